"""Which hubs there are, where they are, and what a repository and a branch may be called there."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from tunesmith.checkpoint import is_hub_id
from tunesmith.errors import DataError, OutputError
from tunesmith.export.push.records import Place

_ENDPOINTS: Mapping[Place, tuple[str, str]] = {
    "huggingface": ("HF_ENDPOINT", "https://huggingface.co"),
    "modelscope": ("MODELSCOPE_ENDPOINT", "https://modelscope.cn"),
}
_MIRRORS = ("hf-mirror.com",)
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_REVISION = re.compile(r"(?!-)(?!.*\.\.)[\w./-]{1,200}")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def address_of(to: str, endpoint: str | None) -> tuple[Place, str]:
    """Which hub, and where it is.

    Args:
        to: the hub's name.
        endpoint: its address; None for that of the environment, or its own.

    Raises:
        DataError: there is no such hub.
        OutputError: no address to send to.
    """
    places: dict[str, Place] = {place: place for place in _ENDPOINTS}
    if to not in places:
        raise DataError("There is no such hub.", expected=", ".join(places), found=to)
    variable, home = _ENDPOINTS[places[to]]
    address = (endpoint or os.environ.get(variable) or home).rstrip("/")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise OutputError("The endpoint is no address of a hub.", expected=f"an address such as {home}", found=address)
    if parts.username or parts.password:
        raise OutputError(
            "The endpoint holds a name or a password, which would be shown in messages.",
            next_step="leave it out, and log in: hf auth login",
        )
    if parts.hostname in _MIRRORS:
        raise OutputError(
            "This endpoint is a mirror of the hub, for reading only.",
            where=address,
            next_step=f"pass --endpoint {home}",
        )
    return places[to], address


def check_names(repo_id: str, revision: str | None, base_model: str | None) -> None:
    """Refuse names that no hub has.

    Raises:
        DataError: one of them cannot be.
    """
    if not _REPO_ID.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id or repo_id.endswith((".git", ".")):
        raise DataError("A repository cannot have this name.", expected="OWNER/NAME", found=repo_id)
    if revision is not None and not _REVISION.fullmatch(revision):
        raise DataError("A branch cannot have this name.", found=revision)
    if base_model is not None and (not is_hub_id(base_model) or "@" in base_model):
        raise DataError("The base is named by its hub id.", expected="OWNER/NAME", found=base_model)


def is_plain(address: str) -> bool:
    """Whether what is sent to an address can be read on its way."""
    parts = urlsplit(address)
    return parts.scheme == "http" and parts.hostname not in _LOOPBACK

"""Where a base model is: a directory, the hub's cache, or the embedded model; and where our own cache is."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tunesmith.checkpoint.embedded import EMBEDDED_NAME, embedded_model
from tunesmith.errors import BaseModelError
from tunesmith.progress import ProgressCallback, no_progress

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*"]


def cache_dir() -> Path:
    """The user's own cache: ``TUNESMITH_HOME``, else the platform's cache folder."""
    import platformdirs

    home = os.environ.get("TUNESMITH_HOME")
    return Path(home).expanduser() if home else Path(platformdirs.user_cache_dir("tunesmith", appauthor=False))


def locate_base(
    name_or_path: str,
    *,
    relative_to: Path | None = None,
    fetch: bool = True,
    progress: ProgressCallback = no_progress,
) -> Path:
    """Find a base model's directory.

    Args:
        name_or_path: ``demo`` for the embedded model, a directory, or a hub id with or without ``@revision``.
        relative_to: a further folder that a relative directory may be relative to.
        fetch: whether a model that is not at hand may be made or downloaded.
        progress: told of the embedded model's preparation.

    Returns:
        The directory.

    Raises:
        BaseModelError: there is no such model, here or in the hub's cache, and it cannot be fetched.
    """
    if name_or_path == EMBEDDED_NAME:
        return embedded_model(cache_dir(), make=fetch, progress=progress)
    folder = _folder(name_or_path, relative_to)
    if folder is not None:
        return folder
    if _HUB_ID.fullmatch(name_or_path):
        return _from_hub(name_or_path, fetch=fetch)
    raise BaseModelError(
        "The base model is not there.",
        where=name_or_path,
        expected=f"a directory, a hub id such as org/name, or {EMBEDDED_NAME!r}",
        next_step="pass --base with the directory of the model that was tuned",
    )


def _folder(name_or_path: str, relative_to: Path | None) -> Path | None:
    if not name_or_path:
        return None
    try:
        for folder in (Path(name_or_path).expanduser(), *([relative_to / name_or_path] if relative_to else [])):
            if folder.is_dir():
                return folder
            if folder.exists():
                raise BaseModelError("The base model is a file.", where=folder, expected="a directory, or a hub id")
    except (OSError, RuntimeError):  # too long a name, or an unknown user's home: no folder
        pass
    return None


def _from_hub(name: str, *, fetch: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo, _, revision = name.partition("@")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    try:
        try:
            return Path(snapshot_download(repo, revision=revision or None, local_files_only=True))
        except LocalEntryNotFoundError:
            if offline or not fetch:
                raise
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client raises its HTTP library's errors too
        raise BaseModelError(
            "The base model is neither a directory here nor in the hub's cache, and could not be fetched.",
            where=name,
            found=(str(error).strip() or type(error).__name__).splitlines()[0],
            next_step=f"hf download {repo}, or pass --base with its directory",
        ) from error

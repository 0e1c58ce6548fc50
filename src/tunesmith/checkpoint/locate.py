"""Where a base model is: a directory, the hub's cache, or the embedded model; and where our own cache is."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from tunesmith.checkpoint.directory import CONFIG_FILE, read_json_object
from tunesmith.checkpoint.embedded import EMBEDDED_NAME, embedded_model
from tunesmith.checkpoint.hub import hub_model
from tunesmith.checkpoint.storage import storage_path, stored_path
from tunesmith.errors import BaseModelError, CheckpointError
from tunesmith.progress import ProgressCallback, no_progress

# A revision is a branch, a tag or a commit; the client makes a path of it, so that no part of it may be "..".
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@(?!.*\.\.)\w[\w./+-]*)?", re.ASCII)

# Unsloth's repositories: a model quantized by bitsandbytes, and its variant with some layers left as they were.
_BNB_NAME = re.compile(r"([\w.-]+/[\w.-]+?)(?:-unsloth)?-bnb-4bit", re.ASCII)
_MOST_RELATIVES = 8

NOT_LOADED = "What lies in a storage can be merged and verified, and nothing else."
NOT_LOADED_NEXT = "merge it into a directory, or copy it to a disk first"
_LOOKED_AT = 256  # of the entries of one folder
_FORM = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size")


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
    stored: bool = False,
    progress: ProgressCallback = no_progress,
) -> Path:
    """Find a base model's directory.

    Args:
        name_or_path: ``demo`` for the embedded model, a directory, an address such as ``s3://bucket/model``, or a hub
            id: ``org/name``, or ``org/name@revision`` with a branch, a tag or a commit.
        relative_to: a further folder that a relative directory may be relative to.
        fetch: whether a model that is not at hand may be made or downloaded.
        stored: whether it may lie in a storage, of which only headers and rows are ever read.
        progress: told of the embedded model's preparation, and of what is fetched.

    Returns:
        The directory.

    Raises:
        BaseModelError: there is no such model, here or in the hub's cache, and it cannot be fetched.
    """
    if name_or_path == EMBEDDED_NAME:
        return embedded_model(cache_dir(), make=fetch, progress=progress)
    try:
        address = stored_path(name_or_path)
    except CheckpointError as error:  # as another tool's registry: models:/name/1
        raise BaseModelError(
            error.what, where=error.where, expected=error.expected, next_step=error.next_step
        ) from error
    if address is not None:
        if not stored:
            raise BaseModelError(NOT_LOADED, where=address, next_step=NOT_LOADED_NEXT)
        return address  # what is not there is said where it is opened
    beside = relative_to if relative_to is not None and stored_path(relative_to) is None else None
    folder = _folder(name_or_path, beside)
    if folder is not None:
        return folder
    if _HUB_ID.fullmatch(name_or_path):
        return hub_model(name_or_path, fetch=fetch, progress=progress)
    raise BaseModelError(
        "The base model is not there.",
        where=name_or_path,
        expected=f"a directory, a hub id such as org/name, or {EMBEDDED_NAME!r}",
        next_step="give the directory of the model that was tuned: by --base, in a recipe by model_name_or_path",
    )


def is_hub_id(name: str) -> bool:
    """Whether a name could be one of the hub's: ``org/name``, or ``org/name@revision``."""
    return _HUB_ID.fullmatch(name) is not None


def full_precision_sibling(name: str) -> str | None:
    """The model that a 4-bit repository was quantized from, by its name: ``org/X-bnb-4bit`` is of ``org/X``.

    Args:
        name: a base model's name, as an adapter gives it.

    Returns:
        The sibling's name; None where the name is not of that custom.
    """
    match = _BNB_NAME.fullmatch(name)
    return match[1] if match else None


def _folder(name_or_path: str, relative_to: Path | None) -> Path | None:
    if not name_or_path:
        return None
    try:
        for folder in (storage_path(name_or_path).expanduser(), *([relative_to / name_or_path] if relative_to else [])):
            if folder.is_dir():
                return folder
            if folder.exists():
                raise BaseModelError("The base model is a file.", where=folder, expected="a directory, or a hub id")
    except (OSError, RuntimeError):  # too long a name, or an unknown user's home: no folder
        pass
    return None


def relatives_of(base_dir: Path) -> dict[str, Path]:
    """Models at hand that a base could have been mistaken for: those beside it that have its form.

    In the hub's cache these are the other revisions of its repository, and the other repositories (a model and its
    -Instruct); elsewhere, the directories beside it.

    Args:
        base_dir: the base model's directory.

    Returns:
        Their directories by name; a few at most.
    """
    if stored_path(base_dir) is not None:
        return {}
    base_dir = base_dir.resolve()
    form, found = _form(base_dir), {}
    for name, folder in _beside(base_dir):
        if folder != base_dir and form is not None and _form(folder) == form:
            found[name] = folder
            if len(found) == _MOST_RELATIVES:
                break
    return found


def _beside(base_dir: Path) -> Iterator[tuple[str, Path]]:
    if base_dir.parent.name == "snapshots":
        own = base_dir.parents[1]
        for repository in [own, *(folder for folder in _entries(own.parent) if folder != own)]:
            name = "/".join(repository.name.split("--")[1:])
            yield from ((f"{name}@{snapshot.name[:12]}", snapshot) for snapshot in _entries(repository / "snapshots"))
    else:
        yield from ((folder.name, folder) for folder in _entries(base_dir.parent))


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())[:_LOOKED_AT]
    except OSError:
        return []


def _form(folder: Path) -> list[object] | None:
    """What tells the shapes of a model's tensors; None where there is no model."""
    try:
        config = read_json_object(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else None
    except (CheckpointError, OSError):
        return None
    return [config.get(key) for key in _FORM] if config else None

"""Where a base model is: a directory, the hub's cache, or the embedded model; and where our own cache is."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tunesmith.checkpoint.embedded import EMBEDDED_NAME, embedded_model
from tunesmith.checkpoint.hub import hub_model
from tunesmith.errors import BaseModelError
from tunesmith.progress import ProgressCallback, no_progress

# A revision is a branch, a tag or a commit; the client makes a path of it, so that no part of it may be "..".
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@(?!.*\.\.)\w[\w./+-]*)?", re.ASCII)


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
        name_or_path: ``demo`` for the embedded model, a directory, or a hub id: ``org/name``, or ``org/name@revision``
            with a branch, a tag or a commit.
        relative_to: a further folder that a relative directory may be relative to.
        fetch: whether a model that is not at hand may be made or downloaded.
        progress: told of the embedded model's preparation, and of what is fetched.

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
        return hub_model(name_or_path, fetch=fetch, progress=progress)
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

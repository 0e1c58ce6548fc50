"""The one way from a path in a request to a file: links are followed first, and what then lies outside is refused."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tunesmith as ts
from tunesmith.web.answers import NotThereError

EMBEDDED_BASE = "demo"
_LONGEST = 4096
_OWN_VARIANT = re.compile(r"base|final|(?:checkpoint-)?\d{1,9}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?:@[A-Za-z0-9][\w.-]*)?", re.ASCII)
_OTHER_SYSTEMS = re.compile(r"\\|^[A-Za-z]:")
_MOST_LISTED = 2000
_SKIPPED = frozenset({"__pycache__", "node_modules", "site-packages"})
_RUN_FILES = ("adapter_config.json", "tunesmith_run.json", "trainer_log.jsonl")
_CHECKPOINT = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True)
class Folder:
    """A folder in a listing.

    Attributes:
        name: its name.
        path: where it is.
        is_run: whether it looks like a training's output.
        modified_s: when it was last changed, in seconds since 1970.
    """

    name: str
    path: Path
    is_run: bool
    modified_s: float


class Places:
    """Paths within one root, and a few besides that were named on the command line.

    Args:
        root: the folder.
        allowed: a run and a base as they were given there; they are allowed as they are, wherever they lie.
    """

    def __init__(self, root: Path, *, allowed: Iterable[str | None] = ()) -> None:
        self.root = root.resolve()
        self._allowed = frozenset(name for name in allowed if name)
        self._outside = tuple(Path(name).resolve() for name in self._allowed if Path(name).exists())

    def resolve(self, path: str, *, must_exist: bool = True) -> Path:
        """The real path of one in a request.

        Args:
            path: relative to the root, or absolute.
            must_exist: whether something must be there.

        Raises:
            TunesmithError: it is no path of this system, or lies outside.
            NotThereError: nothing is there.
        """
        self._refuse_malformed(path)
        try:
            real = (self.root / path).resolve()
            there = real.exists()
        except (OSError, ValueError, RuntimeError) as error:
            raise ts.TunesmithError("This is no path.", where=_shown(path), found=_reason(error)) from error
        address = "://" in path  # of which a folder within would be made
        if address or not self._is_within(real):
            raise ts.TunesmithError(
                "This path lies outside the folder that the page may use.",
                where=_shown(path),
                expected=f"a path within {self.root}",
                next_step="merge into a storage, and verify there, on the command line"
                if address
                else "start tunesmith web with --root and a folder that holds it",
            )
        if must_exist and not there:
            raise NotThereError("There is nothing at this path.", where=_shown(path), expected=f"within {self.root}")
        return real

    def run(self, path: str) -> str:
        """A run's place: a path, or the very run that was named on the command line, which may be a hub's.

        Raises:
            TunesmithError: as :meth:`resolve`.
        """
        return path if self._names_allowed(path) else str(self.resolve(path))

    def base(self, name: str | None, *, run: str | None = None) -> str | None:
        """A base model as the library takes it: a directory within, a hub id, the embedded model, or None for none.

        Args:
            name: as it was asked for.
            run: its run's place, beside which the library looks too.

        Raises:
            TunesmithError: as :meth:`resolve`.
        """
        if name is None or name == EMBEDDED_BASE or self._names_allowed(name):
            return name
        # A name of the hub may also be a folder, here or beside the run, which the library looks at first.
        if _HUB_ID.fullmatch(name) and not (self.root / name).exists():
            beside = None if run is None else Path(run).parent / name
            if beside is not None and beside.exists():
                return str(self.resolve(str(beside)))
            if not Path(name).exists():
                return name
        return str(self.resolve(name))

    def variant(self, name: str) -> str:
        """A variant as the library takes it: one of the run's own by name, else a directory within; ``NAME=DIR`` too.

        Raises:
            TunesmithError: as :meth:`resolve`.
        """
        label, equals, rest = name.partition("=")
        if equals and label.strip() and rest.strip():
            return f"{label.strip()}={self.run(rest.strip())}"
        return name if _OWN_VARIANT.fullmatch(name) else self.run(name)

    def shown(self, path: str | os.PathLike[str]) -> str:
        """A path as a person would type it: relative to the root where it lies within."""
        try:
            return Path(path).relative_to(self.root).as_posix()
        except ValueError:
            return str(path)

    def folders(self, path: str) -> tuple[Path, list[Folder], bool]:
        """The folders in a folder, by name, without hidden ones; links are left out.

        Returns:
            The folder, those in it, and whether there were more than are listed.

        Raises:
            TunesmithError: as :meth:`resolve`, or it is no folder, or cannot be read.
        """
        folder = self.resolve(path)
        if not folder.is_dir():
            raise ts.TunesmithError("This is a file, not a folder.", where=_shown(path))
        try:
            found = sorted(_subfolders(folder), key=lambda entry: entry.name.lower())
        except OSError as error:
            raise ts.TunesmithError("This folder cannot be read.", where=_shown(path), found=_reason(error)) from error
        listed = [
            Folder(entry.name, Path(entry.path), looks_like_a_run(Path(entry.path)), _modified(entry.path))
            for entry in found[:_MOST_LISTED]
        ]
        return folder, listed, len(found) > _MOST_LISTED

    def find_runs(self, *, depth: int = 4, most: int = 200, seconds: float = 2.0) -> tuple[list[Path], bool]:
        """Runs below the root, breadth first, within bounds.

        Returns:
            Their directories, and whether the search ended before it had been everywhere.
        """
        until = time.monotonic() + seconds
        runs: list[Path] = []
        level = [self.root]
        for _ in range(depth + 1):
            below: list[Path] = []
            for folder in level:
                if len(runs) >= most or time.monotonic() > until:
                    return runs, True
                if looks_like_a_run(folder):
                    runs.append(folder)
                    continue
                below += _readable_subfolders(folder)
            level = below
        return runs, bool(level)

    def _names_allowed(self, name: str) -> bool:
        return name in self._allowed

    def _is_within(self, real: Path) -> bool:
        return any(real.is_relative_to(place) for place in (self.root, *self._outside))

    def _refuse_malformed(self, path: str) -> None:
        problem = None
        if not path or path != path.strip():
            problem = "a path without spaces at its ends"
        elif len(path) > _LONGEST:
            problem = f"at most {_LONGEST} characters"
        elif any(ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in path):
            problem = "no control characters"
        elif os.sep == "/" and _OTHER_SYSTEMS.search(path):
            problem = "forward slashes, and no drive letter"
        elif path.startswith("~"):
            problem = f"a path within {self.root}, without ~"
        if problem is not None:
            raise ts.TunesmithError("This is no path that the page takes.", where=_shown(path), expected=problem)


def looks_like_a_run(folder: Path) -> bool:
    """Whether a folder holds what a training leaves behind; a glance at names, no more."""
    try:
        if any((folder / name).is_file() for name in _RUN_FILES):
            return True
        return any(
            _CHECKPOINT.fullmatch(entry.name) and (Path(entry.path) / "adapter_config.json").is_file()
            for entry in _subfolders(folder)
        )
    except OSError:
        return False


def _subfolders(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            hidden = entry.name.startswith(".") or entry.name in _SKIPPED
            if not hidden and entry.is_dir(follow_symlinks=False):
                yield entry


def _readable_subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(Path(entry.path) for entry in _subfolders(folder))
    except OSError:
        return []


def _modified(path: str) -> float:
    try:
        return Path(path).stat().st_mtime
    except OSError:
        return 0.0


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__


def _shown(path: str) -> str:
    return path if len(path) <= 200 else f"{path[:200]}…"

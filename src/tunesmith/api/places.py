"""What several verbs need: where a run's base and its held-out rows are, and where an answer may be written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tunesmith.adapter import Adapter
from tunesmith.checkpoint import local_target, locate_base, storage_path, write_error
from tunesmith.compare import built_in_set
from tunesmith.conversations import Conversation, read_conversations
from tunesmith.errors import BaseModelError, OutputError
from tunesmith.progress import ProgressCallback, no_progress
from tunesmith.runs import Run, RunCheckpoint

StrPath = str | os.PathLike[str]
Prompts = StrPath | Sequence[Conversation]


def base_of(
    run: Run,
    checkpoint: RunCheckpoint,
    base: str | None,
    *,
    fetch: bool = True,
    stored: bool = False,
    progress: ProgressCallback = no_progress,
) -> tuple[str, Path]:
    """The base of a run: its name as asked for or as the adapter names it, and its directory.

    Raises:
        BaseModelError: none is named, or it cannot be found.
    """
    name = base or Adapter(checkpoint.path).base_model
    if name is None:
        raise BaseModelError(
            "The adapter names no base model.",
            where=checkpoint.path,
            next_step="pass --base with the model that was tuned",
        )
    return name, locate_base(
        name, relative_to=storage_path(run.path).parent, fetch=fetch, stored=stored, progress=progress
    )


def rows_of(prompts: Prompts) -> list[Conversation]:
    """Conversations as they are given, of a file, or of a built-in set."""
    if not isinstance(prompts, str | os.PathLike):
        return list(prompts)
    built_in = built_in_set(os.fspath(prompts)) if not Path(prompts).exists() else None
    return list(built_in) if built_in is not None else read_conversations(prompts)


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """Name the file to write beside ``target``; a failed write leaves none of it and is the user's to mend."""
    beside = target.with_name(f".{target.name}.partial")
    try:
        yield beside
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(error, target) from error
        raise


def output_file(out: StrPath, *, suffixes: Sequence[str] = ()) -> Path:
    """Check, before any work is done for it, that a file can be written.

    Args:
        out: the file.
        suffixes: what its name may end in; empty for anything.

    Raises:
        OutputError: an address of a storage, a wrong suffix, a directory, or a parent that is not there or cannot be
            written.
    """
    target = local_target(out)
    if suffixes and target.suffix not in suffixes:
        raise OutputError("The file's name does not say a known format.", where=target, expected=", ".join(suffixes))
    if target.is_dir():
        raise OutputError("The file is a directory.", where=target)
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise OutputError("The file's directory is not there or cannot be written.", where=target.parent)
    return target

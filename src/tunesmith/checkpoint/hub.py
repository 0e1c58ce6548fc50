"""A model of the Hugging Face hub, whole or a part: found in the client's cache, or fetched into it, at one commit."""

from __future__ import annotations

import errno
import inspect
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.checkpoint.directory import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, read_json_object
from tunesmith.checkpoint.publish import check_free_space
from tunesmith.errors import BaseModelError, Cancelled, OutputError, TunesmithError
from tunesmith.progress import Progress, ProgressCallback

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

# What a merge and its tokenizer need beside the weights.  No code, no other framework's weights, no subfolders.
_SMALL_FILES = (
    "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*", "additional_chat_templates/*.jinja",
)  # fmt: skip
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_WORKERS = 4


@dataclass(frozen=True)
class Sought:
    """What of a repository is asked for.

    Attributes:
        noun: what it is called in messages.
        entry: the file without which it is nothing; that it is in the cache says where the rest is.
        weights: the further files that it needs; None for a model's, as its index names them.
        small: patterns of the files that are taken along.
        elsewhere: how something else is named instead, such as ``pass --base with``.
        error: what is raised where it cannot be had.
    """

    noun: str
    entry: str
    weights: tuple[str, ...] | None
    small: tuple[str, ...]
    elsewhere: str
    error: type[TunesmithError]


_BASE_MODEL = Sought(
    noun="base model",
    entry=CONFIG_FILE,
    weights=None,
    small=_SMALL_FILES,
    elsewhere="pass --base with",
    error=BaseModelError,
)


@dataclass(frozen=True)
class _Wanted:
    """What was asked for, and as what: ``org/name``, with or without ``@revision``."""

    name: str
    repo: str
    revision: str | None
    sought: Sought

    @property
    def command(self) -> str:
        """What to type to fetch it."""
        words = ["hf", "download", self.repo, *(["--revision", self.revision] if self.revision else [])]
        return shlex.join(words)


def hub_model(name: str, *, fetch: bool, progress: ProgressCallback) -> Path:
    """Find a hub model's directory in the client's cache; fetch what is missing of it: :func:`hub_snapshot`."""
    return hub_snapshot(name, _BASE_MODEL, fetch=fetch, progress=progress)


def hub_snapshot(name: str, sought: Sought, *, fetch: bool, progress: ProgressCallback) -> Path:
    """Find the directory of what a hub repository holds in the client's cache; fetch what is missing of it.

    What is whole in the cache is taken as it is there, without asking the hub.  What is fetched
    is one commit's, whatever happens to the branch meanwhile; the branch's name leads to it only when all is there.

    Args:
        name: ``org/name`` or ``org/name@revision``; a branch, a tag or a commit.
        sought: what of it.
        fetch: whether to download what is not in the cache.
        progress: told of the bytes that arrive.

    Returns:
        The snapshot's directory.

    Raises:
        TunesmithError: ``sought.error``: it is not in the cache and cannot be fetched; says why and what to do.
        Cancelled: ``progress`` raised it.
    """
    from huggingface_hub import constants

    repo, _, revision = name.partition("@")
    wanted = _Wanted(name, repo, revision or None, sought)
    with _explained(wanted):
        snapshot = _cached(wanted)
        missing = _missing(snapshot, sought) if snapshot else []
        if snapshot and not missing:
            return snapshot
        if fetch and not constants.HF_HUB_OFFLINE:
            return _fetched(wanted, progress)
    reason, way = "this command only looks, and fetches nothing", wanted.command
    if constants.HF_HUB_OFFLINE:
        reason, way = "HF_HUB_OFFLINE is set", f"without HF_HUB_OFFLINE: {wanted.command}"
    if snapshot:
        raise sought.error(
            f"The hub's cache holds the {sought.noun} in part.",
            where=snapshot,
            found=f"nothing was fetched: {reason}",
            details=[f"missing: {file}" for file in missing[:10]],
            next_step=way,
        )
    raise sought.error(
        f"The {sought.noun} is neither a directory here nor in the hub's cache.",
        where=name,
        found=f"nothing was fetched: {reason}",
        next_step=f"{way}, or {sought.elsewhere} its directory",
    )


def _missing(snapshot: Path, sought: Sought) -> list[str]:
    if sought.weights is None:
        return missing_files(snapshot)
    return [file for file in (sought.entry, *sought.weights) if not (snapshot / file).exists()]


def missing_files(snapshot: Path) -> list[str]:
    """What a directory lacks to be a model with safetensors weights: its config, or weights, by file name."""
    needed = [CONFIG_FILE]
    if (snapshot / SINGLE_FILE).exists() or not (snapshot / INDEX_FILE).exists():
        needed.append(SINGLE_FILE)
    else:
        needed += _shards(snapshot / INDEX_FILE)
    return [file for file in needed if not (snapshot / file).exists()]


def _shards(index: Path) -> list[str]:
    """The file names in an index; what is not one is left to those who read the model."""
    weight_map = read_json_object(index).get("weight_map")
    values = weight_map.values() if isinstance(weight_map, dict) else ()
    return [
        name
        for name in dict.fromkeys(value for value in values if isinstance(value, str))
        if name.isprintable() and len(name) < 256 and Path(name).name == name
    ]


def _cached(wanted: _Wanted) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(wanted.repo, wanted.sought.entry, revision=wanted.revision)
    return Path(config).parent if isinstance(config, str) else None


def _fetched(wanted: _Wanted, progress: ProgressCallback) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    sought = wanted.sought
    info = HfApi().model_info(wanted.repo, revision=wanted.revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    weights = _weights(wanted, sizes, str(info.sha))
    if absent := sorted({sought.entry, *weights} - sizes.keys()):
        raise sought.error(
            "The model on the hub is not whole: it has no such files.", where=wanted.name, details=absent[:10]
        )
    small = [file for file in sizes if any(_fits(file, pattern) for pattern in sought.small)]
    files = [file for file in dict.fromkeys([*small, *weights]) if file != sought.entry]
    _check_space(wanted, info, files)
    _Download(wanted, sizes, progress).run(files, str(info.sha))
    # The config by the branch's name, and last: the client notes then which commit the name meant.
    config = Path(hf_hub_download(wanted.repo, sought.entry, revision=wanted.revision))
    if config.parent.name != info.sha:
        raise sought.error(
            "The model on the hub changed while it was fetched.",
            where=wanted.name,
            expected=f"commit {info.sha}",
            found=f"commit {config.parent.name}",
            next_step="run the command again, or name a commit: org/name@commit",
        )
    return config.parent


def _weights(wanted: _Wanted, sizes: Mapping[str, int], commit: str) -> list[str]:
    from huggingface_hub import hf_hub_download

    if wanted.sought.weights is not None:
        needed = list(wanted.sought.weights)
        if set(needed) <= sizes.keys():
            return needed
    elif SINGLE_FILE in sizes:
        return [SINGLE_FILE]
    elif INDEX_FILE in sizes:
        return _shards(Path(hf_hub_download(wanted.repo, INDEX_FILE, revision=commit)))
    raise _no_safetensors(wanted, sizes)


def _fits(file: str, pattern: str) -> bool:
    return file.count("/") == pattern.count("/") and fnmatchcase(file, pattern)


def _no_safetensors(wanted: _Wanted, files: Mapping[str, int]) -> TunesmithError:
    sought = wanted.sought
    expected = f"{SINGLE_FILE} or {INDEX_FILE}" if sought.weights is None else ", ".join(sought.weights)
    pickles = sorted(file for file in files if any(_fits(file, pattern) for pattern in _PICKLES))
    if pickles:
        return sought.error(
            "The model on the hub has its weights as pickles only, which can run code when they are read; "
            "Tunesmith never reads one.",
            where=wanted.name,
            expected=expected,
            found=", ".join(pickles[:5]),
            next_step="ask for a safetensors version at https://huggingface.co/spaces/safetensors/convert, "
            f"and name it as {wanted.repo}@refs/pr/N",
        )
    instead = "the full-precision model, not of a GGUF or adapter made from it" if sought.weights is None else "a LoRA"
    return sought.error(
        "The model on the hub has no safetensors weights.",
        where=wanted.name,
        expected=expected,
        found=", ".join(sorted(files)[:10]) or "no files",
        next_step=f"name the repository of {instead}",
    )


def _check_space(wanted: _Wanted, info: ModelInfo, files: list[str]) -> None:
    """Refuse before the first byte what the disk cannot hold; what another commit left in the cache counts as there."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    blobs = cache / f"models--{wanted.repo.replace('/', '--')}" / "blobs"
    needed = 0
    for file in info.siblings or []:
        digest = file.lfs.sha256 if file.lfs else file.blob_id
        if file.rfilename in files and not (digest and (blobs / digest).exists()):
            needed += file.size or 0
    try:
        check_free_space(cache, needed)
    except OutputError as error:
        raise wanted.sought.error(
            f"There is not enough disk space to fetch the {wanted.sought.noun}.",
            where=error.where,
            expected=error.expected,
            found=error.found,
            next_step=_OTHER_DISK,
        ) from error


class _Download:
    """Files of one commit on their way into the cache, a few at a time, with one count of bytes over them all."""

    def __init__(self, wanted: _Wanted, sizes: Mapping[str, int], progress: ProgressCallback) -> None:
        self._wanted, self._sizes, self._progress = wanted, sizes, progress
        self._lock = threading.Lock()
        self._done: dict[str, int] = {}
        self._total = 0
        self._stopped = False

    def run(self, files: list[str], commit: str) -> None:
        """Fetch all of them; on an error, or when the progress callback raises, those under way are stopped."""
        self._total = sum(self._sizes[file] for file in files)
        with ThreadPoolExecutor(_WORKERS) as pool:
            try:
                for future in as_completed([pool.submit(self._one, file, commit) for file in files]):
                    future.result()
            except BaseException:
                self._stopped = True
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _one(self, file: str, commit: str) -> None:
        from huggingface_hub import hf_hub_download

        self._tell(file, 0)
        options: dict[str, Any] = {}
        if "tqdm_class" in inspect.signature(hf_hub_download).parameters:  # huggingface_hub 1.0 tells of whole files
            options["tqdm_class"] = _bar(partial(self._tell, file))
        hf_hub_download(self._wanted.repo, file, revision=commit, **options)
        self._tell(file, self._sizes[file])

    def _tell(self, file: str, done: int) -> None:
        with self._lock:
            if self._stopped:
                raise Cancelled
            self._done[file] = min(max(done, self._done.get(file, 0)), self._sizes[file])
            self._progress(
                Progress(f"fetch {self._wanted.sought.noun}", sum(self._done.values()), self._total, "bytes", file)
            )


def _bar(tell: Callable[[int], None]) -> type[Any]:
    """A progress bar class that shows nothing, and tells how many bytes of the file are there."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]
            self.there = int(options.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            self.there += int(n or 0)
            tell(self.there)

    return Bar


_OTHER_DISK = "free some space, or set HF_HUB_CACHE to a folder on another disk"


@contextmanager
def _explained(wanted: _Wanted) -> Iterator[None]:
    """Say what an error of the hub's client means, and what to do."""
    try:
        yield
    except (TunesmithError, Cancelled):
        raise
    except Exception as error:  # the client raises its HTTP library's errors too
        what, next_step = _meaning(error, wanted)
        # The client wraps what happened in advice of its own.
        cause = error.__cause__ if type(error).__name__ == "LocalEntryNotFoundError" and error.__cause__ else error
        found = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise wanted.sought.error(what, where=wanted.name, found=found, next_step=next_step) from error


def _meaning(error: Exception, wanted: _Wanted) -> tuple[str, str]:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return (
            "The model is gated: its owner gives access to those who accept its terms.",
            f"accept them at https://huggingface.co/{wanted.repo}, then: hf auth login",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "The model has no such revision.", f"name a branch, a tag or a commit: {wanted.repo}@main"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "The hub has no such model, or it is private.",
            "check the spelling; for a private model: hf auth login",
        )
    if isinstance(error, errors.HFValidationError):
        return "The hub cannot have a model of this name.", f"{wanted.sought.elsewhere} org/name or a directory"
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk became full while the {wanted.sought.noun} was fetched.", _OTHER_DISK
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "The hub's cache cannot be written.", "set HF_HUB_CACHE to a folder that is yours"
    return (
        f"The {wanted.sought.noun} is neither a directory here nor in the hub's cache, and could not be fetched.",
        f"check the connection, then: {wanted.command}; or {wanted.sought.elsewhere} its directory",
    )

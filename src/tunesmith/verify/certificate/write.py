"""A certificate beside the weights: of what they were made, how, and what was proved of them.

It is an in-toto Statement, so that the signers of others can sign it as it is;
:mod:`tunesmith.verify.certificate.statement` says what it holds.  Its subjects are the files of the directory.  It
names no time, no absolute path, no user and no machine: the same files, proved again by the same tools on the same
machine, give the same bytes.

A certificate that nobody has signed says what was verified to those who trust where they have it from.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tunesmith.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tunesmith.checkpoint import Checkpoint, hash_files, stored_path
from tunesmith.errors import CheckpointError
from tunesmith.progress import Cancellation
from tunesmith.record import Finding, Value
from tunesmith.verify.certificate.statement import (
    CERTIFICATE_FILE,
    Certificate,
    CertifiedAdapter,
    CertifiedBase,
    CertifiedBehaviour,
    CertifiedCodes,
    CertifiedCounts,
    CertifiedLevel,
    CertifiedMerge,
    CertifiedQuantization,
    CertifiedVerdict,
    HashedFile,
    Predicate,
    hashed_file,
    read_certificate,
)
from tunesmith.verify.records import Answer, BehaviourRow, Level, TensorVerdict

_TOOLS = ("tunesmith", "compressed-tensors", "numpy", "peft", "safetensors", "tokenizers", "torch", "transformers")

# What some loader of some framework reads: weights, settings, templates, tokenizers, code.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
_SMALL = (".json", ".jinja", ".model", ".spm", ".tiktoken", ".vocab", ".bpe", ".txt", ".py")
_PROSE = ("readme", "license", "licence", "notice", "changelog", "use_policy", "copying")
_SIGNATURES = ".sigstore.json"

_PATH = re.compile(r"(?<![\w./\\:])(?:~|[A-Za-z]:)?(?:[/\\][^/\\\s'\",;:()<>]+)+[/\\]?")
_SNAPSHOT = re.compile(r"(?:^|.*[/\\])models--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]?")


@dataclass(frozen=True)
class Origin:
    """What a merged model was made of, on this machine.

    Attributes:
        base_model: the base as it was asked for.
        base_dir: its directory.
        adapters: run name, checkpoint, directory and weight of every adapter.
        view: how the base was seen; None for as it is stored.
        is_residual: whether the base is what an initialisation such as PiSSA's left of a model.
    """

    base_model: str
    base_dir: Path
    adapters: tuple[tuple[str, str, Path, float], ...]
    view: str | None = None
    is_residual: bool = False


def write_certificate(
    directory: Path,
    origin: Origin,
    *,
    merge: CertifiedMerge | None = None,
    quantization: CertifiedQuantization | None = None,
    verdict: CertifiedVerdict | None = None,
    hashes: Mapping[Path, str] | None = None,
    executor: Executor | None = None,
    cancellation: Cancellation | None = None,
) -> Finding:
    """Write the certificate of a merged model, whole or not at all; a certificate that is there is replaced.

    Where ``merge`` and ``quantization`` are None and the certificate that is replaced is of the same weights, made of
    the same weights, both are taken from there.

    Args:
        directory: the merged model.
        origin: what it was made of.
        merge: how Tunesmith merged, where it did and that is known.
        quantization: how Tunesmith quantized, likewise.
        verdict: what was proved; None for nothing yet.
        hashes: hashes that are known already, by path as ``directory`` and ``origin`` begin it; the rest are worked
            out now.
        executor: a cluster's, which is to work them out; any other has no part in it.
        cancellation: read while files are hashed.

    Returns:
        That it was written, or a warning that says why it was not: no fault of the model's.

    Raises:
        Cancelled: stopped on request; what was there is as it was.
    """
    if any(stored_path(place) for place in (directory, origin.base_dir, *(one[2] for one in origin.adapters))):
        return not_written("What lies in a storage is not read again to be hashed.")
    target = directory / CERTIFICATE_FILE
    try:
        certificate = _certificate(
            directory,
            origin,
            merge=merge,
            quantization=quantization,
            verdict=verdict,
            known=hashes or {},
            executor=executor,
            cancellation=cancellation or Cancellation(),
        )
        _write(target, certificate.to_json())
    except (CheckpointError, OSError, ValueError, BrokenExecutor) as error:
        reason = error.what if isinstance(error, CheckpointError) else getattr(error, "strerror", None) or str(error)
        if isinstance(error, CheckpointError) and error.where is not None:
            reason = f"{Path(error.where).name}: {reason}"
        return not_written(reason)
    return Finding(
        code="certificate_written",
        severity="ok",
        params={"file": CERTIFICATE_FILE, "files": len(certificate.subject), "proved": verdict is not None},
    )


def not_written(reason: str) -> Finding:
    """The warning that no certificate was written, and why."""
    params = {"file": CERTIFICATE_FILE, "reason": without_paths(reason)}
    return Finding(code="certificate_not_written", severity="warning", params=params)


def verdict_of(
    answer: Answer,
    levels: Sequence[Level],
    tensors: Sequence[TensorVerdict],
    *,
    codes: CertifiedCodes | None = None,
    behaviour: Sequence[BehaviourRow] = (),
    dtype: str | None = None,
) -> CertifiedVerdict:
    """What a verification found, as a certificate says it.

    Args:
        answer: the verdict.
        levels: every level.
        tensors: every tensor of the weights level that is stored in full.
        codes: what the quantized ones come to.
        behaviour: every prompt of the behaviour level.
        dtype: of that level's arithmetic.
    """
    sums = ("elements", "exact", "faithful", "twice_rounded", "outside", "unchanged")
    counts = {key: sum(getattr(tensor, key) for tensor in tensors) for key in sums}
    return CertifiedVerdict(
        answer=answer,
        levels=tuple(
            CertifiedLevel(name=level.name, status=level.status, findings=tuple(map(_nameless, level.findings)))
            for level in levels
        ),
        counts=CertifiedCounts(tensors=len(tensors), **counts),
        codes=codes,
        behaviour=_behaviour(behaviour, dtype) if behaviour else None,
        tools=tool_versions(),
    )


def tool_versions() -> dict[str, str]:
    """The versions of Python and of the packages whose arithmetic or reading a merge or a proof rests on."""
    found = {"python": platform.python_version()}
    for name in _TOOLS:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def visible_files(directory: Path) -> tuple[dict[str, Path], list[str]]:
    """The files of a directory and of those below it, without hidden ones and without the certificate.

    Args:
        directory: where to look.

    Returns:
        Every file by its POSIX name, sorted; and the names of what cannot be certified: links to folders or to nothing,
        pipes, devices, names that are not plain text.

    Raises:
        OSError: a folder cannot be read.
    """
    files: dict[str, Path] = {}
    others: list[str] = []
    folders = [directory]
    while folders:
        for entry in os.scandir(folders.pop()):
            path = Path(entry.path)
            name = path.relative_to(directory).as_posix()
            if entry.name.startswith(".") or name == CERTIFICATE_FILE:
                continue
            if not _can_be_named(name):
                others.append(name.encode("utf-8", "backslashreplace").decode())
            elif entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif entry.is_file():
                files[name] = path
            else:
                others.append(name)
    return dict(sorted(files.items())), sorted(others)


def certified_files(directory: Path, origin: Origin) -> list[dict[str, Path]]:
    """What a certificate names: the files of the merged model, of its base, and of each adapter, by name, sorted.

    Args:
        directory: the merged model.
        origin: what it was made of.

    Raises:
        CheckpointError: one of the models cannot be opened, or something in the directory cannot be certified.
        OSError: a folder cannot be read.
    """
    subjects, others = visible_files(directory)
    if others:
        raise CheckpointError(
            "A link to a folder or to nothing, a pipe, or a name that is not plain text.", where=others[0]
        )
    # What a loader reads is certified, also where its name is a hidden file's.
    weights = {shard: directory / shard for shard in Checkpoint(directory).shards}
    adapters = [
        {name: folder / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)} for _, _, folder, _ in origin.adapters
    ]
    return [dict(sorted({**subjects, **weights}.items())), _base_files(origin.base_dir), *adapters]


def a_loader_reads(name: str) -> bool:
    """Whether a file of that name may change what a loader makes of the directory; prose and signatures do not."""
    last = PurePosixPath(name).name.lower()
    if last.endswith(_SIGNATURES) or (last.endswith(".txt") and last.startswith(_PROSE)):
        return False
    return last.endswith((*_WEIGHTS, *_SMALL))


def _can_be_named(name: str) -> bool:
    """Whether a name is one of text, the same on every system; what is not UTF-8 comes as lone surrogates."""
    return not re.search(r"[\x00-\x1f\x7f\\\ud800-\udfff]", name)


def without_paths(text: str) -> str:
    """A text in which every absolute path is cut down to its last name."""
    return _PATH.sub(lambda match: re.split(r"[/\\]", match.group().rstrip("/\\"))[-1], text)


def name_and_revision(base_model: str, base_dir: Path) -> tuple[str, str | None]:
    """A base's name and commit: of the hub where its directory lies in the hub's cache, else its last name alone."""
    for place in (base_dir, base_dir.resolve()):
        if match := _SNAPSHOT.fullmatch(str(place)):
            return match[1].replace("--", "/", 1), match[2]
    plain = bool(base_model) and not re.search(r"[/\\~]", base_model) and base_model not in (".", "..")
    return base_model if plain else base_dir.resolve().name, None


def _certificate(
    directory: Path,
    origin: Origin,
    *,
    merge: CertifiedMerge | None,
    quantization: CertifiedQuantization | None,
    verdict: CertifiedVerdict | None,
    known: Mapping[Path, str],
    executor: Executor | None,
    cancellation: Cancellation,
) -> Certificate:
    places = certified_files(directory, origin)
    unknown = {str(path): path for files in places for path in files.values() if path not in known}
    hashed = hash_files(unknown, executor=executor, tick=lambda _: cancellation.check())
    found = {**known, **{Path(key): digest for key, digest in hashed.items()}}
    subject, base_files, *adapter_files = (
        tuple(hashed_file(name, found[path]) for name, path in files.items()) for files in places
    )
    name, revision = name_and_revision(origin.base_model, origin.base_dir)
    base = CertifiedBase(
        name=name, revision=revision, view=origin.view, is_residual=origin.is_residual, files=base_files
    )
    adapters = tuple(
        CertifiedAdapter(run=run, checkpoint=checkpoint, weight=weight, files=files)
        for (run, checkpoint, _, weight), files in zip(origin.adapters, adapter_files, strict=True)
    )
    predicate = Predicate(base=base, adapters=adapters, merge=merge, quantization=quantization, verdict=verdict)
    certificate = Certificate(subject=subject, predicate=predicate)
    if merge is None and quantization is None and (before := _made_before(directory, certificate)) is not None:
        predicate = predicate.model_copy(update={"merge": before.merge, "quantization": before.quantization})
    return certificate.model_copy(update={"predicate": predicate})


def _base_files(base: Path) -> dict[str, Path]:
    """What a loader reads of a base: the weights that its index names, and the other files of the directory itself."""
    weights = dict.fromkeys(Checkpoint(base).shards)
    small = {
        path.name: None
        for path in base.iterdir()
        if not path.name.startswith(".")
        and path.name != CERTIFICATE_FILE
        and path.suffix.lower() in _SMALL
        and a_loader_reads(path.name)
        and path.is_file()
    }
    return {name: base / name for name in sorted({**weights, **small})}


def _made_before(directory: Path, new: Certificate) -> Predicate | None:
    """How the same weights were made of the same files, where the certificate that is replaced says so."""
    try:
        old = read_certificate(directory / CERTIFICATE_FILE)
    except CheckpointError:
        return None
    mine, before = (
        (
            _weights(one.subject),
            (_weights(one.predicate.base.files), one.predicate.base.view, one.predicate.base.is_residual),
            [(adapter.files, adapter.weight) for adapter in one.predicate.adapters],
        )
        for one in (new, old)
    )
    return old.predicate if mine == before else None


def _weights(files: Iterable[HashedFile]) -> list[HashedFile]:
    """The files of weights among those: another copy of a base may lack a small one."""
    return [file for file in files if file.name.endswith(".safetensors")]


def _behaviour(rows: Sequence[BehaviourRow], dtype: str | None) -> CertifiedBehaviour:
    tokens = sum(row.tokens for row in rows)

    def mean(field: str) -> float:
        return float(sum(getattr(row, field) * row.tokens for row in rows) / (tokens or 1))

    return CertifiedBehaviour(
        prompts=len(rows),
        tokens=tokens,
        mean_kl=mean("mean_kl"),
        base_kl=mean("base_kl"),
        max_logit_difference=max(row.max_logit_difference for row in rows),
        top1_agreement=mean("top1_agreement"),
        same_texts=sum(row.same_text for row in rows),
        ties=sum(row.tie for row in rows),
        dtype=dtype,
    )


def _nameless(finding: Finding) -> Finding:
    """A finding without the paths of this machine."""
    params: dict[str, Value] = {
        key: without_paths(value) if isinstance(value, str) else value for key, value in finding.params.items()
    }
    return finding.model_copy(update={"params": params})


def _write(target: Path, document: str) -> None:
    """Write whole or not at all; a file that holds the same already is left as it is."""
    data = document.encode("utf-8")
    with suppress(OSError):
        if target.is_file() and target.read_bytes() == data:
            return
    beside = target.with_name(f".{target.name}.partial")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise

"""Every number of a GGUF file against the exact number of the model that it stands for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tunesmith.checkpoint import Checkpoint, Float64, same_values
from tunesmith.progress import Cancellation, ProgressCallback, SharedProgress
from tunesmith.record import Finding, Value
from tunesmith.verify.gguf.bounds import known, outside
from tunesmith.verify.gguf.families import COMPUTED, OUTPUT, Family, Source, embedding_name, sources_of, tied
from tunesmith.verify.gguf.file import GgufFile
from tunesmith.verify.gguf.records import GgufTensor

_TILE = 1 << 20  # numbers at once
_SHOWN = 5


@dataclass(frozen=True)
class Matched:
    """What each tensor of a file must hold, and what could not be matched.

    Attributes:
        sources: by the file's names.
        findings: missing, unexpected and misshapen tensors; one good finding where there are none.
    """

    sources: Mapping[str, Source]
    findings: tuple[Finding, ...]


def match_tensors(file: GgufFile, model: Checkpoint, family: Family) -> Matched:
    """Find the source of every tensor of a file.

    A head that is the embedding may be left out, which is how llama.cpp ties them; one of its own must be there.

    Args:
        file: the GGUF file.
        model: the model.
        family: its family.
    """
    sources, lost = sources_of(model, family)
    embedding = embedding_name(model)
    is_tied = tied(model.config, model)
    if embedding and OUTPUT in file.tensors and OUTPUT not in sources and is_tied:
        sources[OUTPUT] = Source((embedding,))  # written out: it must be the embedding's numbers
    if OUTPUT in sources and OUTPUT not in file.tensors and embedding and _is_copy(model, sources[OUTPUT], embedding):
        del sources[OUTPUT]
    missing = sorted(sources.keys() - file.tensors.keys())
    unexpected = sorted(file.tensors.keys() - sources.keys() - set(COMPUTED))
    findings = [_misshapen(file, model, name, sources[name]) for name in sorted(sources.keys() & file.tensors.keys())]
    wrong = [finding for finding in findings if finding is not None]
    wrong += [_named("gguf_tensors_unplaced", lost)] if lost else []
    if OUTPUT in missing:
        missing.remove(OUTPUT)
        wrong.append(Finding(code="gguf_head_missing", severity="error", params={"name": sources[OUTPUT].names[0]}))
    wrong += [_named("gguf_tensors_missing", missing)] if missing else []
    wrong += [_named("gguf_tensors_unexpected", unexpected)] if unexpected else []
    good = Finding(code="gguf_tensors_matched", severity="ok", params={"count": len(sources)})
    misshapen = {str(finding.params["name"]) for finding in wrong if finding.code == "gguf_shape_differs"}
    usable = {name: sources[name] for name in sources if name in file.tensors and name not in misshapen}
    return Matched(usable, tuple(wrong) or (good,))


def check_weights(
    file: GgufFile,
    model: Checkpoint,
    sources: Mapping[str, Source],
    *,
    progress: ProgressCallback,
    cancellation: Cancellation,
) -> tuple[GgufTensor, ...]:
    """Hold every number against the model's.

    Args:
        file: the GGUF file.
        model: the model.
        sources: what each tensor must hold.
        progress: told of numbers looked at.
        cancellation: read between tiles.

    Returns:
        A record a tensor, in the file's order.
    """
    total = sum(int(file.tensors[name].n_elements) for name in sources)
    shared = SharedProgress("verify weights", total, "numbers", progress=progress, cancellation=cancellation)
    checked = [_check(file, model, name, sources[name], shared) for name in file.tensors if name in sources]
    return tuple(_explained(file, model, one, sources) if one.outside else one for one in checked)


def weighted(file: GgufFile) -> bool:
    """Whether an importance matrix took part in the file's rounding, as llama-quantize then says."""
    return any(file.get(f"quantize.imatrix.{key}") is not None for key in ("file", "entries_count", "dataset"))


def weights_findings(tensors: Sequence[GgufTensor], *, weighted: bool = False) -> list[Finding]:
    """What the tensors' records come to.

    Args:
        tensors: the records.
        weighted: an importance matrix took part in them.
    """
    unproven = sorted({one.type for one in tensors if not known(one.type, weighted=weighted)})
    findings = (
        [Finding(code="gguf_type_unproven", severity="warning", params={"types": ", ".join(unproven)})]
        if unproven
        else []
    )
    bad = [one for one in tensors if one.outside]
    if bad:
        findings.append(_named("gguf_weights_outside", [one.name for one in bad]))
        return findings + _causes(bad)
    proven = [one for one in tensors if known(one.type, weighted=weighted)]
    if not proven:
        return findings
    exact = all(one.exact == one.elements for one in proven)
    kinds = Counter({one.type: 0 for one in proven})
    for one in proven:
        kinds[one.type] += one.elements
    worst = max((one.relative_error or 0.0 for one in proven), default=0.0)
    params: dict[str, Value] = {
        "tensors": len(proven),
        "numbers": sum(one.elements for one in proven),
        "types": ", ".join(kind for kind, _ in kinds.most_common()),
        "worst": worst,
    }
    code = "gguf_weights_exact" if exact else "gguf_weights_within"
    return [*findings, Finding(code=code, severity="ok", params=params)]


def _check(file: GgufFile, model: Checkpoint, name: str, source: Source, shared: SharedProgress) -> GgufTensor:
    kind = file.type(name)
    exact_count = out_count = 0
    error = norm = 0.0
    not_finite = False
    for block, start, stop in source.tiles(model, _TILE):
        raw = file.raw(name, block, start, stop)
        x = source.exact(model, block, start, stop)
        try:
            y = file.values(name, raw)
        except NotImplementedError:
            y = np.full_like(x, np.nan)
        bad = outside(kind, raw, y, x, weighted=weighted(file))
        exact_count += int((x == y).sum())
        out_count += 0 if bad is None else int(bad.sum())
        finite = bool(np.isfinite(y).all())
        not_finite |= not finite
        error += float(((y - x) ** 2).sum()) if finite else 0.0
        norm += float((x**2).sum())
        shared.advance(x.size, name)
    return GgufTensor(
        name=name,
        source=source.names[0],
        type=kind,
        elements=int(file.tensors[name].n_elements),
        exact=exact_count,
        outside=out_count,
        relative_error=(error / norm) ** 0.5 if norm else None,
        cause="not_finite" if not_finite and known(kind) else None,
    )


def _explained(file: GgufFile, model: Checkpoint, tensor: GgufTensor, sources: Mapping[str, Source]) -> GgufTensor:
    """Try what commonly goes wrong: rows not interleaved, a norm without its 1, another layer's tensor."""
    if tensor.cause is not None:
        return tensor
    source = sources[tensor.name]
    tries: dict[str, Source] = {}
    if source.heads:
        tries["not_permuted"] = replace(source, heads=None)
    if source.plus_one:
        tries["norm_without_one"] = replace(source, plus_one=False)
    elif tensor.name.endswith("norm.weight"):
        tries["norm_with_one"] = replace(source, plus_one=True)
    shape = source.shape(model)
    tail = tensor.name.split(".", 2)[-1]
    tries |= {
        other: candidate
        for other, candidate in sources.items()
        if other != tensor.name and other.split(".", 2)[-1] == tail and candidate.shape(model) == shape
    }
    cause = next((cause for cause, candidate in tries.items() if _begins_as(file, model, tensor.name, candidate)), None)
    return tensor.model_copy(update={"cause": cause})


def _begins_as(file: GgufFile, model: Checkpoint, name: str, source: Source) -> bool:
    """Whether the first tile of a tensor is what another source would have made it."""
    block, start, stop = next(source.tiles(model, _TILE >> 6))
    raw = file.raw(name, block, start, stop)
    x = source.exact(model, block, start, stop)
    try:
        bad = outside(file.type(name), raw, file.values(name, raw), x, weighted=weighted(file))
    except NotImplementedError:
        return False
    return bad is not None and not bad.any()


def _causes(bad: Sequence[GgufTensor]) -> list[Finding]:
    by_cause: dict[str, list[str]] = {}
    for one in bad:
        if one.cause is not None:
            known_cause = one.cause in ("not_permuted", "norm_without_one", "norm_with_one", "not_finite")
            by_cause.setdefault(one.cause if known_cause else "of_another", []).append(
                one.name if known_cause else f"{one.name} = {one.cause}"
            )
    return [_named(f"gguf_cause_{cause}", names) for cause, names in sorted(by_cause.items())]


def _misshapen(file: GgufFile, model: Checkpoint, name: str, source: Source) -> Finding | None:
    found, wanted = file.shape(name), source.shape(model)
    if found == wanted:
        return None
    params: dict[str, Value] = {"name": name, "expected": _by(wanted), "found": _by(found)}
    return Finding(code="gguf_shape_differs", severity="error", params=params)


def _is_copy(model: Checkpoint, head: Source, embedding: str) -> bool:
    name = head.names[0]
    first, second = (model.shards[model.shard_of(each)] for each in (name, embedding))
    return name == embedding or same_values(first, name, second, embedding)


def _named(code: str, names: Sequence[str]) -> Finding:
    shown = ", ".join(names[:_SHOWN]) + (f", … ({len(names)})" if len(names) > _SHOWN else "")
    return Finding(code=code, severity="error", params={"count": len(names), "names": shown})


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def stored_values(file: GgufFile, name: str, source: Source, model: Checkpoint) -> list[tuple[str, Float64]]:
    """The numbers that a file's tensor means, laid out as the model has them, by the model's names.

    The inverse of what a converter does; for the behaviour level, which has the model compute with them.
    """
    found = []
    for block, each in enumerate(source.names):
        shape = model.info(each).shape
        rows = shape[0] if len(shape) > 1 else 1
        values = file.values(name, file.raw(name, block if source.stacked else None, 0, rows))
        if source.heads:
            half = shape[0] // source.heads // 2
            turned = values.reshape(source.heads, half, 2, -1)
            values = turned.swapaxes(1, 2)
        found.append((each, values.reshape(shape) - (1 if source.plus_one else 0)))
    return found


__all__ = ["Matched", "check_weights", "match_tensors", "stored_values", "weighted", "weights_findings"]

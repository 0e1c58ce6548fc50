"""Level 1: the merged directory as a loader sees it, against what base and adapter demand."""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import replace
from pathlib import Path

from tunesmith.adapter import Binding, Copied
from tunesmith.checkpoint import (
    FLOAT_DTYPES,
    Checkpoint,
    TensorInfo,
)
from tunesmith.errors import CheckpointError
from tunesmith.record import Finding, Value
from tunesmith.verify.structure.dequantized import as_dequantized
from tunesmith.verify.structure.directory import beside, foreign_format, quantized_as, some_of, why_not_opened
from tunesmith.verify.structure.layout import Respelled, Shapes, with_experts_apart

HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
    "embeddings.weight",
)
_TIED = "tie_word_embeddings"
_NOTHING = Binding(updates=())

# What Transformers writes before names, and what it loads beside it: a model's own prefix may be there or not, and that
# of a tower within a larger model has changed its place.
_OWN_PREFIXES = ("model.", "transformer.")
_TOWER_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", *_OWN_PREFIXES)
_TOWER_NAMES = (("vision_tower.vision_model.", "vision_tower."),)


# Buffers that old releases saved with the weights, and that a loader works out by itself.
_BUFFER = re.compile(r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|embeddings\.position_ids|\.masked_bias)$")
_MASK = re.compile(r"\.(attn|attention)\.bias$")  # and a bias proper, which is no square of four dimensions


def check_structure(
    merged_dir: Path, base: Checkpoint, binding: Binding = _NOTHING
) -> tuple[Checkpoint | None, list[Finding]]:
    """Open the merged model and hold its tensors' names, shapes and dtypes against what they should be.

    How the tensors are spread over files, and what those are called, is the merging tool's own affair.

    Args:
        merged_dir: the merged model.
        base: the base model.
        binding: what the adapters make of it: tensors that are new, dropped, or of another shape.

    Returns:
        The opened model by the base's names (None where it cannot be opened, or holds nothing that could be compared),
        and what was seen.
    """
    foreign = foreign_format(merged_dir)
    if foreign is not None:
        return None, [foreign]
    try:
        merged = Checkpoint(merged_dir)
    except CheckpointError as error:
        return None, [
            Finding(code="structure_broken", severity="error", params={"what": why_not_opened(error, merged_dir)})
        ]
    expected = _expected_shapes(base, binding)
    method = quantized_as(merged) if quantized_as(base) is None else None
    if method is not None:
        return _check_quantized(merged, base, binding, method=method)
    merged, renamed = _spelled_as(merged, base, expected.keys())
    merged, experts, aside = with_experts_apart(merged, expected)
    merged, padded = _without_padding(merged, expected)
    findings = renamed + experts + padded + _names(merged, base, binding, aside=aside) + _forms(merged, base, binding)
    findings += _ties(merged, base, binding) + beside(merged)
    return merged, _with_summary(findings, merged)


def _check_quantized(
    stored: Checkpoint, base: Checkpoint, binding: Binding, *, method: str
) -> tuple[Checkpoint | None, list[Finding]]:
    """Hold a quantized model's tensors against what its own configuration makes of the base's."""
    dtypes = {name: info.dtype for name, info in base.tensors.items()}
    merged, findings, aside = as_dequantized(stored, _expected_shapes(base, binding), dtypes)
    if merged is None:
        return None, findings or [Finding(code="weights_quantized", severity="error", params={"method": method})]
    findings += _names(merged, base, binding, aside=aside) + _forms(merged, base, binding)
    findings += _ties(merged, base, binding) + beside(merged)
    return merged, _with_summary(findings, stored)


def _with_summary(findings: list[Finding], merged: Checkpoint) -> list[Finding]:
    """The findings, after one that says that all is there, where none is an error."""
    if not any(finding.severity == "error" for finding in findings):
        params = {
            "tensors": len(merged.tensors),
            "shards": len(merged.shards),
        }
        return [Finding(code="structure_ok", severity="ok", params=params), *findings]
    return findings


def _expected_shapes(base: Checkpoint, binding: Binding) -> dict[str, tuple[int, ...] | None]:
    """Every tensor that there should be, with its shape; None where nothing says that."""
    sources = {update.name: update.source for update in binding.updates if isinstance(update, Copied)}
    shapes = {name: info.shape for name, info in base.tensors.items()}
    shapes |= {name: shapes[source] for name, source in sources.items() if source in shapes}
    shapes |= {name: tuple(shape) for name, shape in binding.shapes.items()}
    return {name: shapes.get(name) for name in sorted(_expected_names(base, binding))}


def _expected_names(base: Checkpoint, binding: Binding) -> set[str]:
    return (base.tensors.keys() - set(binding.dropped)) | binding.by_name.keys() | binding.shapes.keys()


def _spelled_as(merged: Checkpoint, base: Checkpoint, expected: Set[str]) -> tuple[Checkpoint, list[Finding]]:
    """The merged model by the base's names, where its own differ from them in a known prefix and nothing else."""
    towers = isinstance(base.config.get("text_config"), dict)
    ours = merged.tensors.keys()
    missing = {_plain(name, towers=towers): name for name in expected - ours}
    names = {name: missing[plain] for name in ours - expected if (plain := _plain(name, towers=towers)) in missing}
    if not names or len(set(names.values())) < len(names) or len(missing) < len(expected - ours):
        return merged, []
    views = {name: [replace(merged.info(name), name=other)] for name, other in names.items()}
    return Respelled(merged, views), [Finding(code="tensors_renamed", severity="info", params={"count": len(names)})]


def _plain(name: str, *, towers: bool) -> str:
    """A tensor's name without what differs between spellings."""
    for written, plain in _TOWER_NAMES if towers else ():
        name = name.replace(written, plain)
    prefixes = _TOWER_PREFIXES if towers else _OWN_PREFIXES
    return next((name[len(prefix) :] for prefix in prefixes if name.startswith(prefix)), name)


def _names(merged: Checkpoint, base: Checkpoint, binding: Binding, *, aside: Set[str]) -> list[Finding]:
    findings = []
    expected = _expected_names(base, binding)
    missing = sorted(expected - merged.tensors.keys() - aside)
    extra = sorted(merged.tensors.keys() - expected - aside)
    if len(extra) == 1 and is_head(extra[0]):
        written_out = _head_beside_embedding(merged, extra[0])
        if written_out is not None:
            findings.append(written_out)
            extra = []
    if len(missing) == 1 and _may_lack_head(missing[0], base, binding):
        findings.append(Finding(code="tied_head_left_out", severity="info"))
        missing = []
    buffers = [name for name in (*missing, *extra) if _is_buffer(merged if name in extra else base, name)]
    if buffers:
        findings.append(
            Finding(code="buffers_apart", severity="info", params={"count": len(buffers), "names": some_of(buffers)})
        )
        missing, extra = ([name for name in names if name not in buffers] for names in (missing, extra))
    left = _left_behind(missing, merged, binding)
    if left:
        params: dict[str, Value] = {"count": len(left), "names": some_of(left)}
        findings.append(Finding(code="old_head_left_out", severity="info", params=params))
        missing = [name for name in missing if name not in left]
    heads = [name for name in missing if is_head(name) and unties(binding)]
    missing = [name for name in missing if name not in heads]
    if heads:
        findings.append(Finding(code="tied_head_missing", severity="error", params={"name": heads[0]}))
    for code, names in (("tensors_missing", missing), ("tensors_extra", extra)):
        if names:
            params = {"count": len(names), "names": some_of(names)}
            findings.append(Finding(code=code, severity="error", params=params))
    return findings


def _is_buffer(model: Checkpoint, name: str) -> bool:
    """Whether a loader works a tensor out by itself, so that files may hold it or not."""
    if name not in model.tensors:
        return False
    shape = model.info(name).shape
    is_mask = _MASK.search(name) and len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return bool(_BUFFER.search(name) or is_mask)


def _left_behind(missing: list[str], merged: Checkpoint, binding: Binding) -> list[str]:
    """Tensors of a head that the tuned model, another class, has no use for: a whole module that no adapter touches."""
    if not any(key.rpartition(".")[2] == "architectures" for key in binding.config):
        return []
    kept = {name.partition(".")[0] for name in (*merged.tensors, *binding.by_name)}
    return [name for name in missing if name.partition(".")[0] not in kept]


def _forms(merged: Checkpoint, base: Checkpoint, binding: Binding) -> list[Finding]:
    findings = []
    ours, theirs = merged.tensors, base.tensors
    sources = {update.name: update.source for update in binding.updates if isinstance(update, Copied)}
    shared = [name for name in (*theirs, *sorted(_expected_names(base, binding) - theirs.keys())) if name in ours]
    dtypes = set()
    for name in shared:
        origin = theirs.get(sources.get(name, name))
        shape = binding.shapes.get(name, origin.shape if origin else ours[name].shape)
        if ours[name].shape != tuple(shape):
            if (short := _too_few_rows(ours[name], tuple(shape))) is not None:
                findings.append(short)
                continue
            findings.append(
                Finding(
                    code="shape_differs",
                    severity="error",
                    params={"name": name, "expected": str(list(shape)), "found": str(list(ours[name].shape))},
                )
            )
        elif _cannot_be_compared(ours[name], origin):
            params: dict[str, Value] = {"name": name, "found": ours[name].dtype}
            findings.append(Finding(code="dtype_unknown", severity="error", params=params))
        if origin:
            dtypes.add((origin.dtype, ours[name].dtype))
    findings += [
        Finding(code="dtype_differs", severity="warning", params={"expected": expected, "found": found})
        for expected, found in sorted(dtypes)
        if expected != found
    ]
    return findings[:20]


def _too_few_rows(info: TensorInfo, shape: tuple[int, ...]) -> Finding | None:
    """A vocabulary without its last tokens."""
    if not _is_vocabulary(info.name) or info.shape[1:] != shape[1:] or not info.shape or info.shape[0] >= shape[0]:
        return None
    params: dict[str, Value] = {"name": info.name, "expected": shape[0], "found": info.shape[0]}
    return Finding(code="vocabulary_short", severity="error", params=params)


def _without_padding(merged: Checkpoint, expected: Shapes) -> tuple[Checkpoint, list[Finding]]:
    """A vocabulary with rows too many, seen without them, so that the others are compared all the same."""
    views, findings = {}, []
    for name, info in merged.tensors.items():
        shape = expected.get(name)
        if not shape or not _is_vocabulary(name) or info.shape[1:] != shape[1:] or info.shape[0] <= shape[0]:
            continue
        end = info.begin + info.size_bytes // info.shape[0] * shape[0]
        views[name] = [replace(info, shape=shape, end=end)]
        params: dict[str, Value] = {"name": name, "expected": shape[0], "found": info.shape[0]}
        findings.append(Finding(code="vocabulary_padded", severity="error", params=params))
    return (Respelled(merged, views) if views else merged), findings


def _is_vocabulary(name: str) -> bool:
    return is_head(name) or name.endswith(_EMBEDDINGS)


def _cannot_be_compared(ours: TensorInfo, origin: TensorInfo | None) -> bool:
    """Whether neither arithmetic nor bytes can tell if a tensor is right."""
    same = origin is not None and ours.dtype == origin.dtype
    plain = origin is None or origin.dtype in FLOAT_DTYPES
    return not same and not (plain and ours.dtype in FLOAT_DTYPES)


def _ties(merged: Checkpoint, base: Checkpoint, binding: Binding) -> list[Finding]:
    """A head that is declared to be a tensor of its own, and is not there."""
    if _says_tied(merged) is not False or _says_tied(base) is not True or unties(binding):
        return []
    if any(is_head(name) for name in merged.tensors):
        return []
    return [Finding(code="untied_head_missing", severity="error", params={"embedding": embeddings_of(merged)[0]})]


def _says_tied(model: Checkpoint) -> bool | None:
    """What a configuration says of the head, in the section that says it; None where it is silent."""
    for section in (model.config, model.config.get("text_config")):
        if isinstance(section, dict) and isinstance(section.get(_TIED), bool):
            return bool(section[_TIED])
    return None


def is_head(name: str) -> bool:
    """Whether a tensor is, by its name, the matrix that gives the next token's logits."""
    return any(name == head or name.endswith(f".{head}") for head in HEADS)


def embeddings_of(checkpoint: Checkpoint) -> list[str]:
    """The tensors that are, by their names, the input embedding."""
    return [name for name in checkpoint.tensors if name.endswith(_EMBEDDINGS)]


def unties(binding: Binding) -> bool:
    """Whether the adapters make two tensors of a tied embedding."""
    return any(key.rpartition(".")[2] == _TIED and value is False for key, value in binding.config.items())


def _may_lack_head(name: str, base: Checkpoint, binding: Binding) -> bool:
    """Whether a loader makes the head of the embedding, also where the base's file holds one."""
    text = base.config.get("text_config")
    tied = base.config.get(_TIED) or (isinstance(text, dict) and text.get(_TIED))
    return is_head(name) and bool(tied) and name not in binding.by_name


def _head_beside_embedding(merged: Checkpoint, head: str) -> Finding | None:
    """What a head is that the base does not have: a copy of the embedding, or another matrix of its form."""
    embeddings = embeddings_of(merged)
    if any(is_copy(merged, head, of) for of in embeddings):
        return Finding(code="tied_head_written_out", severity="info")
    for of in embeddings:
        pair = merged.info(head), merged.info(of)
        if pair[0].shape == pair[1].shape and pair[0].dtype == pair[1].dtype:
            rows = pair[0].shape[0]
            apart = sum(
                merged.read(head, row, row + 1).tobytes() != merged.read(of, row, row + 1).tobytes()
                for row in range(rows)
            )
            params: dict[str, Value] = {"name": head, "embedding": of, "rows": apart, "total": rows}
            return Finding(code="tied_head_differs", severity="error", params=params)
    return None


def is_copy(merged: Checkpoint, name: str, of: str) -> bool:
    """Whether two tensors of one model hold the same bytes in the same shape."""
    if merged.info(name).shape != merged.info(of).shape or merged.info(name).dtype != merged.info(of).dtype:
        return False
    rows = merged.info(name).shape[0]
    return all(
        merged.read(name, row, row + 1024).tobytes() == merged.read(of, row, row + 1024).tobytes()
        for row in range(0, rows, 1024)
    )

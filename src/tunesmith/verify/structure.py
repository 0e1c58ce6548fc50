"""Level 1: the merged directory as a loader sees it, against what base and adapter demand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tunesmith.adapter import Binding, Copied
from tunesmith.checkpoint import FLOAT_DTYPES, Array, Checkpoint, Header, TensorInfo, read_rows
from tunesmith.errors import CheckpointError
from tunesmith.record import Finding, Value

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


class Respelled(Checkpoint):
    """A model whose tensors go by other names than in its files.

    Args:
        model: the model.
        names: the other names of some of its tensors, by their own.
    """

    def __init__(self, model: Checkpoint, names: Mapping[str, str]) -> None:
        self.path, self.config = model.path, model.config
        self.shards = {file: _renamed(header, names) for file, header in model.shards.items()}
        self._files = {name: file for file, header in self.shards.items() for name in header.tensors}
        self._infos = {name: self.shards[file].tensors[name] for name, file in self._files.items()}

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by its other name."""
        return self._infos

    def shard_of(self, name: str) -> str:
        """The file that holds a tensor."""
        return self._files[name]

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies."""
        return self._infos[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Read rows of a tensor as stored."""
        return read_rows(self.shards[self._files[name]], name, start, stop)


def _renamed(header: Header, names: Mapping[str, str]) -> Header:
    tensors = {names.get(name, name): info for name, info in header.tensors.items()}
    return replace(header, tensors={name: replace(info, name=name) for name, info in tensors.items()})


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
        The opened model (None where it cannot be), and what was seen.
    """
    try:
        merged = Checkpoint(merged_dir)
    except CheckpointError as error:
        return None, [Finding(code="structure_broken", severity="error", params={"what": _one_line(error)})]
    merged, renamed = _spelled_as(merged, base, _expected_names(base, binding))
    findings = renamed + _names(merged, base, binding) + _forms(merged, base, binding) + _stray(merged)
    if not any(finding.severity == "error" for finding in findings):
        params = {
            "tensors": len(merged.tensors),
            "shards": len(merged.shards),
        }
        findings.insert(0, Finding(code="structure_ok", severity="ok", params=params))
    return merged, findings


def _expected_names(base: Checkpoint, binding: Binding) -> set[str]:
    return (base.tensors.keys() - set(binding.dropped)) | binding.by_name.keys() | binding.shapes.keys()


def _spelled_as(merged: Checkpoint, base: Checkpoint, expected: set[str]) -> tuple[Checkpoint, list[Finding]]:
    """The merged model by the base's names, where its own differ from them in a known prefix and nothing else."""
    towers = isinstance(base.config.get("text_config"), dict)
    ours = merged.tensors.keys()
    missing = {_plain(name, towers=towers): name for name in expected - ours}
    names = {name: missing[plain] for name in ours - expected if (plain := _plain(name, towers=towers)) in missing}
    if not names or len(set(names.values())) < len(names) or len(missing) < len(expected - ours):
        return merged, []
    return Respelled(merged, names), [Finding(code="tensors_renamed", severity="info", params={"count": len(names)})]


def _plain(name: str, *, towers: bool) -> str:
    """A tensor's name without what differs between spellings."""
    for written, plain in _TOWER_NAMES if towers else ():
        name = name.replace(written, plain)
    prefixes = _TOWER_PREFIXES if towers else _OWN_PREFIXES
    return next((name[len(prefix) :] for prefix in prefixes if name.startswith(prefix)), name)


def _names(merged: Checkpoint, base: Checkpoint, binding: Binding) -> list[Finding]:
    findings = []
    expected = _expected_names(base, binding)
    missing = sorted(expected - merged.tensors.keys())
    extra = sorted(merged.tensors.keys() - expected)
    if len(extra) == 1 and is_head(extra[0]) and _is_copy_of_embedding(merged, extra[0]):
        findings.append(Finding(code="tied_head_written_out", severity="info"))
        extra = []
    if len(missing) == 1 and _may_lack_head(missing[0], base, binding):
        findings.append(Finding(code="tied_head_left_out", severity="info"))
        missing = []
    left = _left_behind(missing, merged, binding)
    if left:
        params: dict[str, Value] = {"count": len(left), "names": _some(left)}
        findings.append(Finding(code="old_head_left_out", severity="info", params=params))
        missing = [name for name in missing if name not in left]
    heads = [name for name in missing if is_head(name) and unties(binding)]
    missing = [name for name in missing if name not in heads]
    if heads:
        findings.append(Finding(code="tied_head_missing", severity="error", params={"name": heads[0]}))
    for code, names in (("tensors_missing", missing), ("tensors_extra", extra)):
        if names:
            params = {"count": len(names), "names": _some(names)}
            findings.append(Finding(code=code, severity="error", params=params))
    return findings


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


def _cannot_be_compared(ours: TensorInfo, origin: TensorInfo | None) -> bool:
    """Whether neither arithmetic nor bytes can tell if a tensor is right."""
    same = origin is not None and ours.dtype == origin.dtype
    plain = origin is None or origin.dtype in FLOAT_DTYPES
    return not same and not (plain and ours.dtype in FLOAT_DTYPES)


def _stray(merged: Checkpoint) -> list[Finding]:
    stray = sorted(file.name for file in merged.path.glob("*.safetensors") if file.name not in merged.shards)
    return [Finding(code="stray_weights", severity="warning", params={"names": _some(stray)})] if stray else []


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


def _is_copy_of_embedding(merged: Checkpoint, name: str) -> bool:
    return any(is_copy(merged, name, of) for of in embeddings_of(merged))


def is_copy(merged: Checkpoint, name: str, of: str) -> bool:
    """Whether two tensors of one model hold the same bytes in the same shape."""
    if merged.info(name).shape != merged.info(of).shape or merged.info(name).dtype != merged.info(of).dtype:
        return False
    rows = merged.info(name).shape[0]
    return all(
        merged.read(name, row, row + 1024).tobytes() == merged.read(of, row, row + 1024).tobytes()
        for row in range(0, rows, 1024)
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (" …" if len(names) > 4 else "")


def _one_line(error: CheckpointError) -> str:
    parts = [error.what, error.where and Path(error.where).name, error.found]
    return " · ".join(str(part) for part in parts if part)

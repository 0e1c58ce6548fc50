"""Level 1: the merged directory as a loader sees it, against what base and adapter demand."""

from __future__ import annotations

from pathlib import Path

from tunesmith.checkpoint import FLOAT_DTYPES, Checkpoint
from tunesmith.errors import CheckpointError
from tunesmith.record import Finding, Value

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


def check_structure(merged_dir: Path, base: Checkpoint) -> tuple[Checkpoint | None, list[Finding]]:
    """Open the merged model and hold its tensors' names, shapes and dtypes against the base's.

    Returns:
        The opened model (None where it cannot be), and what was seen.
    """
    try:
        merged = Checkpoint(merged_dir)
    except CheckpointError as error:
        return None, [Finding(code="structure_broken", severity="error", params={"what": _one_line(error)})]
    findings = _names(merged, base) + _forms(merged, base) + _stray(merged)
    if not any(finding.severity == "error" for finding in findings):
        params = {
            "tensors": len(merged.tensors),
            "shards": len(merged.shards),
        }
        findings.insert(0, Finding(code="structure_ok", severity="ok", params=params))
    return merged, findings


def _names(merged: Checkpoint, base: Checkpoint) -> list[Finding]:
    findings = []
    missing = sorted(base.tensors.keys() - merged.tensors.keys())
    extra = sorted(merged.tensors.keys() - base.tensors.keys())
    if extra == [_HEAD] and _is_copy(merged, _HEAD, _EMBEDDING):
        findings.append(Finding(code="tied_head_written_out", severity="info"))
        extra = []
    for code, names in (("tensors_missing", missing), ("tensors_extra", extra)):
        if names:
            params: dict[str, Value] = {"count": len(names), "names": _some(names)}
            findings.append(Finding(code=code, severity="error", params=params))
    return findings


def _forms(merged: Checkpoint, base: Checkpoint) -> list[Finding]:
    findings = []
    shared = [name for name in base.tensors if name in merged.tensors]
    for name in shared:
        ours, theirs = merged.info(name), base.info(name)
        if ours.shape != theirs.shape:
            findings.append(
                Finding(
                    code="shape_differs",
                    severity="error",
                    params={"name": name, "expected": str(list(theirs.shape)), "found": str(list(ours.shape))},
                )
            )
        elif ours.dtype not in FLOAT_DTYPES and ours.dtype != theirs.dtype:
            findings.append(Finding(code="dtype_unknown", severity="error", params={"name": name, "found": ours.dtype}))
    dtypes = {(base.info(name).dtype, merged.info(name).dtype) for name in shared}
    changed = sorted(pair for pair in dtypes if pair[0] != pair[1])
    findings += [
        Finding(code="dtype_differs", severity="warning", params={"expected": expected, "found": found})
        for expected, found in changed
    ]
    return findings[:20]


def _stray(merged: Checkpoint) -> list[Finding]:
    stray = sorted(file.name for file in merged.path.glob("*.safetensors") if file.name not in merged.shards)
    return [Finding(code="stray_weights", severity="warning", params={"names": _some(stray)})] if stray else []


def _is_copy(merged: Checkpoint, name: str, of: str) -> bool:
    if of not in merged.tensors or merged.info(name).shape != merged.info(of).shape:
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

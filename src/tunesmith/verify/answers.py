"""From findings to a level's status, and from levels to the answer."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.checkpoint import Checkpoint
from tunesmith.record import Finding, Value
from tunesmith.verify.records import Answer, Level, QuantizedTensor, Status, TensorVerdict
from tunesmith.verify.weights import strays

NOT_MEASURED = "behaviour_not_measured"


def answer_of(
    levels: Sequence[Level],
    tensors: Sequence[TensorVerdict],
    quantized: Sequence[QuantizedTensor],
    *,
    sampled: bool,
) -> Answer:
    """The answer that the levels and the weights' records come to; a sample proves nothing."""
    failed = {level.name for level in levels if level.status == "fail"}
    proven = not sampled and any(level.name == "weights" and level.status == "pass" for level in levels)
    if failed:
        return "different"
    if not proven:
        return "not_verified"
    if quantized:
        return "equal_within_quantization"
    exact = all(tensor.exact == tensor.elements for tensor in tensors)
    return "identical" if exact else "equal_within_rounding"


def status_of(findings: Sequence[Finding]) -> Status:
    """A level's status: that of its worst finding."""
    if any(finding.code == NOT_MEASURED for finding in findings):
        return "skipped"
    severities = {finding.severity for finding in findings}
    return "fail" if "error" in severities else "warn" if "warning" in severities else "pass"


def weights_findings(tensors: Sequence[TensorVerdict], *, sampled_of: Checkpoint | None) -> list[Finding]:
    """What the records of tensors that are stored in full come to.

    Args:
        tensors: their records.
        sampled_of: the model, where only some rows of each tensor were looked at.
    """
    counts = {
        key: sum(getattr(tensor, key) for tensor in tensors)
        for key in ("elements", "exact", "faithful", "twice_rounded", "outside")
    }
    # What is stored whole is not lost in rounding, so it says nothing here.
    touched = [tensor for tensor in tensors if tensor.module is not None and tensor.delta_norm]
    changed = sum(tensor.elements for tensor in touched)
    good = not counts["outside"]
    few = strays(tensors)
    findings = [
        Finding(code="weights_proven" if good else "weights_outside", severity="ok" if good else "error", params=counts)
    ]
    if sampled_of is not None and good:
        total = sum(info.elements for info in sampled_of.tensors.values())
        findings = [Finding(code="weights_sampled", severity="ok", params={**counts, "total": total})]
    if few:
        strayed: dict[str, Value] = {"count": sum(few.values()), "tensor": max(few, key=lambda name: few[name])}
        findings.append(Finding(code="weights_strays", severity="error", params=strayed))
    if changed:
        share = sum(tensor.unchanged for tensor in touched) / changed
        params = {"share_unchanged": share, "tensors": len(touched)}
        findings.append(Finding(code="weights_unchanged_share", severity="info", params=params))
    return findings

"""What a report shows of a quantized model's codes."""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.verify import QuantizedTensor, Verdict

CODE_CLASSES = ("nearest", "twice_rounded", "saturated", "neighbour", "further")
_WORST = 10


@dataclass(frozen=True)
class CodesView:
    """Every code of the weights level, by class, and the tensors that lost most."""

    scheme: str
    tensors: int
    elements: int
    classes: tuple[tuple[str, int, float], ...]
    worst: tuple[QuantizedTensor, ...]


def codes_view(verdict: Verdict) -> CodesView | None:
    """Counts over all quantized tensors; None where there are none, or the weights level was not run."""
    if not verdict.quantized:
        return None
    elements = sum(tensor.elements for tensor in verdict.quantized)
    counts = [(name, sum(getattr(tensor, name) for tensor in verdict.quantized)) for name in CODE_CLASSES]
    return CodesView(
        scheme=", ".join(dict.fromkeys(tensor.scheme for tensor in verdict.quantized)),
        tensors=len(verdict.quantized),
        elements=elements,
        classes=tuple((name, count, count / (elements or 1)) for name, count in counts),
        worst=tuple(sorted(verdict.quantized, key=lambda tensor: -(tensor.relative_error or 0.0))[:_WORST]),
    )

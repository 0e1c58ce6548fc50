"""A tuned model as a compressed-tensors directory, rounded once: base and adapter straight to codes."""

from tunesmith.export.quantize.plan import plan_quantization
from tunesmith.export.quantize.records import QuantizationPlan, Quantized, TensorRounded
from tunesmith.export.quantize.rounders import CALIBRATED, ROUNDINGS
from tunesmith.export.quantize.schemes import SCHEMES, scheme_of
from tunesmith.export.quantize.write import quantize

__all__ = [
    "CALIBRATED",
    "ROUNDINGS",
    "SCHEMES",
    "QuantizationPlan",
    "Quantized",
    "TensorRounded",
    "plan_quantization",
    "quantize",
    "scheme_of",
]

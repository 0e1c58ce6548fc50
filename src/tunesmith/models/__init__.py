"""Live variants of one base model: base, adapters and merged models, loaded once; they generate and score.

Importing this room imports neither torch nor Transformers nor PEFT; using it does.
"""

from tunesmith.models.calibration import (
    RecordedInputs,
    encode_calibration_rows,
    record_inputs,
    write_calibration_text,
)
from tunesmith.models.compute import ComputeDtype, compute_dtype, dtype_name
from tunesmith.models.generate import Generation, GenerationSettings, generate
from tunesmith.models.score import RowScore, score, token_logits
from tunesmith.models.variants import BASE, Variant, VariantSet

__all__ = [
    "BASE",
    "ComputeDtype",
    "Generation",
    "GenerationSettings",
    "RecordedInputs",
    "RowScore",
    "Variant",
    "VariantSet",
    "compute_dtype",
    "dtype_name",
    "encode_calibration_rows",
    "generate",
    "record_inputs",
    "score",
    "token_logits",
    "write_calibration_text",
]

"""Live variants of one base model: base, adapters and merged models, loaded once; they generate and score.

Importing this room imports neither torch nor Transformers nor PEFT; using it does.
"""

from tunesmith.models.calibration import (
    RecordedInputs,
    encode_calibration_rows,
    record_inputs,
    write_calibration_text,
)
from tunesmith.models.compute import (
    ComputeDtype,
    avoid_cudnn_attention,
    compute_dtype,
    dtype_name,
    flops_per_s,
    free_bytes,
)
from tunesmith.models.endpoint import PARALLEL, Endpoint
from tunesmith.models.engine import (
    Capabilities,
    Engine,
    Generation,
    GenerationSettings,
    Prompt,
    Request,
    RowScore,
    ScoredRow,
)
from tunesmith.models.generate import continue_rows, generate, prompt_ids
from tunesmith.models.local import LocalEngine, RenderedPrompt
from tunesmith.models.remember import RememberingEngine
from tunesmith.models.score import RowDrift, row_drifts, same_tokens, score, token_logits
from tunesmith.models.variants import BASE, Variant, VariantSet

__all__ = [
    "BASE",
    "PARALLEL",
    "Capabilities",
    "ComputeDtype",
    "Endpoint",
    "Engine",
    "Generation",
    "GenerationSettings",
    "LocalEngine",
    "Prompt",
    "RecordedInputs",
    "RememberingEngine",
    "RenderedPrompt",
    "Request",
    "RowDrift",
    "RowScore",
    "ScoredRow",
    "Variant",
    "VariantSet",
    "avoid_cudnn_attention",
    "compute_dtype",
    "continue_rows",
    "dtype_name",
    "encode_calibration_rows",
    "flops_per_s",
    "free_bytes",
    "generate",
    "prompt_ids",
    "record_inputs",
    "row_drifts",
    "same_tokens",
    "score",
    "token_logits",
    "write_calibration_text",
]

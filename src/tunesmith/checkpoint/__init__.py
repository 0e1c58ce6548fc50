"""Model directories: strict header parse, lazy reads, atomic publishing, and where a base model is.

Knows nothing of LoRA.
"""

from tunesmith.checkpoint.directory import (
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    read_json_object,
    read_rows,
    same_values,
)
from tunesmith.checkpoint.hashing import TrailingHashes, hash_files
from tunesmith.checkpoint.header import DTYPE_BITS, Header, TensorInfo, is_file, is_there, open_regular, read_header
from tunesmith.checkpoint.hub import Sought, hub_snapshot
from tunesmith.checkpoint.locate import cache_dir, full_precision_sibling, is_hub_id, locate_base, relatives_of
from tunesmith.checkpoint.publish import (
    Stage,
    check_free_space,
    check_out_dir,
    copy_range,
    done_bytes,
    listing_sha256,
    resumable_stage,
    sha256_of,
    staged_directory,
    weights_files,
    weights_sha256,
    write_at,
    write_error,
)
from tunesmith.checkpoint.quantized import (
    QUANTIZED_METHOD,
    Quantization,
    QuantizedScheme,
    QuantizedWeight,
    StoredTensor,
    quantization_of,
)
from tunesmith.checkpoint.tensors import (
    FLOAT_DTYPES,
    Array,
    Float64,
    as_float64,
    stored_array,
)
from tunesmith.checkpoint.views import VIEW_KINDS, BaseView, ViewKind, is_linear_weight, view_of

__all__ = [
    "Array",
    "BaseView",
    "CONFIG_FILE",
    "Checkpoint",
    "DTYPE_BITS",
    "FLOAT_DTYPES",
    "Float64",
    "Header",
    "INDEX_FILE",
    "SINGLE_FILE",
    "QUANTIZED_METHOD",
    "Quantization",
    "QuantizedScheme",
    "QuantizedWeight",
    "Sought",
    "Stage",
    "StoredTensor",
    "TensorInfo",
    "TrailingHashes",
    "VIEW_KINDS",
    "ViewKind",
    "as_float64",
    "cache_dir",
    "check_free_space",
    "check_out_dir",
    "copy_range",
    "done_bytes",
    "full_precision_sibling",
    "hash_files",
    "hub_snapshot",
    "is_file",
    "is_hub_id",
    "is_linear_weight",
    "is_there",
    "listing_sha256",
    "locate_base",
    "open_regular",
    "quantization_of",
    "read_header",
    "read_json_object",
    "read_rows",
    "relatives_of",
    "resumable_stage",
    "same_values",
    "sha256_of",
    "staged_directory",
    "stored_array",
    "view_of",
    "weights_files",
    "weights_sha256",
    "write_at",
    "write_error",
]

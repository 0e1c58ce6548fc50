"""From a full-precision GGUF file to a quantized one: tensor by tensor by the ``gguf`` package, or by llama-quantize.

What stays finer follows llama-quantize's own rules for these types: vectors, norms and an expert router stay as they
are; the output head (or, where there is none, the embedding that serves as one) gets six bits there and eight here,
since the package writes no K types; a tensor whose rows are no multiple of a block stays as it is.

Source: ``llama_tensor_get_type`` (llama-quant.cpp).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.errors import MissingExtraError, OutputError
from tunesmith.progress import Cancellation, Progress, ProgressCallback

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

_PROGRAM = "llama-quantize"
_TILE = 1 << 22  # numbers at once
_FILE_TYPE, _VERSION = "general.file_type", "general.quantization_version"
_FINE = ("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "pos_embd.weight", "token_types.weight")
_HEAD, _TOKENS = "output.weight", "token_embd.weight"


def require_program() -> str:
    """The path of ``llama-quantize``.

    Raises:
        OutputError: it is not on PATH.
    """
    found = shutil.which(_PROGRAM)
    if found is None:
        raise OutputError(
            "K and IQ types are written by llama.cpp's own program, which is not on PATH.",
            expected=_PROGRAM,
            next_step="brew install llama.cpp, winget install llama.cpp, or unpack a release of "
            "github.com/ggml-org/llama.cpp/releases and add its folder to PATH; or take --type q4_0 or q8_0",
        )
    return found


def quantize_file(
    source: Path, out: Path, type_name: str, *, progress: ProgressCallback, cancellation: Cancellation
) -> dict[str, int]:
    """Write a quantized copy of a full-precision GGUF file; memory holds one tile of one tensor.

    Args:
        source: the file to read (f32, f16 or bf16).
        out: the file to write.
        type_name: ``q4_0``, ``q4_1``, ``q5_0`` or ``q5_1``.
        progress: told of tensors.
        cancellation: read between tiles.

    Returns:
        How many matrices stayed finer than asked for, by their type.

    Raises:
        MissingExtraError: the package is not installed.
        Cancelled: stopped on request.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("Writing a GGUF file", "gguf", "gguf") from error

    reader = gguf.GGUFReader(source)
    wanted = gguf.GGMLQuantizationType[type_name.upper()]
    architecture = reader.get_field("general.architecture")
    writer = gguf.GGUFWriter(None, architecture.contents() if architecture is not None else "")
    _copy_fields(reader, writer, file_type=int(gguf.LlamaFileType[f"MOSTLY_{type_name.upper()}"]))
    names = {tensor.name for tensor in reader.tensors}
    types = {tensor.name: _type_of(tensor, wanted, names) for tensor in reader.tensors}
    for tensor in reader.tensors:
        shape, nbytes = _stored_shape(tensor, types[tensor.name])
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), nbytes, raw_dtype=types[tensor.name])
    try:
        writer.write_header_to_file(path=out)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for number, tensor in enumerate(reader.tensors):
            progress(Progress("quantize", number, len(reader.tensors), "tensors", tensor.name))
            writer.write_tensor_data(_Streamed(tensor, types[tensor.name], cancellation))
    finally:
        writer.close()
    kept = [types[tensor.name] for tensor in reader.tensors if len(tensor.shape) > 1]
    return {kind.name: kept.count(kind) for kind in dict.fromkeys(kept) if kind != wanted}


def kept_finer(file: Path, type_name: str) -> dict[str, int]:
    """How many matrices of a file that llama-quantize wrote are in another type than the one asked for.

    Its mixes keep some finer on purpose, and rows that are no multiple of 256 get a type in blocks of 32.
    """
    try:
        import gguf
    except ImportError:
        return {}
    name = type_name.upper()
    own = name if name in gguf.GGMLQuantizationType.__members__ else name.rpartition("_")[0]
    kinds = [tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors if len(tensor.shape) > 1]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds) if kind != own}


class _Streamed:
    """What the writer takes for an array: it asks for its size, and has it write itself to a file."""

    def __init__(self, tensor: Any, kind: GGMLQuantizationType, cancellation: Cancellation) -> None:
        self._tensor, self._kind, self._cancellation = tensor, kind, cancellation
        self.nbytes = _stored_shape(tensor, kind)[1]

    def tofile(self, file: Any) -> None:
        for tile in _tiles(self._tensor, self._kind):
            self._cancellation.check()
            file.write(tile.tobytes())


def _tiles(tensor: Any, kind: GGMLQuantizationType) -> Iterator[Any]:
    from gguf.quants import dequantize, quantize

    data = tensor.data.reshape(-1, tensor.data.shape[-1])
    columns = max(1, int(tensor.shape[0]))
    step = max(1, _TILE // columns)
    for start in range(0, data.shape[0], step):
        rows = np.ascontiguousarray(data[start : start + step])
        if kind == tensor.tensor_type:
            yield rows
        else:
            yield quantize(np.asarray(dequantize(rows, tensor.tensor_type), dtype=np.float32), kind)


def _stored_shape(tensor: Any, kind: GGMLQuantizationType) -> tuple[tuple[int, ...], int]:
    """A tensor's shape in bytes, slowest dimension first, and how many there are."""
    from gguf.constants import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    shape = tuple(int(each) for each in reversed(tensor.shape.tolist()))
    in_bytes = (*shape[:-1], shape[-1] // block * size)
    return in_bytes, int(np.prod(in_bytes))


def _type_of(tensor: Any, wanted: GGMLQuantizationType, names: set[str]) -> GGMLQuantizationType:
    from gguf import GGMLQuantizationType
    from gguf.constants import GGML_QUANT_SIZES

    own: GGMLQuantizationType = tensor.tensor_type
    if len(tensor.shape) < 2 or not tensor.name.endswith(".weight") or tensor.name.endswith(_FINE):
        return own
    is_head = tensor.name == _HEAD or (tensor.name == _TOKENS and _HEAD not in names)
    kind = GGMLQuantizationType.Q8_0 if is_head else wanted
    return kind if int(tensor.shape[0]) % GGML_QUANT_SIZES[kind][0] == 0 else own


def _copy_fields(reader: GGUFReader, writer: GGUFWriter, *, file_type: int) -> None:
    """Every field as it is, but for the type of the file."""
    from gguf import GGUFValueType

    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", _FILE_TYPE):
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=element)
    writer.add_uint32(_FILE_TYPE, file_type)
    if reader.get_field(_VERSION) is None:
        import gguf

        writer.add_uint32(_VERSION, int(gguf.GGML_QUANT_VERSION))

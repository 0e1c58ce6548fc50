"""The base as a quantized training saw it: bitsandbytes' numbers, without bitsandbytes and without torch.

An adapter that was trained on a 4-bit or 8-bit base (QLoRA, arXiv:2305.14314) corrects ``dequant(quant(W))``, not W.
A merge that starts from W adds the correction to a model that the training never saw.

    nf4          blocks of 64 in flattened order, each divided by its absmax; the nearest of 16 codes; code · absmax
    nf4-double   the same, with the absmax itself in 8 bits (QLoRA, section 3, "double quantization")
    int8         rows in fp16, each divided by its absmax; 127 steps to each side (LLM.int8(), arXiv:2208.07339)

The numbers are those of bitsandbytes 0.50, where its processor and CUDA sources agree.  Where they do not:

- The CUDA build multiplies by a reciprocal that fast arithmetic may leave an ulp or two off.  For every ratio of two
  bf16 numbers the NF4 code does not depend on it (a test goes through them all), so a bf16 base has one ``nf4`` view.
  In ``int8``, a number halfway between two steps may take the other one.
- For double quantization the processor's kernel finds an 8-bit code by a table of 65,536 steps, CUDA's by search.
  Trainings run on CUDA; so this is the search.  The mean that is subtracted first is torch's float32 sum, whose order
  depends on the device; here it is rounded once from float64, which can move a few results by a rounding.
- A block of zeros stays zero here and on a processor.  By its source, CUDA's quotient of zero by zero takes the lowest
  code, −1, which double quantization multiplies by an absmax that is near zero but not zero.

``int8`` reproduces the weights.  The training rounded its activations to 8 bits as well, which no merge can hold.
"""

from __future__ import annotations

import math
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from tunesmith.checkpoint.directory import Checkpoint
from tunesmith.checkpoint.tensors import Array, Float64, as_float64
from tunesmith.errors import CheckpointError, DataError

Float32: TypeAlias = npt.NDArray[np.float32]

NF4_BLOCK = 64
_ABSMAX_BLOCK = 256
_BLOCKS_AT_ONCE = 1024  # their float32 numbers, 256 KiB, stay in the second cache through all passes
_BLOCKS_READ = 1 << 14  # 2 MiB of a 16-bit tensor at a time
_SCALES_KEPT = 8  # tensors; one of 70 million elements takes 4 MiB
_SMALLEST_ABSMAX = np.float32(1e-38)  # below it bitsandbytes divides by this
_VIEWED_DTYPES = ("F32", "F16", "BF16")

# QLoRA, appendix E, as float32 in bitsandbytes/backends/utils.py; its kernel's thresholds are the midpoints, and a
# number on a threshold takes the lower code.
NF4_CODE: Float32 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    dtype=np.float32,
)  # fmt: skip

# What a Linear layer's weight is called, in the text and vision models whose every such layer bitsandbytes replaces.
_LINEAR = frozenset(
    str.split(
        "q_proj k_proj v_proj o_proj out_proj qkv_proj qkv W_pack Wqkv wqkv wo query_key_value "
        "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj gate_proj up_proj down_proj gate_up_proj w1 w2 w3 "
        "dense dense_h_to_4h dense_4h_to_h fc1 fc2 fc_in fc_out proj linear linear_1 linear_2 linear_fc1 linear_fc2 "
        "projection_layer merging_layer in_proj_qkv in_proj_z in_proj_a in_proj_b "
        "per_layer_input_gate per_layer_projection per_layer_model_projection"
    )
)
_LINEAR_IN = {  # names that are a Conv1D elsewhere
    "gpt_bigcode": frozenset(("c_attn", "c_fc", "c_proj")),
    "gpt_neo": frozenset(("c_fc", "c_proj")),
    "starcoder2": frozenset(("c_fc", "c_proj")),
}
_LINEAR_IN_SEQUENCE = re.compile(r"(^|\.)(mlp|mlp1|merger|proj)\.\d+$")
_EMBEDDING = frozenset(
    str.split(
        "embed_tokens embed_tokens_per_layer embed_in embed_positions tok_embeddings wte wpe word_embeddings "
        "token_embedding position_embedding position_embeddings pos_embed"
    )
)
_HEAD = frozenset(("lm_head", "embed_out"))
_CONV1D_MODELS = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "convbert"))
_OWN_LINEAR_MODELS = frozenset(("falcon", "idefics", "esm"))

ViewKind: TypeAlias = Literal["nf4", "nf4-double", "int8"]
VIEW_KINDS: tuple[ViewKind, ...] = ("nf4", "nf4-double", "int8")


@dataclass(frozen=True)
class BaseView:
    """A base as bitsandbytes showed it to a training.

    Attributes:
        kind: ``nf4``, ``nf4-double`` (LLaMA-Factory's default for ``quantization_bit: 4``) or ``int8``.
        dtype: what the training loaded the base in and computed in, ``BF16``, ``F16`` or ``F32``; None for the dtype
            that each tensor is stored in.

    Raises:
        ValueError: an unknown kind or dtype.
    """

    kind: ViewKind
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in VIEW_KINDS or self.dtype not in (None, *_VIEWED_DTYPES):
            raise ValueError(f"no such view: {self.kind!r} in {self.dtype!r}")

    def check(self, checkpoint: Checkpoint) -> None:
        """Make sure that it is known which tensors of a model bitsandbytes quantizes.

        Raises:
            CheckpointError: it is not, and why.
        """
        _quantized_names(checkpoint)

    def applies_to(self, checkpoint: Checkpoint, name: str) -> bool:
        """Whether a tensor is one that Transformers quantizes with bitsandbytes.

        These are the weights of Linear layers, but for the output head; embeddings, norms, biases and convolutions
        keep their own numbers.

        Raises:
            CheckpointError: as :meth:`check`.
        """
        return name in _quantized_names(checkpoint)

    def rows(self, checkpoint: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> Float64:
        """Rows ``start:stop`` of a tensor, as the training saw them.

        Blocks of 64 that reach into other rows are read whole, so any cut into tiles gives the same numbers.
        ``nf4-double`` reads a tensor once more, at the first tile of it.

        Args:
            checkpoint: the base.
            name: a tensor; the stored numbers come back for one that is not quantized.
            start: first row.
            stop: row to stop before; None for all.

        Returns:
            float64 of shape (stop − start, columns).  NF4's values lie on the grid of the training's dtype, int8's on
            float32's, where bitsandbytes computes them.

        Raises:
            CheckpointError: as :meth:`check`; or the tensor holds what is not a number, or none that fp16 can hold.
        """
        if not self.applies_to(checkpoint, name):
            return checkpoint.read_float64(name, start, stop)
        height, columns = checkpoint.info(name).shape
        stop = height if stop is None else min(stop, height)
        if start >= stop or not columns:
            return np.empty((max(0, stop - start), columns))
        if self.kind == "int8":
            return self._int8_rows(checkpoint, name, start, stop)
        return self._nf4_rows(checkpoint, name, start, stop)

    def _nf4_rows(self, checkpoint: Checkpoint, name: str, start: int, stop: int) -> Float64:
        info = checkpoint.info(name)
        columns, dtype = info.shape[1], self.dtype or info.dtype
        first, last = start * columns // NF4_BLOCK, math.ceil(stop * columns / NF4_BLOCK)
        scales = self._double_scales(checkpoint, name)[first:last] if self.kind == "nf4-double" else None
        out = np.empty((last - first, NF4_BLOCK))
        for done, blocks in _blocks(checkpoint, name, first, last):
            absmax = _absmax(blocks, name, dtypes=(info.dtype, dtype))
            part = slice(done, done + len(blocks))
            seen = absmax if scales is None else scales[part]
            table = _cast(seen[:, None] * NF4_CODE, dtype).astype(np.float64)
            codes = _nf4_codes(_loaded(blocks, info.dtype, dtype), absmax)
            # An index into every block's own 16 values: a quarter as many roundings as elements.
            where = np.add(codes, np.arange(len(blocks))[:, None] * 16, dtype=np.int64)
            np.take(table.reshape(-1), where, out=out[part], mode="clip")
        skipped = start * columns - first * NF4_BLOCK
        return out.reshape(-1)[skipped : skipped + (stop - start) * columns].reshape(stop - start, columns)

    def _double_scales(self, checkpoint: Checkpoint, name: str) -> Float32:
        memory, key = _memory_of(checkpoint), (name, self.dtype)
        with memory.lock:
            if key in memory.scales:
                memory.scales.move_to_end(key)
                return memory.scales[key]
        # Computed outside the lock: workers on one tensor do it twice, workers on two do not wait for each other.
        info = checkpoint.info(name)
        blocks = math.ceil(info.elements / NF4_BLOCK)
        dtypes = (info.dtype, self.dtype or info.dtype)
        parts = [
            _absmax(part, name, dtypes=dtypes)
            for first in range(0, blocks, _BLOCKS_READ)
            for _, part in _blocks(checkpoint, name, first, min(first + _BLOCKS_READ, blocks))
        ]
        scales = double_quantized(np.concatenate(parts))
        with memory.lock:
            memory.scales[key] = scales
            while len(memory.scales) > _SCALES_KEPT:
                memory.scales.popitem(last=False)
        return scales

    def _int8_rows(self, checkpoint: Checkpoint, name: str, start: int, stop: int) -> Float64:
        info = checkpoint.info(name)
        stored = checkpoint.read(name, start, stop)
        out = np.empty(stored.shape)
        height = max(1, _BLOCKS_AT_ONCE * NF4_BLOCK // info.shape[1])
        for done in range(0, len(stored), height):
            part = stored[done : done + height]
            absmax = _absmax(part, name, dtypes=(info.dtype, self.dtype or info.dtype, "F16"))
            tile = _loaded(part, info.dtype, self.dtype or info.dtype)
            tile = tile if "F16" in (info.dtype, self.dtype) else _cast(tile, "F16")
            # Both devices multiply by a reciprocal; a number halfway between two steps falls as its rounding has it.
            steps = np.float32(127) * (np.float32(1) / np.where(absmax == 0, np.float32(1), absmax))
            np.multiply(tile, steps[:, None], out=tile)
            np.rint(tile, out=tile)
            np.multiply(tile, absmax[:, None], out=tile)
            np.multiply(tile, np.float32(7.874015718698502e-3), out=tile)
            out[done : done + height] = tile
        return out


def double_quantized(absmax: Float32, *, offset: np.float32 | None = None) -> Float32:
    """The absmax of a tensor's blocks after double quantization.

    Args:
        absmax: one a block of 64, in order.
        offset: the mean that is subtracted first; None to compute it.

    Returns:
        float32, as many.

    Source: QLoRA, section 3; ``quantize_4bit(compress_statistics=True)`` of bitsandbytes.
    """
    offset = np.float32(np.mean(absmax, dtype=np.float64)) if offset is None else offset
    centred = absmax - offset
    blocks = np.concatenate((centred, np.zeros(-len(centred) % _ABSMAX_BLOCK, np.float32))).reshape(-1, _ABSMAX_BLOCK)
    largest = np.abs(blocks).max(axis=1)[:, None]
    normed = blocks * (np.float32(1) / np.maximum(largest, _SMALLEST_ABSMAX))
    codes = np.searchsorted((_DYNAMIC_CODE[:-1] + _DYNAMIC_CODE[1:]) / np.float32(2), normed)
    scales: Float32 = (_DYNAMIC_CODE[codes] * largest).reshape(-1)[: len(absmax)] + offset
    return scales


def _dynamic_code() -> Float32:
    """The 8-bit code of an absmax: 7 decades, each with twice the steps of the one below (arXiv:2110.02861, 2.1)."""
    values = [0.0, 1.0]
    for decade in range(7):
        steps = 2**decade
        low, high = float(np.float32(0.1)), 1.0
        width = float(np.float32(high - low) / np.float32(steps))
        places = np.arange(steps + 1)
        # torch.linspace counts its second half down from the end.
        edges = np.where(places < (steps + 1) // 2, low + width * places, high - width * (steps - places))
        edges_single = edges.astype(np.float32)
        means = np.float32(10.0 ** (decade - 6)) * ((edges_single[:-1] + edges_single[1:]) / np.float32(2))
        values += [*means.tolist(), *(-means).tolist()]
    return np.sort(np.array(values, np.float32))


_DYNAMIC_CODE = _dynamic_code()
_NF4_THRESHOLDS: Float32 = (NF4_CODE[:-1] + NF4_CODE[1:]) / np.float32(2)


def _nf4_codes(blocks: Float32, absmax: Float32) -> npt.NDArray[np.uint8]:
    """The code of every element, 0 to 15; overwrites the blocks."""
    np.multiply(blocks, (np.float32(1) / np.maximum(absmax, _SMALLEST_ABSMAX))[:, None], out=blocks)
    codes = np.zeros(blocks.shape, np.uint8)
    above = np.empty(blocks.shape, np.bool_)
    # Fifteen passes over a cached tile take a fraction of one binary search an element.
    for threshold in _NF4_THRESHOLDS:
        np.greater(blocks, threshold, out=above)
        np.add(codes, above.view(np.uint8), out=codes)
    return codes


def _blocks(checkpoint: Checkpoint, name: str, first: int, last: int) -> Iterator[tuple[int, Array]]:
    """Blocks ``first:last`` of a tensor as stored, a few at a time, with the count of those before.

    Zeros fill the tensor's last block.
    """
    info = checkpoint.info(name)
    columns = info.shape[1]
    begin, end = first * NF4_BLOCK, min(last * NF4_BLOCK, info.elements)
    row = begin // columns
    flat = checkpoint.read(name, row, math.ceil(end / columns)).reshape(-1)[begin - row * columns :][: end - begin]
    step = _BLOCKS_AT_ONCE * NF4_BLOCK
    for done in range(0, len(flat), step):
        part = flat[done : done + step]
        if len(part) % NF4_BLOCK:
            part = np.concatenate((part, np.zeros(-len(part) % NF4_BLOCK, part.dtype)))
        yield done // NF4_BLOCK, part.reshape(-1, NF4_BLOCK)


def _absmax(stored: Array, name: str, *, dtypes: tuple[str, ...]) -> Float32:
    """The largest magnitude of every row, after the roundings from the first dtype to the last.

    Without their sign, floating-point patterns are in the numbers' own order, and rounding keeps that order: so the
    largest is found among stored integers, and it alone is converted.

    Raises:
        CheckpointError: it is infinite or not a number.
    """
    unsigned = stored.view(f"<u{stored.dtype.itemsize}")
    magnitudes = unsigned & unsigned.dtype.type(np.iinfo(unsigned.dtype).max >> 1)
    starts = np.arange(0, magnitudes.size, magnitudes.shape[1])
    largest = np.maximum.reduceat(magnitudes.reshape(-1), starts).view(stored.dtype)
    with np.errstate(invalid="ignore"):
        exact = as_float64(largest, dtypes[0]).astype(np.float32)
    rounded = exact.copy()
    for dtype in dtypes[1:]:
        rounded = _cast(rounded, dtype)
    if not (np.isfinite(exact) & np.isfinite(rounded)).all():
        raise CheckpointError(
            "A tensor cannot be quantized: it holds infinities, NaN, or numbers too large for the training's dtype.",
            where=name,
        )
    return rounded


def _loaded(stored: Array, dtype: str, training_dtype: str) -> Float32:
    """Finite stored numbers as float32, after the rounding to the dtype that the training loaded them in."""
    if dtype == "F32":
        single = stored.astype(np.float32)
    elif dtype == "BF16":
        single = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:  # by hand, as NumPy's own conversion of fp16 takes several times as long
        bits = stored.view("<u2").astype(np.uint32)
        single = ((bits & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32) * np.float32(2.0**112)
        signed = single.view(np.uint32)
        signed |= (bits & np.uint32(0x8000)) << np.uint32(16)
    return single if training_dtype == dtype else _cast(single, training_dtype)


def _cast(values: Float32, dtype: str) -> Float32:
    """Round float32 numbers to a dtype, to nearest, ties to even; may overwrite them."""
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        bits = values.view(np.uint32)
        bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        bits &= np.uint32(0xFFFF0000)
    return values


@dataclass
class _Memory:
    """What was found out about one checkpoint."""

    quantized: frozenset[str] | None = None
    scales: OrderedDict[tuple[str, str | None], Float32] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)


_MEMORIES: WeakKeyDictionary[Checkpoint, _Memory] = WeakKeyDictionary()
_MEMORIES_LOCK = threading.Lock()


def _memory_of(checkpoint: Checkpoint) -> _Memory:
    with _MEMORIES_LOCK:
        return _MEMORIES.setdefault(checkpoint, _Memory())


def _quantized_names(checkpoint: Checkpoint) -> frozenset[str]:
    """The names of the tensors that Transformers quantizes with bitsandbytes.

    Source: transformers 5.23, ``get_keys_to_not_convert`` and ``replace_with_bnb_linear``: every ``nn.Linear`` but the
    output head, what is tied to it, and the last module.

    Raises:
        CheckpointError: the names and the configuration do not tell.
    """
    memory = _memory_of(checkpoint)
    if memory.quantized is None:
        _check_kind_of_model(checkpoint)
        model_types = _model_types(checkpoint.config)
        kinds = {name: _is_linear(checkpoint, name, model_types) for name in checkpoint.tensors}
        unknown = sorted(name for name, kind in kinds.items() if kind is None)
        if unknown:
            raise _refusal(
                checkpoint, "it is not known whether bitsandbytes quantizes some of its tensors", details=unknown[:10]
            )
        foreign = sorted(f"{name}: {checkpoint.info(name).dtype}" for name, kind in kinds.items()
                         if kind and checkpoint.info(name).dtype not in _VIEWED_DTYPES)  # fmt: skip
        if foreign:
            raise _refusal(checkpoint, "bitsandbytes quantizes fp32, fp16 and bf16 only", details=foreign[:10])
        memory.quantized = frozenset(name for name, kind in kinds.items() if kind)
    return memory.quantized


def _is_linear(checkpoint: Checkpoint, name: str, model_types: frozenset[str]) -> bool | None:
    """Whether a tensor is the weight of a Linear layer that is quantized; None where that cannot be told."""
    module, _, parameter = name.rpartition(".")
    leaf = module.rpartition(".")[2]
    if len(checkpoint.info(name).shape) != 2 or parameter != "weight" or leaf in _EMBEDDING:
        return False
    # The head is left out by what it is to the model; a classifier only as the last parameter, which its bias would be.
    if leaf in _HEAD or module == "output" or (leaf == "score" and f"{module}.bias" not in checkpoint.tensors):
        return False
    # An attention of torch's own keeps its output layer in a class of its own, which only some versions replace.
    if leaf == "out_proj" and f"{module.rpartition('.')[0]}.in_proj_weight" in checkpoint.tensors:
        return None
    here = set().union(*(_LINEAR_IN.get(kind, frozenset()) for kind in model_types))
    return True if leaf in _LINEAR or leaf in here or _LINEAR_IN_SEQUENCE.search(module) else None


def is_linear_weight(checkpoint: Checkpoint, name: str) -> bool | None:
    """Whether a tensor is the weight of a Linear layer other than the output head; None where that cannot be told.

    Told from names; embeddings, norms, biases, convolutions, the head and stacks of matrices are none.
    """
    return _is_linear(checkpoint, name, _model_types(checkpoint.config))


def _check_kind_of_model(checkpoint: Checkpoint) -> None:
    model_types = _model_types(checkpoint.config)
    experts = sorted(name for name in checkpoint.tensors if "expert" in name or ".block_sparse_moe." in name)
    if checkpoint.config.get("quantization_config"):
        raise _refusal(checkpoint, "the base is quantized already", next_step="give the full-precision model as base")
    if experts:
        raise _refusal(
            checkpoint,
            "which weights of a mixture of experts are quantized depends on the versions of Transformers and "
            "bitsandbytes that the training used",
            details=experts[:3],
        )
    for models, reason in (
        (_CONV1D_MODELS, "its layers are Conv1D, which are quantized along the other dimension, or not, by version"),
        (_OWN_LINEAR_MODELS, "its layers are of a Linear class of its own, which only some versions replace"),
    ):
        if model_types & models:
            raise _refusal(checkpoint, reason, found=", ".join(sorted(model_types & models)))
    if checkpoint.config.get("is_encoder_decoder"):
        raise _refusal(checkpoint, "it is an encoder with a decoder; these keep some Linear layers in fp32")


def _model_types(config: dict[str, Any]) -> frozenset[str]:
    configs = [config, *(value for value in config.values() if isinstance(value, dict))]
    return frozenset(kind for part in configs if isinstance(kind := part.get("model_type"), str))


def _refusal(checkpoint: Checkpoint, reason: str, **facts: Any) -> CheckpointError:
    """An error that says why the view of this model is not known, with the way out."""
    facts.setdefault("next_step", "load the base in bitsandbytes as the training did, save its dequantize(), and "
                     "merge into that")  # fmt: skip
    return CheckpointError(
        f"The base cannot be shown as a quantized training saw it: {reason}.", where=checkpoint.path, **facts
    )


def view_of(kind: str | None) -> BaseView | None:
    """The view of that name; None for the base as it is stored.

    Raises:
        DataError: there is none of that name.
    """
    found: ViewKind | None = next((known for known in VIEW_KINDS if known == kind), None)
    if kind is None:
        return None
    if found is None:
        raise DataError("There is no such view of a base.", expected=", ".join(VIEW_KINDS), found=kind)
    return BaseView(found)

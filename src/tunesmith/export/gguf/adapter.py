"""A LoRA adapter as a GGUF adapter, for llama.cpp's ``--lora``.

llama.cpp adds alpha / r · B·A, with one alpha for the file and the rank of each pair.  PEFT knows more scales than that
(rsLoRA's alpha / √r, patterns of ranks and alphas, a weight).  So the file's alpha is the one that makes most pairs
right, and the B of any other is multiplied by what is missing; every pair then has exactly PEFT's scale.

What such a file has no place for is refused with its reason: DoRA's magnitudes, modules and token rows that were saved
whole, biases, experts that share a stack.  Those are merged instead.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tunesmith.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LowRank, Stack, Update
from tunesmith.checkpoint import Checkpoint, sha256_of
from tunesmith.errors import UnsupportedAdapterError
from tunesmith.export.gguf.converter import ADAPTER_SCRIPT, find_converter, python_command, run_converter, safe_view
from tunesmith.export.gguf.records import GgufExport
from tunesmith.export.gguf.types import check_adapter_type
from tunesmith.export.gguf.write import beside, check_target
from tunesmith.progress import Cancellation, ProgressCallback, no_progress

_SHOWN = 8


def write_adapter(
    adapter: Path,
    out: Path,
    *,
    base: Path,
    type_name: str,
    converter: Path | None = None,
    force: bool = False,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> GgufExport:
    """Convert an adapter directory by llama.cpp's own converter.

    Args:
        adapter: PEFT's directory.
        out: the file to write.
        base: the base model's directory; its configuration is read, and its tensors' names and shapes.
        type_name: f32, f16, bf16 or q8_0.
        converter: a llama.cpp checkout or its script; None to look for one.
        force: replace a file that is there.
        progress: told of bytes written.
        cancellation: ends the converter.

    Returns:
        What was written.

    Raises:
        UnsupportedAdapterError: it holds what a GGUF adapter has no place for; every reason is listed.
        TunesmithError: it cannot be read, does not fit the base, or the converter stopped.
    """
    started = time.perf_counter()
    check_adapter_type(type_name)
    target = check_target(out, force=force)
    stack = Stack([(adapter, 1.0)])
    binding = stack.bind(Checkpoint(base))
    pairs = _pairs(binding.updates, adapter)
    found = find_converter(converter)
    with tempfile.TemporaryDirectory() as folder, beside(target) as partial:
        plain = Path(folder) / adapter.resolve().name
        plain.mkdir()
        size = _write_plain(plain, stack, pairs)
        with safe_view(base, name="base", weights=False) as view:
            run_converter(
                python_command(
                    found.script(ADAPTER_SCRIPT), plain, "--base", view, "--outfile", partial, "--outtype", type_name
                ),
                out=partial,
                total_bytes=size,
                progress=progress,
                cancellation=cancellation or Cancellation(),
            )
        digest, written = sha256_of(partial), partial.stat().st_size
    return GgufExport(
        source=adapter.resolve().name,
        out=str(target),
        type=type_name,
        adapter=True,
        converter=found.origin,
        size_bytes=written,
        sha256=digest,
        seconds=time.perf_counter() - started,
    )


def shared_alpha(pairs: Sequence[LowRank]) -> float:
    """The alpha for which alpha / r is the scale of most pairs."""
    return Counter(pair.scaling * pair.r for pair in pairs).most_common(1)[0][0]


def _pairs(updates: Sequence[Update], adapter: Path) -> list[LowRank]:
    pairs = [update for update in updates if isinstance(update, LowRank)]
    refused = [f"{update.name}: {update.kind}" for update in updates if not isinstance(update, LowRank)]
    for pair in pairs:
        if pair.block is not None or any((pair.A_rows, pair.A_columns, pair.B_rows, pair.B_columns)):
            refused.append(f"{pair.name}: one of several experts")
        elif pair.transposed or not pair.name.endswith(".weight"):
            refused.append(f"{pair.name}: stored the other way round")
        elif pair.name.endswith("embed_tokens.weight"):
            refused.append(f"{pair.name}: an embedding")
    if refused or not pairs:
        more = [f"… and {len(refused) - _SHOWN} more"] if len(refused) > _SHOWN else []
        raise UnsupportedAdapterError(
            "A GGUF adapter has no place for all of this one.",
            where=adapter,
            expected="pairs of factors of whole linear layers",
            details=[*refused[:_SHOWN], *more],
            next_step="merge it, and write the merged model: tunesmith merge, then tunesmith gguf",
        )
    return pairs


def _write_plain(folder: Path, stack: Stack, pairs: Sequence[LowRank]) -> int:
    """Write PEFT's plainest form of the adapter: one alpha, float32, names as the converter knows them.

    Returns:
        The bytes of its factors.
    """
    import numpy as np
    from safetensors.numpy import save_file

    alpha = shared_alpha(pairs)
    tensors = {}
    for pair in pairs:
        a, b = stack.factors(pair)
        stem = f"base_model.model.{pair.name.removesuffix('.weight')}"
        tensors[f"{stem}.lora_A.weight"] = np.ascontiguousarray(a, dtype=np.float32)
        tensors[f"{stem}.lora_B.weight"] = np.ascontiguousarray(b * (pair.scaling * pair.r / alpha), dtype=np.float32)
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    config = {
        "peft_type": "LORA",
        "r": pairs[0].r,
        "lora_alpha": alpha,
        "target_modules": sorted({pair.name.split(".")[-2] for pair in pairs}),
        "base_model_name_or_path": "base",
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return sum(tensor.nbytes for tensor in tensors.values())

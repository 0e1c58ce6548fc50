"""A complete model directory as one GGUF file, which appears whole or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunesmith.checkpoint import Checkpoint, check_free_space, sha256_of, write_error
from tunesmith.errors import CheckpointError, OutputError
from tunesmith.export.gguf.converter import (
    MODEL_SCRIPT,
    Converter,
    find_converter,
    last_words,
    python_command,
    run_converter,
    safe_view,
)
from tunesmith.export.gguf.quantize import kept_finer, quantize_file, require_program
from tunesmith.export.gguf.records import GgufExport
from tunesmith.export.gguf.types import maker_of
from tunesmith.progress import Cancellation, ProgressCallback, no_progress

_SUFFIX = ".gguf"
_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.0625, "tq1_0": 0.25, "tq2_0": 0.3}
_PLAIN = ("F64", "F32", "F16", "BF16")


def write_model(
    model: Path,
    out: Path,
    *,
    type_name: str,
    converter: Path | None = None,
    force: bool = False,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> GgufExport:
    """Convert a model directory by llama.cpp's own converter, and quantize the result where a type asks for that.

    Args:
        model: a complete, unquantized model directory.
        out: the file to write.
        type_name: one of ``types``.
        converter: a llama.cpp checkout or its script; None to look for one.
        force: replace a file that is there.
        progress: told of bytes and tensors written.
        cancellation: ends the converter.

    Returns:
        What was written.

    Raises:
        CheckpointError: the directory is no model, or is a quantized one.
        OutputError: the file is there, cannot be written, or the converter stopped.
        MissingExtraError: no converter was found.
        Cancelled: stopped on request; nothing is left behind.
    """
    started = time.perf_counter()
    stop = cancellation or Cancellation()
    maker = maker_of(type_name)
    checkpoint = Checkpoint(model)
    _refuse_quantized(checkpoint)
    target = check_target(out, force=force)
    program = require_program() if maker == "llama-quantize" else None
    found = find_converter(converter)
    elements = sum(info.elements for info in checkpoint.tensors.values())
    first = type_name if maker == "converter" else "bf16" if _is_bf16(checkpoint) else "f32"
    needed = int(elements * _BYTES[first])
    check_free_space(target.parent, needed if maker == "converter" else 2 * needed)
    kept: dict[str, int] = {}
    with beside(target) as partial:
        full = partial if maker == "converter" else partial.with_name(f"{partial.name}.full")
        try:
            _convert(model, full, first, found, needed, progress, stop)
            if maker == "package":
                kept = quantize_file(full, partial, type_name, progress=progress, cancellation=stop)
            elif program is not None:
                run_converter(
                    [program, full, partial, type_name.upper()],
                    out=partial,
                    total_bytes=needed,
                    progress=progress,
                    cancellation=stop,
                    translate=lambda said: OutputError("llama-quantize stopped.", found=last_words(said)),
                )
                kept = kept_finer(partial, type_name)
        finally:
            if full != partial:
                full.unlink(missing_ok=True)
        digest, size = sha256_of(partial), partial.stat().st_size
    return GgufExport(
        source=model.resolve().name,
        out=str(target),
        type=type_name,
        adapter=False,
        converter=found.origin,
        size_bytes=size,
        sha256=digest,
        kept=kept,
        seconds=time.perf_counter() - started,
    )


def check_target(out: Path, *, force: bool) -> Path:
    """Refuse, before any work, a place that must not or cannot be written.

    Raises:
        OutputError: another ending than ``.gguf``, a directory, a file that is there, or a parent that is not.
    """
    if out.suffix != _SUFFIX:
        raise OutputError("The file's name does not say a known format.", where=out, expected=_SUFFIX)
    if out.is_dir():
        raise OutputError("The file is a directory.", where=out)
    if out.exists() and not force:
        raise OutputError(
            "The file is there already.", where=out, next_step="choose another --out, or pass --force to replace it"
        )
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise OutputError("The file's directory is not there or cannot be written.", where=out.parent)
    return out


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """Name a file to write beside the target, and move it into place at the end; on any error nothing is left.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(error, target) from error
        raise


def _convert(
    model: Path,
    out: Path,
    type_name: str,
    converter: Converter,
    total_bytes: int,
    progress: ProgressCallback,
    cancellation: Cancellation,
) -> None:
    with safe_view(model, name=model.resolve().name) as view:
        run_converter(
            python_command(converter.script(MODEL_SCRIPT), view, "--outfile", out, "--outtype", type_name),
            out=out,
            total_bytes=total_bytes,
            progress=progress,
            cancellation=cancellation,
        )


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    settings = checkpoint.config.get("quantization_config")
    strange = sorted({info.dtype for info in checkpoint.tensors.values() if info.dtype not in _PLAIN})
    if not settings and not strange:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    raise CheckpointError(
        "A GGUF file is made of the merged model, not of a quantized one: its rounding would be rounded again.",
        where=checkpoint.path,
        found=method or ", ".join(strange),
        next_step="tunesmith merge RUN --out DIR, then tunesmith gguf DIR --out FILE.gguf",
    )


def _is_bf16(checkpoint: Checkpoint) -> bool:
    """Whether bf16 holds every number, so that quantizing starts from what the model has and not from its rounding."""
    return all(info.dtype == "BF16" for info in checkpoint.tensors.values() if len(info.shape) > 1)

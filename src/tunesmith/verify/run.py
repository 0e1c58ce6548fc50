"""One verification: four levels, one answer, and why."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor
from pathlib import Path

from tunesmith.adapter import Adapter, Stack
from tunesmith.checkpoint import (
    Checkpoint,
    TrailingHashes,
    listing_sha256,
    relatives_of,
    storage_path,
    stored_path,
    weights_files,
)
from tunesmith.conversations import Conversation, built_in_prompts
from tunesmith.errors import AdapterError, BaseModelError, CheckpointError, TunesmithError
from tunesmith.executors import retried_by
from tunesmith.models import VariantSet
from tunesmith.progress import Cancellation, Progress, ProgressCallback, no_progress
from tunesmith.record import Finding, Value
from tunesmith.runs import FINAL, Run, checkpoint_of, tokenizer_dir
from tunesmith.verify.answers import answer_of, status_of, weights_findings
from tunesmith.verify.assets import check_assets
from tunesmith.verify.behaviour import ADAPTER, MERGED, Codes, Reference, check_behaviour, tolerated_share
from tunesmith.verify.certificate import Origin, certified_files, not_written, verdict_of, write_certificate
from tunesmith.verify.diagnosis import diagnose_findings, diagnose_weights
from tunesmith.verify.quantized import (
    certified_codes,
    check_codes,
    diagnose_codes,
    judge_codes,
    other_checkpoint,
    other_start,
)
from tunesmith.verify.records import (
    GOOD,
    Answer,
    BehaviourRow,
    Level,
    LevelName,
    QuantizedTensor,
    TensorVerdict,
    Verdict,
)
from tunesmith.verify.structure import Dequantized, check_structure
from tunesmith.verify.weights import Expectation, StartView, check_weights

LEVELS: tuple[LevelName, ...] = ("structure", "assets", "weights", "behaviour")


class Verification:
    """The state of one verification, filled level by level.

    Args:
        run: the run.
        merged_dir: the merged model.
        base_dir: the base model's directory.
        base_model: the base as it was asked for.
        checkpoint: which adapter.
        weight: what its update is multiplied by.
        adapters: directories of further adapters that were summed with it, each with its weight.
        base_is_residual: the base is what remained after the adapter's start was subtracted.
        base_view: how the base is to be seen; None for as it is stored.
        sample: whether the weights level only looks at some rows of each tensor, which proves nothing.
        certificate: whether a good answer is to be certified, so that the files are hashed while they are read.
        progress: told of the work's parts.
        cancellation: read between tiles, prompts and tokens.
    """

    def __init__(
        self,
        run: Run,
        merged_dir: Path,
        *,
        base_dir: Path,
        base_model: str,
        checkpoint: str | int,
        weight: float = 1.0,
        adapters: Sequence[tuple[str, float]] = (),
        base_is_residual: bool = False,
        base_view: StartView | None = None,
        sample: bool = False,
        certificate: bool = False,
        executor: Executor | None = None,
        progress: ProgressCallback,
        cancellation: Cancellation,
    ) -> None:
        self.run = run
        self.merged_dir = merged_dir
        self.base_model = base_model
        self.chosen = checkpoint_of(run, checkpoint)
        self.weight, self.others = weight, tuple(adapters)
        self.base_is_residual, self.base_view = base_is_residual, base_view
        self.base = Checkpoint(base_dir)
        self.expectation = self._expect(self.chosen.path)
        self.tokenizer_dir = tokenizer_dir(run, self.chosen, base_dir)
        self.merged: Checkpoint | None = None
        self.head_written_out = False
        self.tensors: tuple[TensorVerdict, ...] = ()
        self.quantized: tuple[QuantizedTensor, ...] = ()
        self.behaviour: tuple[BehaviourRow, ...] = ()
        self.dtype: str | None = None
        places = (merged_dir, base_dir, self.chosen.path, *(path for path, _ in self.others))
        self.far = any(stored_path(place) is not None for place in places)
        self.sample, self.wanted = sample, certificate and not sample
        self.certificate = self.wanted and not self.far
        self.hashes: dict[Path, str] = {}
        self.stamps = self._stamps() if self.certificate else {}
        self.executor = executor
        self.progress = progress
        self.cancellation = cancellation

    def _expect(self, adapter: str) -> Expectation:
        """What a merge would hold with an adapter in the chosen one's place.

        Raises:
            TunesmithError: the adapters cannot be read, or do not fit the base.
        """
        stack = Stack([(adapter, self.weight), *self.others])
        binding = stack.bind(self.base, base_is_residual=self.base_is_residual)
        return Expectation(self.base, stack, binding, view=self.base_view, base_is_residual=self.base_is_residual)

    def structure(self) -> list[Finding]:
        """Level 1."""
        self.merged, findings = check_structure(self.merged_dir, self.base, self.expectation.binding)
        self.head_written_out = any(finding.code == "tied_head_written_out" for finding in findings)
        return findings

    def assets(self) -> list[Finding]:
        """Level 2."""
        return check_assets(
            self.merged_dir,
            self.base.path,
            self.tokenizer_dir,
            generation_from=storage_path(self.chosen.path),
            head_written_out=self.head_written_out,
            config_changes=self.expectation.binding.config,
        )

    def weights(self) -> list[Finding]:
        """Level 3."""
        if self.merged is None:
            return [Finding(code="weights_unreadable", severity="error")]
        shards = [self.base.path / shard for shard in self.base.shards] if self.certificate else []
        known = self.run.base_sha256 is not None and not self.sample and not self.far
        base = weights_files(self.base.path) if known else shards
        ours = [self.merged.path / shard for shard in self.merged.shards] if self.certificate else []
        codes = self._codes()
        coded = sum(layer.rows * layer.columns for layer in codes.layers.values()) if codes is not None else 0
        share = coded / max(1, sum(info.elements for info in self.merged.tensors.values()))
        with self._trailing(base) as base_hashes, self._trailing(ours) as our_hashes:

            def told(event: Progress) -> None:
                done = event.done / event.total if event.total else 1.0
                for hashes in (base_hashes, our_hashes):
                    hashes.follow(1 - share + share * done if event.stage == "verify codes" else (1 - share) * done)
                self.progress(event)

            self.tensors = check_weights(
                self.merged,
                self.expectation,
                without=codes.layers if codes is not None else (),
                sample=self.sample,
                executor=self.executor,
                progress=told,
                cancellation=self.cancellation,
            )
            findings = weights_findings(self.tensors, sampled_of=self.merged if self.sample else None)
            if codes is not None:
                findings += self._check_codes(codes, told)
            proven = status_of(findings) == "pass"
            if base and (proven or known):
                self._take(base_hashes)
            if ours and proven:
                self._take(our_hashes)
        return [*(self._base_identity() if known else ()), *findings]

    def _trailing(self, files: Sequence[Path]) -> TrailingHashes:
        return TrailingHashes({str(path): path for path in files}, self.executor)

    def _take(self, trailing: TrailingHashes) -> None:
        """Wait for hashes and keep them."""
        try:
            hashes = trailing.result(self.cancellation.check)
        except BrokenExecutor as error:
            raise TunesmithError("A worker of the executor died.", found=error) from error
        self.hashes |= {Path(path): digest for path, digest in hashes.items()}

    def _codes(self) -> Dequantized | None:
        """The model, where some of its layers are quantized."""
        return self.merged if isinstance(self.merged, Dequantized) and self.merged.layers else None

    def _check_codes(self, codes: Dequantized, told: ProgressCallback) -> list[Finding]:
        """The quantized layers' part of level 3."""
        self.quantized = check_codes(
            codes,
            self.expectation,
            sample=self.sample,
            executor=self.executor,
            progress=told,
            cancellation=self.cancellation,
        )
        findings = judge_codes(self.quantized, sampled=self.sample)
        if not any(finding.severity == "error" for finding in findings):
            name = other_checkpoint(self.quantized, codes, self.expectation, self._other_adapters())
            if name is not None:
                params: dict[str, Value] = {"checkpoint": name, "asked": self.chosen.name}
                findings.append(Finding(code="quantized_other_checkpoint", severity="error", params=params))
            start = other_start(self.quantized, codes, self.expectation)
            findings += [start] if start is not None else []
        return findings

    def _other_adapters(self) -> dict[str, Expectation]:
        """What a merge would hold with the run's other adapters; damaged or foreign ones are passed over."""
        return {
            other.name: expectation
            for other in self.run.checkpoints
            if other.name != self.chosen.name and (expectation := self._expect_if_readable(other.path))
        }

    def _base_identity(self) -> list[Finding]:
        """Whether the base is, byte for byte, the one that training recorded."""
        listing = {file.name: self.hashes[file] for file in weights_files(self.base.path)}
        same = listing_sha256(listing) == self.run.base_sha256
        return [Finding(code="base_same" if same else "base_changed", severity="ok" if same else "error")]

    def certify(self, answer: Answer, levels: Sequence[Level]) -> Finding | None:
        """Write the certificate of a good answer; a directory of any other one is left alone.

        Args:
            answer: the verdict.
            levels: every level.

        Returns:
            Whether it was written; None where it was not to be.
        """
        if not self.wanted or answer not in GOOD:
            return None
        if self.far:
            return not_written("What lies in a storage is not read again to be hashed.")
        if self._stamps() != self.stamps:
            return not_written("A file was changed while it was verified.")
        verdict = verdict_of(
            answer,
            levels,
            self.tensors,
            codes=certified_codes(self.quantized),
            behaviour=self.behaviour,
            dtype=self.dtype,
        )
        return write_certificate(
            self.merged_dir, self._origin(), verdict=verdict, hashes=self.hashes, cancellation=self.cancellation
        )

    def _origin(self) -> Origin:
        first = (self.run.name, self.chosen.name, Path(self.chosen.path), self.weight)
        others = tuple((Path(path).name, FINAL, Path(path), weight) for path, weight in self.others)
        view = self.base_view
        return Origin(
            base_model=self.base_model,
            base_dir=self.base.path,
            adapters=(first, *others),
            view=None if view is None else str(getattr(view, "kind", type(view).__name__)),
            is_residual=self.base_is_residual,
        )

    def _stamps(self) -> dict[Path, tuple[int, int]]:
        """Size and time of change of every file that a certificate would name."""
        try:
            files = [path for place in certified_files(self.merged_dir, self._origin()) for path in place.values()]
            stats = [(path, path.stat()) for path in files]
        except (CheckpointError, OSError):  # nothing that could be certified
            return {}
        return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats}

    def measure_behaviour(self, prompts: Sequence[Conversation], *, dtype: str, device: str) -> list[Finding]:
        """Level 4."""
        if self.merged is None:
            return [Finding(code="behaviour_unloadable", severity="error", params={"what": str(self.merged_dir.name)})]
        reason = self._not_comparable()
        if reason is not None or self.tokenizer_dir is None:
            return [_not_measured(reason or "Neither the run nor the base holds a tokenizer.")]
        try:
            variants = VariantSet.load(
                self.base.path,
                adapters={ADAPTER: Path(self.chosen.path)},
                full={MERGED: self.merged_dir},
                tokenizer_dir=self.tokenizer_dir,
                dtype=dtype,
                device=device,
                progress=self.progress,
            )
        except (AdapterError, BaseModelError) as error:
            # The adapter could be bound, so what stands in the way is the loading of it beside its base.
            return [_not_measured(error.what if error.found is None else f"{error.what} {error.found}")]
        self.dtype = dtype
        try:
            self.behaviour, findings = check_behaviour(
                variants,
                prompts or built_in_prompts(),
                tolerated_share=tolerated_share(self.tensors),
                reference=self._reference(self.merged),
                codes=self._kind_of_codes(),
                progress=self.progress,
                cancellation=self.cancellation,
            )
        except TunesmithError as error:
            return [Finding(code="behaviour_unloadable", severity="error", params={"what": error.what})]
        return findings

    def _kind_of_codes(self) -> Codes:
        """Whether weights are quantized, and activations with them."""
        codes = self._codes()
        if codes is None:
            return "none"
        return "activations" if any(layer.scheme.activations for layer in codes.layers.values()) else "weights"

    def _reference(self, merged: Checkpoint) -> Reference | None:
        """The recomputed weights; None where not all of them were."""
        recomputed = bool(self.tensors) and not self.sample
        return Reference(merged, self.expectation, self.tensors) if recomputed else None

    def _not_comparable(self) -> str | None:
        """Why the merge has no live counterpart that answers in text; None where it may have one."""
        if self.far:
            return "A model is not loaded from a storage."
        config = Adapter(self.chosen.path).config
        task = config.get("task_type") or "CAUSAL_LM"
        if task != "CAUSAL_LM":
            return f"task_type {task}: there is no text to generate."
        if self.others or self.weight != 1:
            return "Adapters that are summed with weights are not loaded beside the base."
        if self.base_view is not None:
            return "The base that the adapter saw in training is not the one that its files hold."
        return None

    def causes(self, levels: Sequence[Level]) -> list[Finding]:
        """Why the answer is ``different``, the likeliest cause first."""
        causes = diagnose_findings(finding for level in levels for finding in level.findings)
        if self.merged is not None and self.tensors:
            others, codes = self._other_adapters(), self._codes()
            of_weights = diagnose_weights(self.tensors, self.merged, self.expectation, others, self._other_bases())
            if codes is not None:
                of_weights += diagnose_codes(self.quantized, codes, self.expectation, others)
            named = {cause.code for cause in of_weights}
            causes = [*of_weights, *(cause for cause in causes if cause.code not in named)]
        return [cause for cause in causes if cause.code != "cause_behaviour"] or causes

    def _other_bases(self) -> dict[str, Expectation]:
        """What a merge would hold on another base of this one's form that is at hand."""
        found = {}
        for name, folder in relatives_of(self.base.path).items():
            try:
                if folder != self.merged_dir.resolve():
                    found[name] = Expectation(Checkpoint(folder), self.expectation.stack, self.expectation.binding)
            except TunesmithError:
                continue
        return found

    def _expect_if_readable(self, adapter: str) -> Expectation | None:
        try:
            return self._expect(adapter)
        except TunesmithError:
            return None


def verify(
    run: Run,
    merged_dir: Path,
    *,
    base_dir: Path,
    base_model: str,
    checkpoint: str | int = "final",
    weight: float = 1.0,
    adapters: Sequence[tuple[str, float]] = (),
    base_is_residual: bool = False,
    base_view: StartView | None = None,
    sample: bool = False,
    certificate: bool = False,
    executor: Executor | None = None,
    levels: Sequence[str] = LEVELS,
    prompts: Sequence[Conversation] = (),
    dtype: str = "float32",
    device: str = "cpu",
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> Verdict:
    """Hold a merged model against its base and its adapter.

    Args:
        run: the run.
        merged_dir: the merged model, by whatever tool, stored in full or in the compressed-tensors format.
        base_dir: the base model's directory.
        base_model: the base as it was asked for.
        checkpoint: which of the run's adapters: ``final``, ``checkpoint-N`` or ``N``.
        weight: what its update is multiplied by.
        adapters: directories of further adapters that were summed with it, each with its weight.
        base_is_residual: the base is what remained after the adapter's start was subtracted (PiSSA and its like).
        base_view: how the base is to be seen, where the merge started from something else than its files say.
        sample: whether the weights level only looks at the first, the last and another tile of each tensor.  The answer
            is then ``different``, or ``not_verified``: what was not looked at may be anything.
        certificate: whether to write a certificate into the directory, where the answer is identical or equal within
            rounding or quantization; for any other answer the directory is left as it is.
        executor: what recomputes the parts of the weights; None for a pool of threads, one a core.
        levels: which levels to look at; without ``weights`` the answer cannot be better than ``not_verified``.
        prompts: for the behaviour level; empty for a built-in set.
        dtype: of the behaviour level's arithmetic; float32 keeps its noise far below bf16's rounding of the weights.
        device: where the behaviour level computes.
        progress: told of the work's parts.
        cancellation: read between tiles, prompts and tokens.

    Returns:
        The verdict; a merged model that is wrong is an answer, not an exception.

    Raises:
        TunesmithError: the run, its adapter or the base cannot be read, or do not fit each other.
    """
    retried = retried_by(executor)
    work = Verification(
        run,
        merged_dir,
        base_dir=base_dir,
        base_model=base_model,
        checkpoint=checkpoint,
        weight=weight,
        adapters=adapters,
        base_is_residual=base_is_residual,
        base_view=base_view,
        sample=sample,
        certificate=certificate,
        executor=executor,
        progress=progress,
        cancellation=cancellation or Cancellation(),
    )
    steps: dict[LevelName, Callable[[], list[Finding]]] = {
        "structure": work.structure,
        "assets": work.assets,
        "weights": work.weights,
        "behaviour": lambda: work.measure_behaviour(prompts, dtype=dtype, device=device),
    }
    done = []
    for name in LEVELS:
        started = time.monotonic()
        # Structure is always looked at: the levels after it read what it opened.
        asked = name in levels or name == "structure"
        findings = steps[name]() if asked else []
        status = status_of(findings) if asked else "skipped"
        done.append(Level(name=name, status=status, findings=tuple(findings), seconds=time.monotonic() - started))
    answer = answer_of(done, work.tensors, work.quantized, sampled=sample)
    return Verdict(
        run=run.name,
        merged=merged_dir.resolve().name,
        checkpoint=work.chosen.name,
        base_model=base_model,
        answer=answer,
        levels=tuple(done),
        causes=tuple(work.causes(done)) if answer == "different" else (),
        tensors=work.tensors,
        quantized=work.quantized,
        behaviour=work.behaviour,
        dtype=work.dtype,
        certificate=work.certify(answer, done),
        retried_units=retried_by(executor) - retried,
    )


def _not_measured(reason: str) -> Finding:
    return Finding(code="behaviour_not_measured", severity="info", params={"reason": reason})

"""A GGUF file's levels, run in turn, and the verdict they come to."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import get_args

from tunesmith.checkpoint import Checkpoint
from tunesmith.errors import CheckpointError
from tunesmith.progress import Cancellation, ProgressCallback, no_progress
from tunesmith.record import Finding
from tunesmith.verify.gguf.families import Family, Source, family_of
from tunesmith.verify.gguf.file import GgufFile
from tunesmith.verify.gguf.records import GgufRow, GgufTensor, GgufVerdict
from tunesmith.verify.gguf.running import Answers, ask, check_behaviour, engine_missing, prompts_for, window_of
from tunesmith.verify.gguf.settings import check_settings
from tunesmith.verify.gguf.vocabulary import check_added, check_tokenizing, check_vocabulary, probes_of
from tunesmith.verify.gguf.weights import check_weights, match_tensors, weighted, weights_findings
from tunesmith.verify.records import Answer, Level, LevelName, Status

GGUF_LEVELS: tuple[LevelName, ...] = get_args(LevelName)


def verify_gguf(
    model_dir: Path,
    file: Path,
    *,
    levels: Sequence[str] = GGUF_LEVELS,
    threads: int | None = None,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> GgufVerdict:
    """Prove that a GGUF file is the model of a directory, or say why it is not.

    Args:
        model_dir: a complete model directory, whose stored numbers are the exact ones.
        file: the GGUF file, by whatever converter.
        levels: of ``structure`` (architecture, settings, names and shapes), ``assets`` (vocabulary, special ids, chat
            template), ``weights`` and ``behaviour`` (a real llama.cpp, where one is installed).
        threads: of llama.cpp; None for the processor's.
        progress: told of the work's parts.
        cancellation: read between tiles and prompts.

    Returns:
        The verdict; a wrong file is an answer, not an exception.

    Raises:
        CheckpointError: the directory is no model, or the file is not there or no GGUF file.
        MissingExtraError: the package that reads GGUF is not installed.
    """
    return _Verification(
        GgufFile(file),
        Checkpoint(model_dir),
        levels,
        threads=threads or os.cpu_count() or 1,
        progress=progress,
        cancellation=cancellation or Cancellation(),
    ).verdict()


class _Verification:
    """What the levels share."""

    def __init__(
        self,
        file: GgufFile,
        model: Checkpoint,
        levels: Sequence[str],
        *,
        threads: int,
        progress: ProgressCallback,
        cancellation: Cancellation,
    ) -> None:
        self.file, self.model, self.levels = file, model, levels
        self.threads, self.progress, self.cancellation = threads, progress, cancellation
        self.family: Family | None = family_of(model.config)
        self.sources: Mapping[str, Source] = {}
        self.matched: tuple[Finding, ...] = ()
        self.tensors: tuple[GgufTensor, ...] = ()
        self.behaviour: tuple[GgufRow, ...] = ()
        self.prompts: list[list[int]] = []
        self.probes: list[str] = []
        self.answers: Answers | None = None
        self.not_run: Finding | None = None

    def verdict(self) -> GgufVerdict:
        if self.family is not None and self.family.gguf == self.file.architecture:
            matched = match_tensors(self.file, self.model, self.family)
            self.sources, self.matched = matched.sources, matched.findings
        self._ask()
        of: Mapping[LevelName, Callable[[], list[Finding]]] = {
            "structure": self._structure,
            "assets": self._assets,
            "weights": self._weights,
            "behaviour": self._behaviour,
        }
        done = tuple(self._level(name, of[name]) for name in GGUF_LEVELS)
        kinds: Counter[str] = Counter()
        for name, tensor in self.file.tensors.items():
            kinds[self.file.type(name)] += int(tensor.n_elements)
        return GgufVerdict(
            model=self.model.path.resolve().name,
            file=self.file.path.name,
            type=kinds.most_common(1)[0][0] if kinds else "–",
            architecture=self.file.architecture or None,
            answer=self._answer(done),
            levels=done,
            tensors=self.tensors,
            behaviour=self.behaviour,
            engine=self.answers.engine if self.answers else None,
        )

    def _level(self, name: LevelName, look: Callable[[], list[Finding]]) -> Level:
        started = time.perf_counter()
        findings = look() if name in self.levels else []
        seconds = time.perf_counter() - started
        return Level(name=name, status=_status(findings), findings=tuple(findings), seconds=seconds)

    def _structure(self) -> list[Finding]:
        stated = self.model.config.get("architectures") or ["–"]
        if self.family is None:
            return [_of("gguf_architecture_unproven", architecture=str(stated[0]), found=self.file.architecture)]
        if self.family.gguf != self.file.architecture:
            params = {"expected": self.family.gguf, "found": self.file.architecture or "–"}
            return [Finding(code="gguf_architecture_differs", severity="error", params=params)]
        return [*check_settings(self.file, self.model, self.family), *self.matched]

    def _assets(self) -> list[Finding]:
        findings = check_vocabulary(self.file, self.model.path)
        if self.answers is None or not self.probes:
            return findings
        tokens = check_tokenizing(self.model.path, self.probes, self.answers.texts)
        if tokens.severity == "ok":  # another name of what does the same
            findings = [_softer(one) if one.code == "gguf_cut_differs" else one for one in findings]
        return [*findings, tokens]

    def _weights(self) -> list[Finding]:
        if not self.sources:
            return []
        self.tensors = check_weights(
            self.file, self.model, self.sources, progress=self.progress, cancellation=self.cancellation
        )
        return weights_findings(self.tensors, weighted=weighted(self.file))

    def _behaviour(self) -> list[Finding]:
        if self.answers is None:
            return [self.not_run] if self.not_run else []
        if not self.prompts:
            return []
        try:
            self.behaviour, finding = check_behaviour(
                self.file, self.model, self.sources, self.prompts, self.answers, progress=self.progress
            )
        except CheckpointError as error:
            return [Finding(code="gguf_not_run", severity="info", params={"reason": error.what})]
        # What llama.cpp puts before a text is a part of how it behaves; with the assets it is told there.
        return [finding] if "assets" in self.levels else [*check_added(self.file, self.model.path), finding]

    def _ask(self) -> None:
        """Ask llama.cpp once, for whichever levels need it."""
        wanted = {"assets", "behaviour"} & set(self.levels)
        if not wanted:
            return
        if package := engine_missing():
            self.not_run = Finding(code="gguf_no_engine", severity="info", params={"package": package})
            return
        try:
            if "assets" in wanted and (self.model.path / "tokenizer.json").is_file():
                self.probes = probes_of(self.model.path)
            if "behaviour" in wanted:
                self.prompts = prompts_for(self.file, self.model)
        except CheckpointError as error:
            self.not_run = Finding(code="gguf_not_run", severity="info", params={"reason": error.what})
            return
        try:
            self.answers = ask(
                self.file.path.resolve(),
                texts=self.probes,
                prompts=self.prompts,
                window=window_of(self.model),
                threads=self.threads,
                cancellation=self.cancellation,
            )
        except CheckpointError as error:
            self.not_run = Finding(code="gguf_engine_failed", severity="error", params={"found": error.found or "–"})

    def _answer(self, levels: Sequence[Level]) -> Answer:
        by_name = {level.name: level for level in levels}
        if any(level.status == "fail" for level in levels):
            return "different"
        needed = (by_name["structure"], by_name["assets"], by_name["weights"])
        unproven = {"gguf_type_unproven", "gguf_architecture_unproven", "gguf_tokens_unproven"}
        codes = {finding.code for level in levels for finding in level.findings}
        if any(level.status == "skipped" for level in needed) or codes & unproven:
            return "not_verified"
        # A way of cutting text that has no name here is proved by llama.cpp's own tokens, or not at all.
        if "gguf_cut_unknown" in codes and "gguf_tokenizes_same" not in codes:
            return "not_verified"
        return "identical" if "gguf_weights_exact" in codes else "equal_within_rounding"


def _status(findings: Sequence[Finding]) -> Status:
    severities = {finding.severity for finding in findings}
    if "error" in severities:
        return "fail"
    if "warning" in severities:
        return "warn"
    return "pass" if "ok" in severities else "skipped"


def _softer(finding: Finding) -> Finding:
    return finding.model_copy(update={"severity": "warning"})


def _of(code: str, **params: str) -> Finding:
    return Finding(code=code, severity="warning", params=params)

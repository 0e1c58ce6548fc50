"""A GGUF adapter against the LoRA adapter that it was made from: every factor, and the scale of every pair."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tunesmith.adapter import LowRank, Stack
from tunesmith.checkpoint import Checkpoint, Float64
from tunesmith.errors import CheckpointError
from tunesmith.progress import Cancellation, Progress, ProgressCallback, no_progress
from tunesmith.record import Finding, Value
from tunesmith.verify.gguf.bounds import outside
from tunesmith.verify.gguf.families import family_of, interleaved, sources_of
from tunesmith.verify.gguf.file import GgufFile
from tunesmith.verify.gguf.records import GgufRow, GgufTensor, GgufVerdict
from tunesmith.verify.gguf.running import WINDOW, ask, check_behaviour, engine_missing, prompts_for
from tunesmith.verify.gguf.weights import match_tensors, weights_findings
from tunesmith.verify.records import Answer, Level, LevelName, Status

ADAPTER_LEVELS: tuple[LevelName, ...] = ("structure", "weights", "behaviour")
_ALPHA = "adapter.lora.alpha"


def verify_gguf_adapter(
    adapter: Path,
    base: Path,
    file: Path,
    *,
    base_gguf: Path | None = None,
    levels: Sequence[str] = ADAPTER_LEVELS,
    threads: int | None = None,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> GgufVerdict:
    """Prove that a GGUF adapter adds what an adapter of PEFT's adds.

    llama.cpp adds alpha / r · B·A.  A must be the adapter's own; B, interleaved as the base's rows are, may carry what
    alpha / r lacks of the adapter's scale.

    Args:
        adapter: PEFT's directory.
        base: the base model's directory.
        file: the GGUF adapter.
        base_gguf: a GGUF file of the base, which llama.cpp puts the adapter on; None for no behaviour level.
        levels: of ``structure``, ``weights`` and ``behaviour``.
        threads: of llama.cpp; None for the processor's.
        progress: told of pairs and prompts.
        cancellation: read between pairs.

    Returns:
        The verdict.

    Raises:
        TunesmithError: one of the three cannot be read, or the adapter does not fit the base.
    """
    started = time.perf_counter()
    found, model, stack = GgufFile(file), Checkpoint(base), Stack([(adapter, 1.0)])
    pairs = [update for update in stack.bind(model).updates if isinstance(update, LowRank)]
    structure, places, heads = _structure(found, model, pairs)
    tensors: list[GgufTensor] = []
    alpha = found.get(_ALPHA)
    stop = cancellation or Cancellation()
    if isinstance(alpha, float) and alpha and places and "weights" in levels:
        for number, (name, pair) in enumerate(places.items()):
            stop.check()
            progress(Progress("verify weights", number, len(places), "pairs", name))
            tensors += _pair(found, stack, name, pair, alpha, heads=heads[name])
    weights = weights_findings(tensors)
    seconds = time.perf_counter() - started
    run = _Run(base_gguf, adapter, model, file, threads=threads, progress=progress, cancellation=stop)
    behaviour = run.findings() if "behaviour" in levels else []
    done = (
        _level("structure", structure if "structure" in levels else [], seconds),
        _level("weights", weights, seconds),
        _level("behaviour", behaviour, time.perf_counter() - started - seconds),
    )
    return GgufVerdict(
        model=adapter.resolve().name,
        file=file.name,
        type=tensors[0].type if tensors else "–",
        architecture=found.architecture or None,
        answer=_answer(done, tensors),
        levels=done,
        tensors=tuple(tensors),
        behaviour=run.rows,
        engine=run.engine,
    )


class _Run:
    """The adapter in a real llama.cpp, on a GGUF file of its base, against PEFT's own forward."""

    def __init__(
        self,
        base_gguf: Path | None,
        adapter: Path,
        model: Checkpoint,
        file: Path,
        *,
        threads: int | None,
        progress: ProgressCallback,
        cancellation: Cancellation,
    ) -> None:
        self._base_gguf, self._adapter, self._model, self._file = base_gguf, adapter, model, file
        self._threads, self._progress, self._cancellation = threads, progress, cancellation
        self.rows: tuple[GgufRow, ...] = ()
        self.engine: str | None = None

    def findings(self) -> list[Finding]:
        if self._base_gguf is None:
            return [Finding(code="gguf_adapter_not_run", severity="info")]
        if package := engine_missing():
            return [Finding(code="gguf_no_engine", severity="info", params={"package": package})]
        found, family = GgufFile(self._base_gguf), family_of(self._model.config)
        if family is None or family.gguf != found.architecture:
            params: dict[str, Value] = {"expected": family.gguf if family else "–", "found": found.architecture or "–"}
            return [Finding(code="gguf_architecture_differs", severity="error", params=params)]
        try:
            prompts = prompts_for(found, self._model)
        except CheckpointError as error:
            return [Finding(code="gguf_not_run", severity="info", params={"reason": error.what})]
        try:
            answers = ask(
                self._base_gguf.resolve(),
                texts=(),
                prompts=prompts,
                window=WINDOW,
                threads=self._threads or os.cpu_count() or 1,
                cancellation=self._cancellation,
                adapter=self._file.resolve(),
            )
        except CheckpointError as error:
            return [Finding(code="gguf_engine_failed", severity="error", params={"found": error.found or "–"})]
        sources = match_tensors(found, self._model, family).sources
        self.engine = answers.engine
        self.rows, finding = check_behaviour(
            found, self._model, sources, prompts, answers, progress=self._progress, adapter=self._adapter
        )
        return [finding]


def _level(name: LevelName, findings: list[Finding], seconds: float) -> Level:
    severities = {finding.severity for finding in findings}
    status: Status = "fail" if "error" in severities else "warn" if "warning" in severities else "pass"
    return Level(
        name=name, status=status if severities - {"info"} else "skipped", findings=tuple(findings), seconds=seconds
    )


def _answer(levels: tuple[Level, ...], tensors: list[GgufTensor]) -> Answer:
    if any(level.status == "fail" for level in levels):
        return "different"
    if not tensors:
        return "not_verified"
    return "identical" if all(one.exact == one.elements for one in tensors) else "equal_within_rounding"


def _structure(
    file: GgufFile, model: Checkpoint, pairs: list[LowRank]
) -> tuple[list[Finding], dict[str, LowRank], dict[str, int | None]]:
    """What the file says it is, where each pair is in it, and in how many heads its rows are interleaved."""
    family = family_of(model.config)
    if family is None:
        stated = str((model.config.get("architectures") or ["–"])[0])
        params = {"architecture": stated, "found": file.architecture}
        return [Finding(code="gguf_architecture_unproven", severity="warning", params=params)], {}, {}
    findings = [
        Finding(
            code="gguf_setting_differs", severity="error", params={"setting": key, "expected": wanted, "found": said}
        )
        for key, wanted in (
            ("general.architecture", family.gguf),
            ("general.type", "adapter"),
            ("adapter.type", "lora"),
        )
        if (said := str(file.get(key) or "–")) != wanted
    ]
    if not isinstance(file.get(_ALPHA), float):
        params = {"setting": _ALPHA, "expected": "a number", "found": str(file.get(_ALPHA))}
        findings.append(Finding(code="gguf_setting_differs", severity="error", params=params))
    sources, _ = sources_of(model, family)
    target_of = {source.names[0]: name for name, source in sources.items()}
    places = {target_of[pair.name]: pair for pair in pairs if pair.name in target_of}
    wanted_names = {f"{name}.lora_{half}" for name in places for half in "ab"}
    missing, more = sorted(wanted_names - file.tensors.keys()), sorted(file.tensors.keys() - wanted_names)
    for code, names in (("gguf_tensors_missing", missing), ("gguf_tensors_unexpected", more)):
        if names:
            about: dict[str, Value] = {"count": len(names), "names": ", ".join(names[:5])}
            findings.append(Finding(code=code, severity="error", params=about))
    there = {name: pair for name, pair in places.items() if not {f"{name}.lora_a", f"{name}.lora_b"} & set(missing)}
    good = Finding(code="gguf_tensors_matched", severity="ok", params={"count": len(wanted_names)})
    return findings or [good], there, {name: sources[name].heads for name in there}


def _pair(
    file: GgufFile, stack: Stack, name: str, pair: LowRank, alpha: float, *, heads: int | None
) -> list[GgufTensor]:
    a, b = stack.factors(pair)
    scaled = (b * (pair.scaling * pair.r / alpha)).astype(np.float32).astype(np.float64)
    if heads:
        scaled = interleaved(scaled, heads, scaled.shape[0])
    return [_held(file, f"{name}.lora_a", pair.name, a), _held(file, f"{name}.lora_b", pair.name, scaled)]


def _held(file: GgufFile, name: str, source: str, exact: Float64) -> GgufTensor:
    kind, shape = file.type(name), file.shape(name)
    same_shape = shape == exact.shape
    raw = file.raw(name, None, 0, shape[0])
    y = file.values(name, raw) if same_shape else np.full_like(exact, np.nan)
    bad = outside(kind, raw, y, exact) if same_shape else np.ones_like(exact, dtype=bool)
    norm = float((exact**2).sum())
    return GgufTensor(
        name=name,
        source=source,
        type=kind,
        elements=exact.size,
        exact=int((exact == y).sum()),
        outside=0 if bad is None else int(bad.sum()),
        relative_error=(float(((y - exact) ** 2).sum()) / norm) ** 0.5 if norm and same_shape else None,
    )

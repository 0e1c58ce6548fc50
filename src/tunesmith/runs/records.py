"""The records that describe a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tunesmith.record import Finding, Part, Record, Value


class RunFile(Part):
    """One file of a run directory.

    Attributes:
        path: relative to the run, with forward slashes.
        size_bytes: its size.
        kind: the key of its explanation, such as ``adapter_weights``; ``unknown`` where nothing is known.
        needed_for: what would be lost without it.
    """

    path: str
    size_bytes: int
    kind: str
    needed_for: Literal["inference", "resuming", "record", "unknown"]


class LogRow(Part):
    """One logged step; what was not logged is None.

    Attributes:
        step: optimizer steps done.
        epoch: epochs done.
        loss: training loss, mean nats a supervised token since the row before.
        eval_loss: held-out loss, mean nats a supervised token.
        learning_rate: at that step.
        grad_norm: the gradient's norm before clipping.
        source: the file it was read from.
    """

    step: int
    epoch: float | None = None
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    source: str


class RunCheckpoint(Part):
    """One saved adapter.

    Attributes:
        name: ``checkpoint-N``, or ``final`` for the adapter at the run's root.
        step: optimizer steps done when it was saved; None where that is not recorded.
        path: absolute directory.
        loss: the training loss logged nearest at or before it.
        eval_loss: the held-out loss logged at its step.
        is_best: whether the trainer recorded it as the best.
    """

    name: str
    step: int | None
    path: str
    loss: float | None = None
    eval_loss: float | None = None
    is_best: bool = False


class Run(Record):
    """One run directory, understood.

    Attributes:
        path: absolute directory.
        kind: what the path named: a run, one of its checkpoints, or a bare adapter.
        writer: the tool that wrote it, as far as its files tell.
        base_model: the base that the adapter names; None where it names none.
        base_sha256: hash of the base's weights that training recorded; None where it did not.
        files: every file, by path.
        checkpoints: saved adapters in order of step, ``final`` last.
        log: logged steps in order, one a step and kind.
        hyperparameters: what is recorded of the training's settings.
        metrics: final metrics.
        held_out: the file of rows that were kept from training, relative to the run; None where it keeps none.
        findings: what looks unhealthy.
    """

    path: str
    kind: Literal["run", "checkpoint", "adapter"]
    writer: Literal["tunesmith", "llamafactory", "trainer", "peft"]
    base_model: str | None
    base_sha256: str | None = None
    files: tuple[RunFile, ...]
    checkpoints: tuple[RunCheckpoint, ...]
    log: tuple[LogRow, ...] = ()
    hyperparameters: dict[str, Value] = {}
    metrics: dict[str, float] = {}
    held_out: str | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def name(self) -> str:
        """The directory's own name."""
        return Path(self.path).name

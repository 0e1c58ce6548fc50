"""The records that describe a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tunesmith.record import Finding, Part, Record, Value

NeededFor = Literal["inference", "resuming", "record", "unknown"]

Writer = Literal[
    "tunesmith", "llamafactory", "ms-swift", "axolotl", "unsloth", "mlx-lm", "trl", "trainer", "peft"
]  # fmt: skip


class RunFile(Part):
    """One file of a run directory.

    Attributes:
        path: relative to the run, with forward slashes.
        size_bytes: its size.
        kind: the key of its explanation, such as ``adapter_weights``; ``unknown`` where nothing is known.
        needed_for: what would be lost without it; ``record`` where nothing but knowledge would.
        written_by: the tool that writes such a file, such as ``peft``; None where that is not known.
    """

    path: str
    size_bytes: int
    kind: str
    needed_for: NeededFor
    written_by: str | None = None


class LogRow(Part):
    """One logged step; what was not logged is None.

    Attributes:
        step: optimizer steps done.
        epoch: epochs done.
        loss: training loss, mean nats a supervised token since the row before.
        eval_loss: held-out loss, mean nats a supervised token.
        learning_rate: at that step.
        grad_norm: the gradient's norm before clipping.
        tokens_per_s: throughput, tokens a second.
        total_tokens: tokens seen since training began.
        elapsed_s: seconds since training began.
        accuracy: share of supervised tokens that the model foretold, on the training rows.
        eval_accuracy: the same on the held-out rows.
        reward: mean reward; of preference trainers, the mean margin of the chosen answers above the rejected ones.
        sources: the files it was read from, the one that won first.
    """

    step: int
    epoch: float | None = None
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_s: float | None = None
    total_tokens: int | None = None
    elapsed_s: float | None = None
    accuracy: float | None = None
    eval_accuracy: float | None = None
    reward: float | None = None
    sources: tuple[str, ...] = ()


class Overruled(Part):
    """What another file says of a setting.

    Attributes:
        value: its value there.
        source: the file.
    """

    value: Value
    source: str


class Setting(Part):
    """One recorded setting of the training.

    Attributes:
        name: as its tool spells it, such as ``learning_rate``.
        value: what is taken to be true.
        source: the file that says so, relative to the run.
        overruled: other files that say otherwise, and lose.
    """

    name: str
    value: Value
    source: str
    overruled: tuple[Overruled, ...] = ()


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
        writer_mark: the file that tells; None where there is no mark of a tool.
        base_model: the base that the adapter names; None where it names none.
        base_sha256: hash of the base's weights that training recorded; None where it did not.
        files: every file, by path.
        checkpoints: saved adapters in order of step, ``final`` last.
        log: logged steps in order, one a step and kind.
        settings: what is recorded of the training's settings, by name.
        metrics: final metrics.
        held_out: the file of rows that were kept from training, relative to the run; None where it keeps none.
        findings: what looks unhealthy.
    """

    path: str
    kind: Literal["run", "checkpoint", "adapter"]
    writer: Writer
    writer_mark: str | None = None
    base_model: str | None
    base_sha256: str | None = None
    files: tuple[RunFile, ...]
    checkpoints: tuple[RunCheckpoint, ...]
    log: tuple[LogRow, ...] = ()
    settings: tuple[Setting, ...] = ()
    metrics: dict[str, float] = {}
    held_out: str | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def name(self) -> str:
        """The directory's own name; in the hub's cache, where that is a commit, the repository's."""
        path = Path(self.path)
        return "/".join(path.parents[1].name.split("--")[1:]) if path.parent.name == "snapshots" else path.name

    @property
    def hyperparameters(self) -> dict[str, Value]:
        """The settings' values by name."""
        return {setting.name: setting.value for setting in self.settings}

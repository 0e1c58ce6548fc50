"""Training logs, from whichever of their files there are, as one series."""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from tunesmith.record import Finding, Value
from tunesmith.runs.records import LogRow

TRAINER_LOG = "trainer_log.jsonl"
TRAINER_STATE = "trainer_state.json"
SWIFT_LOG = "logging.jsonl"

# ms-swift writes "10/60": the step and how many are planned.
_STEP_KEYS = ("current_steps", "step", "global_step/max_steps", "steps[global_step/max_steps]", "global_step")
_NUMBER_KEYS = {
    "epoch": "epoch",
    "loss": "loss",
    "eval_loss": "eval_loss",
    "lr": "learning_rate",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "throughput": "tokens_per_s",
    "total_tokens": "total_tokens",
    "num_input_tokens_seen": "total_tokens",
    "num_tokens": "total_tokens",
    # LLaMA-Factory's `accuracy` is a share of preference pairs, not of tokens, and so is not read.
    "mean_token_accuracy": "accuracy",
    "token_acc": "accuracy",
    "acc": "accuracy",
    "eval_mean_token_accuracy": "eval_accuracy",
    "eval_token_acc": "eval_accuracy",
    "eval_acc": "eval_accuracy",
    "reward": "reward",
    "mean_reward": "reward",
    # What a preference trainer raises: the mean reward of the chosen answers above that of the rejected ones.
    "rewards/margins": "reward",
}
_STEP_LIMIT = 10**9
_TOKEN_LIMIT = 10**18
_LONGEST_NUMBER = 40
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?|nan|inf|infinity)\s*", re.ASCII | re.I)
_CLOCK = re.compile(r"(?:(\d+) days?, )?(\d+):(\d\d):(\d\d)", re.ASCII)
_UNITS = re.compile(r"(?:(\d+)d)? ?(?:(\d+)h)? ?(?:(\d+)m)? ?(?:(\d+)s)?", re.ASCII)
_SECONDS = (86_400, 3_600, 60, 1)
# Trainers round a loss to four decimals or eight, or not at all.
_SAME_LOSS_ABSOLUTE = 1e-4
_SAME_LOSS_RELATIVE = 5e-4
_RESTARTS_NAMED = 5
# A restarted run's clock begins anew, so that at its first row it shows one logging interval, of two at least that the
# broken-off attempt had.  Two processes that write one log are only apart by how long each took to start.
_SET_BACK = 0.7
_COMES_AGAIN = 3


def read_log(rows: Iterable[Mapping[str, Any]], source: str) -> list[LogRow]:
    """Rows of one file as log rows, in the file's order.

    Knows the names that LLaMA-Factory, the HF Trainer, TRL and ms-swift write.  A value that is no number is left
    out, and so is a row whose step is no whole number from 0 to below 10⁹.

    Args:
        rows: the file's JSON objects.
        source: the file's name.

    Source:
        LLaMA-Factory ``train/callbacks.py`` (``LogCallback.on_log``), Transformers ``trainer.py``
        (``_maybe_log_save_evaluate``), TRL ``sft_trainer.py`` and its siblings (``log``), ms-swift
        ``trainers/callback.py`` (``add_train_message``).
    """
    series = []
    for row in rows:
        step = next((step for key in _STEP_KEYS if key in row and (step := _step(row[key])) is not None), None)
        if step is None:
            continue
        values: dict[str, Any] = {"step": step, "sources": (source,)}
        for key, value in row.items():
            name = _NUMBER_KEYS.get(key)
            if name is not None and (number := _number(value)) is not None:
                values[name] = number
        # Trainers that do not count tokens may log 0 of them.
        tokens, throughput = values.pop("total_tokens", None), values.pop("tokens_per_s", None)
        if tokens and 0 < tokens < _TOKEN_LIMIT:
            values["total_tokens"] = int(tokens)
        if throughput and throughput > 0:
            values["tokens_per_s"] = throughput
        series.append(LogRow(elapsed_s=_seconds(row.get("elapsed_time")), **values))
    return series


def merge_logs(*series: Sequence[LogRow]) -> tuple[tuple[LogRow, ...], list[Finding]]:
    """One row a step, in order.

    Of a restarted run the later row wins, and what it logged beyond the place that it went back to is left out: those
    weights are gone.  Across files the first one wins, and what it lacks the next ones fill.

    Args:
        series: the rows of each file in the file's order, the file that wins first.

    Returns:
        The rows that have a training or held-out loss, and findings: ``log_restarted``, ``log_interleaved`` and
        ``logs_disagree``.
    """
    merged: dict[int, LogRow] = {}
    findings: list[Finding] = []
    earlier: list[dict[int, LogRow]] = []
    for rows in series:
        latest, restarts, again = _latest(rows)
        if restarts:
            findings.append(_restarted(rows[0].sources[0], restarts))
        if again >= _COMES_AGAIN:
            params: dict[str, Value] = {"file": rows[0].sources[0], "count": again}
            findings.append(Finding(code="log_interleaved", severity="info", params=params))
        findings += _disagreements(earlier, latest)
        earlier.append(latest)
        for step, row in latest.items():
            held = merged.get(step)
            merged[step] = row if held is None else _filled(held, row)
    return tuple(merged[step] for step in sorted(merged)), findings


def as_number(value: object) -> float | None:
    """A JSON number as a float; None where it is none, or an integer beyond all floats."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _latest(rows: Iterable[LogRow]) -> tuple[dict[int, LogRow], list[int], int]:
    """One file's rows by step, the steps at which it was restarted, and how many rows came again without a restart.

    Only a training loss tells of a restart: held-out losses may be logged late, and LLaMA-Factory appends the rows of
    a prediction, which count from 0 and have no loss at all.
    """
    latest: dict[int, LogRow] = {}
    restarts: list[int] = []
    again, last, clock = 0, -1, None
    furthest: list[int] = []  # a heap of negated steps, so that a restart drops rows without a look at those it keeps
    for row in rows:
        if row.loss is None and row.eval_loss is None:
            continue
        if row.loss is not None:
            timed = clock is not None and row.elapsed_s is not None
            set_back = clock is not None and row.elapsed_s is not None and row.elapsed_s < _SET_BACK * clock
            if row.step <= last and (set_back if timed else row.step < last):
                restarts.append(row.step)
                while furthest and -furthest[0] > row.step:
                    del latest[-heapq.heappop(furthest)]
            elif row.step <= last:
                again += 1
            last, clock = row.step, row.elapsed_s
        held = latest.get(row.step)
        if held is None:
            heapq.heappush(furthest, -row.step)
        latest[row.step] = row if held is None else _later(held, row)
    return latest, restarts, again


def _later(held: LogRow, row: LogRow) -> LogRow:
    """Two rows of one step and file: the later wins, but a held-out row's clock does not replace a training row's."""
    if row.loss is not None or held.loss is None:
        return _filled(row, held)
    return _filled(held.model_copy(update={"eval_loss": None, "eval_accuracy": None}), row)


def _filled(first: LogRow, second: LogRow) -> LogRow:
    held = first.__dict__
    values = {name: value for name, value in second.__dict__.items() if value is not None and held[name] is None}
    if not values:
        return first
    values["sources"] = tuple(dict.fromkeys(first.sources + second.sources))
    return first.model_copy(update=values)


def _restarted(file: str, restarts: Sequence[int]) -> Finding:
    named = ", ".join(map(str, restarts[:_RESTARTS_NAMED])) + (", …" if len(restarts) > _RESTARTS_NAMED else "")
    params: dict[str, Value] = {"file": file, "count": len(restarts), "steps": named}
    return Finding(code="log_restarted", severity="info", params=params)


def _disagreements(earlier: Iterable[Mapping[int, LogRow]], latest: Mapping[int, LogRow]) -> list[Finding]:
    """Where this file tells another loss than one before it: a finding for each such file, with the first step."""
    findings = []
    for before in earlier:
        shared = ((before[step], latest[step]) for step in sorted(before.keys() & latest.keys()))
        differing = [
            (one.step, one.sources[0], other.sources[0], *values)
            for one, other in shared
            for values in ((one.loss, other.loss), (one.eval_loss, other.eval_loss))
            if _differ(*values)
        ]
        if differing:
            step, file, other_file, value, other_value = differing[0]
            params: dict[str, Value] = {"step": step, "count": len(differing), "file": file, "other_file": other_file}
            params |= {"value": _shown(value), "other_value": _shown(other_value)}
            findings.append(Finding(code="logs_disagree", severity="warning", params=params))
    return findings


def _shown(value: float | None) -> Value:
    """A value as a finding's parameter: one that is not finite is a text, as it is after a way through JSON."""
    return value if value is None or math.isfinite(value) else str(value)


def _differ(one: float | None, other: float | None) -> bool:
    if one == other or one is None or other is None:
        return False
    if math.isnan(one) or math.isnan(other):
        return not (math.isnan(one) and math.isnan(other))
    return not math.isclose(one, other, rel_tol=_SAME_LOSS_RELATIVE, abs_tol=_SAME_LOSS_ABSOLUTE)


def _step(value: object) -> int | None:
    number = _number(value.partition("/")[0] if isinstance(value, str) else value)
    return int(number) if number is not None and 0 <= number < _STEP_LIMIT and number == int(number) else None


def _number(value: object) -> float | None:
    """A number, or a text that is one: newer trainers write some of theirs as texts."""
    if type(value) is float:  # nearly all are, and there may be millions
        return value
    if isinstance(value, str):
        return float(value) if len(value) <= _LONGEST_NUMBER and _NUMBER.fullmatch(value) else None
    return as_number(value)


def _seconds(value: object) -> float | None:
    """A duration: seconds, ``H:MM:SS``, ``D days, H:MM:SS`` or ``1h 2m 3s``."""
    return _seconds_of(value) if isinstance(value, str | int | float) else None


@lru_cache(maxsize=256, typed=True)  # many rows are logged within a second
def _seconds_of(value: str | float) -> float | None:
    if isinstance(value, str) and 0 < len(value) <= _LONGEST_NUMBER:
        match = _CLOCK.fullmatch(value) or _UNITS.fullmatch(value)
        if match and any(match.groups()):
            return float(sum(int(part or 0) * unit for part, unit in zip(match.groups(), _SECONDS, strict=True)))
    number = _number(value)
    return number if number is not None and 0 <= number < math.inf else None

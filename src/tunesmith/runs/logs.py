"""Training logs, from whichever of their files there are, as one series."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tunesmith.record import Finding, Value
from tunesmith.runs.records import LogRow

TRAINER_LOG = "trainer_log.jsonl"
TRAINER_STATE = "trainer_state.json"


def read_log(rows: Iterable[Mapping[str, Any]], source: str) -> list[LogRow]:
    """Rows of one file as log rows; the names of LLaMA-Factory's log and of the HF Trainer's are both known."""
    series = []
    for row in rows:
        step = _number(row, "current_steps", "step")
        if step is None or not math.isfinite(step):
            continue
        series.append(
            LogRow(
                step=int(step),
                epoch=_number(row, "epoch"),
                loss=_number(row, "loss"),
                eval_loss=_number(row, "eval_loss"),
                learning_rate=_number(row, "lr", "learning_rate"),
                grad_norm=_number(row, "grad_norm"),
                source=source,
            )
        )
    return series


def merge_logs(*series: Iterable[LogRow]) -> tuple[LogRow, ...]:
    """One row a step: of a restarted run the later row wins, and what the first file lacks the next one fills."""
    merged: dict[int, dict[str, Any]] = {}
    for rows in series:
        latest: dict[int, dict[str, Any]] = {}
        for row in rows:
            values = {key: value for key, value in row.model_dump().items() if value is not None}
            # A trainer logs the training loss and the held-out loss of one step in two rows.
            latest[row.step] = {**latest.get(row.step, {}), **values}
        for step, values in latest.items():
            merged[step] = {**values, **merged.get(step, {})}
    rows_kept = (LogRow(**merged[step]) for step in sorted(merged))
    return tuple(row for row in rows_kept if row.loss is not None or row.eval_loss is not None)


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], list[Finding]]:
    """The rows of a JSON-lines file; damaged lines are left out and counted in a finding."""
    rows, damaged = [], 0
    # Not splitlines: JSON text may hold U+2028 and its like as they are.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            damaged += 1
    params: dict[str, Value] = {"file": path.name, "count": damaged}
    return rows, [Finding(code="log_lines_damaged", severity="info", params=params)] if damaged else []


def health(log: tuple[LogRow, ...]) -> list[Finding]:
    """What looks unhealthy in a loss curve; nothing where all is well."""
    findings = []
    bad = next((row for row in log if row.loss is not None and not math.isfinite(row.loss)), None)
    if bad is not None:
        findings.append(Finding(code="loss_not_finite", severity="error", params={"step": bad.step}))
    losses = [row.loss for row in log if row.loss is not None and math.isfinite(row.loss)]
    if len(losses) >= 4:
        quarter = max(1, len(losses) // 4)
        first, last = sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter
        if last > first:
            findings.append(Finding(code="loss_rose", severity="warning", params={"first": first, "last": last}))
    held_out = [row for row in log if row.eval_loss is not None and math.isfinite(row.eval_loss)]
    if len(held_out) >= 3:
        best = min(held_out, key=lambda row: row.eval_loss or 0.0)
        rise = (held_out[-1].eval_loss or 0.0) - (best.eval_loss or 0.0)
        if best is not held_out[-1] and rise > 0.02 * abs(best.eval_loss or 1.0):
            findings.append(
                Finding(
                    code="overfitting",
                    severity="warning",
                    params={"step": best.step, "best": best.eval_loss, "last": held_out[-1].eval_loss},
                )
            )
    return findings


def as_number(value: object) -> float | None:
    """A JSON number as a float; None where it is none, or an integer beyond all floats."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _number(row: Mapping[str, Any], *keys: str) -> float | None:
    for key in keys:
        value = as_number(row.get(key))
        if value is not None:
            return value
    return None

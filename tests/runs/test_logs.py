"""Training logs: two files' formats, half-written lines and restarts become one series."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runs.making import factory_row, history, jsonl
from tunesmith.runs.logs import TRAINER_LOG, TRAINER_STATE, health, merge_logs, read_jsonl, read_log
from tunesmith.runs.records import LogRow


def test_both_files_names_are_known() -> None:
    """``current_steps`` and ``lr``, or ``step`` and ``learning_rate``."""
    factory = read_log([factory_row(10, loss=2.0, lr=1e-4)], TRAINER_LOG)
    trainer = read_log([{"step": 10, "epoch": 1.0, "loss": 2.0, "learning_rate": 1e-4}], TRAINER_LOG)
    assert factory == trainer == [LogRow(step=10, epoch=1.0, loss=2.0, learning_rate=1e-4, source=TRAINER_LOG)]


def test_a_half_written_last_line_is_left_out_and_counted(tmp_path: Path) -> None:
    """A run that is killed, or still going on."""
    file = tmp_path / "trainer_log.jsonl"
    jsonl(file, [factory_row(1, loss=2.0), factory_row(2, loss=1.0)])
    file.write_text(file.read_text() + '{"current_steps": 3, "lo')
    rows, findings = read_jsonl(file)
    assert [row["current_steps"] for row in rows] == [1, 2]
    assert [(finding.code, finding.params) for finding in findings] == [
        ("log_lines_damaged", {"file": "trainer_log.jsonl", "count": 1})
    ]


def test_damaged_lines_anywhere_are_counted(tmp_path: Path) -> None:
    """Other bytes, other types, other nesting; blank lines are none."""
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"a": 1}\n\xff\xfe\n[]\n3\n\n   \n' + b"[" * 100_000 + b'\n{"a": 2}\r\n')
    rows, findings = read_jsonl(file)
    assert rows == [{"a": 1}, {"a": 2}]
    assert findings[0].params["count"] == 4


def test_a_line_ends_only_at_a_line_break(tmp_path: Path) -> None:
    """Texts may hold U+2028, U+0085 and form feeds' kin as they are."""
    file = tmp_path / "x.jsonl"
    file.write_bytes('{"a": "one\u2028two\x85three"}\n'.encode())
    assert read_jsonl(file) == ([{"a": "one\u2028two\x85three"}], [])


def test_of_a_restarted_run_the_later_row_wins() -> None:
    """It went back to step 10 and came by 20 again; what the later row lacks stays."""
    rows = [
        factory_row(10, loss=2.0),
        factory_row(20, loss=9.0, eval_loss=1.7),
        factory_row(30, loss=8.0),
        factory_row(20, loss=1.5),
        factory_row(30, loss=1.2),
    ]
    merged = merge_logs(read_log(rows, TRAINER_LOG))
    assert [(row.step, row.loss, row.eval_loss) for row in merged] == [(10, 2.0, None), (20, 1.5, 1.7), (30, 1.2, None)]


def test_the_first_file_wins_and_the_second_fills() -> None:
    """The trainer's state has gradients, the log has the steps since it was saved."""
    state = read_log([{"step": 10, "loss": 2.0, "grad_norm": 1.5}], TRAINER_STATE)
    log = read_log([factory_row(10, loss=2.1, lr=1e-4), factory_row(20, loss=1.0)], TRAINER_LOG)
    first, second = merge_logs(state, log)
    assert (first.loss, first.grad_norm, first.learning_rate, first.source) == (2.0, 1.5, 1e-4, TRAINER_STATE)
    assert (second.loss, second.source) == (1.0, TRAINER_LOG)


def test_rows_without_any_loss_are_left_out() -> None:
    """LLaMA-Factory writes nulls; the Trainer ends with a row of run times."""
    rows = [factory_row(5, loss=None, eval_loss=None), {"step": 30, "train_runtime": 9.0, "train_loss": 1.5}]
    assert merge_logs(read_log(rows, TRAINER_LOG)) == ()


def test_training_and_held_out_rows_of_one_step_become_one() -> None:
    """Whichever comes first."""
    rows = [{"step": 10, "eval_loss": 1.9}, {"step": 10, "loss": 2.0}]
    for order in (rows, rows[::-1]):
        (row,) = merge_logs(read_log(order, TRAINER_STATE))
        assert (row.loss, row.eval_loss) == (2.0, 1.9)


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.none(), max_size=1)
ROWS = st.lists(
    st.dictionaries(
        st.sampled_from(["step", "current_steps", "loss", "eval_loss", "lr", "epoch", "grad_norm"]), VALUES
    ),
    max_size=8,
)


@given(first=ROWS, second=ROWS)
@settings(max_examples=300, deadline=None)
def test_any_rows_become_one_ordered_series(first: list[dict[str, object]], second: list[dict[str, object]]) -> None:
    """No crash whatever they hold: steps ascend, each once, each with a loss; and its health can be told."""
    log = merge_logs(read_log(first, TRAINER_STATE), read_log(second, TRAINER_LOG))
    steps = [row.step for row in log]
    assert steps == sorted(set(steps))
    assert all(row.loss is not None or row.eval_loss is not None for row in log)
    health(log)


def test_health_reads_the_trainers_rows() -> None:
    """A curve that falls is healthy."""
    assert health(merge_logs(read_log(history(3.0, 2.0, 1.5, 1.2, 1.1), TRAINER_STATE))) == []

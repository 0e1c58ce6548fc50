"""Training logs: four trainers' formats, restarts and several files become one series."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runs.making import factory_row
from tunesmith.record import Finding
from tunesmith.runs.health import health
from tunesmith.runs.logs import SWIFT_LOG, TRAINER_LOG, TRAINER_STATE, merge_logs, read_log
from tunesmith.runs.records import LogRow


def only(row: dict[str, Any], source: str = TRAINER_LOG) -> dict[str, Any]:
    """What was read of a row, without what it does not hold."""
    (read,) = read_log([row], source)
    return {name: value for name, value in read if value is not None}


def steps_and_losses(*rows: dict[str, Any]) -> tuple[list[tuple[int, float | None, float | None]], list[str]]:
    """The merged series of one file, and its findings' codes."""
    log, findings = merge_logs(read_log(rows, TRAINER_LOG))
    return [(row.step, row.loss, row.eval_loss) for row in log], [finding.code for finding in findings]


# -- one file


def test_llama_factorys_rows_are_read() -> None:
    """``LogCallback.on_log`` of LLaMA-Factory 0.9.5."""
    row = factory_row(10, loss=2.0, lr=1e-4, elapsed_time="1:02:03", remaining_time="0:05:13")
    row |= {"throughput": 812.5, "total_tokens": 40960, "reward": 0.25, "percentage": 33.33}
    assert only(row) == {
        "step": 10,
        "epoch": 1.0,
        "loss": 2.0,
        "learning_rate": 1e-4,
        "tokens_per_s": 812.5,
        "total_tokens": 40960,
        "elapsed_s": 3723.0,
        "reward": 0.25,
        "sources": (TRAINER_LOG,),
    }


def test_llama_factorys_accuracy_is_not_taken_for_that_of_tokens() -> None:
    """It logs the share of preference pairs under that name."""
    assert "accuracy" not in only(factory_row(10, loss=0.69, accuracy=1.0))


def test_the_trainers_rows_are_read() -> None:
    """The HF Trainer's, with what TRL adds to them."""
    row = {"step": 10, "epoch": 1.0, "loss": 2.0, "learning_rate": 1e-4, "grad_norm": 0.7, "entropy": 1.9}
    row |= {"mean_token_accuracy": 0.61, "num_tokens": 2048.0}
    assert only(row, TRAINER_STATE) == {
        "step": 10,
        "epoch": 1.0,
        "loss": 2.0,
        "learning_rate": 1e-4,
        "grad_norm": 0.7,
        "total_tokens": 2048,
        "accuracy": 0.61,
        "sources": (TRAINER_STATE,),
    }
    held_out = {"step": 10, "eval_loss": 1.9, "eval_mean_token_accuracy": 0.6, "eval_num_tokens": 9, "eval_runtime": 1}
    assert only(held_out) == {"step": 10, "eval_loss": 1.9, "eval_accuracy": 0.6, "sources": (TRAINER_LOG,)}


def test_ms_swifts_rows_are_read() -> None:
    """``add_train_message``: the step and how many are planned as one text, durations in words."""
    row = {"loss": 1.85, "token_acc": 0.59, "grad_norm": 1.75, "learning_rate": 8e-08, "epoch": 0.96}
    row |= {"memory(GiB)": 15.83, "train_speed(iter/s)": 0.218, "percentage": "98.36%"}
    row |= {"global_step/max_steps": "60/61", "elapsed_time": "1h 4m 34s", "remaining_time": "4s"}
    expected = {
        "step": 60,
        "epoch": 0.96,
        "loss": 1.85,
        "learning_rate": 8e-08,
        "grad_norm": 1.75,
        "elapsed_s": 3874.0,
        "accuracy": 0.59,
        "sources": (SWIFT_LOG,),
    }
    assert only(row, SWIFT_LOG) == expected
    older = {**row, "steps[global_step/max_steps]": row["global_step/max_steps"], "acc": row["token_acc"]}
    del older["global_step/max_steps"], older["token_acc"]
    assert only(older, SWIFT_LOG) == expected
    assert only({"eval_loss": 1.5, "eval_token_acc": 0.7, "global_step/max_steps": "60/61"})["eval_accuracy"] == 0.7


def test_ms_swifts_closing_line_is_no_row() -> None:
    """It names the checkpoints and has no step."""
    closing = {"last_model_checkpoint": "x/checkpoint-60", "best_metric": 1.5, "log_history": [{"step": 1, "loss": 9}]}
    assert read_log([closing], SWIFT_LOG) == []


@pytest.mark.parametrize(
    ("row", "reward"),
    [
        ({"reward": 0.4, "rewards/format/mean": 1.0}, 0.4),
        ({"mean_reward": -0.3}, -0.3),
        ({"rewards/margins": 1.5}, 1.5),
    ],
)
def test_rewards_are_read(row: dict[str, float], reward: float) -> None:
    """Of TRL's GRPO, reward and DPO trainers, in order."""
    assert only({"step": 1, "loss": 0.1, **row})["reward"] == reward


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0:00:28", 28.0),
        ("26:00:01", 93601.0),
        ("1 day, 2:03:04", 93784.0),
        ("12 days, 0:00:01", 1036801.0),
        ("34s", 34.0),
        ("2d 16h 57m 8s", 233828.0),
        (7.5, 7.5),
        ("", None),
        ("soon", None),
        ("1:2", None),
        (-1, None),
        (math.inf, None),
        ("9" * 4000 + "s", None),
        (None, None),
    ],
)
def test_durations_are_read(text: object, seconds: float | None) -> None:
    """As each trainer writes them; what is none is left out."""
    assert only({"step": 1, "loss": 1.0, "elapsed_time": text}).get("elapsed_s") == seconds


@pytest.mark.parametrize("step", [10, 10.0, "10", " 10 ", "10/60", "1e1"])
def test_a_step_is_a_whole_number_however_it_is_written(step: object) -> None:
    """Texts too."""
    assert only({"step": step, "loss": 1.0})["step"] == 10


@pytest.mark.parametrize(
    "step", [-1, 1.5, 10**9, 10**18, 10**4000, math.nan, math.inf, True, None, "", "x", "1_0", "/60", [10], {}]
)
def test_a_row_without_a_sound_step_is_left_out(step: object) -> None:
    """Negative, broken, absurd, or no number."""
    assert read_log([{"step": step, "loss": 1.0}], TRAINER_LOG) == []
    assert only({"current_steps": step, "step": 3, "loss": 1.0})["step"] == 3


@pytest.mark.parametrize("value", [True, None, "", "loss", "0x1", "1_0", [1.0], {}, 10**4000, "1" * 100])
def test_a_value_that_is_no_number_is_left_out(value: object) -> None:
    """And the rest of the row is kept."""
    row = {"step": 1, "eval_loss": 1.0, "loss": value, "grad_norm": value, "total_tokens": value}
    assert only(row) == {"step": 1, "eval_loss": 1.0, "sources": (TRAINER_LOG,)}


@pytest.mark.parametrize(("value", "loss"), [("1.5", 1.5), ("-2e-3", -0.002), (3, 3.0), ("inf", math.inf), (0, 0.0)])
def test_a_number_may_be_a_text(value: object, loss: float) -> None:
    """As newer trainers write some of theirs."""
    assert only({"step": 1, "loss": value})["loss"] == loss


def test_nan_is_kept() -> None:
    """It is what the health of a run is told from."""
    assert math.isnan(only({"step": 1, "loss": math.nan})["loss"])
    assert math.isnan(only({"step": 1, "loss": "NaN"})["loss"])


def test_tokens_that_were_not_counted_are_absent() -> None:
    """Older versions of LLaMA-Factory log 0 of them."""
    assert "total_tokens" not in only(factory_row(1, loss=1.0, total_tokens=0, throughput=0.0))
    assert "tokens_per_s" not in only(factory_row(1, loss=1.0, total_tokens=0, throughput=0.0))


# -- one series


def test_training_and_held_out_rows_of_one_step_become_one() -> None:
    """Whichever comes first; the clock is the training row's, since evaluation takes its time too."""
    rows = [factory_row(10, eval_loss=1.9, elapsed_time="0:01:30"), factory_row(10, loss=2.0, elapsed_time="0:01:00")]
    for order in (rows, rows[::-1]):
        (row,), findings = merge_logs(read_log(order, TRAINER_LOG))
        assert (row.loss, row.eval_loss, row.elapsed_s, findings) == (2.0, 1.9, 60.0, [])


def test_of_two_held_out_rows_of_a_step_the_later_wins() -> None:
    """The trainer evaluates once more at the end."""
    rows, _ = steps_and_losses(
        factory_row(10, loss=2.0), factory_row(10, eval_loss=1.9), factory_row(10, eval_loss=1.8)
    )
    assert rows == [(10, 2.0, 1.8)]


def test_rows_without_any_loss_are_left_out() -> None:
    """LLaMA-Factory writes nulls, the Trainer ends with a row of run times, a prediction counts its own steps."""
    rows = [factory_row(5, loss=None, eval_loss=None), {"step": 30, "train_runtime": 9.0, "train_loss": 1.5}]
    assert merge_logs(read_log(rows, TRAINER_LOG)) == ((), [])
    trained = [factory_row(10, loss=2.0, elapsed_time="0:01:00"), factory_row(20, loss=1.0, elapsed_time="0:02:00")]
    predicted = [factory_row(step, elapsed_time="0:00:02") for step in (5, 10, 15)]
    log, findings = merge_logs(read_log(trained + predicted, TRAINER_LOG))
    assert [(row.step, row.elapsed_s) for row in log] == [(10, 60.0), (20, 120.0)]
    assert findings == []


def test_of_a_restarted_run_the_later_row_wins() -> None:
    """It went back to step 10 and came by 20 again; what the later row lacks stays."""
    rows, codes = steps_and_losses(
        factory_row(10, loss=2.0),
        factory_row(20, loss=9.0, eval_loss=1.7),
        factory_row(30, loss=8.0),
        factory_row(20, loss=1.5),
        factory_row(30, loss=1.2),
    )
    assert rows == [(10, 2.0, None), (20, 1.5, 1.7), (30, 1.2, None)]
    assert codes == ["log_restarted"]


def test_what_a_broken_off_attempt_logged_beyond_the_restart_is_left_out() -> None:
    """Restarted at 20 and logged at other steps: 25 and 30 tell of weights that are gone, held-out losses too."""
    before = [factory_row(step, loss=1.0, eval_loss=1.1) for step in (5, 10, 15, 20, 25, 30)]
    rows, codes = steps_and_losses(*before, factory_row(24, loss=0.8), factory_row(28, loss=0.7))
    assert [step for step, _, _ in rows] == [5, 10, 15, 20, 24, 28]
    assert codes == ["log_restarted"]


def test_a_restart_is_told_with_its_steps() -> None:
    """How often, and where; of many the first ones."""
    rows = [factory_row(step, loss=1.0) for step in (10, 20, 30, 20, 30, 40, 10, 20)]
    (finding,) = merge_logs(read_log(rows, TRAINER_LOG))[1]
    assert (finding.severity, finding.params) == ("info", {"file": TRAINER_LOG, "count": 2, "steps": "20, 10"})
    (finding,) = merge_logs(read_log(rows * 5, TRAINER_LOG))[1]
    assert (finding.params["count"], finding.params["steps"]) == (14, "20, 10, 10, 20, 10, …")


def test_held_out_losses_that_are_logged_late_are_no_restart() -> None:
    """An evaluation beside the training, or one more afterwards, eats no row."""
    rows, codes = steps_and_losses(
        *(factory_row(step, loss=1.0) for step in (10, 20, 30)),
        *(factory_row(step, eval_loss=1.5) for step in (10, 20, 30, 0)),
    )
    assert rows == [(0, None, 1.5), (10, 1.0, 1.5), (20, 1.0, 1.5), (30, 1.0, 1.5)]
    assert codes == []


def test_a_restart_at_the_very_last_step_shows_in_the_clock() -> None:
    """Killed after step 20 was logged, begun again from 10."""
    rows = [factory_row(step, loss=1.0, elapsed_time=f"0:0{step // 10}:00") for step in (10, 20)]
    rows.append(factory_row(20, loss=0.9, elapsed_time="0:01:05"))
    log, findings = merge_logs(read_log(rows, TRAINER_LOG))
    assert [row.loss for row in log] == [1.0, 0.9]
    assert [finding.params["steps"] for finding in findings] == ["20"]


def test_a_step_that_is_logged_twice_is_no_restart() -> None:
    """Without a clock there is no telling; the later row wins."""
    rows, codes = steps_and_losses(factory_row(10, loss=2.0), factory_row(20, loss=1.5), factory_row(20, loss=1.4))
    assert (rows, codes) == ([(10, 2.0, None), (20, 1.4, None)], [])


def test_two_processes_that_write_one_log_are_no_restart() -> None:
    """Seen in the wild, with training on two machines: each step twice, one of them now and then a step behind."""
    rows = []
    for step in range(10, 110, 10):
        rows.append(factory_row(step, loss=1.0, elapsed_time=f"0:{step // 10:02}:30"))
        rows.append(factory_row(step - 10, loss=1.0001, elapsed_time=f"0:{step // 10:02}:10"))
    log, findings = merge_logs(read_log(rows, TRAINER_LOG))
    assert [row.step for row in log] == list(range(0, 110, 10))
    (finding,) = findings
    assert (finding.code, finding.severity) == ("log_interleaved", "info")
    assert finding.params == {"file": TRAINER_LOG, "count": 10}


# -- several files


def test_the_first_file_wins_and_the_second_fills() -> None:
    """The trainer's state has gradients, the log has the clock and the steps since the state was saved."""
    state = read_log([{"step": 10, "loss": 2.0, "grad_norm": 1.5}], TRAINER_STATE)
    log = read_log([factory_row(10, loss=2.00004, lr=1e-4), factory_row(20, loss=1.0)], TRAINER_LOG)
    (first, second), findings = merge_logs(state, log)
    assert (first.loss, first.grad_norm, first.learning_rate) == (2.0, 1.5, 1e-4)
    assert first.sources == (TRAINER_STATE, TRAINER_LOG)
    assert (second.loss, second.sources) == (1.0, (TRAINER_LOG,))
    assert findings == []


def test_a_file_that_gave_nothing_is_no_source() -> None:
    """Its row holds only what the first file says already."""
    state = read_log([{"step": 10, "loss": 2.0, "epoch": 1.0}], TRAINER_STATE)
    (row,), _ = merge_logs(state, read_log([factory_row(10, loss=2.0)], TRAINER_LOG), [])
    assert row.sources == (TRAINER_STATE,)


def test_logs_that_disagree_are_told_with_both_values() -> None:
    """The first step where they do, who says what, and how often; of training and held-out losses alike."""
    state = read_log([{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.5, "eval_loss": 1.6}], TRAINER_STATE)
    log = read_log([factory_row(10, loss=2.0), factory_row(20, loss=1.4, eval_loss=1.7)], TRAINER_LOG)
    rows, (finding,) = merge_logs(state, log)
    assert [row.loss for row in rows] == [2.0, 1.5]
    assert (finding.code, finding.severity) == ("logs_disagree", "warning")
    assert finding.params == {
        "step": 20,
        "file": TRAINER_STATE,
        "value": 1.5,
        "other_file": TRAINER_LOG,
        "other_value": 1.4,
        "count": 2,
    }


def test_of_three_files_each_is_compared_with_those_before_it() -> None:
    """A finding for each two that disagree."""
    files = [[LogRow(step=1, loss=loss, sources=(name,))] for name, loss in (("a", 1.0), ("b", 1.0), ("c", 2.0))]
    _, findings = merge_logs(*files)
    assert [(one.params["file"], one.params["other_file"]) for one in findings] == [("a", "c"), ("b", "c")]


@pytest.mark.parametrize(
    ("one", "other", "disagree"),
    [
        (1.23456789, 1.2346, False),
        (0.00012, 0.0001, False),
        (4321.9876, 4322.0, False),
        (1.2345, 1.2365, True),
        (math.nan, math.nan, False),
        (math.nan, 1.0, True),
        (math.inf, 1.0, True),
        (0.0, 0.001, True),
    ],
)
def test_rounding_is_no_disagreement(one: float, other: float, disagree: bool) -> None:
    """To four decimals or figures, as trainers round."""
    state = [LogRow(step=1, loss=one, sources=("a",))]
    _, findings = merge_logs(state, [LogRow(step=1, loss=other, sources=("b",))])
    assert bool(findings) is disagree
    for finding in findings:
        assert Finding.model_validate_json(finding.model_dump_json()) == finding


# -- anything

VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**18, 10**400, -1, 0, 1, 2, 3])
    | st.floats()
    | st.sampled_from(["1", "2/9", "NaN", "0:00:03", "1 day, 0:00:00", "3s", "1e400", "²", "९"])
    | st.text(max_size=3)
    | st.lists(st.none(), max_size=1)
)
KEYS = ["step", "current_steps", "global_step/max_steps", "loss", "eval_loss", "lr", "epoch", "grad_norm"]
KEYS += ["total_tokens", "throughput", "elapsed_time", "reward", "token_acc"]
ROWS = st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES), max_size=8)


@given(first=ROWS, second=ROWS)
@settings(max_examples=300, deadline=None)
def test_any_rows_become_one_ordered_series(first: list[dict[str, object]], second: list[dict[str, object]]) -> None:
    """No crash whatever they hold: steps ascend, each once, each with a loss and a source; and its health is told."""
    log, findings = merge_logs(read_log(first, TRAINER_STATE), read_log(second, TRAINER_LOG))
    steps = [row.step for row in log]
    assert steps == sorted(set(steps))
    assert all(row.loss is not None or row.eval_loss is not None for row in log)
    assert all(row.sources and set(row.sources) <= {TRAINER_STATE, TRAINER_LOG} for row in log)
    for finding in [*findings, *health(log, {}, None)]:
        assert Finding.model_validate_json(finding.model_dump_json()).code == finding.code

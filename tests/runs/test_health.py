"""Health: every disease of a training is told with its figures, and sound trainings that look like it are not."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.record import Finding, Value
from tunesmith.report import LANGUAGES, finding_text
from tunesmith.runs.health import health
from tunesmith.runs.records import LogRow

NAN = math.nan


def log(losses: Sequence[float], *, every: int = 10, start: int = 0, **columns: Any) -> list[LogRow]:
    """Rows with these losses; a column is one value for all, or a sequence with a value a row."""
    return [
        LogRow(
            step=start + every * (place + 1),
            loss=loss,
            sources=("trainer_state.json",),
            **{name: value[place] if isinstance(value, Sequence) else value for name, value in columns.items()},
        )
        for place, loss in enumerate(losses)
    ]


def noisy(curve: Callable[[float], float], rows: int, noise: float, *, seed: int = 0) -> list[float]:
    """A loss curve over the training's share that is done, with Gaussian noise."""
    chance = random.Random(seed)  # noqa: S311 - no secret
    return [max(0.001, curve((row + 1) / rows) + chance.gauss(0, noise)) for row in range(rows)]


def falling(share: float) -> float:
    """The loss of a fine-tune that goes well."""
    return 1.0 + 1.2 * math.exp(-8 * share)


def cosine(rows: int, *, peak: float = 1e-4, floor: float = 0.0, warm: int = 0) -> list[float]:
    """A learning rate that falls to ``floor`` of its peak, after ``warm`` rows of warmup."""
    shares = [max(0.0, row + 1 - warm) / (rows - warm) for row in range(rows)]
    fallen = [floor + (1 - floor) * (0.5 + 0.5 * math.cos(math.pi * share)) for share in shares]
    return [peak * (fallen[row] if row >= warm else (row + 1) / (warm + 1)) for row in range(rows)]


def told(rows: Sequence[LogRow], asked: Mapping[str, Value] | None = None, planned: int | None = None) -> Finding:
    """The one finding that there is."""
    (finding,) = health(rows, asked or {}, planned)
    for lang in LANGUAGES:
        assert "–" not in finding_text(finding, lang), "a figure is missing"
    return finding


def codes(rows: Sequence[LogRow], asked: Mapping[str, Value] | None = None, planned: int | None = None) -> list[str]:
    """The codes of all findings."""
    return [finding.code for finding in health(rows, asked or {}, planned)]


GOOD = noisy(falling, 40, 0.05)
FLAT = noisy(lambda share: 2.0 - 0.002 * share, 300, 0.04)


# -- loss that is no number


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf, 1e300])
def test_a_loss_that_is_not_finite_is_told_with_its_first_step(bad: float) -> None:
    """And how many of the rows; gradients that broke with it are not told once more."""
    finding = told(log([2.0, 1.5, bad, bad, bad], grad_norm=[1.0, 1.0, NAN, NAN, NAN]))
    assert (finding.code, finding.severity) == ("loss_not_finite", "error")
    assert finding.params == {"step": 30, "count": 3, "rows": 5}


@pytest.mark.parametrize(("norm", "shown"), [(NAN, "NaN"), (math.inf, "NaN"), (0.0, "0")])
def test_a_loss_of_0_without_a_gradient_is_told(norm: float, shown: str) -> None:
    """What the HF Trainer's filter makes of NaN losses, of fp16 overflow, or of rows without answers."""
    finding = told(log([2.0, 1.5, 0.0, 0.0, 0.0], grad_norm=[1.0, 1.0, norm, norm, norm]))
    assert (finding.code, finding.severity) == ("loss_zero", "error")
    assert finding.params == {"step": 30, "count": 3, "rows": 5, "norm": shown}


def test_a_loss_of_0_with_a_gradient_is_one_that_was_rounded() -> None:
    """A model that knows its rows by heart; and one spoiled row of many is no broken training."""
    assert codes(log([2.0, 1.0, 0.1, 0.0, 0.0], grad_norm=[1.0, 1.0, 0.1, 1e-4, 1e-4])) == []
    assert codes(log([*GOOD[:-1], 0.0], grad_norm=[*[1.0] * 39, NAN])) == []
    assert codes(log([2.0, 1.5, 0.0, 1.2], grad_norm=[1.0, 1.0, NAN, 1.0])) == []


# -- the loss's shape


@pytest.mark.parametrize("rows", [10, 40, 400])
@pytest.mark.parametrize("noise", [0.02, 0.2])
def test_a_diverged_loss_is_told_with_where_it_began(rows: int, noise: float) -> None:
    """It falls to 1, and from 60 % of the steps on it is at 8."""
    finding = told(log(noisy(lambda share: falling(share) if share <= 0.6 else 8.0, rows, noise)))
    assert (finding.code, finding.severity) == ("loss_diverged", "error")
    assert finding.params["step"] == 10 * (round(0.6 * rows) + 1)
    assert isinstance(low := finding.params["low"], float)
    assert isinstance(last := finding.params["last"], float)
    assert low == pytest.approx(falling(0.6), abs=3 * noise)
    assert last == pytest.approx(8.0, abs=3 * noise)
    assert isinstance(before := finding.params["low_step"], int)
    assert before < finding.params["step"]


def test_a_loss_that_diverges_from_the_start_is_told() -> None:
    """A learning rate far too high: the first rows are the best ones."""
    finding = told(log([2.5, 3.0, 5.5, 8.0, 7.9, 7.5, 7.6, 7.4, 7.5, 7.4]))
    assert (finding.code, finding.params["low"], finding.params["low_step"]) == ("loss_diverged", 2.75, 20)
    assert finding.params["step"] == 30


def test_a_loss_that_began_high_diverges_where_it_rises() -> None:
    """Not at its first rows; and wild as it is afterwards, the calm before it tells what noise is."""
    finding = told(log([7.0, 6.0, 3.0, *[1.2, 1.25, 1.22] * 4, *[4.0, 12.0, 5.0, 13.0] * 5]))
    assert (finding.code, finding.params["low_step"]) == ("loss_diverged", 60)
    assert finding.params["step"] == 160


def test_a_lucky_batch_at_the_end_does_not_hide_where_it_diverged() -> None:
    """One of the last rows is as low as before."""
    assert told(log([*GOOD[:20], *[8.0] * 18, 1.1, 8.0])).params["step"] == 210


def test_a_diverged_loss_is_not_called_overfitting() -> None:
    """The held-out loss goes up with it."""
    losses = [*GOOD[:20], *[8.0] * 20]
    assert codes(log(losses, eval_loss=losses)) == ["loss_diverged"]


def test_a_spike_that_passes_is_no_divergence() -> None:
    """Three bad batches, and the loss comes back."""
    assert codes(log([*GOOD[:20], 6.0, 9.0, 5.0, *GOOD[23:]])) == []
    assert codes(log([*GOOD[:33], 6.0, 9.0, 5.0, *GOOD[36:]])) == []


def test_a_loss_that_rose_is_told() -> None:
    """From the first quarter to the last; four rows are enough for it."""
    finding = told(log([1.0, 1.1, 1.2, 1.3]))
    assert (finding.code, finding.severity, finding.params) == ("loss_rose", "warning", {"first": 1.0, "last": 1.3})
    assert told(log(noisy(lambda share: 1 + 0.3 * share, 100, 0.1))).code == "loss_rose"


def test_a_loss_that_rose_by_less_has_not_diverged() -> None:
    """Not doubled; or tenfold, of next to nothing."""
    assert told(log(noisy(lambda share: 1.0 if share < 0.5 else 1.7, 40, 0.01))).code == "loss_rose"
    assert told(log(noisy(lambda share: 0.02 if share < 0.5 else 0.2, 40, 0.001))).code == "loss_rose"


@pytest.mark.parametrize(
    "losses", [(2.0, 1.0), (2.0, 1.5, 1.8, 1.9), (1.0, 1.0, 1.0, 1.0), (1.0, 2.0, 3.0), (), (1.3, 1.2, 1.1, 1.25, 1.4)]
)
def test_of_few_rows_little_is_said(losses: tuple[float, ...]) -> None:
    """Fallen, the same, or too short to tell."""
    assert codes(log(losses)) == []


def test_a_loss_that_never_fell_is_told() -> None:
    """A learning rate too low by far; with the figures of the first quarter and the second half."""
    finding = told(log(FLAT))
    assert (finding.code, finding.severity, finding.params["rows"]) == ("loss_flat", "warning", 300)
    assert finding.params["first"] == pytest.approx(2.0, abs=0.02)
    assert finding.params["last"] == pytest.approx(2.0, abs=0.02)


def test_a_loss_that_is_flat_at_its_end_alone_is_as_it_should_be() -> None:
    """It fell at once, within the first of 2,000 rows; or the log is a resumed run's, and begins in the flat end."""
    fell_at_once = noisy(lambda share: 1.0 + 2.0 * math.exp(-1500 * share), 2000, 0.04)
    assert codes(log(fell_at_once)) == []
    assert codes(log(fell_at_once[1000:], start=10_000)) == []
    assert codes(log(fell_at_once[1000:])) == ["loss_flat"]
    for seed in range(20):
        fell_in_noise = noisy(lambda share: 1.5 + 0.5 * math.exp(-200 * share), 2000, 0.3, seed=seed)
        assert codes(log(fell_in_noise)) == []


def test_a_pretraining_stage_may_be_flat() -> None:
    """More of the same text moves a model's loss by next to nothing."""
    flat = log(FLAT)
    assert codes(flat, {"stage": "pt"}) == []
    assert codes(flat, {"stage": "sft"}) == ["loss_flat"]


def test_overfitting_is_told_with_its_best_step() -> None:
    """The held-out loss turned round while the training loss went on falling."""
    held_out = [None, 1.6, None, 1.4, None, 1.3, None, 1.45, None, 1.6]
    losses = [2.0, 1.7, 1.5, 1.3, 1.1, 0.9, 0.7, 0.5, 0.4, 0.3]
    finding = told(log(losses, eval_loss=held_out))
    assert (finding.code, finding.severity) == ("overfitting", "warning")
    assert finding.params == {"step": 60, "best": 1.3, "last": 1.6}


@pytest.mark.parametrize(
    "held_out",
    [
        (2.0, 1.5, 1.4),
        (2.0, 1.5, 1.52),
        (1.5, 1.8),
        (2.0, 1.5, NAN),
        (1.5, 1.3, 1.42, 1.28, 1.4, 1.27, 1.41, 1.26, 1.38, 1.3),
    ],
)
def test_a_held_out_loss_that_falls_or_wavers_is_no_overfitting(held_out: tuple[float, ...]) -> None:
    """Falling, within 2 %, too few points to tell, not finite, or no more than its own noise."""
    assert codes(log(GOOD[: len(held_out)], eval_loss=held_out)) == []


# -- learning rate

ASKED: dict[str, Value] = {"learning_rate": 1e-4, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1}


def test_a_learning_rate_of_0_throughout_is_told() -> None:
    """Nothing was learned; that the loss stayed the same follows from it."""
    finding = told(log(FLAT, learning_rate=0.0))
    assert (finding.code, finding.severity, finding.params) == ("learning_rate_zero", "error", {"rows": 300})


@pytest.mark.parametrize(
    "asked",
    [
        {"warmup_ratio": 0.1},
        {"warmup_ratio": "0.1"},
        {"warmup_steps": 40},
        {"warmup_steps": 0.1},
        {"warmup_steps": 0, "lr_scheduler_warmup_ratio": 0.1},
    ],
)
def test_a_warmup_that_did_not_happen_is_told(asked: dict[str, Value]) -> None:
    """However it was asked for; the schedule ``constant`` takes no notice of it."""
    finding = told(log(GOOD, learning_rate=1e-4), {"lr_scheduler_type": "constant", **asked}, 400)
    assert (finding.code, finding.severity) == ("learning_rate_not_warmed", "warning")
    assert finding.params == {"asked": 40, "step": 10, "rate": 1e-4, "schedule": "constant"}


@pytest.mark.parametrize(
    ("asked", "rates"),
    [
        ({"warmup_ratio": 0.1}, cosine(40, warm=4)),
        ({"warmup_steps": 10}, [1e-4] * 40),
        ({"warmup_steps": 0}, [1e-4] * 40),
        ({}, [1e-4] * 40),
        ({"warmup_steps": True, "warmup_ratio": "much"}, [1e-4] * 40),
    ],
)
def test_a_warmup_that_happened_or_cannot_be_seen_is_quiet(asked: dict[str, Value], rates: list[float]) -> None:
    """It was over before the first row was logged, or none was asked for."""
    assert codes(log(GOOD, learning_rate=rates), {"lr_scheduler_type": "constant", **asked}, 400) == []


@pytest.mark.parametrize("schedule", ["cosine", "linear", "SchedulerType.COSINE", None])
def test_a_learning_rate_that_never_decayed_is_told(schedule: str | None) -> None:
    """By a schedule that decays, or by none, which is the same; with what is left of the peak."""
    rates = [1e-4 * (1 - 0.4 * row / 39) for row in range(40)]
    asked: dict[str, Value] = {"learning_rate": 1e-4, "lr_scheduler_type": schedule}
    finding = told(log(GOOD, learning_rate=rates), asked, 400)
    assert (finding.code, finding.severity) == ("learning_rate_not_decayed", "warning")
    assert (finding.params["steps"], finding.params["peak"]) == (400, 1e-4)
    assert finding.params["share"] == pytest.approx(0.6)
    assert finding.params["schedule"] == (str(schedule).rpartition(".")[2].lower() if schedule else "linear")


@pytest.mark.parametrize(
    ("asked", "rates", "planned"),
    [
        (ASKED, cosine(40, warm=4), 400),
        ({**ASKED, "lr_scheduler_type": "cosine_with_min_lr"}, cosine(40, floor=0.6, warm=4), 400),
        ({**ASKED, "warmup_ratio": 0, "lr_scheduler_type": "constant"}, [1e-4] * 40, 400),
        ({"lr_scheduler_type": "warmup_stable_decay", "learning_rate": 1e-4}, [1e-4] * 36 + [6e-5] * 4, 400),
        ({"lr_scheduler_type": "cosine", "learning_rate": 1e-4}, [1e-4] * 40, 410),
        ({"lr_scheduler_type": "cosine", "learning_rate": 1e-4}, [1e-4] * 40, None),
        ({}, [1e-4] * 40, 400),
    ],
    ids=["cosine", "floor", "constant", "wsd", "broken off", "unknown length", "unknown schedule"],
)
def test_schedules_as_they_should_be_are_quiet(
    asked: dict[str, Value], rates: list[float], planned: int | None
) -> None:
    """Those that end high by intent, runs that are not done, and runs of which too little is recorded."""
    assert codes(log(GOOD, learning_rate=rates), asked, planned) == []


def test_a_rate_that_was_last_logged_long_before_the_end_is_quiet() -> None:
    """The evaluation is at the last step, the last training row is not."""
    rows = [*log(GOOD, learning_rate=1e-4), LogRow(step=500, eval_loss=1.0)]
    assert codes(rows, {"learning_rate": 1e-4}, 500) == []


def test_a_warmup_longer_than_the_training_is_told() -> None:
    """The learning rate that was asked for was never reached."""
    rates = [1e-4 * row / 80 for row in range(1, 41)]
    finding = told(log(GOOD, learning_rate=rates), {"learning_rate": 1e-4, "warmup_steps": 800}, 400)
    assert (finding.code, finding.severity) == ("learning_rate_still_rising", "warning")
    assert finding.params == {"steps": 400, "last": pytest.approx(5e-5), "asked": 1e-4}


# -- gradients


def test_gradients_of_0_throughout_are_told() -> None:
    """No weight moved; that the loss stayed the same follows from it."""
    finding = told(log(FLAT, grad_norm=0.0))
    assert (finding.code, finding.severity, finding.params) == ("gradients_zero", "error", {"rows": 300})


def test_gradients_that_are_not_finite_are_told() -> None:
    """A share of steps that is more than a loss scaler's search for its scale."""
    norms = [1.0 if row % 4 else NAN for row in range(40)]
    finding = told(log(GOOD, grad_norm=norms))
    assert (finding.code, finding.severity) == ("gradients_not_finite", "warning")
    assert finding.params == {"count": 10, "rows": 40, "step": 370}
    assert codes(log(GOOD, grad_norm=[NAN, math.inf, NAN, *[1.0] * 37])) == []
    assert codes(log(GOOD[:4], grad_norm=[NAN, math.inf, 1.0, 1.0])) == []


def test_gradients_that_ran_away_are_told() -> None:
    """Far above what they were, and far above what clipping is for."""
    norms = [0.5] * 25 + [3.0] * 5 + [40.0] * 9 + [90.0]
    finding = told(log(GOOD, grad_norm=norms), {"max_grad_norm": 1.0})
    assert (finding.code, finding.severity) == ("gradients_exploded", "warning")
    assert finding.params == {"usual": 0.5, "late": 40.0, "largest": 90.0, "step": 400}
    assert codes(log(GOOD, grad_norm=norms)) == ["gradients_exploded"]
    assert codes(log(GOOD, grad_norm=norms), {"max_grad_norm": 10.0}) == []


def test_a_leap_without_clipping_is_told() -> None:
    """With clipping it is cut to size, and harmless."""
    norms = [0.5] * 20 + [400.0] + [0.5] * 19
    finding = told(log(GOOD, grad_norm=norms), {"max_grad_norm": 0})
    assert (finding.code, finding.severity) == ("gradients_unclipped", "warning")
    assert (finding.params["usual"], finding.params["largest"], finding.params["step"]) == (0.5, 400.0, 210)
    assert codes(log(GOOD, grad_norm=norms), {"max_grad_norm": 1.0}) == []
    assert codes(log(GOOD, grad_norm=norms)) == []
    assert codes(log(GOOD, grad_norm=[0.5] * 20 + [40.0] + [0.5] * 19), {"max_grad_norm": 0}) == []


@pytest.mark.parametrize(
    "norms",
    [
        [30.0, 12.0, 5.0, *[0.8] * 37],
        [0.1 * 1.06**row for row in range(40)],
        [0.02] * 20 + [0.9] * 20,
        [3.0] * 20 + [20.0] * 20,
    ],
    ids=["large at first", "growing as rows are learned", "small throughout", "a few times larger"],
)
def test_gradients_of_sound_trainings_are_quiet(norms: list[float]) -> None:
    """They start large, or grow while they stay within what clipping leaves alone."""
    assert codes(log(GOOD, grad_norm=norms)) == []


# -- throughput


def test_a_training_that_slowed_down_is_told() -> None:
    """From tokens and clock, since what LLaMA-Factory logs is the mean since the start."""
    clock = [10.0 * row if row <= 20 else 200 + 40.0 * (row - 20) for row in range(1, 41)]
    tokens = [10_000 * row for row in range(1, 41)]
    means = [count / seconds for count, seconds in zip(tokens, clock, strict=True)]
    finding = told(log(GOOD, total_tokens=tokens, elapsed_s=clock, tokens_per_s=means))
    assert (finding.code, finding.severity) == ("throughput_fell", "info")
    assert finding.params == {"first": 1000.0, "last": 250.0}
    finding = told(log(GOOD, tokens_per_s=[1000.0] * 20 + [400.0] * 20))
    assert finding.params == {"first": 1000.0, "last": 400.0}


def test_a_steady_training_is_quiet() -> None:
    """A clock of whole seconds, a resumed run whose clock begins anew, and a third less."""
    tokens = [10_000 * row for row in range(1, 41)]
    short = [float(row if row <= 20 else 20 + 3 * (row - 20)) for row in range(1, 41)]
    assert codes(log(GOOD, total_tokens=tokens, elapsed_s=short)) == []
    resumed = [10.0 * row for row in (*range(1, 21), *range(1, 21))]
    assert codes(log(GOOD, total_tokens=tokens, elapsed_s=resumed)) == []
    assert codes(log(GOOD, tokens_per_s=[900.0] * 20 + [600.0] * 20)) == []


# -- sound trainings as a whole

HEALTHY: dict[str, list[LogRow]] = {
    "fine-tune": log(GOOD, learning_rate=cosine(40, warm=4), grad_norm=1.0),
    "ten percent left": log(GOOD, learning_rate=cosine(40, floor=0.1, warm=4), grad_norm=1.0),
    "batches of one": log(noisy(lambda share: 0.8 + 0.8 * math.exp(-5 * share), 200, 0.5)),
    "continued pretraining": log(noisy(lambda share: 1.95 - 0.05 * share, 400, 0.03)),
    "three epochs": log(noisy(lambda share: (1.2, 0.8, 0.4)[min(2, int(share * 3))], 90, 0.1)),
    "learned by heart": log(noisy(lambda share: 2 * math.exp(-8 * share), 90, 0.02)),
    "five rows": log([2.2, 1.9, 1.6, 1.7, 1.5], learning_rate=cosine(5), grad_norm=1.0),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_sound_trainings_are_quiet(name: str) -> None:
    """Shapes that a hasty rule would call ill."""
    assert codes(HEALTHY[name], ASKED, HEALTHY[name][-1].step) == []


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_is_no_disease(seed: int) -> None:
    """Flat or falling slowly, in few rows or many, with much noise or little."""
    chance = random.Random(seed)  # noqa: S311 - no secret
    rows, noise = chance.randint(4, 300), chance.choice([0.1, 0.3, 0.6])
    losses = noisy(lambda share: 1.5 - 0.4 * share, rows, noise, seed=seed)
    assert codes(log(losses)) == []


@pytest.mark.parametrize(
    ("columns", "asked"),
    [({"reward": 0.5}, {}), ({}, {"stage": "dpo"}), ({}, {"rlhf_type": "grpo"}), ({}, {"rl": "orpo"})],
)
def test_the_loss_of_preference_and_reinforcement_trainers_may_do_as_it_likes(
    columns: dict[str, Any], asked: dict[str, Value]
) -> None:
    """GRPO's begins at 0 and rises as the policy leaves its reference; NaN is an illness there, too."""
    rising = [*[0.0] * 6, *(0.001 * row for row in range(34))]
    rows = log(rising, eval_loss=rising, grad_norm=[*[0.0] * 6, *[0.5] * 34], **columns)
    assert codes(rows, asked) == []
    assert codes(log([*rising, NAN], **columns), asked) == ["loss_not_finite"]
    assert codes([row.model_copy(update={"reward": None}) for row in rows]) != []


def test_a_run_without_a_log_is_quiet() -> None:
    """A bare adapter."""
    assert codes([], ASKED, 100) == []


# -- anything


def test_absurd_numbers_are_no_numbers() -> None:
    """Sums of them overflow, and so do products with a step count that no training has."""
    huge = [1e308, 1e308, 1e308, -1e308] * 5
    assert codes(log(huge, grad_norm=huge)) == ["loss_not_finite"]
    assert codes(log(GOOD[:20], grad_norm=huge, eval_loss=huge, learning_rate=huge)) == ["gradients_not_finite"]
    assert codes(log(GOOD, learning_rate=1e-4), {"warmup_ratio": 0.1}, 10**400) == []


NUMBERS = st.none() | st.floats() | st.sampled_from([0.0, -0.0, 1e308, -1e308, 5e-324, 1.0])
ROWS = st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.none() | st.integers(0, 10**18)), max_size=30)
SETTING = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["linear", "0.1", "1e999", "x", ""])
NAMES = ["learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "max_grad_norm", "stage"]


@given(
    ROWS,
    st.dictionaries(st.sampled_from(NAMES), SETTING),
    st.none() | st.integers(-1, 400) | st.sampled_from([10**400, -(10**400)]),
)
@settings(max_examples=300, deadline=None)
def test_any_numbers_have_a_diagnosis(
    numbers: list[tuple[Any, ...]], asked: dict[str, Value], planned: int | None
) -> None:
    """No crash whatever was logged, and every finding can be said in both languages."""
    names = ("loss", "eval_loss", "learning_rate", "grad_norm", "elapsed_s", "total_tokens")
    rows = [LogRow(step=place, **dict(zip(names, row, strict=True))) for place, row in enumerate(numbers)]
    for finding in health(rows, asked, planned):
        assert all(finding_text(finding, lang) for lang in LANGUAGES)


def test_a_long_log_is_soon_looked_at() -> None:
    """A hundred thousand rows in about 0.2 s of one core; ten times that is allowed for a machine under load."""
    losses = noisy(falling, 100_000, 0.2)
    rows = log(losses, grad_norm=losses, learning_rate=losses, tokens_per_s=losses)
    began = time.process_time()
    assert codes(rows) == []
    assert time.process_time() - began < 2.0

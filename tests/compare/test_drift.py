"""The figures of a drift, from rows whose truth is written down here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.tiny_models import row
from tunesmith.compare import Drift, DriftModel, DriftTexts, Measured, drift_of, drift_texts
from tunesmith.compare.general import LANGUAGES, general_texts
from tunesmith.models import RowDrift

ROWS = 40
GENERATOR = np.random.default_rng(5)
TOKENS = GENERATOR.integers(5, 60, ROWS)
ADAPTER = TOKENS * GENERATOR.normal(1.0, 0.1, ROWS)  # nats of a row under the adapter
GAIN = TOKENS * GENERATOR.normal(0.5, 0.1, ROWS)  # by how much more the base needs


def rows_of(nll: Sequence[float] | Any, kl: float, *, agreed: float = 1.0, spread: float = 0.2) -> tuple[RowDrift, ...]:
    """Rows with these nats, whose tokens have a KL about that; every row's own, drawn anew."""
    rng = np.random.default_rng(3)
    return tuple(
        RowDrift(
            f"row-{i}",
            float(ADAPTER[i]),
            float(nll[i]),
            tuple(np.maximum(0, kl * rng.normal(1, spread, TOKENS[i]))),
            round(agreed * TOKENS[i]),
        )
        for i in range(ROWS)
    )


def measured(
    name: str, nll: Any, kl: float = 0.001, *, general: float = 0.001, size: int = 1000, **changes: Any
) -> Measured:
    """One model."""
    model = DriftModel(name=name, path=f"/{name}", scheme="int8", size_bytes=size, **changes)
    return Measured(model, rows_of(nll, kl, agreed=0.9), rows_of(nll, general), 1.0)


BASE = measured("base", ADAPTER + GAIN, 1.0, general=0.2, size=4000, kind="base")


def drift(*models: Measured, base: Measured = BASE) -> Drift:
    """The record of some models."""
    return drift_of(
        [base, *models],
        run_name="run",
        base_model="org/base",
        checkpoint="final",
        dtype="float32",
        bf16_bytes=4000,
        rows_from="held_out",
    )


def codes(found: Drift) -> list[str]:
    """Of its findings."""
    return [finding.code for finding in found.findings]


def test_the_adapters_twin_keeps_all_and_the_bases_twin_nothing() -> None:
    """0 nats away with the whole effect, and as far as the base with none of it."""
    twin = Measured(measured("twin", ADAPTER).model, rows_of(ADAPTER, 0.0), rows_of(ADAPTER, 0.0), 1.0)
    same_as_base = measured("untuned", ADAPTER + GAIN, 1.0, general=0.2)
    found = drift(twin, same_as_base)
    first, last = found.row("twin"), found.row("untuned")
    assert first is not None
    assert last is not None
    assert first.kept is not None
    assert (first.kept.value, first.kept.low, first.kept.high) == pytest.approx((1.0, 1.0, 1.0), abs=1e-12)
    assert first.in_domain is not None
    assert (first.in_domain.kl.value, first.in_domain.p99.value, first.in_domain.top1.value) == (0.0, 0.0, 1.0)
    assert last.kept is not None
    assert (last.kept.value, last.kept.low, last.kept.high) == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)
    assert found.recommended == "twin"
    assert "drift_beyond_base" in codes(found)
    assert found.base.kept is None, "the base is the yardstick, not an export"


def test_figures_are_sums_over_tokens() -> None:
    """By the formulas, written out: no mean of rows' means, which would weigh short rows like long ones."""
    noise = TOKENS * np.random.default_rng(8).normal(0.02, 0.05, ROWS)
    one = measured("int4", ADAPTER + noise, 0.03)
    found = drift(one)
    line = found.row("int4")
    assert line is not None
    assert line.in_domain is not None
    every = np.concatenate([row.kl for row in one.in_domain])
    assert line.in_domain.kl.value == pytest.approx(every.mean(), rel=1e-12)
    assert line.in_domain.p99.value == np.sort(every)[math.ceil(0.99 * len(every)) - 1]
    assert line.in_domain.top1.value == sum(row.agreed for row in one.in_domain) / len(every)
    assert line.loss is not None
    assert line.loss.value == pytest.approx((ADAPTER + noise).sum() / TOKENS.sum())
    assert line.kept is not None
    assert line.kept.value == pytest.approx((GAIN.sum() - noise.sum()) / GAIN.sum())
    assert found.gain is not None
    assert found.gain.value == pytest.approx(GAIN.sum() / TOKENS.sum())
    assert (found.in_domain_rows, found.in_domain_tokens) == (ROWS, TOKENS.sum())
    assert line.size_ratio == 0.25
    for estimate in (line.in_domain.kl, line.in_domain.p99, line.in_domain.top1, line.loss, line.kept):
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.low < estimate.value < estimate.high


def test_the_smallest_close_model_is_recommended_and_the_nearer_of_equal_ones() -> None:
    """Close is: nine tenths of the effect for sure, and a small KL on general texts for sure."""
    found = drift(
        measured("large", ADAPTER, size=2000),
        measured("small", ADAPTER + 0.02 * GAIN, general=0.02, size=1000),
        measured("equal", ADAPTER + 0.02 * GAIN, general=0.01, size=1000),
        measured("loses", ADAPTER + 0.2 * GAIN, size=500),
        measured("drifts", ADAPTER, general=0.06, size=400),
    )
    assert {row.name for row in found.rows if row.close} == {"large", "small", "equal"}
    assert found.recommended == "equal"
    assert codes(found) == ["drift_advice"]
    assert found.findings[0].params["about"] == "effect"


def test_a_wide_interval_is_no_evidence_of_nearness() -> None:
    """A model that may well lose the effect is not taken because it may as well keep it."""
    wild = TOKENS * np.random.default_rng(9).normal(0, 1.0, ROWS)
    line = drift(measured("wild", ADAPTER + wild - wild.sum() / ROWS)).row("wild")
    assert line is not None
    assert line.kept is not None
    assert line.kept.value > 0.95
    assert not line.close


def test_no_model_is_close() -> None:
    """The nearest is named all the same."""
    found = drift(measured("far", ADAPTER + 0.5 * GAIN, general=0.3), measured("nearer", ADAPTER, general=0.2))
    assert found.recommended is None
    (finding,) = found.findings
    assert (finding.code, finding.params["name"]) == ("drift_none_close", "nearer")


def test_a_gain_that_cannot_be_told_is_not_divided_by() -> None:
    """A share of nothing is not given; nearness alone decides then, in domain too."""
    nothing = TOKENS * np.random.default_rng(2).normal(0.0, 0.5, ROWS)
    base = measured("base", ADAPTER + nothing, 1.0, kind="base")
    found = drift(measured("near", ADAPTER), measured("far", ADAPTER, 0.2, size=500), base=base)
    assert [row.kept for row in found.exports] == [None, None]
    assert found.recommended == "near"
    assert codes(found) == ["drift_gain_unknown", "drift_advice"]
    assert found.findings[1].params["about"] == "nearness"
    worse = measured("base", ADAPTER - GAIN, 1.0, kind="base")
    assert drift(measured("near", ADAPTER), base=worse).exports[0].kept is None, "a loss is no gain either"


def test_without_rows_general_texts_decide() -> None:
    """What is kept of the effect is then not known, and said so."""
    base = Measured(BASE.model, (), BASE.general, 1.0)
    one = measured("int8", ADAPTER)
    found = drift(Measured(one.model, (), one.general, 1.0), base=base)
    assert (found.gain, found.adapter_loss, found.exports[0].in_domain) == (None, None, None)
    assert found.recommended == "int8"
    assert "drift_no_rows" in codes(found)


def test_a_model_of_no_finite_numbers_is_called_broken() -> None:
    """It is neither close nor the nearest."""
    broken = measured("broken", [math.nan] * ROWS, math.nan, general=math.nan, size=10)
    broken = Measured(
        broken.model,
        tuple(RowDrift(r.id, r.reference_nll, math.nan, (math.nan,) * r.tokens, 0) for r in broken.in_domain),
        tuple(RowDrift(r.id, r.reference_nll, math.nan, (math.nan,) * r.tokens, 0) for r in broken.general),
        1.0,
    )
    found = drift(broken, measured("int8", ADAPTER))
    assert found.recommended == "int8"
    assert codes(found)[0] == "drift_not_finite"
    assert Drift.model_validate_json(found.to_json()).row("broken") is not None


def test_intervals_of_several_models_hold_together() -> None:
    """Each is wider than it would be alone."""
    alone = drift(measured("a", ADAPTER + 0.1 * GAIN * np.linspace(0, 2, ROWS)))
    several = drift(*[measured(name, ADAPTER + 0.1 * GAIN * np.linspace(0, 2, ROWS)) for name in "abcd"])
    one, other = alone.exports[0].kept, several.exports[0].kept
    assert one is not None
    assert other is not None
    assert one.half is not None
    assert other.half is not None
    assert other.half > 1.2 * one.half
    assert several.comparisons == 4


def test_texts_are_drawn_by_the_seed_and_from_each_language_in_turn() -> None:
    """No more than asked for, rows in their order."""
    rows = [row(i, f"q {i}", f"a {i}") for i in range(30)]
    some, again, other = (drift_texts(rows, max_rows=10, seed=seed) for seed in (1, 1, 2))
    assert some == again != other
    assert [int(one.id.removeprefix("row-")) for one in some.in_domain] == sorted(
        int(one.id.removeprefix("row-")) for one in some.in_domain
    )
    assert len(some.in_domain) == len(some.general) == 10
    assert {text.id for text in some.general[:3]} == {general_texts(language)[0].id for language in LANGUAGES}
    assert drift_texts(rows, max_rows=1000) == DriftTexts(tuple(rows), drift_texts([], max_rows=1000).general)
    assert len(drift_texts([], max_rows=1000).general) == sum(len(general_texts(one)) for one in LANGUAGES)

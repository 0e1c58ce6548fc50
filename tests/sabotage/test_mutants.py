"""No spoilt merge passes, and each is told by its cause."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from tests.sabotage.mutants import MUTANTS, Mutant
from tests.sabotage.workshop import Workshop, check
from tunesmith.record import Finding
from tunesmith.report import finding_text


def says(cause: Finding, params: dict[str, object]) -> bool:
    """Whether a cause says these things: floats to 0.1 %, texts as a part, counts exactly."""
    for key, expected in params.items():
        said = cause.params.get(key)
        if isinstance(expected, float):
            if not isinstance(said, float) or not math.isclose(said, expected, rel_tol=1e-3):
                return False
        elif isinstance(expected, str):
            if expected not in str(said):
                return False
        elif said != expected:
            return False
    return True


@pytest.mark.parametrize(
    ("mutant", "rounding"),
    [(mutant, rounding) for mutant in MUTANTS for rounding in mutant.roundings],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_spoilt_merge_is_different_and_its_cause_is_named(
    mutant: Mutant, rounding: str, shop: Workshop, tmp_path: Path
) -> None:
    """The answer is ``different``; the first cause and those after it are the right ones, with their figures."""
    out = tmp_path / "merged"
    shutil.copytree({"faithful": shop.merged, "nearest": shop.nearest}[rounding], out)
    mutant.spoil(out, shop)
    verdict = check(shop.run, out, shop.base)
    assert verdict.answer == "different"
    assert tuple(cause.code for cause in verdict.causes) == (mutant.cause, *mutant.then), verdict.causes
    assert says(verdict.causes[0], dict(mutant.params)), verdict.causes[0]
    assert all(finding_text(cause, lang) for cause in verdict.causes for lang in ("en", "zh"))


def test_mutants_have_names_of_their_own() -> None:
    """A name used twice would hide one of the two."""
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) > 60

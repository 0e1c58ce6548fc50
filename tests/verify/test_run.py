"""One verification: which levels ran, the answer, and the record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.sabotage.workshop import Workshop, check, deltas, flip_bit, make_base, make_workshop, peft_merge, rewrite
from tests.tiny_models import edit_json
from tunesmith.checkpoint import weights_sha256
from tunesmith.errors import TunesmithError
from tunesmith.progress import Cancellation, Cancelled, Progress
from tunesmith.runs import open_run
from tunesmith.verify import LEVELS, Verdict, verify

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A tiny run, its base and a sound merge."""
    return make_workshop(tmp_path_factory.mktemp("verify"))


@pytest.fixture(scope="module")
def full(shop: Workshop) -> Verdict:
    """The verdict of all four levels on the sound merge."""
    return check(shop.run, shop.merged, shop.base, levels=LEVELS)


def statuses(verdict: Verdict) -> dict[str, str]:
    """Every level's status."""
    return {level.name: level.status for level in verdict.levels}


def codes(verdict: Verdict) -> set[str]:
    """Every finding's code."""
    return {finding.code for level in verdict.levels for finding in level.findings}


def test_a_sound_merge_passes_every_level(full: Verdict) -> None:
    """Equal within rounding, as a faithful merge is, and no cause is looked for."""
    assert statuses(full)["structure"] == statuses(full)["assets"] == statuses(full)["weights"] == "pass"
    assert statuses(full)["behaviour"] in ("pass", "warn")
    assert (full.answer, full.good, full.causes) == ("equal_within_rounding", True, ())
    assert (full.run, full.merged, full.checkpoint, full.base_model) == ("run", "merged", "final", "base")
    assert len(full.tensors) == 20
    assert full.dtype == "float32"
    assert len(full.behaviour) > 2


def test_a_verdict_survives_the_way_through_json(full: Verdict, tmp_path: Path) -> None:
    """Every field, exactly."""
    assert Verdict.read(full.write(tmp_path / "verdict.json")) == full


def test_a_verdict_on_a_spoilt_merge_survives_the_way_through_json(shop: Workshop, tmp_path: Path) -> None:
    """Infinite errors too."""
    out = shutil.copytree(shop.merged, tmp_path / "merged")
    name = next(iter(deltas(shop.run)))
    rewrite(out, lambda tensors: tensors[name].view(-1).__setitem__(0, float("nan")))
    verdict = check(shop.run, out, shop.base)
    assert verdict.answer == "different"
    assert any(tensor.relative_error == float("inf") for tensor in verdict.tensors)
    assert Verdict.read(verdict.write(tmp_path / "verdict.json")) == verdict
    json.loads(verdict.to_json(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))


@pytest.mark.parametrize("levels", [("structure",), ("assets",), ("structure", "assets")])
def test_without_the_weights_nothing_is_verified(levels: tuple[str, ...], shop: Workshop) -> None:
    """Levels that were not asked for are skipped, and say so; structure is always looked at."""
    verdict = check(shop.run, shop.merged, shop.base, levels=levels)
    assert (verdict.answer, verdict.good) == ("not_verified", False)
    expected = {name: "pass" if name in (*levels, "structure") else "skipped" for name in LEVELS}
    assert statuses(verdict) == expected
    assert (verdict.tensors, verdict.behaviour, verdict.dtype) == ((), (), None)


def test_behaviour_alone_verifies_nothing_and_weights_alone_do(shop: Workshop) -> None:
    """What shows is not what proves."""
    assert check(shop.run, shop.merged, shop.base, levels=("behaviour",)).answer == "not_verified"
    assert check(shop.run, shop.merged, shop.base, levels=("weights",)).answer == "equal_within_rounding"


def test_behaviour_alone_does_not_accuse_a_merge_of_its_rounding(shop: Workshop, tmp_path: Path) -> None:
    """What rounding costs is not known then; the base in the merge's place is still told."""
    assert check(shop.run, shop.merged, shop.base, levels=("behaviour",)).causes == ()
    out = shutil.copytree(shop.merged, tmp_path / "merged")
    shutil.copy(shop.base / WEIGHTS, out)
    verdict = check(shop.run, out, shop.base, levels=("behaviour",))
    assert [cause.code for cause in verdict.causes] == ["cause_behaviour"]


def test_another_rounding_is_equal_and_not_identical(shop: Workshop, tmp_path: Path) -> None:
    """PEFT's ``safe_merge`` rounds Δ first."""
    out = peft_merge(shop.run, shop.base, tmp_path / "peft", dtype=torch.bfloat16, safe=True)
    verdict = check(shop.run, out, shop.base)
    assert (verdict.answer, verdict.good) == ("equal_within_rounding", True)


def test_every_level_is_looked_at_after_one_has_failed(shop: Workshop, tmp_path: Path) -> None:
    """All that is wrong is found in one go."""
    out = shutil.copytree(shop.merged, tmp_path / "merged")
    rewrite(out, lambda tensors: tensors.update(extra=tensors["model.norm.weight"].clone()))
    edit_json(out / "config.json", rms_norm_eps=0.1)
    flip_bit(out, "model.norm.weight", 3, 2)
    verdict = check(shop.run, out, shop.base)
    assert statuses(verdict) == {"structure": "fail", "assets": "fail", "weights": "fail", "behaviour": "skipped"}
    assert [cause.code for cause in verdict.causes] == ["cause_one_element", "cause_tensors_extra", "cause_config"]


def test_unreadable_weights_are_different_and_not_a_crash(shop: Workshop, tmp_path: Path) -> None:
    """At every level."""
    out = shutil.copytree(shop.merged, tmp_path / "merged")
    (out / WEIGHTS).write_bytes(b"\0" * 100)
    verdict = check(shop.run, out, shop.base, levels=LEVELS)
    assert verdict.answer == "different"
    assert {"structure_broken", "weights_unreadable", "behaviour_unloadable"} <= codes(verdict)
    assert [cause.code for cause in verdict.causes] == ["cause_unreadable"]


def test_a_base_that_is_not_the_recorded_one_is_told_by_its_hash(shop: Workshop, tmp_path: Path) -> None:
    """The adapter does not belong on it, even where base plus adapter is what was merged."""
    run = shutil.copytree(shop.run, tmp_path / "run")
    (run / "tunesmith_run.json").write_text(json.dumps({"base_sha256": weights_sha256(shop.base)}))
    assert "base_same" in codes(check(run, shop.merged, shop.base))
    (run / "tunesmith_run.json").write_text(json.dumps({"base_sha256": "0" * 64}))
    verdict = check(run, shop.merged, shop.base)
    assert verdict.answer == "different"
    assert [cause.code for cause in verdict.causes] == ["cause_base_changed"]


def test_another_checkpoint_is_held_against_where_it_is_asked_for(shop: Workshop) -> None:
    """The sound merge of the last is no merge of the first."""
    arguments = {"base_dir": shop.base, "base_model": "base", "levels": ("weights",)}
    assert verify(open_run(shop.run), shop.nearest, checkpoint=30, **arguments).answer == "identical"
    assert verify(open_run(shop.run), shop.merged, checkpoint=30, **arguments).answer == "equal_within_rounding"
    verdict = verify(open_run(shop.run), shop.merged, checkpoint="checkpoint-10", **arguments)
    assert verdict.answer == "different"
    assert verdict.checkpoint == "checkpoint-10"
    assert verdict.causes[0].code == "cause_other_checkpoint"


def test_a_damaged_checkpoint_beside_explains_nothing_and_breaks_nothing(shop: Workshop, tmp_path: Path) -> None:
    """The other adapters are asked only where they can be."""
    run = shutil.copytree(shop.run, tmp_path / "run")
    (run / "checkpoint-10" / "adapter_model.safetensors").write_bytes(b"damaged")
    out = shutil.copytree(shop.merged, tmp_path / "merged")
    shutil.copy(shop.base / WEIGHTS, out)
    assert check(run, out, shop.base).causes[0].code == "cause_not_applied"


def test_a_run_that_does_not_fit_its_base_is_an_error_and_no_verdict(shop: Workshop, tmp_path: Path) -> None:
    """There is nothing to hold the merge against."""
    small = make_base(tmp_path / "small", hidden_size=32)
    with pytest.raises(TunesmithError):
        check(shop.run, shop.merged, small)


def test_progress_ends_at_all_elements_and_it_stops_when_told_to(shop: Workshop) -> None:
    """Every tile is told of; cancelling is heard between tiles."""
    told: list[Progress] = []
    cancellation = Cancellation()
    arguments = {"base_dir": shop.base, "base_model": "base", "levels": ("weights",)}
    verify(open_run(shop.run), shop.merged, progress=told.append, **arguments)
    assert told[-1].done == told[-1].total == 102720
    cancellation.cancel()
    with pytest.raises(Cancelled):
        verify(open_run(shop.run), shop.merged, cancellation=cancellation, **arguments)

"""Whole verifications of what is more than one adapter on its base: stacks, residual bases, views, and no live twin."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tunesmith as ts
from tests.sabotage.workshop import Workshop, deltas, make_adapter, make_base, make_workshop, peft_merge, remerge
from tests.tiny_models import edit_json
from tests.verify.making import round_once
from tunesmith.checkpoint import Checkpoint
from tunesmith.checkpoint.views import BaseView
from tunesmith.cli.app import app
from tunesmith.cli.options import weighted_run
from tunesmith.errors import DataError, TunesmithError, UnsupportedAdapterError
from tunesmith.verify import Verdict

WEIGHTS = "model.safetensors"
QUICK = ("structure", "assets", "weights")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A tiny run, its base and a sound merge."""
    return make_workshop(tmp_path_factory.mktemp("stacks"))


@pytest.fixture(scope="module")
def second(shop: Workshop) -> Path:
    """Another run on the same base."""
    return make_adapter(shop.base, shop.base.parent / "second", seed=11, target_modules=["q_proj", "up_proj"])


@pytest.fixture(scope="module")
def summed(shop: Workshop, second: Path) -> Path:
    """W + 0.8·Δ + 0.5·Δ′, rounded once, by hand."""
    out = Path(shutil.copytree(shop.merged, shop.base.parent / "summed"))
    base = load_file(shop.base / WEIGHTS)
    exact = {name: base[name].double() + 0.8 * delta for name, delta in deltas(shop.run).items()}
    for name, delta in deltas(second).items():
        exact[name] = exact.get(name, base[name].double()) + 0.5 * delta
    base |= {name: round_once(value, torch.bfloat16) for name, value in exact.items()}
    save_file(base, out / WEIGHTS, {"format": "pt"})
    return out


def answer(verdict: Verdict) -> tuple[str, str | None]:
    """The answer, and the first cause."""
    return verdict.answer, verdict.causes[0].code if verdict.causes else None


def behaviour(verdict: Verdict) -> tuple[str, str, str]:
    """The behaviour level's status, its one finding and the reason that it gives."""
    level = verdict.levels[-1]
    (finding,) = level.findings
    return level.status, finding.code, str(finding.params.get("reason"))


def test_a_weighted_sum_of_adapters_is_proved_with_the_same_weights_and_no_others(
    shop: Workshop, second: Path, summed: Path
) -> None:
    """All adapters, each with its weight; the order of the sum does not matter."""

    def check(run: Path, weight: float, *others: tuple[Path, float]) -> str:
        return ts.verify(run, summed, base=str(shop.base), weight=weight, adapters=others, levels=QUICK).answer

    assert check(shop.run, 0.8, (second, 0.5)) == "identical"
    assert check(second, 0.5, (shop.run, 0.8)) == "identical"
    assert check(shop.run, 0.8) == "different"
    assert check(shop.run, 1.0, (second, 0.5)) == "different"
    assert check(shop.run, 0.8, (second, 0.6)) == "different"


def test_a_sum_that_was_made_with_another_weight_says_by_how_much(shop: Workshop) -> None:
    """A single adapter at a wrong weight is a factor."""
    verdict = ts.verify(shop.run, shop.merged, base=str(shop.base), weight=0.5, levels=QUICK)
    assert answer(verdict) == ("different", "cause_merged_twice")
    verdict = ts.verify(shop.run, shop.merged, base=str(shop.base), weight=1.25, levels=QUICK)
    assert answer(verdict) == ("different", "cause_scaled")
    assert verdict.causes[0].params["factor"] == pytest.approx(0.8, rel=1e-3)


def test_behaviour_is_not_measured_for_a_sum_and_the_other_levels_decide(
    shop: Workshop, second: Path, summed: Path
) -> None:
    """There is no live counterpart; that is said, and is no reason to fail."""
    verdict = ts.verify(shop.run, summed, base=str(shop.base), weight=0.8, adapters=[(second, 0.5)])
    assert verdict.answer == "identical"
    assert behaviour(verdict)[:2] == ("skipped", "behaviour_not_measured")
    assert (verdict.behaviour, verdict.dtype) == ((), None)
    assert Verdict.model_validate_json(verdict.to_json()) == verdict


def test_peft_merges_of_two_adapters_one_after_another_are_sound(shop: Workshop, second: Path, tmp_path: Path) -> None:
    """Rounded after each, which is what merging a merge means."""
    once = peft_merge(shop.run, shop.base, tmp_path / "once", dtype=torch.bfloat16)
    out = peft_merge(second, once, tmp_path / "twice", dtype=torch.bfloat16)
    verdict = ts.verify(shop.run, out, base=str(shop.base), adapters=[(second, 1.0)], levels=QUICK)
    assert verdict.answer == "equal_within_rounding"
    assert sum(tensor.faithful for tensor in verdict.tensors) == 0


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"bias": "all"}, "behaviour_not_measured"),
        ({"task_type": "SEQ_CLS"}, "behaviour_not_measured"),
        ({"task_type": "FEATURE_EXTRACTION"}, "behaviour_not_measured"),
        ({"use_dora": True}, "behaviour_close"),
        ({"trainable_token_indices": [3, 7]}, "behaviour_close"),
    ],
    ids=["bias", "classifier", "features", "dora", "tokens"],
)
def test_behaviour_is_measured_where_the_live_adapter_can_be_and_never_an_error(
    config: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    """An adapter that changes the base's own weights, or makes no text, is proved by its weights."""
    biased = {"attention_bias": True} if "bias" in config else {}
    base = make_base(tmp_path / "base", dtype=torch.float32, **biased)
    task = config.pop("task_type", None)
    run = make_adapter(base, tmp_path / "run", seed=12, **config)
    if task:
        edit_json(run / "adapter_config.json", task_type=task)
    out = tmp_path / "merged"
    ts.merge(ts.plan_merge(run, out, base=str(base)))
    verdict = ts.verify(run, out, base=str(base))
    level = verdict.levels[-1]
    assert expected in [finding.code for finding in level.findings]
    if expected == "behaviour_not_measured":
        assert level.status == "skipped"
        assert ts.finding_text(level.findings[0])
    assert verdict.answer == "identical" or task == "SEQ_CLS"


def test_a_residual_base_is_taken_only_where_it_is_said_to_be_one(shop: Workshop, tmp_path: Path) -> None:
    """PiSSA's adapters are relative to what was left of the base."""
    run = shutil.copytree(shop.run, tmp_path / "run")
    edit_json(run / "adapter_config.json", init_lora_weights="pissa")
    with pytest.raises(UnsupportedAdapterError):
        ts.verify(run, shop.merged, base=str(shop.base), levels=QUICK)
    verdict = ts.verify(run, shop.nearest, base=str(shop.base), base_is_residual=True)
    assert verdict.answer == "identical"
    assert behaviour(verdict)[1] == "behaviour_not_measured"


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "int8"])
def test_a_merge_into_a_view_of_the_base_is_proved_against_that_view(kind: str, shop: Workshop, tmp_path: Path) -> None:
    """dequant(quant(W)) + s·B·A; held against the base as it is stored, every quantized tensor is wrong."""
    view, base = BaseView(kind), Checkpoint(shop.base)  # type: ignore[arg-type]
    out = Path(shutil.copytree(shop.merged, tmp_path / "merged"))

    def seen(name: str, delta: torch.Tensor) -> torch.Tensor:
        start = torch.from_numpy(view.rows(base, name, 0, None).copy())
        return round_once(start + delta, torch.bfloat16).double() - load_file(shop.base / WEIGHTS)[name].double()

    remerge(out, shop, seen)
    verdict = ts.verify(shop.run, out, base=str(shop.base), base_view=kind)
    assert verdict.answer == "identical"
    assert behaviour(verdict)[0] == "skipped"
    assert ts.verify(shop.run, out, base=str(shop.base), levels=QUICK).answer == "different"
    assert ts.verify(shop.run, shop.merged, base=str(shop.base), base_view=kind, levels=QUICK).answer == "different"


def test_an_unknown_view_is_an_error_that_lists_the_known(shop: Workshop) -> None:
    """Nothing is verified against a guess."""
    with pytest.raises(DataError, match="nf4-double"):
        ts.verify(shop.run, shop.merged, base=str(shop.base), base_view="nf3")


def test_a_further_run_that_is_not_there_is_an_error(shop: Workshop, tmp_path: Path) -> None:
    """As the first one is."""
    with pytest.raises(TunesmithError):
        ts.verify(shop.run, shop.merged, base=str(shop.base), adapters=[(tmp_path / "none", 1.0)])


def test_the_command_line_reads_runs_with_their_weights(shop: Workshop, second: Path, summed: Path) -> None:
    """As merge does; exit 0 where the weights are those of the merge, 3 where they are not."""

    def code(run: str, *options: str) -> int:
        base = ("--base", str(shop.base), "--level", "weights", "--json")
        return CliRunner().invoke(app, ["verify", run, str(summed), *base, *options]).exit_code

    assert code(f"{shop.run}:0.8", "--adapter", f"{second}:0.5") == 0
    assert code(f"{second}:0.5", "--adapter", f"{shop.run}:0.8") == 0
    assert code(str(shop.run), "--adapter", f"{second}:0.5") == 3
    assert code(f"{shop.run}:0.8") == 3


def test_a_weight_is_read_off_the_end_of_a_run(tmp_path: Path) -> None:
    """A directory of just that name goes before; what is no number belongs to the name."""
    assert weighted_run("a/b:0.7") == (Path("a/b"), 0.7)
    assert weighted_run(Path("a:-1")) == (Path("a"), -1.0)
    assert weighted_run("a/b") == (Path("a/b"), 1.0)
    assert weighted_run("C:run") == (Path("C:run"), 1.0)
    (tmp_path / "run:2").mkdir()
    assert weighted_run(tmp_path / "run:2") == (tmp_path / "run:2", 1.0)
    assert weighted_run(f"{tmp_path}/run:2:0.5") == (tmp_path / "run:2", 0.5)

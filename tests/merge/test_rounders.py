"""Which rounding a tensor gets, what it keeps, and that verification accepts it and nothing beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tunesmith as ts
from tests.merge.conftest import Bench
from tests.tiny_models import build_adapter
from tunesmith.adapter import Added, Copied, LowRank, Magnitude, Replaced, Rows, Stack, beside
from tunesmith.api.merging import recorded_inputs
from tunesmith.checkpoint import Checkpoint, Float64
from tunesmith.errors import CheckpointError, OutputError
from tunesmith.merge import Merged, forecast, plan_merge
from tunesmith.merge import merge as merge_weights
from tunesmith.merge.rounders import WIDEST, calibrated, rounding_of
from tunesmith.merge.rounders import recorded_inputs as read_inputs

LOW = LowRank(name="w", module="m", r=2, scaling=1.0, lora_A="a", lora_B="b")
ADDED = Added(name="w", module="m", tensor="x", scaling=1.0)
SCALED = Magnitude(name="w", module="m", tensor="x", per="row")
REPLACED = Replaced(name="w", module="m", tensor="x")
ROWS = Rows(name="w", module="m", tensor="x", indices=(1,))
COPIED = Copied(name="w", source="v")


@pytest.mark.parametrize(
    ("updates", "feedback", "chance"),
    [
        ([LOW], True, True),
        ([LOW, SCALED], True, True),
        ([COPIED, LOW], True, True),
        ([ROWS, LOW], True, True),
        ([ADDED], False, True),
        ([REPLACED], False, False),
        ([ROWS], False, False),
        ([COPIED], False, False),
    ],
)
def test_every_kind_of_update_has_its_rule(updates: list[Any], feedback: bool, chance: bool) -> None:
    """In bf16; in every other format there is but one."""
    for rounding in ("faithful", "calibrated", "calibrated-free"):
        assert rounding_of(rounding, "BF16", updates) == (rounding if feedback else "nearest")
    assert rounding_of("stochastic", "BF16", updates) == ("stochastic" if chance else "nearest")
    assert rounding_of("nearest", "BF16", updates) == "nearest"
    for dtype in ("F16", "F32", "F64", "I8"):
        assert rounding_of("faithful", dtype, updates) == rounding_of("stochastic", dtype, updates) == "nearest"


@pytest.fixture(scope="module")
def weak(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose update lies mostly under half a step, as real ones do, on every linear layer."""
    base = bench.bases["BF16", "single"]
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    run = build_adapter(base, tmp_path_factory.mktemp("weak") / "run", seed=5, r=4, target_modules=every)
    weights = load_file(run / "adapter_model.safetensors")
    save_file({k: v * (0.004 if "lora_B" in k else 1) for k, v in weights.items()}, run / "adapter_model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, run)
    return run


def merged(run: Path, bench: Bench, out: Path, **options: Any) -> Merged:
    """A merge into the bf16 base."""
    return ts.merge(plan_merge(run, out, base=str(bench.bases["BF16", "single"]), **options))


def test_the_default_is_faithful_in_bf16_and_says_why(weak: Path, bench: Bench, tmp_path: Path) -> None:
    """And to nearest in formats that are fine enough."""
    plan = plan_merge(weak, tmp_path / "out", base=str(bench.bases["BF16", "single"]))
    assert (plan.rounding, plan.rounded) == ("faithful", {"faithful": 14})
    assert plan.warnings[0].code == "rounding_faithful"
    assert plan.warnings[0].params["tensors"] == 14
    for dtype in ("F16", "F32"):
        fine = plan_merge(weak, tmp_path / "out", base=str(bench.bases[dtype, "single"]))
        assert (fine.rounding, fine.warnings[0].code) == ("nearest", "rounding_fine")
    converted = plan_merge(weak, tmp_path / "out", base=str(bench.bases["BF16", "single"]), dtype="fp32")
    assert (converted.rounding, converted.warnings[0].code) == ("nearest", "rounding_fine")
    asked = plan_merge(weak, tmp_path / "out", base=str(bench.bases["BF16", "single"]), rounding="nearest")
    assert not [finding for finding in asked.warnings if finding.code.startswith("rounding_")]


def test_what_cannot_be_rounded_as_asked_is_refused(weak: Path, bench: Bench, tmp_path: Path) -> None:
    """Before anything is written."""
    base = str(bench.bases["BF16", "single"])
    rows = tmp_path / "rows.txt"
    rows.write_text("a question\n")
    for options, what in (
        ({"rounding": "best"}, "no such rounding"),
        ({"rounding": "faithful", "dtype": "fp16"}, "nothing to be rounded"),
        ({"rounding": "calibrated", "weight": 0.5}, "live adapter"),
        ({"rounding": "calibrated", "adapters": [(weak, 1.0)]}, "live adapter"),
        ({"rounding": "calibrated", "base_view": "int8"}, "live adapter"),
        ({"rounding": "faithful", "calibration": rows}, "Only calibrated rounding"),
        ({"calibration": rows}, "Only calibrated rounding"),
    ):
        with pytest.raises(OutputError, match=what):
            plan_merge(weak, tmp_path / "out", base=base, **options)  # type: ignore[arg-type]
    plan = plan_merge(weak, tmp_path / "out", base=base, rounding="calibrated")
    with pytest.raises(OutputError, match="recorded inputs"):
        merge_weights(plan)
    assert not (tmp_path / "out").exists()


def test_faithful_keeps_what_nearest_loses_and_tells_of_both(weak: Path, bench: Bench, tmp_path: Path) -> None:
    """The record holds, for every tensor and for all, what was done and what nearest would have done."""
    nearest = merged(weak, bench, tmp_path / "nearest", rounding="nearest")
    faithful = merged(weak, bench, tmp_path / "faithful")
    assert nearest.kept.gain < 0.9
    assert abs(faithful.kept.gain - 1) < 0.1
    assert faithful.nearest.model_dump() == pytest.approx(
        {**nearest.kept.model_dump(), "error_inside": faithful.nearest.error_inside}, rel=1e-9
    )
    assert faithful.kept.error_inside < faithful.nearest.error_inside / 3  # type: ignore[operator]
    assert faithful.kept.relative_error > faithful.nearest.relative_error
    assert [finding.code for finding in nearest.findings] == ["update_lost_in_rounding"]
    assert [finding.code for finding in faithful.findings] == ["update_finer_than_bf16"]
    for ours, theirs in zip(faithful.receipts[0].tensors, nearest.receipts[0].tensors, strict=True):
        assert (ours.rounding, theirs.rounding, theirs.nearest) == ("faithful", "nearest", None)
        assert ours.nearest is not None
        assert ours.nearest.gain == pytest.approx(theirs.gain, rel=1e-9)
        assert ours.nearest.share_unchanged == theirs.share_unchanged
        assert ours.share_beyond == 0


def test_the_receipt_is_what_the_files_say(weak: Path, bench: Bench, tmp_path: Path) -> None:
    """Gain, error and error within A's row space, computed again from the merged file alone."""
    done = merged(weak, bench, tmp_path / "out")
    base, out, stack = Checkpoint(bench.bases["BF16", "single"]), Checkpoint(tmp_path / "out"), Stack([(weak, 1.0)])
    by_name = stack.bind(base).by_name
    for told in done.receipts[0].tensors:
        (update,) = by_name[told.name]
        assert isinstance(update, LowRank)
        a_RI, b_OR = stack.factors(update)
        delta_OI = update.scaling * b_OR @ a_RI
        realised_OI = out.read_float64(told.name) - base.read_float64(told.name)
        size = np.linalg.norm(delta_OI)
        _, _, v_RI = np.linalg.svd(a_RI, full_matrices=False)
        assert told.gain == pytest.approx((realised_OI * delta_OI).sum() / size**2, rel=1e-9)
        assert told.relative_error == pytest.approx(np.linalg.norm(realised_OI - delta_OI) / size, rel=1e-9)
        assert told.error_inside == pytest.approx(np.linalg.norm((realised_OI - delta_OI) @ v_RI.T) / size, rel=1e-6)
        assert told.share_unchanged == (realised_OI == 0).mean()


@pytest.mark.parametrize("rounding", ["faithful", "stochastic", "calibrated"])
def test_verification_accepts_either_neighbour_and_nothing_beside_them(
    weak: Path, bench: Bench, tmp_path: Path, rounding: str
) -> None:
    """One number one step outside its neighbours is enough."""
    base = str(bench.bases["BF16", "single"])
    out = merged(weak, bench, tmp_path / "out", rounding=rounding).path
    levels = ("structure", "weights")
    verdict = ts.verify(weak, out, base=base, levels=levels)
    assert verdict.answer == "equal_within_rounding"
    assert sum(tensor.faithful for tensor in verdict.tensors) > 1000
    assert not any(tensor.twice_rounded or tensor.outside for tensor in verdict.tensors)
    weights = load_file(out / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    damaged = weights[name].view(torch.int16).clone()
    damaged[3, 5] = _beyond(weak, Path(base), name, 3, 5, weights[name])
    save_file({**weights, name: damaged.view(torch.bfloat16)}, out / "model.safetensors", {"format": "pt"})
    spoilt = ts.verify(weak, out, base=base, levels=levels)
    assert spoilt.answer == "different"
    assert {tensor.name: tensor.outside for tensor in spoilt.tensors if tensor.outside} == {name: 1}


def _beyond(run: Path, base: Path, name: str, row: int, column: int, stored: torch.Tensor) -> int:
    """The pattern one step beyond the neighbour of the exact value that lies further from zero."""
    stack = Stack([(run, 1.0)])
    (update,) = stack.bind(Checkpoint(base)).by_name[name]
    assert isinstance(update, LowRank)
    a_RI, b_OR = stack.factors(update)
    exact = Checkpoint(base).read_float64(name)[row, column] + update.scaling * float(b_OR[row] @ a_RI[:, column])
    pattern = int(stored[row, column].view(torch.int16))
    inner = torch.tensor(exact, dtype=torch.float64).to(torch.float32).view(torch.int32).item() >> 16
    assert pattern - inner in (0, 1), "the stored number is one of the two neighbours"
    return inner + 2


def test_calibrated_rounding_errs_least_where_it_looked(weak: Path, bench: Bench, tmp_path: Path) -> None:
    """On those and on A's row space, weighed alike: calibrated below faithful and nearest, and free below clamped."""
    plan = plan_merge(weak, tmp_path / "x", base=str(bench.bases["BF16", "single"]), rounding="calibrated", seed=3)
    with recorded_inputs(plan) as folder:
        assert folder is not None
        inputs = shutil.copytree(folder, tmp_path / "kept")
    assert not folder.exists()
    errors = {}
    for rounding in ("nearest", "faithful", "calibrated", "calibrated-free"):
        out = merged(weak, bench, tmp_path / rounding, rounding=rounding, seed=3)
        errors[rounding] = _output_error(weak, Path(plan.base), out.path, inputs)
        beyond = max(tensor.share_beyond for tensor in out.receipts[0].tensors)
        assert (beyond > 0) == (rounding == "calibrated-free")
        assert not list(tmp_path.glob(".*inputs")), "nothing is left beside the target"
    assert errors["calibrated"] < 0.7 * min(errors["nearest"], errors["faithful"])
    assert errors["calibrated-free"] < errors["calibrated"]


def _output_error(run: Path, base: Path, out: Path, inputs: Path) -> float:
    """Σ ‖X·Eᵀ‖²/N + ‖E·U‖²·(mean of XᵀX/N's diagonal)·(I/M), in the textbook's words."""
    stack, total = Stack([(run, 1.0)]), 0.0
    binding = stack.bind(Checkpoint(base))
    for name, (update,) in binding.by_name.items():
        assert isinstance(update, LowRank)
        a_RI, b_OR = stack.factors(update)
        others = [stack.factors(other)[0] for other in beside(binding).get(name, ())]
        e_OI = Checkpoint(out).read_float64(name) - Checkpoint(base).read_float64(name) - update.scaling * b_OR @ a_RI
        x_NI = read_inputs(str(inputs), update.module)
        assert x_NI is not None
        _, values, v_MI = np.linalg.svd(np.concatenate([a_RI, *others]), full_matrices=False)
        assert values[-1] > 1e-3 * values[0], "of full rank"
        weight = np.square(x_NI).mean() * x_NI.shape[1] / len(v_MI)
        total += float(np.square(x_NI @ e_OI.T).sum() / len(x_NI) + weight * np.square(e_OI @ v_MI.T).sum())
    return total


def test_calibration_is_repeatable_and_takes_the_users_rows(weak: Path, bench: Bench, tmp_path: Path) -> None:
    """The same seed gives the same bytes; another seed, or the user's text, gives others."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"say {n}", "output": "yes " * 9}) + "\n" for n in range(20)))
    found = []
    for number, options in enumerate(({"seed": 1}, {"seed": 1}, {"seed": 2}, {"calibration": rows})):
        out = merged(weak, bench, tmp_path / str(number), rounding="calibrated", **options).path
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_few_tokens_and_many_give_the_same_problem() -> None:
    """Fewer tokens than columns are solved by their low rank: what one more, all zero, changes to the whole matrix."""
    rng = np.random.default_rng(0)
    x_NI, a_RI, steps_I = rng.standard_normal((37, 41)), rng.standard_normal((3, 41)), rng.uniform(1, 2, 41)
    t_TI = rng.standard_normal((9, 41))

    def round_with(inputs_NI: Float64) -> Float64:
        return calibrated(inputs_NI, steps_I, a_RI, clamp=True).round(t_TI, 0)

    few = round_with(x_NI)
    scaled = np.concatenate([x_NI, np.zeros((1, 41))]) * (38 / 37) ** 0.5  # the same XᵀX / n
    assert np.array_equal(round_with(scaled), few)


def test_a_module_without_recorded_inputs_is_rounded_faithfully(weak: Path, bench: Bench, tmp_path: Path) -> None:
    """And a folder that cannot be read is an error, not a silence."""
    plan = plan_merge(weak, tmp_path / "out", base=str(bench.bases["BF16", "single"]), rounding="calibrated")
    empty = tmp_path / "inputs"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="index"):
        merge_weights(plan, inputs=empty)
    # Another folder of that name, later in the same process, is another folder.
    (empty / "inputs.json").write_text(json.dumps({"tokens": 1, "files": {}, "modules": {"another": "0000.npy"}}))
    assert read_inputs(str(empty), "model.layers.0.self_attn.q_proj") is None
    (empty / "inputs.json").write_text(json.dumps({"tokens": 1, "files": {}, "modules": {"another": "0001.npy"}}))
    with pytest.raises(CheckpointError, match="0001"):
        read_inputs(str(empty), "another")
    (empty / "inputs.json").write_text(json.dumps({"tokens": 0, "files": {}, "modules": {}}))
    out = merge_weights(plan, inputs=empty).path
    faithful = merged(weak, bench, tmp_path / "faithful")
    assert (out / "model.safetensors").read_bytes() == (faithful.path / "model.safetensors").read_bytes()


def test_modules_that_are_given_the_same_input_stand_beside_each_other(weak: Path, bench: Bench) -> None:
    """q, k and v; gate and up; o and down alone."""
    binding = Stack([(weak, 1.0)]).bind(Checkpoint(bench.bases["BF16", "single"]))
    found = {name: sorted(update.name for update in others) for name, others in beside(binding).items()}
    layer = "model.layers.0."
    assert found[f"{layer}self_attn.k_proj.weight"] == [
        f"{layer}self_attn.q_proj.weight",
        f"{layer}self_attn.v_proj.weight",
    ]
    assert found[f"{layer}mlp.up_proj.weight"] == [f"{layer}mlp.gate_proj.weight"]
    assert {name.rpartition("_")[0].rpartition(".")[2] for name in found} == {"q", "k", "v", "gate", "up"}
    assert WIDEST == 3 * 8, "three ranks of 8 fit"


def test_the_forecast_is_near_what_the_merge_then_tells(weak: Path, bench: Bench, tmp_path: Path) -> None:
    """From a few rows."""
    base = Checkpoint(bench.bases["BF16", "single"])
    stack = Stack([(weak, 1.0)])
    told = forecast(base, stack, stack.bind(base))
    assert told is not None
    done = merged(weak, bench, tmp_path / "out")
    assert (told.dtype, told.rounding) == ("BF16", "faithful")
    assert told.nearest.gain == pytest.approx(done.nearest.gain, abs=0.1)
    assert told.kept.gain == pytest.approx(done.kept.gain, abs=0.05)
    fine = Checkpoint(bench.bases["F32", "single"])
    exact = forecast(fine, stack, stack.bind(fine))
    assert exact is not None
    assert (exact.rounding, exact.kept.gain) == ("nearest", pytest.approx(1, abs=1e-3))


def test_a_merge_that_left_its_neighbours_is_called_that(weak: Path, bench: Bench, tmp_path: Path) -> None:
    """It is not proven number by number; the cause says why, and what to do."""
    base = str(bench.bases["BF16", "single"])
    out = merged(weak, bench, tmp_path / "out", rounding="calibrated-free").path
    verdict = ts.verify(weak, out, base=base, levels=("structure", "weights"))
    assert verdict.answer == "different"
    assert [cause.code for cause in verdict.causes] == ["cause_beyond_neighbours"]
    assert verdict.causes[0].params["gain"] == pytest.approx(1, abs=0.1)


def test_a_tensor_that_nearest_keeps_whole_is_rounded_to_nearest(bench: Bench, weak: Path, tmp_path: Path) -> None:
    """A large update has nothing to win; the bytes are those of nearest, and the record says so."""
    run = tmp_path / "strong" / "run"
    shutil.copytree(weak, run)
    weights = load_file(run / "adapter_model.safetensors")
    strong = {k: v * (250 if "lora_B" in k and "q_proj" in k else 1) for k, v in weights.items()}
    save_file(strong, run / "adapter_model.safetensors")
    faithful = merged(run, bench, tmp_path / "faithful")
    nearest = merged(run, bench, tmp_path / "nearest", rounding="nearest")
    ours, theirs = (load_file(one.path / "model.safetensors") for one in (faithful, nearest))
    found = {tensor.name: tensor.rounding for tensor in faithful.receipts[0].tensors}
    assert {name for name, rounding in found.items() if rounding == "nearest"} == {n for n in found if "q_proj" in n}
    for name, rounding in found.items():
        same = torch.equal(ours[name].view(torch.int16), theirs[name].view(torch.int16))
        assert same == (rounding == "nearest"), name

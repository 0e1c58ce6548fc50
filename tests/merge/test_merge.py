"""A merge from end to end: the bytes it writes, what it leaves alone, and every way that it stops."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.merge.conftest import ADAPTERS, Bench
from tests.merge.exact import TORCH, load_model, raw_bytes, round_tensor
from tests.tiny_models import edit_json, peft_alone
from tunesmith.checkpoint import BaseView, Checkpoint, read_header, sha256_of, weights_sha256
from tunesmith.errors import (
    AdapterError,
    AdapterMismatchError,
    BaseModelError,
    Cancelled,
    CheckpointError,
    OutputError,
    RunError,
    TunesmithError,
    UnsupportedAdapterError,
)
from tunesmith.merge import Merged, MergePlan, merge, plan_merge, units, work, write
from tunesmith.progress import Cancellation, Progress

# Half a unit in the last place of each format, relative: PEFT rounds Δ, then the sum; we round the sum.
HALF_ULP = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}


def closed_form(base: Path, run: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """W + s·B·A in float64 for every adapted tensor, written out by hand: the scaling too."""
    tensors, factors, sums = load_model(base), load_file(run / "adapter_model.safetensors"), {}
    for key in (name for name in factors if ".lora_A." in name):
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = factors[key].double(), factors[key.replace("lora_A", "lora_B")].double()
        alpha, r = float(config["lora_alpha"]), a.shape[0]
        if "alpha_pattern" in config and ".layers.1." in module and module.endswith("q_proj"):
            alpha = 3.0
        scaling = alpha / r**0.5 if config.get("use_rslora") else alpha / r
        delta = torch.zeros(b.shape[0], a.shape[1], dtype=torch.float64)
        for index in range(r):
            delta += torch.outer(b[:, index], a[index])
        sums[f"{module}.weight"] = tensors[f"{module}.weight"].double() + scaling * delta
    return sums


def hashes(*folders: Path) -> dict[str, str]:
    """Every file below some folders, by hash."""
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest()
        for folder in folders
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def merged_into(
    out: Path, bench: Bench, dtype: str = "BF16", layout: str = "single", name: str = "plain", rounding: str = "auto"
) -> Merged:
    """Plan and merge."""
    return merge(plan_merge(bench.runs[name], out, base=str(bench.bases[dtype, layout]), rounding=rounding))


CASES = [
    ("BF16", "single", "plain"),
    ("BF16", "sharded", "patterns"),
    ("BF16", "single", "rslora"),
    ("F16", "sharded", "plain"),
    ("F16", "single", "patterns"),
    ("F32", "single", "plain"),
    ("F32", "sharded", "rslora"),
]


@pytest.mark.parametrize(("dtype", "layout", "name"), CASES)
def test_merged_tensors_are_the_float64_sum_rounded_once_to_nearest(
    tmp_path: Path, bench: Bench, dtype: str, layout: str, name: str
) -> None:
    """To the last bit; every other tensor, header and shard byte for byte as in the base."""
    base = bench.bases[dtype, layout]
    merged = merged_into(tmp_path / "out", bench, dtype, layout, name, "nearest")
    expected = closed_form(base, bench.runs[name], ADAPTERS[name])
    before, after = load_model(base), load_model(tmp_path / "out")
    assert before.keys() == after.keys()
    assert len(expected) == 6
    for key, tensor in after.items():
        exact = round_tensor(expected[key], dtype) if key in expected else before[key]
        assert raw_bytes(tensor) == raw_bytes(exact), key
    for file in base.glob("*.safetensors"):
        theirs, ours = read_header(file), read_header(tmp_path / "out" / file.name)
        assert (tmp_path / "out" / file.name).read_bytes()[: ours.data_start] == file.read_bytes()[: theirs.data_start]
    assert (len(merged.receipts) > 1) == (layout == "sharded")
    assert Checkpoint(tmp_path / "out").indexed == (layout == "sharded")


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_tensors_are_pefts_within_its_own_rounding(tmp_path: Path, bench: Bench, dtype: str, name: str) -> None:
    """PEFT computes B·A in float32, rounds Δ to the dtype, then the sum: half an ulp each, and ours is half an ulp."""
    base = bench.bases[dtype, "single"]
    merged_into(tmp_path / "out", bench, dtype, "single", name, "nearest")
    live = peft_alone(LlamaForCausalLM.from_pretrained(base, dtype=TORCH[dtype]), bench.runs[name])
    theirs, before = live.merge_and_unload().state_dict(), load_model(base)
    changed = 0
    for key, tensor in load_model(tmp_path / "out").items():
        ours, other, old = tensor.double(), theirs[key].double(), before[key].double()
        # Their factors may be cast to the dtype too, so B·A is off by three half ulps of its own size, summed over r.
        delta = (ours - old).abs() + (other - old).abs()
        bound = HALF_ULP[dtype] * (2 * ours.abs().maximum(other.abs()) + 4 * delta + 16 * delta.max())
        assert bool(((ours - other).abs() <= bound).all()), key
        changed += int(not torch.equal(ours, old))
    assert changed == 6


def test_a_merged_model_answers_as_the_live_adapter(tmp_path: Path, bench: Bench) -> None:
    """Loaded by transformers, float32 throughout; float32 sums in another order differ by 1e-5 of the largest logit."""
    merged_into(tmp_path / "out", bench, "F32", "sharded", "rslora")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    base = LlamaForCausalLM.from_pretrained(bench.bases["F32", "single"], dtype=torch.float32)
    live = peft_alone(base, bench.runs["rslora"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello, 世界"}], return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ours, theirs = model(**ids).logits, live(**ids).logits
        with live.disable_adapter():
            untuned = live(**ids).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert (untuned - theirs).abs().max() > 0.1 * theirs.abs().max()


@pytest.mark.parametrize("elements", [1, 100, 1000])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "faithful"])
def test_bytes_do_not_depend_on_the_tile_size(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch, rounding: str, elements: int
) -> None:
    """Accumulation order almost never crosses a rounding boundary, for each sum is rounded once from float64."""
    expected = merged_into(tmp_path / "a", bench, name="patterns", rounding=rounding)
    assert expected.plan.rounded == {rounding: 6}
    monkeypatch.setattr(work, "TILE_ELEMENTS", elements)
    monkeypatch.setattr(work, "FEEDBACK_TILES", 1)
    found = merged_into(tmp_path / "b", bench, name="patterns", rounding=rounding)
    assert weights_sha256(found.path) == weights_sha256(expected.path)
    for ours, theirs in ((found.kept, expected.kept), (found.nearest, expected.nearest)):
        assert ours.model_dump(exclude_none=True) == pytest.approx(theirs.model_dump(exclude_none=True), rel=1e-9)


@pytest.mark.parametrize("seed", [1, 2**40])
def test_stochastic_rounding_is_its_seeds_and_no_other(tmp_path: Path, bench: Bench, seed: int) -> None:
    """The same seed, the same bytes; another, others."""
    base = str(bench.bases["BF16", "single"])
    found = []
    for number, chosen in enumerate((seed, seed, 0)):
        plan = plan_merge(bench.runs["plain"], tmp_path / str(number), base=base, rounding="stochastic", seed=chosen)
        found.append(weights_sha256(merge(plan).path))
    assert found[0] == found[1] != found[2]


def weak_run(bench: Bench, folder: Path, scale: float) -> Path:
    """The plain run with its update times the square of a number."""
    shutil.copytree(bench.runs["plain"], folder / "run")
    factors = load_file(folder / "run" / "adapter_model.safetensors")
    save_file({key: value * scale for key, value in factors.items()}, folder / "run" / "adapter_model.safetensors")
    return folder / "run"


def test_receipts_tell_what_was_written(tmp_path: Path, bench: Bench) -> None:
    """Sizes and hashes, and only where they were asked for; and a record that can be read again."""
    plan = plan_merge(bench.runs["plain"], tmp_path / "out", base=str(bench.bases["BF16", "sharded"]))
    merged = merge(plan, sha256=True)
    for receipt in merged.receipts:
        file = merged.path / receipt.filename
        assert (receipt.size_bytes, receipt.sha256) == (file.stat().st_size, sha256_of(file))
    base = Path(plan.base)
    assert merged.base_sha256 == {file.name: sha256_of(file) for file in sorted(base.glob("*.safetensors"))}
    unhashed = merged_into(tmp_path / "other", bench, "BF16", "sharded")
    assert ({receipt.sha256 for receipt in unhashed.receipts}, unhashed.base_sha256) == ({None}, {})
    assert Merged.read(merged.write(tmp_path / "merged.json")) == merged


def by_hand(stored: torch.Tensor, before: torch.Tensor, delta: torch.Tensor, basis: torch.Tensor) -> dict[str, float]:
    """What rounding kept of an update, from the tensor that was stored."""
    realised = stored.double() - before.double()
    return {
        "share_unchanged": float((realised == 0).double().mean()),
        "relative_error": float((realised - delta).norm() / delta.norm()),
        "gain": float((realised * delta).sum() / (delta**2).sum()),
        "error_inside": float(((realised - delta) @ basis).norm() / delta.norm()),
    }


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "faithful"])
def test_receipts_tell_what_rounding_kept_and_what_the_nearest_would_have(
    tmp_path: Path, bench: Bench, rounding: str
) -> None:
    """Of an update about as large as the grid's steps, against the tensors on disk; the whole from all of them."""
    base, run = bench.bases["BF16", "sharded"], weak_run(bench, tmp_path / "in", 0.05)
    merged = merge(plan_merge(run, tmp_path / "out", base=str(base), rounding=rounding))
    expected, before, after = closed_form(base, run, ADAPTERS["plain"]), load_model(base), load_model(merged.path)
    kept = {tensor.name: tensor for receipt in merged.receipts for tensor in receipt.tensors}
    assert kept.keys() == expected.keys()
    wholes: dict[str, list[torch.Tensor]] = {"before": [], "delta": [], "after": [], "nearest": []}
    for name, tensor in kept.items():
        delta = expected[name] - before[name].double()
        _, _, rows = torch.linalg.svd(delta, full_matrices=False)
        basis, nearest = rows[:4].T, round_tensor(expected[name], "BF16")  # Δ is of rank 4
        assert (tensor.rounding, tensor.elements, tensor.share_beyond) == (rounding, delta.numel(), 0.0)
        assert tensor.delta_norm == pytest.approx(float(delta.norm()), rel=1e-9)
        mine = by_hand(after[name], before[name], delta, basis)
        if rounding == "nearest":
            assert (tensor.nearest, tensor.error_inside) == (None, None)
            del mine["error_inside"]
        else:
            assert tensor.nearest is not None
            assert tensor.nearest.model_dump() == pytest.approx(by_hand(nearest, before[name], delta, basis), rel=1e-6)
        assert {key: getattr(tensor, key) for key in mine} == pytest.approx(mine, rel=1e-6)
        for key, value in (("before", before[name]), ("delta", delta), ("after", after[name]), ("nearest", nearest)):
            wholes[key].append(value.double().reshape(1, -1))
    before_all, delta_all, after_all, nearest_all = (torch.cat(parts, dim=1) for parts in wholes.values())
    for whole, stored in ((merged.kept, after_all), (merged.nearest, nearest_all)):
        mine = by_hand(stored, before_all, delta_all, torch.zeros(delta_all.shape[1], 1, dtype=torch.float64))
        del mine["error_inside"]
        assert {key: getattr(whole, key) for key in mine} == pytest.approx(mine, rel=1e-6)
    if rounding == "faithful":
        assert merged.kept.error_inside is not None
        assert merged.nearest.error_inside is not None
        assert merged.kept.error_inside < merged.nearest.error_inside / 2


def test_an_update_below_the_grid_is_reported_as_lost(tmp_path: Path, bench: Bench) -> None:
    """Δ of a thousandth of an ulp: nothing changes, and the receipt says so."""
    base = bench.bases["BF16", "single"]
    run = weak_run(bench, tmp_path / "work", 1e-4)
    merged = merge(plan_merge(run, tmp_path / "out", base=str(base), rounding="nearest"))
    assert merged.kept.share_unchanged > 0.99
    assert merged.kept.gain < 0.1


def test_inputs_are_never_touched(tmp_path: Path, bench: Bench) -> None:
    """Hash before and after, of the base and the run."""
    inputs = (bench.bases["BF16", "sharded"], bench.runs["plain"])
    before = hashes(*inputs)
    merged_into(tmp_path / "out", bench, "BF16", "sharded")
    assert hashes(*inputs) == before


def test_the_tokenizer_and_template_come_from_the_run(tmp_path: Path, bench: Bench) -> None:
    """Whole, from one place; the base's template is another, and must not slip in."""
    merged_into(tmp_path / "out", bench)
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == (
        bench.runs["plain"] / "chat_template.jinja"
    ).read_bytes()
    run = tmp_path / "work" / "run"
    shutil.copytree(bench.runs["plain"], run)
    (run / "chat_template.jinja").unlink()
    merge(plan_merge(run, tmp_path / "bare", base=str(bench.bases["BF16", "single"])))
    assert not (tmp_path / "bare" / "chat_template.jinja").exists()


def test_a_run_without_a_tokenizer_takes_the_bases_and_says_so(tmp_path: Path, bench: Bench) -> None:
    """A warning in the plan; and another where there is none at all."""
    run, base = tmp_path / "work" / "run", tmp_path / "base"
    shutil.copytree(bench.runs["plain"], run)
    shutil.copytree(bench.bases["BF16", "single"], base)
    for file in [*run.glob("*token*"), run / "chat_template.jinja"]:
        file.unlink()
    plan = plan_merge(run, tmp_path / "out", base=str(base))
    assert [finding.code for finding in plan.warnings] == ["rounding_faithful", "tokenizer_from_base"]
    assert {asset.origin for asset in plan.assets} == {"base"}
    merge(plan)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "the base's own template"
    (base / "tokenizer.json").unlink()
    bare = plan_merge(run, tmp_path / "out2", base=str(base))
    assert [finding.code for finding in bare.warnings] == ["rounding_faithful", "no_tokenizer_anywhere"]


def test_the_bases_other_files_travel_and_its_weights_in_other_formats_do_not(tmp_path: Path, bench: Bench) -> None:
    """Licence, code and generation settings; no pickle, no README, no stale index."""
    base = tmp_path / "base"
    shutil.copytree(bench.bases["BF16", "single"], base)
    for name in ("LICENSE", "NOTICE.txt", "modeling_x.py", "pytorch_model.bin", "README.md"):
        (base / name).write_text(name)
    (base / "model.safetensors.index.json").write_text("{}")
    merge(plan_merge(bench.runs["plain"], tmp_path / "out", base=str(base)))
    found = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "NOTICE.txt", "modeling_x.py", "generation_config.json", "config.json"} <= found
    assert found & {"pytorch_model.bin", "README.md", "model.safetensors.index.json", "adapter_config.json"} == set()


def test_the_runs_own_generation_settings_win(tmp_path: Path, bench: Bench) -> None:
    """What was tested is what is shipped."""
    run = tmp_path / "work" / "run"
    shutil.copytree(bench.runs["plain"], run)
    (run / "generation_config.json").write_text('{"temperature": 0.123}')
    merge(plan_merge(run, tmp_path / "out", base=str(bench.bases["BF16", "single"])))
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"temperature": 0.123}


def config_of(tmp_path: Path, bench: Bench, **changes: Any) -> dict[str, Any]:
    """The merged configuration of a base with these settings; None takes a key away."""
    base = tmp_path / "base"
    shutil.copytree(bench.bases["BF16", "single"], base)
    config = {**json.loads((base / "config.json").read_text()), **changes}
    (base / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    merge(plan_merge(bench.runs["plain"], tmp_path / "out", base=str(base)))
    found: dict[str, Any] = json.loads((tmp_path / "out" / "config.json").read_text())
    return found


def test_rope_is_written_in_both_spellings(tmp_path: Path, bench: Bench) -> None:
    """Transformers 4 knows only ``rope_theta`` and would take its default in silence."""
    config = config_of(tmp_path, bench)
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"] == 5000.0
    assert "rope_scaling" not in config


def test_scaled_rope_is_written_in_both_spellings(tmp_path: Path, bench: Bench) -> None:
    """Its type and factors, and the share of a head that turns."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    config = config_of(tmp_path, bench, rope_parameters=rope)
    assert config["rope_parameters"] == rope
    assert config["rope_scaling"]["rope_type"] == "linear"
    assert config["rope_scaling"]["factor"] == 2.0
    assert (config["rope_theta"], config["partial_rotary_factor"]) == (5000.0, 0.5)


def test_the_older_spelling_stays_as_it_is(tmp_path: Path, bench: Bench) -> None:
    """Transformers 5 reads it."""
    config = config_of(tmp_path, bench, rope_parameters=None, rope_theta=777.0)
    assert config["rope_theta"] == 777.0
    assert "rope_parameters" not in config


def test_both_spellings_mean_the_same_to_transformers(tmp_path: Path, bench: Bench) -> None:
    """The merged configuration loads to the base's own settings."""
    from transformers import AutoConfig

    config_of(tmp_path, bench)
    ours, theirs = AutoConfig.from_pretrained(tmp_path / "out"), AutoConfig.from_pretrained(tmp_path / "base")
    assert ours.rope_parameters == theirs.rope_parameters
    assert {**ours.to_dict(), "_name_or_path": ""} == {**theirs.to_dict(), "_name_or_path": ""}


def test_a_plan_writes_nothing_and_tells_everything(tmp_path: Path, bench: Bench) -> None:
    """A dry run is a plan that is not carried out."""
    inputs = (bench.bases["BF16", "sharded"], bench.runs["patterns"])
    before = hashes(*inputs)
    plan = plan_merge(bench.runs["patterns"], tmp_path / "x" / "out", base=str(bench.bases["BF16", "sharded"]))
    assert list(tmp_path.iterdir()) == []
    assert hashes(*inputs) == before
    assert (plan.dtype, plan.rounding, plan.checkpoint) == ("BF16", "faithful", "final")
    assert plan.rounded == {"faithful": 6}
    assert plan.changed == 6
    assert MergePlan.model_validate_json(plan.to_json()) == plan
    merge(plan)
    written = sum(file.stat().st_size for file in (tmp_path / "x" / "out").iterdir())
    config = (tmp_path / "x" / "out" / "config.json").stat().st_size
    assert written == plan.write_bytes + config


def test_a_plan_that_travelled_through_json_merges_to_the_same_bytes(tmp_path: Path, bench: Bench) -> None:
    """The page and another machine hand plans on as JSON."""
    plan = plan_merge(bench.runs["rslora"], tmp_path / "a", base=str(bench.bases["BF16", "single"]))
    merge(plan)
    merge(MergePlan.model_validate_json(plan.to_json()).model_copy(update={"out": str(tmp_path / "b")}))
    assert weights_sha256(tmp_path / "a") == weights_sha256(tmp_path / "b")


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_progress_rises_to_the_total(tmp_path: Path, bench: Bench, layout: str) -> None:
    """Step by step, also with several shards at once."""
    told: list[Progress] = []
    plan = plan_merge(bench.runs["plain"], tmp_path / "out", base=str(bench.bases["F32", layout]))
    merge(plan, progress=told.append)
    done = [step.done for step in told]
    assert done == sorted(done)
    assert done[-1] == told[-1].total == sum(shard.size_bytes for shard in plan.shards)
    assert {(step.stage, step.unit) for step in told} == {("merge", "bytes")}


@pytest.mark.parametrize("layout", ["single", "sharded"])
@pytest.mark.parametrize("after", [1, 5])
def test_a_cancelled_merge_leaves_nothing(tmp_path: Path, bench: Bench, layout: str, after: int) -> None:
    """In mid-merge, from the progress callback as a page does it."""
    cancellation, count = Cancellation(), 0

    def stop(_: Progress) -> None:
        nonlocal count
        count += 1
        if count == after:
            cancellation.cancel()

    plan = plan_merge(bench.runs["plain"], tmp_path / "deep" / "out", base=str(bench.bases["BF16", layout]))
    with pytest.raises(Cancelled):
        merge(plan, progress=stop, cancellation=cancellation)
    assert list(tmp_path.iterdir()) == []
    assert count < 30


def test_an_interrupted_merge_leaves_nothing(tmp_path: Path, bench: Bench) -> None:
    """Ctrl-C reaches the work through whatever it is doing."""

    def interrupt(_: Progress) -> None:
        raise KeyboardInterrupt

    plan = plan_merge(bench.runs["plain"], tmp_path / "out", base=str(bench.bases["BF16", "sharded"]))
    with pytest.raises(KeyboardInterrupt):
        merge(plan, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_in_mid_merge_leaves_what_can_be_gone_on_from(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told as a full disk, names what stays, and nothing is under the target's name."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    plan = plan_merge(bench.runs["plain"], tmp_path / "out", base=str(bench.bases["BF16", "sharded"]))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OutputError, match="disk is full") as caught:
            merge(plan)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    assert str(tmp_path / ".out.partial") in caught.value.what
    merge(plan)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_replaces_the_whole_target_and_only_at_the_end(tmp_path: Path, bench: Bench) -> None:
    """A cancelled merge leaves the old model as it was."""
    out, base = tmp_path / "out", str(bench.bases["BF16", "single"])
    out.mkdir()
    (out / "old.safetensors").write_text("old")
    with pytest.raises(OutputError, match="not empty"):
        plan_merge(bench.runs["plain"], out, base=base)
    plan = plan_merge(bench.runs["plain"], out, base=base, force=True)
    stopped = Cancellation()
    stopped.cancel()
    with pytest.raises(Cancelled):
        merge(plan, cancellation=stopped)
    assert [file.name for file in out.iterdir()] == ["old.safetensors"]
    merge(plan)
    assert not (out / "old.safetensors").exists()
    assert [folder.name for folder in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("where", ["base", "base/x", "run", "run/merged", "."])
def test_a_target_that_overlaps_the_inputs_is_refused(tmp_path: Path, bench: Bench, where: str) -> None:
    """Other tools overwrite the base here."""
    shutil.copytree(bench.bases["BF16", "single"], tmp_path / "base")
    shutil.copytree(bench.runs["plain"], tmp_path / "run")
    with pytest.raises(OutputError, match="overlaps"):
        plan_merge(tmp_path / "run", tmp_path / where, base=str(tmp_path / "base"), force=True)


def edited_base(tmp_path: Path, bench: Bench, dtype: str, name: str, value: float) -> Path:
    """A base with one number changed."""
    base = tmp_path / "inputs" / "base"
    shutil.copytree(bench.bases[dtype, "single"], base)
    tensors = load_file(base / "model.safetensors")
    tensors[name][1, 1] = value
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return base


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", TORCH)
def test_a_base_that_is_not_finite_is_refused_naming_the_tensor(
    tmp_path: Path, bench: Bench, dtype: str, bad: float
) -> None:
    """And nothing is left behind."""
    name = "model.layers.1.self_attn.q_proj.weight"
    base = edited_base(tmp_path, bench, dtype, name, bad)
    with pytest.raises(CheckpointError, match="base tensor holds NaN or infinity") as caught:
        merge(plan_merge(bench.runs["plain"], tmp_path / "out", base=str(base)))
    assert str(caught.value.where).endswith(name)
    assert not (tmp_path / "out").exists()


def test_an_overflow_in_fp16_is_refused_naming_the_tensor(tmp_path: Path, bench: Bench) -> None:
    """Finite before, infinite after."""
    name = "model.layers.0.mlp.down_proj.weight"
    run = tmp_path / "inputs" / "run"
    shutil.copytree(bench.runs["plain"], run)
    factors = load_file(run / "adapter_model.safetensors")
    save_file({k: v * 3000 if "0.mlp" in k else v for k, v in factors.items()}, run / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="would not be finite in F16") as caught:
        merge(plan_merge(run, tmp_path / "out", base=str(bench.bases["F16", "single"])))
    assert str(caught.value.where).endswith(name)
    assert not (tmp_path / "out").exists()
    merge(plan_merge(run, tmp_path / "out", base=str(bench.bases["BF16", "single"])))


def test_a_tensor_that_is_not_finite_and_not_touched_is_copied(tmp_path: Path, bench: Bench) -> None:
    """It is the base's own matter; its bytes stay."""
    name = "model.layers.1.self_attn.o_proj.weight"
    base = edited_base(tmp_path, bench, "BF16", name, float("nan"))
    merge(plan_merge(bench.runs["plain"], tmp_path / "out", base=str(base)))
    assert raw_bytes(load_model(tmp_path / "out")[name]) == raw_bytes(load_model(base)[name])


def test_an_adapter_with_nan_is_refused_and_nothing_is_left(tmp_path: Path, bench: Bench) -> None:
    """A diverged run."""
    run = tmp_path / "inputs" / "run"
    shutil.copytree(bench.runs["plain"], run)
    factors = load_file(run / "adapter_model.safetensors")
    next(iter(factors.values()))[0, 0] = float("nan")
    save_file(factors, run / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="NaN"):
        merge(plan_merge(run, tmp_path / "out", base=str(bench.bases["BF16", "sharded"])))
    assert not (tmp_path / "out").exists()


def test_a_mismatch_is_found_by_the_plan_before_anything_is_written(tmp_path: Path, bench: Bench) -> None:
    """Names, shapes, refused configurations, an unknown checkpoint and no base; nothing is written for any."""
    run = tmp_path / "inputs" / "run"
    shutil.copytree(bench.runs["plain"], run)
    base = edited_base(tmp_path, bench, "BF16", "model.norm.weight"[:0] + "model.layers.0.mlp.up_proj.weight", 1.0)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 3, dtype=torch.bfloat16)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterMismatchError, match="2 of 6"):
        plan_merge(run, tmp_path / "out", base=str(base))
    good = str(bench.bases["BF16", "single"])
    with pytest.raises(RunError):
        plan_merge(run, tmp_path / "out", base=good, checkpoint=7)
    edit_json(run / "adapter_config.json", init_lora_weights="pissa")
    with pytest.raises(UnsupportedAdapterError):
        plan_merge(run, tmp_path / "out", base=good)
    edit_json(run / "adapter_config.json", init_lora_weights=True, base_model_name_or_path=None)
    with pytest.raises(BaseModelError, match="names no base"):
        plan_merge(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


def test_too_little_disk_space_is_found_by_the_plan(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before an hour's work."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OutputError, match="not enough disk space"):
        plan_merge(bench.runs["plain"], tmp_path / "out", base=str(bench.bases["BF16", "single"]))


@pytest.mark.parametrize("what", ["base", "adapter"])
def test_inputs_that_changed_since_the_plan_are_refused(tmp_path: Path, bench: Bench, what: str) -> None:
    """An update without its tensor would be left out in silence."""
    run, base = tmp_path / "inputs" / "run", tmp_path / "inputs" / "base"
    shutil.copytree(bench.runs["plain"], run)
    shutil.copytree(bench.bases["BF16", "single"], base)
    plan = plan_merge(run, tmp_path / "out", base=str(base))
    if what == "base":
        tensors = load_file(base / "model.safetensors")
        del tensors["model.layers.0.self_attn.q_proj.weight"]
        save_file(tensors, base / "model.safetensors")
    else:
        edit_json(run / "adapter_config.json", lora_alpha=99)
    with pytest.raises((CheckpointError, AdapterMismatchError)):
        merge(plan)
    assert not (tmp_path / "out").exists()


def test_the_adapters_own_base_is_found_beside_the_run(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative name in the configuration is relative to here, or to the run's parent."""
    shutil.copytree(bench.runs["plain"], tmp_path / "house" / "run")
    shutil.copytree(bench.bases["BF16", "single"], tmp_path / "house" / "models" / "b")
    edit_json(tmp_path / "house" / "run" / "adapter_config.json", base_model_name_or_path="models/b")
    monkeypatch.chdir(tmp_path)
    plan = plan_merge("house/run", "out")
    assert plan.base == str((tmp_path / "house" / "models" / "b").resolve())
    assert plan.out == str(tmp_path / "out")


def test_one_of_a_runs_checkpoints_can_be_merged(tmp_path: Path, bench: Bench) -> None:
    """By its number, with its own weights."""
    root = tmp_path / "inputs" / "run"
    shutil.copytree(bench.runs["plain"], root)
    shutil.copytree(bench.runs["rslora"], root / "checkpoint-7")
    base = bench.bases["F32", "single"]
    plan = plan_merge(root, tmp_path / "out", base=str(base), checkpoint=7)
    assert plan.checkpoint == "checkpoint-7"
    merge(plan)
    merged_into(tmp_path / "other", bench, "F32", name="rslora")
    assert weights_sha256(tmp_path / "out") == weights_sha256(tmp_path / "other")


def test_a_merged_directory_has_the_umasks_modes(tmp_path: Path, bench: Bench) -> None:
    """Transformers leaves weights that only their owner can read; a served model needs more."""
    before = os.umask(0o022)
    try:
        merged_into(tmp_path / "out", bench)
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "out").iterdir()} == {"0o644"}
    assert oct((tmp_path / "out").stat().st_mode & 0o777) == "0o755"


def test_the_memory_estimate_covers_the_factors(bench: Bench, tmp_path: Path) -> None:
    """In float64, of the largest update."""
    plan = plan_merge(bench.runs["plain"], tmp_path / "out", base=str(bench.bases["BF16", "single"]))
    factors = load_file(bench.runs["plain"] / "adapter_model.safetensors")
    sizes = [
        8 * (a.numel() + factors[k.replace("lora_A", "lora_B")].numel()) for k, a in factors.items() if "lora_A" in k
    ]
    assert plan.memory_bytes > max(sizes)
    assert np.isfinite(plan.memory_bytes)


def test_several_adapters_are_summed_with_their_weights(tmp_path: Path, bench: Bench) -> None:
    """In float64 and in one pass: rounded once, not once an adapter."""
    base = bench.bases["BF16", "single"]
    plan = plan_merge(
        bench.runs["plain"],
        tmp_path / "out",
        base=str(base),
        weight=0.5,
        adapters=[(bench.runs["rslora"], -0.7), (str(bench.runs["patterns"]), 2.0)],
        rounding="nearest",
    )
    assert [(Path(one.adapter).parent.name, one.weight) for one in plan.adapters] == [
        ("plain", 0.5), ("rslora", -0.7), ("patterns", 2.0),
    ]  # fmt: skip
    merge(plan)
    before, after = load_model(base), load_model(tmp_path / "out")
    sums = {name: tensor.double().clone() for name, tensor in before.items()}
    for name, weight in (("plain", 0.5), ("rslora", -0.7), ("patterns", 2.0)):
        for key, exact in closed_form(base, bench.runs[name], ADAPTERS[name]).items():
            sums[key] += weight * (exact - before[key].double())
    for key, tensor in after.items():
        assert raw_bytes(tensor) == raw_bytes(round_tensor(sums[key], "BF16")), key


def test_a_target_that_overlaps_a_further_adapter_is_refused(tmp_path: Path, bench: Bench) -> None:
    """Every input is one."""
    shutil.copytree(bench.runs["rslora"], tmp_path / "other")
    base = str(bench.bases["BF16", "single"])
    with pytest.raises(OutputError, match="overlaps"):
        plan_merge(
            bench.runs["plain"], tmp_path / "other" / "x", base=base, adapters=[(tmp_path / "other", 1.0)], force=True
        )


@pytest.mark.parametrize(("name", "dtype", "spelling"), [("fp32", "F32", "float32"), ("fp16", "F16", "float16")])
def test_another_dtype_is_rounded_from_the_sum_and_told_in_the_configuration(
    tmp_path: Path, bench: Bench, name: str, dtype: str, spelling: str
) -> None:
    """Every floating-point tensor, and both spellings of the configuration's key."""
    base = tmp_path / "in" / "base"
    shutil.copytree(bench.bases["BF16", "sharded"], base)
    edit_json(base / "config.json", torch_dtype="bfloat16", dtype="bfloat16", extra_config={"dtype": "bfloat16"})
    plan = plan_merge(bench.runs["plain"], tmp_path / "out", base=str(base), dtype=name)
    assert plan.dtype == dtype
    merge(plan)
    expected = closed_form(base, bench.runs["plain"], ADAPTERS["plain"])
    for key, tensor in load_model(tmp_path / "out").items():
        exact = expected[key] if key in expected else load_model(base)[key].double()
        assert raw_bytes(tensor) == raw_bytes(round_tensor(exact, dtype)), key
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"], config["extra_config"]["dtype"]) == (spelling,) * 3
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").dtype == TORCH[dtype]


def test_resharded_weights_are_the_same(tmp_path: Path, bench: Bench) -> None:
    """Through the whole of plan and merge, and loadable."""
    base = str(bench.bases["BF16", "single"])
    merge(plan_merge(bench.runs["plain"], tmp_path / "one", base=base))
    plan = plan_merge(bench.runs["plain"], tmp_path / "many", base=base, shard_size="60KB")
    merged = merge(plan)
    assert len(merged.receipts) > 2
    ours, theirs = load_model(tmp_path / "many"), load_model(tmp_path / "one")
    assert {key: raw_bytes(tensor) for key, tensor in ours.items()} == {
        key: raw_bytes(tensor) for key, tensor in theirs.items()
    }
    LlamaForCausalLM.from_pretrained(tmp_path / "many")


@pytest.mark.parametrize(
    "option", [{"dtype": "int8"}, {"shard_size": "big"}, {"base_view": "nf5"}, {"weight": float("nan")}]
)
def test_an_option_that_means_nothing_is_refused(tmp_path: Path, bench: Bench, option: dict[str, Any]) -> None:
    """Before anything is written."""
    with pytest.raises(TunesmithError):
        plan_merge(bench.runs["plain"], tmp_path / "out", base=str(bench.bases["BF16", "single"]), **option)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("view", ["nf4", "nf4-double", "int8"])
def test_a_base_view_starts_from_what_the_training_saw(tmp_path: Path, bench: Bench, view: Any) -> None:
    """Every Linear layer begins as the view has it, adapted or not; everything else as it is stored."""
    base = Checkpoint(bench.bases["BF16", "single"])
    plan = plan_merge(bench.runs["plain"], tmp_path / "out", base=str(base.path), base_view=view, rounding="nearest")
    merged = merge(plan)
    assert len(merged.receipts[0].tensors) == 6
    stored = load_model(base.path)
    updates = {
        key: exact - stored[key].double()
        for key, exact in closed_form(base.path, bench.runs["plain"], ADAPTERS["plain"]).items()
    }
    changed = 0
    for key, tensor in load_model(tmp_path / "out").items():
        if BaseView(view).applies_to(base, key):
            begun = torch.from_numpy(BaseView(view).rows(base, key).copy())
            exact = begun + updates[key] if key in updates else begun
            assert raw_bytes(tensor) == raw_bytes(round_tensor(exact, "BF16")), key
            changed += 1
        else:
            assert raw_bytes(tensor) == raw_bytes(stored[key]), key
    assert changed == plan.changed == 14


@pytest.mark.parametrize(("setting", "value"), [("quantization_bit", 4), ("load_in_4bit", True)])
def test_a_training_on_a_quantized_base_is_told(tmp_path: Path, bench: Bench, setting: str, value: object) -> None:
    """QLoRA's adapter corrects another base than the one that is merged into; a view of it is the remedy."""
    run = tmp_path / "in" / "run"
    shutil.copytree(bench.runs["plain"], run)
    (run / "training_args.yaml").write_text(f"{setting}: {json.dumps(value)}\n")
    base = str(bench.bases["BF16", "single"])

    def codes(**options: Any) -> list[str]:
        plan = plan_merge(run, tmp_path / "out", base=base, rounding="nearest", **options)
        return [finding.code for finding in plan.warnings]

    assert codes() == ["trained_on_quantized_base"]
    assert codes(base_view="nf4") == []
    (run / "training_args.yaml").write_text(f"{setting}: null\n")
    assert codes() == []


def test_an_update_that_rounding_lost_is_a_finding(tmp_path: Path, bench: Bench) -> None:
    """With the remedy's own dtype it is not."""
    run, base = weak_run(bench, tmp_path / "in", 1e-3), str(bench.bases["BF16", "single"])
    lost = merge(plan_merge(run, tmp_path / "bf16", base=base, rounding="nearest"))
    assert [finding.code for finding in lost.findings] == ["update_lost_in_rounding"]
    assert merge(plan_merge(run, tmp_path / "fp32", base=base, dtype="fp32")).findings == ()


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_a_given_executor_makes_the_same_bytes(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """So that another engine can take the units; progress is told a unit at a time."""
    monkeypatch.setattr(units, "UNIT_BYTES", 40_000)
    base, told = str(bench.bases["BF16", "sharded"]), []
    expected = merge(plan_merge(bench.runs["plain"], tmp_path / "a", base=base))
    assert expected.plan.rounding == "faithful"
    spawn = multiprocessing.get_context("spawn")
    pool = ThreadPoolExecutor(3) if kind == "threads" else ProcessPoolExecutor(2, mp_context=spawn)
    with pool:
        found = merge(plan_merge(bench.runs["plain"], tmp_path / "b", base=base), executor=pool, progress=told.append)
    assert found.receipts == expected.receipts
    assert told[-1].done == told[-1].total


def test_an_error_in_another_process_arrives_as_it_is(tmp_path: Path, bench: Bench) -> None:
    """A refused tensor is refused whoever finds it, and nothing is left."""
    base = edited_base(tmp_path, bench, "BF16", "model.layers.1.self_attn.q_proj.weight", float("nan"))
    plan = plan_merge(bench.runs["plain"], tmp_path / "out", base=str(base))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool, pytest.raises(CheckpointError, match="NaN") as caught:
        merge(plan, executor=pool)
    assert "q_proj" in str(caught.value.where)
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


def test_changes_of_the_configuration_are_applied_by_dotted_key(tmp_path: Path, bench: Bench) -> None:
    """A binding's, in sections too; the rest stays."""
    base = bench.bases["BF16", "single"]
    plan = plan_merge(bench.runs["plain"], tmp_path / "out", base=str(base))
    changes = {"vocab_size": 7, "text_config.deep.key": "x", "labels": {"0": "a"}, "names": ("n",)}
    binding = plan.binding.model_copy(update={"config": changes})
    config = json.loads(write.config_text(write.config_of(Path(plan.base), binding)))
    assert (config["vocab_size"], config["text_config"]["deep"]["key"]) == (7, "x")
    assert (config["labels"], config["names"]) == ({"0": "a"}, ["n"])
    assert config["hidden_size"] == 64

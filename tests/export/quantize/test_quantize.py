"""Quantizing tiny models: codes against the compressed-tensors package, the directory against transformers."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize as package_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import tunesmith as ts
from tests.merge.exact import load_model
from tests.tiny_models import TinyRun, build_adapter, build_base, build_tokenizer, edit_json
from tunesmith.checkpoint import Checkpoint, QuantizedWeight, quantization_of
from tunesmith.errors import CheckpointError, OutputError, TunesmithError

SCHEMES = ("int8", "int4:64", "int4:32", "w8a8", "fp8")
TEXT = torch.tensor([[5, 17, 200, 33, 8, 91, 4]])


def made(source: Path, out: Path, **options: Any) -> ts.Quantized:
    """Plan and quantize."""
    return ts.quantize(ts.plan_quantization(source, out, **options), certificate=False)


def dequantized(directory: Path) -> dict[str, torch.Tensor]:
    """Every quantized tensor in float64, by the name that it has in an unquantized model."""
    model = Checkpoint(directory)
    quantization = quantization_of(model.config)
    assert quantization is not None
    modules = [name.removesuffix(".weight_scale") for name in model.tensors if name.endswith(".weight_scale")]
    found = {}
    for module in modules:
        scheme = quantization.scheme_of(module)
        assert scheme is not None
        weight = QuantizedWeight(model, module, scheme)
        found[weight.weight] = torch.from_numpy(weight.float64(0, weight.rows))
    return found


def exact_tensors(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Base + scaling·B·A in float64 by PEFT's names, for a plain adapter; every tensor of the base."""
    tensors = {name: value.double() for name, value in load_file(base / "model.safetensors").items()}
    config = json.loads((adapter / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    factors = load_file(adapter / "adapter_model.safetensors")
    for name, a in factors.items():
        if name.endswith("lora_A.weight"):
            b = factors[name.replace("lora_A", "lora_B")]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            tensors[f"{module}.weight"] += scaling * b.double() @ a.double()
    return tensors


def package_args(scheme: str) -> QuantizationArgs:
    """The package's own arguments of a scheme's weights."""
    if scheme.startswith("int4"):
        return QuantizationArgs(num_bits=4, strategy="group", group_size=int(scheme[5:]), symmetric=True)
    return QuantizationArgs(num_bits=8, type="float" if scheme == "fp8" else "int", strategy="channel", symmetric=True)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nearest_is_the_packages_own_rounding_to_the_last_code(tiny: TinyRun, tmp_path: Path, scheme: str) -> None:
    """Scales by ``calculate_qparams``, codes by ``quantize``, of the exact sum of base and adapter."""
    done = made(tiny.adapters["final"], tmp_path / "out", scheme=scheme, base=str(tiny.base), rounding="nearest")
    exact, args = exact_tensors(tiny.base, tiny.adapters["final"]), package_args(scheme)
    found = dequantized(tmp_path / "out")
    assert len(found) == len(done.tensors) == 14
    for name, value in found.items():
        groups = exact[name].unflatten(1, (-1, args.group_size)) if args.group_size else exact[name][:, None]
        scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), args)
        scale = scale.float().double()
        codes = package_quantize(exact[name], scale, zero, args)
        assert torch.equal(codes * scale.repeat_interleave(groups.shape[2], 1), value), name


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_transformers_loads_it_and_computes_what_its_numbers_say(
    tiny: TinyRun, tmp_path: Path, scheme: str, dtype: torch.dtype
) -> None:
    """Weights after loading are code · scale; where activations stay, so do logits to the last bit."""
    base = tmp_path / "base"
    LlamaForCausalLM.from_pretrained(tiny.base, dtype=dtype).save_pretrained(base)
    made(tiny.adapters["final"], tmp_path / "out", scheme=scheme, base=str(base))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    by_hand = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    state, numbers = by_hand.state_dict(), dequantized(tmp_path / "out")
    with torch.no_grad():
        for name, value in numbers.items():
            state[name].copy_(value)
        found, expected = loaded(TEXT).logits, by_hand(TEXT).logits
    for name, value in numbers.items():
        assert torch.equal(loaded.get_submodule(name.removesuffix(".weight")).weight.double(), value.float().double())
    if scheme in ("w8a8", "fp8"):
        assert not torch.equal(found, expected)
        assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.99
    else:
        assert torch.equal(found, expected)


def test_what_is_not_quantized_is_merged_as_merge_does_it(tiny: TinyRun, tmp_path: Path) -> None:
    """Embeddings and norms; a head that is tied has no tensor, and is named in ``ignore`` all the same."""
    done = made(tiny.adapters["final"], tmp_path / "out", scheme="int4:32", base=str(tiny.base))
    merged = ts.merge(ts.plan_merge(tiny.adapters["final"], tmp_path / "merged", base=str(tiny.base)))
    plain, packed = (load_file(folder / "model.safetensors") for folder in (merged.path, done.path))
    kept = [name for name in packed if "weight_" not in name]
    assert sorted(kept) == sorted(name for name in plain if "norm" in name or "embed" in name)
    assert all(torch.equal(packed[name], plain[name]) for name in kept)
    config = json.loads((done.path / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head", "model.embed_tokens"]
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == 32
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (done.path / name).read_bytes() == (tiny.base / name).read_bytes()


KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_in_the_codes(tiny: TinyRun, tmp_path: Path, kind: str) -> None:
    """Each dequantized tensor is within half a step of a float32 merge of the same adapter; the tuned head is there."""
    adapter = build_adapter(tiny.base, tmp_path / "adapter", seed=5, **KINDS[kind])
    done = made(adapter, tmp_path / "out", scheme="int8", base=str(tiny.base), rounding="nearest")
    merged = ts.merge(ts.plan_merge(adapter, tmp_path / "merged", base=str(tiny.base))).path
    plain = load_model(merged)
    for name, value in dequantized(done.path).items():
        steps = plain[name].abs().amax(1, keepdim=True) / 127.5
        assert ((value - plain[name]).abs() <= 0.51 * steps).all(), name
    packed = load_model(done.path)
    assert ("lm_head.weight" in packed) == (kind == "head")
    if kind == "head":
        assert torch.equal(packed["lm_head.weight"], plain["lm_head.weight"])
    loaded = AutoModelForCausalLM.from_pretrained(done.path, dtype=torch.float32).eval()
    whole = LlamaForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    with torch.no_grad():
        found, expected = loaded(TEXT).logits, whole(TEXT).logits
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.999


def test_a_sharded_base_stays_in_shards_and_a_size_splits_anew(tiny: TinyRun, tmp_path: Path) -> None:
    """The same numbers, however they are divided into files."""
    base = tmp_path / "base"
    LlamaForCausalLM.from_pretrained(tiny.base).save_pretrained(base, max_shard_size="150KB")
    options = {"scheme": "int4:64", "base": str(base)}
    whole = made(tiny.adapters["final"], tmp_path / "a", scheme="int4:64", base=str(tiny.base))
    kept = made(tiny.adapters["final"], tmp_path / "b", **options)
    split = made(tiny.adapters["final"], tmp_path / "c", shard_size="20KB", **options)
    files = [len(list(done.path.glob("*.safetensors"))) for done in (whole, kept, split)]
    assert files[0] == 1 < files[1] == len(list(base.glob("*.safetensors"))) < files[2]
    assert len({done.relative_error for done in (whole, kept, split)}) == 1
    expected = dequantized(whole.path)
    for done in (kept, split):
        assert all(torch.equal(value, expected[name]) for name, value in dequantized(done.path).items())
        AutoModelForCausalLM.from_pretrained(done.path)


def test_a_whole_model_is_quantized_alone(tiny: TinyRun, tmp_path: Path) -> None:
    """A merged directory gives the codes that its own numbers have; it has no base."""
    done = made(tiny.merged, tmp_path / "out", scheme="int4:64")
    assert done.plan.adapters == ()
    assert done.rounded == {"faithful": 14}
    stored = load_file(tiny.merged / "model.safetensors")
    for name, value in dequantized(done.path).items():
        assert torch.linalg.norm(value - stored[name]) < 0.12 * torch.linalg.norm(stored[name])
    with pytest.raises(OutputError, match="has no base"):
        ts.plan_quantization(tiny.merged, tmp_path / "b", scheme="int8", base=str(tiny.base))


def test_searched_scales_are_nearer_than_the_largest_value_says(tiny: TinyRun, tmp_path: Path) -> None:
    """In sum over each tensor; the record tells the error that the directory has."""
    plain = made(tiny.merged, tmp_path / "a", scheme="int4:64", rounding="nearest")
    searched = made(tiny.merged, tmp_path / "b", scheme="int4:64", rounding="faithful")
    stored = load_file(tiny.merged / "model.safetensors")
    for before, after in zip(plain.tensors, searched.tensors, strict=True):
        assert after.relative_error < before.relative_error
        value, exact = dequantized(searched.path)[after.name], stored[after.name].double()
        told = float(torch.linalg.norm(value - exact) / torch.linalg.norm(exact))
        assert after.relative_error == pytest.approx(told, rel=1e-9)


def test_calibrated_rounding_lowers_the_error_of_outputs(tiny: TinyRun, tmp_path: Path) -> None:
    """On the tuned model's own inputs, of every quantized layer, the adapted and the others."""
    run = tmp_path / "run"
    shutil.copytree(tiny.adapters["final"], run)
    for file in [*tiny.base.glob("*token*"), tiny.base / "chat_template.jinja"]:
        shutil.copy(file, run)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"instruction": f"say {n}", "output": f"{n} it is " * 8}) + "\n" for n in range(20))
    )
    options = {"scheme": "int4:64", "base": str(tiny.base)}
    done = made(run, tmp_path / "out", rounding="calibrated", calibration=rows, **options)
    assert done.rounded == {"calibrated": 14}
    plain = made(run, tmp_path / "nearest", rounding="nearest", **options)
    exact = exact_tensors(tiny.base, run)
    model = LlamaForCausalLM.from_pretrained(tiny.base, dtype=torch.float32).eval()
    costs = {}
    with torch.no_grad():
        for name, value in exact.items():
            if name in model.state_dict():
                model.state_dict()[name].copy_(value)
        for folder in (done.path, plain.path):
            costs[folder] = _output_errors(model, dequantized(folder), exact)
    assert sum(costs[done.path]) < 0.7 * sum(costs[plain.path])
    assert not list(tmp_path.glob(".*"))


def _output_errors(
    model: LlamaForCausalLM, numbers: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]
) -> list[float]:
    """‖(Ŵ − W')·x‖² over the inputs that a text gives each layer."""
    errors: list[float] = []

    def watch(name: str) -> Any:
        def hook(_module: Any, inputs: Any, _output: Any) -> None:
            difference = numbers[name] - exact[name]
            errors.append(float((inputs[0].double() @ difference.T).square().sum() / (inputs[0] ** 2).sum()))

        return hook

    hooks = [model.get_submodule(name.removesuffix(".weight")).register_forward_hook(watch(name)) for name in numbers]
    tokenizer = build_tokenizer()
    model(
        torch.tensor(
            [tokenizer("<|im_start|>user\nsay 3<|im_end|>\n<|im_start|>assistant\n" + "3 it is " * 8)["input_ids"]]
        )
    )
    for hook in hooks:
        hook.remove()
    return errors


def test_groups_that_do_not_divide_are_refused_with_those_that_do(tiny: TinyRun, tmp_path: Path) -> None:
    """Every scheme that fits is named, and the next command."""
    with pytest.raises(OutputError, match="do not divide") as caught:
        ts.plan_quantization(tiny.adapters["final"], tmp_path / "out", scheme="int4", base=str(tiny.base))
    assert caught.value.expected == "int4:64 or int4:32 or int8"
    assert caught.value.next_step == "pass --scheme int4:64"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "int3"}, "no such scheme"),
        ({"scheme": "int4:48"}, "no such scheme"),
        ({"rounding": "stochastic"}, "no such rounding"),
        ({"calibration": "rows.jsonl"}, "Only calibrated"),
        ({"shard_size": "big"}, "no size"),
    ],
)
def test_wrong_words_are_refused(tiny: TinyRun, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """Before anything is read."""
    with pytest.raises(OutputError, match=message):
        ts.plan_quantization(
            tiny.adapters["final"], tmp_path / "out", base=str(tiny.base), **{"scheme": "int8", **options}
        )


def test_a_quantized_model_is_not_quantized_again(tiny: TinyRun, tmp_path: Path) -> None:
    """Its numbers are rounded already."""
    done = made(tiny.merged, tmp_path / "out", scheme="int8")
    with pytest.raises(CheckpointError, match="quantized already"):
        ts.plan_quantization(done.path, tmp_path / "again", scheme="int4:64")


def test_experts_routers_and_towers_stay_and_are_named(tmp_path: Path) -> None:
    """Told from names; ``ignore`` covers each of them, and a warning says that experts stay."""
    build_base(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    mlp = "model.layers.0.mlp"
    tensors |= {
        f"{mlp}.experts.0.up_proj.weight": torch.randn(64, 64),
        f"{mlp}.gate.weight": torch.randn(4, 64),
        "model.visual.blocks.0.attn.qkv.weight": torch.randn(64, 64),
    }
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    plan = ts.plan_quantization(tmp_path / "base", tmp_path / "out", scheme="int8")
    assert not {name for name in plan.quantized if "experts" in name or "visual" in name or ".gate.weight" in name}
    assert {finding.code for finding in plan.warnings} >= {"quantize_experts_kept", "quantize_towers_kept"}
    done = ts.quantize(plan, certificate=False)
    section = quantization_of(json.loads((done.path / "config.json").read_text()))
    assert section is not None
    for module in (f"{mlp}.experts.0.up_proj", f"{mlp}.gate", "model.visual.blocks.0.attn.qkv", "lm_head"):
        assert section.scheme_of(module) is None
    assert section.scheme_of(f"{mlp}.up_proj") is not None


def test_nan_is_refused_and_nothing_is_left(tiny: TinyRun, tmp_path: Path) -> None:
    """The tensor is named."""
    base = tmp_path / "in" / "base"
    shutil.copytree(tiny.base, base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 7] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="NaN") as caught:
        made(tiny.adapters["final"], tmp_path / "out", scheme="int8", base=str(base))
    assert "up_proj" in str(caught.value.where)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_cancelled_it_leaves_nothing(tiny: TinyRun, tmp_path: Path) -> None:
    """Also where it was under way."""
    plan = ts.plan_quantization(tiny.merged, tmp_path / "out", scheme="int8")
    cancellation = ts.Cancellation()

    def stop(step: ts.Progress) -> None:
        if step.done > step.total / 3 if step.total else False:
            cancellation.cancel()

    with pytest.raises(ts.Cancelled):
        ts.quantize(plan, progress=stop, cancellation=cancellation)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_directory_whole(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``force`` the old one goes only when the new one is there."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    with pytest.raises(OutputError, match="not empty"):
        ts.plan_quantization(tiny.merged, tmp_path / "out", scheme="int8")
    plan = ts.plan_quantization(tiny.merged, tmp_path / "out", scheme="int8", force=True)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    from tunesmith.export.quantize import write

    with monkeypatch.context() as patch:
        patch.setattr(write, "_write_small_files", full)
        with pytest.raises(OutputError, match="disk is full"):
            ts.quantize(plan)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old.txt"]
    ts.quantize(plan)
    assert (tmp_path / "out" / "config.json").is_file()
    assert not (tmp_path / "out" / "old.txt").exists()


def test_what_a_killed_one_left_is_not_believed(tiny: TinyRun, tmp_path: Path) -> None:
    """Its stage is used again, emptied."""
    stage = tmp_path / ".out.partial" / "new"
    stage.mkdir(parents=True)
    (stage / "model.safetensors").write_bytes(b"half")
    (stage / "stray.safetensors").write_bytes(b"half")
    done = made(tiny.merged, tmp_path / "out", scheme="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (done.path / "stray.safetensors").exists()
    AutoModelForCausalLM.from_pretrained(done.path)


def test_a_base_that_changes_after_the_plan_is_noticed(tiny: TinyRun, tmp_path: Path) -> None:
    """Another layer is there than was planned."""
    base = tmp_path / "base"
    shutil.copytree(tiny.merged, base)
    plan = ts.plan_quantization(base, tmp_path / "out", scheme="int8")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="changed since the quantization was planned"):
        ts.quantize(plan)
    assert not (tmp_path / "out").exists()


def test_an_executor_of_ones_own_gives_the_same_bytes(tiny: TinyRun, tmp_path: Path) -> None:
    """Units are paths and numbers; the order in which they end decides nothing."""
    told: list[ts.Progress] = []
    options = {"scheme": "int4:32", "base": str(tiny.base)}
    expected = made(tiny.adapters["final"], tmp_path / "a", **options)
    plan = ts.plan_quantization(tiny.adapters["final"], tmp_path / "b", **options)
    with ThreadPoolExecutor(3) as pool:
        found = ts.quantize(plan, executor=pool, certificate=False, progress=told.append)
    first, second = (folder / "model.safetensors" for folder in (expected.path, found.path))
    assert first.read_bytes() == second.read_bytes()
    assert found.tensors == expected.tensors
    assert told[-1].done == told[-1].total


@pytest.mark.slow
def test_processes_give_the_same_bytes(tiny: TinyRun, tmp_path: Path) -> None:
    """Spawned ones, which know nothing but the units."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    options = {"scheme": "int4:32", "base": str(tiny.base)}
    expected = made(tiny.adapters["final"], tmp_path / "a", **options)
    plan = ts.plan_quantization(tiny.adapters["final"], tmp_path / "b", **options)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = ts.quantize(plan, executor=pool, certificate=False)
    first, second = (folder / "model.safetensors" for folder in (expected.path, found.path))
    assert first.read_bytes() == second.read_bytes()


def test_the_certificate_says_what_it_was_made_of(tiny: TinyRun, tmp_path: Path) -> None:
    """The base, the adapter, the scheme and the hash of every file; no verdict yet."""
    plan = ts.plan_quantization(tiny.adapters["final"], tmp_path / "out", scheme="int4:64", base=str(tiny.base))
    done = ts.quantize(plan)
    assert done.findings == ()
    predicate = json.loads((done.path / "tunesmith-certificate.json").read_text())["predicate"]
    assert predicate["quantization"]["scheme"] == "int4:64"
    assert predicate["quantization"]["modules"] == 14
    assert predicate["quantization"]["relativeError"] == pytest.approx(done.relative_error)
    assert len(predicate["adapters"]) == 1
    assert predicate["verdict"] is None


def test_a_missing_package_is_named(tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is planned."""
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ts.MissingExtraError, match="compressed_tensors"):
        ts.plan_quantization(tiny.merged, tmp_path / "out", scheme="int8")


def test_zero_rows_have_a_scale_that_is_a_number(tiny: TinyRun, tmp_path: Path) -> None:
    """A row of nothing but zeros stays so; a scale of zero would make it NaN."""
    base = tmp_path / "base"
    shutil.copytree(tiny.merged, base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][5] = 0
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    for scheme in ("int8", "int4:64", "fp8"):
        done = made(base, tmp_path / scheme, scheme=scheme)
        stored = load_file(done.path / "model.safetensors")["model.layers.0.mlp.up_proj.weight_scale"].float()
        assert bool((stored != 0).all())
        assert bool(stored.isfinite().all())
        assert bool((dequantized(done.path)["model.layers.0.mlp.up_proj.weight"][5] == 0).all())


def test_encoders_with_decoders_are_refused(tiny: TinyRun, tmp_path: Path) -> None:
    """Which of their layers bear it is not known here."""
    base = tmp_path / "base"
    shutil.copytree(tiny.merged, base)
    edit_json(base / "config.json", is_encoder_decoder=True)
    with pytest.raises(TunesmithError, match="encoder with a decoder"):
        ts.plan_quantization(base, tmp_path / "out", scheme="int8")

"""Quantizing a QLoRA run from the base as its training saw it: the codes, the plan, the certificate, the proof."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import quantize as package_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from typer.testing import CliRunner, Result

import tunesmith as ts
from tests.export.quantize.test_quantize import dequantized, exact_tensors, package_args
from tests.tiny_models import TinyRun, build_base
from tunesmith.checkpoint import VIEW_KINDS, BaseView, Checkpoint, ViewKind
from tunesmith.cli.app import app
from tunesmith.errors import CheckpointError, DataError, OutputError
from tunesmith.verify import read_certificate

PROOF = ("structure", "assets", "weights")


@pytest.fixture(scope="module")
def base(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base in bf16, as a training would load it."""
    out = tmp_path_factory.mktemp("views") / "base"
    LlamaForCausalLM.from_pretrained(tiny.base, dtype=torch.bfloat16).save_pretrained(out)
    for file in tiny.base.glob("*token*"):
        shutil.copy(file, out)
    return out


def seen_tensors(base: Path, adapter: Path, kind: ViewKind) -> dict[str, torch.Tensor]:
    """View of the base + scaling·B·A in float64, of every tensor that the view changes."""
    model, view = Checkpoint(base), BaseView(kind)
    stored = {name: value.double() for name, value in load_file(base / "model.safetensors").items()}
    updated = exact_tensors(base, adapter)
    return {
        name: torch.from_numpy(view.rows(model, name).copy()) + (updated[name] - stored[name])
        for name in stored
        if view.applies_to(model, name)
    }


@pytest.mark.parametrize("scheme", ["int8", "int4:32", "fp8"])
@pytest.mark.parametrize("kind", VIEW_KINDS)
def test_codes_are_the_packages_own_rounding_of_the_sum_that_the_training_saw(
    tiny: TinyRun, base: Path, tmp_path: Path, scheme: str, kind: ViewKind
) -> None:
    """Of view + B·A in float64, in every quantized layer, adapted or not; embeddings and norms stay as stored."""
    run = tiny.adapters["final"]
    plan = ts.plan_quantization(
        run, tmp_path / "out", scheme=scheme, base=str(base), base_view=kind, rounding="nearest"
    )
    done = ts.quantize(plan, certificate=False)
    exact, args, found = seen_tensors(base, run, kind), package_args(scheme), dequantized(done.path)
    assert found.keys() == exact.keys()
    assert len(found) == 14
    for name, value in found.items():
        groups = exact[name].unflatten(1, (-1, args.group_size)) if args.group_size else exact[name][:, None]
        scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), args)
        scale = scale.bfloat16().double()
        codes = package_quantize(exact[name], scale, zero, args)
        assert torch.equal(codes * scale.repeat_interleave(groups.shape[2], 1), value), name
    stored, packed = (load_file(folder / "model.safetensors") for folder in (base, done.path))
    kept = [name for name in packed if "weight_" not in name and name not in exact]
    assert sorted(kept) == sorted(stored.keys() - exact.keys())
    assert all(torch.equal(packed[name], stored[name]) for name in kept)


@pytest.mark.parametrize("scheme", ["int8", "int4:32"])
def test_it_is_what_a_merge_with_the_view_is_when_that_is_quantized(tiny: TinyRun, tmp_path: Path, scheme: str) -> None:
    """Of a merge to float32, whose own rounding decides where a number lies midway between two codes."""
    run, base, options = tiny.adapters["final"], str(tiny.base), {"scheme": scheme, "rounding": "nearest"}
    at_once = ts.plan_quantization(run, tmp_path / "a", base=base, base_view="nf4", **options)
    merged = ts.merge(ts.plan_merge(run, tmp_path / "m", base=base, base_view="nf4"), certificate=False)
    alone = ts.plan_quantization(merged.path, tmp_path / "b", **options)
    found, expected = (dequantized(ts.quantize(plan, certificate=False).path) for plan in (at_once, alone))
    exact = seen_tensors(tiny.base, run, "nf4")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        other = ~torch.isclose(value, expected[name], rtol=1e-6, atol=0)
        midway = (value + expected[name])[other] / 2  # the outermost of a group, by the scale that it sets
        assert torch.allclose(exact[name][other], midway, rtol=1e-6, atol=0), name
        assert other.double().mean() < 0.02


def test_what_is_kept_of_the_linear_layers_begins_as_the_view_too(tiny: TinyRun, tmp_path: Path) -> None:
    """A tower is not quantized here but was in the training: it is what a merge with the view makes of it."""
    name, run = "model.visual.blocks.0.attn.qkv.weight", tiny.adapters["final"]
    build_base(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors") | {name: torch.randn(64, 64)}
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    options: dict[str, Any] = {"base": str(tmp_path / "base"), "base_view": "nf4"}
    packed = ts.quantize(ts.plan_quantization(run, tmp_path / "q", scheme="int8", **options), certificate=False)
    merged = ts.merge(ts.plan_merge(run, tmp_path / "m", **options), certificate=False)
    found, expected = (load_file(path / "model.safetensors")[name] for path in (packed.path, merged.path))
    assert torch.equal(found, expected)
    assert not torch.equal(found, tensors[name])


@pytest.mark.parametrize("rounding", ["nearest", "faithful"])
@pytest.mark.parametrize("kind", ["nf4", "nf4-double"])
def test_the_proof_holds_with_the_view_and_names_it_where_it_is_left_out(
    tiny: TinyRun, base: Path, tmp_path: Path, kind: str, rounding: str
) -> None:
    """int8 codes tell one start from the other; the certificate says which it was, before and after the proof."""
    run, out = tiny.adapters["final"], tmp_path / "out"
    plan = ts.plan_quantization(run, out, scheme="int8", base=str(base), base_view=kind, rounding=rounding)
    assert ts.QuantizationPlan.model_validate_json(plan.to_json()).base_view == kind
    done = ts.quantize(plan)
    certificate = out / "tunesmith-certificate.json"
    assert read_certificate(certificate).predicate.base.view == kind
    verdict = ts.verify(run, done, base=str(base), base_view=kind, levels=PROOF)
    assert verdict.answer == "equal_within_quantization"
    proved = read_certificate(certificate).predicate
    assert proved.base.view == kind
    assert proved.quantization is not None
    without = ts.verify(run, out, base=str(base), levels=PROOF)
    assert without.answer == "different"
    assert [(cause.code, cause.params["view"]) for cause in without.causes] == [("cause_base_dequantized", kind)]
    assert read_certificate(certificate).predicate == proved


def test_a_view_that_was_not_taken_is_told_from_the_codes(tiny: TinyRun, base: Path, tmp_path: Path) -> None:
    """Quantized from the stored base, and verified as if from a view; of another view, that one is named."""
    run = tiny.adapters["final"]

    def causes(made_with: str | None, asked: str) -> list[tuple[str, object]]:
        plan = ts.plan_quantization(
            run, tmp_path / "out", scheme="int8", base=str(base), base_view=made_with, rounding="nearest", force=True
        )
        ts.quantize(plan, certificate=False)
        found = ts.verify(run, tmp_path / "out", base=str(base), base_view=asked, levels=PROOF)
        assert found.answer == "different"
        return [(cause.code, cause.params.get("view")) for cause in found.causes]

    assert causes(None, "nf4")[0] == ("cause_base_not_dequantized", None)
    assert causes("nf4", "int8") == [("cause_base_dequantized", "nf4")]


@pytest.mark.parametrize("scheme", ["int4:32", "int4:64", "fp8"])
@pytest.mark.parametrize("rounding", ["nearest", "faithful"])
def test_the_start_is_told_where_it_lies_within_the_codes_own_noise(
    tiny: TinyRun, base: Path, tmp_path: Path, scheme: str, rounding: str
) -> None:
    """At 4 bits no single code tells an nf4 view from the stored base; all together do, and each alone is right."""
    run, answers = tiny.adapters["final"], {}
    for made_with in (None, "nf4", "nf4-double"):
        out = tmp_path / str(made_with)
        options = {"scheme": scheme, "base": str(base), "rounding": rounding}
        ts.quantize(ts.plan_quantization(run, out, base_view=made_with, **options), certificate=False)
        for asked in (None, made_with or "nf4"):
            found = ts.verify(run, out, base=str(base), base_view=asked, levels=PROOF, certificate=False)
            answers[made_with, asked] = found.answer, [(one.code, one.params.get("view")) for one in found.causes]
    good = ("equal_within_quantization", [])
    assert [pair for pair, answer in answers.items() if answer == good] == [
        (None, None),
        ("nf4", "nf4"),
        ("nf4-double", "nf4-double"),
    ]
    assert answers[None, "nf4"] == ("different", [("cause_base_not_dequantized", None)])
    for view in ("nf4", "nf4-double"):
        assert answers[view, None][0] == "different"
        assert {code for code, _ in answers[view, None][1]} == {"cause_base_dequantized"}


@pytest.mark.parametrize(("setting", "value"), [("quantization_bit", 4), ("load_in_8bit", True)])
def test_a_training_on_a_quantized_base_is_told_unless_a_view_is_asked_for(
    tiny: TinyRun, base: Path, tmp_path: Path, setting: str, value: object
) -> None:
    """The same finding as a merge's."""
    run = Path(shutil.copytree(tiny.adapters["final"], tmp_path / "in" / "run"))
    (run / "training_args.yaml").write_text(f"{setting}: {json.dumps(value)}\n")

    def told(view: str | None) -> bool:
        plan = ts.plan_quantization(run, tmp_path / "out", scheme="int8", base=str(base), base_view=view)
        return "trained_on_quantized_base" in {finding.code for finding in plan.warnings}

    assert told(None)
    assert not told("nf4")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"base_view": "nf5"}, DataError, "no such view"),
        ({"base_view": "nf4", "rounding": "calibrated"}, OutputError, "a view of the base has no such twin"),
    ],
)
def test_views_that_cannot_be_are_refused(
    tiny: TinyRun, base: Path, tmp_path: Path, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    """Before anything is written."""
    with pytest.raises(kind, match=message):
        ts.plan_quantization(tiny.adapters["final"], tmp_path / "out", scheme="int8", base=str(base), **options)
    assert not (tmp_path / "out").exists()


def test_a_model_that_comes_alone_or_of_an_unknown_kind_has_no_view(tiny: TinyRun, tmp_path: Path) -> None:
    """The one has no base; of the other it is not known which layers a training had quantized."""
    with pytest.raises(OutputError, match="has no base") as caught:
        ts.plan_quantization(tiny.merged, tmp_path / "out", scheme="int8", base_view="nf4")
    assert caught.value.next_step == "leave --base-view out"
    build_base(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(CheckpointError, match="Conv1D"):
        ts.plan_quantization(
            tiny.adapters["final"], tmp_path / "out", scheme="int8", base=str(tmp_path / "base"), base_view="nf4"
        )


def test_the_command_line_takes_a_view_and_repeats_it_for_the_proof(tiny: TinyRun, base: Path, tmp_path: Path) -> None:
    """Not with --compare, whose yardstick is the adapter on the base as it is stored."""

    def run(*words: object) -> Result:
        line = ("quantize", tiny.adapters["final"], "--base", base, "--base-view", "nf4-double", *words)
        return CliRunner().invoke(app, [*map(str, line)])

    done = run("--out", tmp_path / "out", "--scheme", "int8")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    (proof,) = [line for line in lines if "tunesmith verify" in line]
    (drift,) = [line for line in lines if "tunesmith drift" in line]
    assert proof.endswith("--base-view nf4-double")
    assert "--base-view" not in drift
    refused = run("--compare", "int8")
    assert refused.exit_code == 2
    assert "leave --base-view out" in " ".join(refused.output.replace("│", " ").split())

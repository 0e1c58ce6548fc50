"""Every way of breaking a quantized model is noticed, at the right level, with its cause."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.sabotage.quantized_workshop import check, compressed, make_stronger, quantize, scales_of, scheme_of
from tests.sabotage.workshop import Tensors, Workshop, rewrite
from tunesmith.verify import Verdict

Q = "model.layers.{}.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"
PARTS = ("weight_packed", "weight_scale", "weight_shape")


@dataclass(frozen=True)
class Bench:
    """A run with a stronger update, its base's workshop, and a sound int4 model of it."""

    shop: Workshop
    run: Path
    sound: Path

    def broken(self, out: Path, change: Callable[[Tensors], object] | None = None) -> Path:
        """A copy with changed tensors."""
        shutil.copytree(self.sound, out)
        if change is not None:
            rewrite(out, change)
        return out

    def check(self, directory: Path) -> Verdict:
        """Structure, assets and weights."""
        return check(self.shop, self.run, directory)


@pytest.fixture(scope="module")
def bench(shop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Made once."""
    root = tmp_path_factory.mktemp("quantized")
    run = make_stronger(shop.run, root / "run")
    return Bench(shop, run, quantize(shop, run, root / "sound"))


def failed(verdict: Verdict) -> list[str]:
    """The levels that failed."""
    return [level.name for level in verdict.levels if level.status == "fail"]


def swap_layers(tensors: Tensors) -> None:
    """Put two layers' queries in each other's places."""
    for part in PARTS:
        first, second = (f"{Q.format(layer)}.{part}" for layer in (0, 1))
        tensors[first], tensors[second] = tensors[second], tensors[first]


def move_one_code(tensors: Tensors) -> None:
    """Change one code by two steps."""
    word = tensors[f"{UP}.weight_packed"][5]
    low = int(word[3]) & 0xF
    word[3] += 2 if low < 8 else -2


def double_one_scale(tensors: Tensors) -> None:
    """Double the scale of one group."""
    tensors[f"{UP}.weight_scale"][5, 1] *= 2


def halve_one_scale(tensors: Tensors) -> None:
    """Halve the scale of one group."""
    tensors[f"{UP}.weight_scale"][7, 0] /= 2


def negate_one_scale(tensors: Tensors) -> None:
    """Turn the sign of one group."""
    tensors[f"{UP}.weight_scale"][3, 1] *= -1


def double_all_scales(tensors: Tensors) -> None:
    """Double all scales of one layer."""
    tensors[f"{UP}.weight_scale"] *= 2


def set_scale(value: float) -> Callable[[Tensors], None]:
    """Put a number in a scale's place."""

    def change(tensors: Tensors) -> None:
        tensors[f"{UP}.weight_scale"][3, 1] = value

    return change


def shift_groups(tensors: Tensors) -> None:
    """Give every group the scale of the next one."""
    tensors[f"{UP}.weight_scale"] = tensors[f"{UP}.weight_scale"].roll(1, 1)


def shift_rows(tensors: Tensors) -> None:
    """Give every row the scales of the next one."""
    tensors[f"{UP}.weight_scale"] = tensors[f"{UP}.weight_scale"].roll(1, 0)


def swap_nibbles(tensors: Tensors) -> None:
    """Pack every pair of codes the other way round."""
    octets = tensors[f"{UP}.weight_packed"].view(torch.uint8)
    tensors[f"{UP}.weight_packed"] = ((octets << 4) | (octets >> 4)).view(torch.int32)


def change_norm(tensors: Tensors) -> None:
    """Change one number of a tensor that is stored in full."""
    tensors["model.norm.weight"][3] += 0.25


WEIGHTS = [
    (swap_layers, "cause_misplaced", {"count": 2}),
    (move_one_code, "cause_quantized_codes", {"count": 1, "tensor": f"{UP}.weight"}),
    (double_one_scale, "cause_quantized_groups", {"groups": 1, "tensor": f"{UP}.weight"}),
    (halve_one_scale, "cause_quantized_groups", {"groups": 1, "tensor": f"{UP}.weight"}),
    (double_all_scales, "cause_quantized_scaled", {"tensor": f"{UP}.weight", "count": 1}),
    (negate_one_scale, "cause_quantized_groups", {"groups": 1, "tensor": f"{UP}.weight"}),
    (set_scale(0.0), "cause_quantized_scales", {"count": 1}),
    (set_scale(float("nan")), "cause_quantized_scales", {"count": 1}),
    (set_scale(float("inf")), "cause_quantized_scales", {"count": 1}),
    (shift_groups, "cause_quantized_shifted", {"tensor": f"{UP}.weight"}),
    (shift_rows, "cause_quantized_shifted", {"tensor": f"{UP}.weight"}),
    (swap_nibbles, "cause_quantized_order", {"tensor": f"{UP}.weight"}),
    (change_norm, "cause_one_element", {"tensor": "model.norm.weight", "count": 1}),
]


@pytest.mark.parametrize(("change", "cause", "params"), WEIGHTS, ids=lambda one: getattr(one, "__name__", None))
def test_changed_codes_and_scales_are_noticed(
    change: Callable[[Tensors], object], cause: str, params: dict[str, object], bench: Bench, tmp_path: Path
) -> None:
    """By the weights level, with what was done."""
    verdict = bench.check(bench.broken(tmp_path / "out", change))
    assert (verdict.answer, failed(verdict)) == ("different", ["weights"])
    assert verdict.causes[0].code == cause
    assert {key: verdict.causes[0].params[key] for key in params} == params


@pytest.mark.parametrize(
    ("factor", "cause"),
    [(0.0, "cause_quantized_without"), (0.5, "cause_scaled"), (2.0, "cause_scaled"), (-1.0, "cause_scaled")],
)
@pytest.mark.parametrize("rounding", ["nearest", "passed-on"])
def test_an_update_of_another_strength_is_noticed(
    factor: float, cause: str, rounding: str, bench: Bench, tmp_path: Path
) -> None:
    """Also none, also where errors are passed on, so that no single code tells."""
    out = quantize(bench.shop, bench.run, tmp_path / "out", factor=factor, rounding=rounding)
    verdict = bench.check(out)
    assert (verdict.answer, failed(verdict)) == ("different", ["weights"])
    assert [one.code for one in verdict.causes] == [cause]
    assert verdict.causes[0].params.get("factor", factor) == factor


@pytest.mark.parametrize("rounding", ["nearest", "passed-on"])
@pytest.mark.parametrize("step", [10, 20])
def test_another_checkpoints_update_is_named(step: int, rounding: str, bench: Bench, tmp_path: Path) -> None:
    """Which one it is, though four fifths of it are the same."""
    out = quantize(bench.shop, bench.run, tmp_path / "out", checkpoint=f"checkpoint-{step}", rounding=rounding)
    verdict = bench.check(out)
    assert (verdict.answer, failed(verdict)) == ("different", ["weights"])
    assert [(one.code, one.params["checkpoint"]) for one in verdict.causes] == [
        ("cause_other_checkpoint", f"checkpoint-{step}")
    ]


def test_a_module_without_its_update_is_named(bench: Bench, tmp_path: Path) -> None:
    """One of fourteen."""
    base = load_file(bench.shop.base / "model.safetensors")
    name = f"{UP}.weight"
    out = quantize(bench.shop, bench.run, tmp_path / "out", weights=lambda x: {**x, name: base[name].double()})
    verdict = bench.check(out)
    assert (verdict.answer, failed(verdict)) == ("different", ["weights"])
    assert (verdict.causes[0].code, verdict.causes[0].params["modules"]) == ("cause_partly_applied", UP)


def test_a_transposed_layer_is_named(bench: Bench, tmp_path: Path) -> None:
    """A square one, whose shape says nothing."""
    name = f"{Q.format(0)}.weight"
    out = quantize(bench.shop, bench.run, tmp_path / "out", weights=lambda x: {**x, name: x[name].T.contiguous()})
    verdict = bench.check(out)
    assert (verdict.answer, failed(verdict)) == ("different", ["weights"])
    assert (verdict.causes[0].code, verdict.causes[0].params["tensor"]) == ("cause_quantized_transposed", name)


def test_scales_that_cut_half_of_the_range_off_are_noticed(bench: Bench, tmp_path: Path) -> None:
    """Every code is then the best that there is, and much of the weights is lost all the same."""
    record = scheme_of("int4")
    assert record.weights is not None
    base = load_file(bench.shop.base / "model.safetensors")

    def cut(tensors: Tensors) -> None:
        x = base[f"{UP}.weight"].double()
        scales = scales_of(x, record.weights, clip=0.5)
        tensors |= {f"{UP}.{part}": one for part, one in compressed("int4", x, scales).items()}

    verdict = bench.check(bench.broken(tmp_path / "out", cut))
    assert (verdict.answer, failed(verdict)) == ("different", ["weights"])
    assert verdict.causes[0].code == "cause_quantized_clipped"


def test_another_bases_weights_are_noticed(bench: Bench, tmp_path: Path) -> None:
    """The adapter was quantized into a base of the same form."""
    other = Workshop(bench.shop.other, bench.run, bench.shop.merged, bench.shop.nearest, bench.shop.other)
    verdict = bench.check(quantize(other, bench.run, tmp_path / "out"))
    assert (verdict.answer, failed(verdict)) == ("different", ["weights"])


def edit(directory: Path, change: Callable[[dict[str, object]], object], file: str = "config.json") -> Path:
    """Change a JSON document in place."""
    document = json.loads((directory / file).read_text())
    change(document)
    (directory / file).write_text(json.dumps(document))
    return directory


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda one: one["ignore"].append(UP), "cause_quantized_unstated"),
        (lambda one: one["ignore"].clear(), "cause_quantized_left_plain"),
        (lambda one: one["config_groups"]["group_0"]["weights"].update(group_size=64), "cause_quantized_misfit"),
        (lambda one: one["config_groups"]["group_0"]["weights"].update(num_bits=8), "cause_quantized_misfit"),
        (lambda one: one["config_groups"]["group_0"]["weights"].update(symmetric=False), "cause_quantization_unknown"),
        (lambda one: one.update(quant_method="gptq"), "cause_quantized"),
    ],
)
def test_a_configuration_that_says_otherwise_is_noticed(
    change: Callable[[dict[str, object]], object], cause: str, bench: Bench, tmp_path: Path
) -> None:
    """By the structure level; a loader would refuse the model, or read it wrong."""
    out = edit(bench.broken(tmp_path / "out"), lambda document: change(document["quantization_config"]))
    verdict = bench.check(out)
    assert (verdict.answer, "structure" in failed(verdict)) == ("different", True)
    assert verdict.causes[0].code == cause


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_of_a_layer_is_noticed(part: str, bench: Bench, tmp_path: Path) -> None:
    """Whichever of the three."""
    verdict = bench.check(bench.broken(tmp_path / "out", lambda tensors: tensors.pop(f"{UP}.{part}")))
    assert (verdict.answer, failed(verdict)) == ("different", ["structure"])
    assert verdict.causes[0].code == "cause_quantized_misfit"
    assert f"{UP}.{part}" in str(verdict.causes[0].params["names"])


def test_a_tensor_too_many_is_noticed(bench: Bench, tmp_path: Path) -> None:
    """One that a loader would not know."""
    verdict = bench.check(
        bench.broken(tmp_path / "out", lambda tensors: tensors.update({f"{UP}.weight_zero_point": torch.zeros(4)}))
    )
    assert (verdict.answer, failed(verdict)) == ("different", ["structure"])
    assert verdict.causes[0].code == "cause_tensors_extra"


def test_a_layer_stored_in_full_is_noticed(bench: Bench, tmp_path: Path) -> None:
    """Where the configuration says that it is quantized, as its siblings are."""

    def change(tensors: Tensors) -> None:
        for part in PARTS:
            tensors.pop(f"{UP}.{part}")
        tensors[f"{UP}.weight"] = load_file(bench.shop.nearest / "model.safetensors")[f"{UP}.weight"]

    verdict = bench.check(bench.broken(tmp_path / "out", change))
    assert (verdict.answer, "structure" in failed(verdict)) == ("different", True)
    assert "cause_quantized_left_plain" in [cause.code for cause in verdict.causes]


def test_another_template_or_setting_is_noticed(bench: Bench, tmp_path: Path) -> None:
    """As beside a merge."""
    out = edit(bench.broken(tmp_path / "out"), lambda document: document.update(rope_theta=5.0, rms_norm_eps=0.1))
    template = out / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_begin|>"))
    verdict = bench.check(out)
    assert (verdict.answer, failed(verdict)) == ("different", ["assets"])
    assert {"cause_config", "cause_chat_template"} <= {cause.code for cause in verdict.causes}

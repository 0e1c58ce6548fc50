"""Quantized models that are sound, by several hands and roundings, are told to be so."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from tests.sabotage.quantized_workshop import SCHEMES, check, make_stronger, quantize
from tests.sabotage.workshop import Workshop, rewrite


@pytest.fixture(scope="session")
def run(shop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workshop's run with a stronger update."""
    return make_stronger(shop.run, tmp_path_factory.mktemp("stronger") / "run")


def accused(verdict: object) -> list[str]:
    """The codes of everything that is not fine."""
    levels = verdict.levels  # type: ignore[attr-defined]
    return [one.code for level in levels for one in level.findings if one.severity in ("warning", "error")]


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_the_packages_own_rounding_is_equal_within_quantization(
    scheme: str, shop: Workshop, run: Path, tmp_path: Path
) -> None:
    """Every code is the nearest, or the outermost; and the update is there."""
    verdict = check(shop, run, quantize(shop, run, tmp_path / "out", scheme))
    assert (verdict.answer, accused(verdict), verdict.good) == ("equal_within_quantization", [], True)
    assert sum(tensor.unexplained for tensor in verdict.quantized) == 0
    assert sum(tensor.elements for tensor in verdict.quantized) == 2 * (4 * 64 * 64 + 3 * 64 * 128)


def test_errors_passed_on_are_equal_within_quantization(shop: Workshop, run: Path, tmp_path: Path) -> None:
    """As GPTQ rounds: many codes are not the nearest, and some are further than a neighbour."""
    verdict = check(shop, run, quantize(shop, run, tmp_path / "out", rounding="passed-on"))
    assert (verdict.answer, accused(verdict)) == ("equal_within_quantization", [])
    assert sum(tensor.unexplained for tensor in verdict.quantized) > 5000
    assert sum(tensor.further for tensor in verdict.quantized) > 50


def test_a_bf16_merge_that_was_quantized_is_equal_within_quantization(
    shop: Workshop, run: Path, tmp_path: Path
) -> None:
    """Rounded to bf16 before: some codes next to a border come out on the other side, and that explains them."""
    out = quantize(
        shop, run, tmp_path / "out", weights=lambda exact: {n: x.bfloat16().double() for n, x in exact.items()}
    )
    verdict = check(shop, run, out)
    assert (verdict.answer, accused(verdict)) == ("equal_within_quantization", [])
    assert sum(tensor.twice_rounded for tensor in verdict.quantized) > 100


def test_negative_scales_are_sound_where_codes_go_with_them(shop: Workshop, run: Path, tmp_path: Path) -> None:
    """They turn a group round, so that its larger side has the longer half of the range."""
    out = quantize(shop, run, tmp_path / "out")

    def turn(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            tensors[name] = -tensors[name]
            packed = name.replace("weight_scale", "weight_packed")
            codes = unpack_from_int32(
                tensors[packed], 4, torch.Size([len(tensors[name]), 8 * tensors[packed].shape[1]])
            )
            tensors[packed] = pack_to_int32((-codes.int()).clamp(-8, 7).to(torch.int8), 4)

    rewrite(out, turn)
    verdict = check(shop, run, out)
    assert (verdict.answer, accused(verdict)) == ("equal_within_quantization", [])


def test_quantized_tensors_are_judged_alike_in_processes(shop: Workshop, run: Path, tmp_path: Path) -> None:
    """The same records, whatever does the work."""
    out = quantize(shop, run, tmp_path / "out")
    plain = check(shop, run, out).quantized
    with ProcessPoolExecutor(2) as pool:
        assert check(shop, run, out, executor=pool).quantized == plain


def test_a_sample_of_codes_proves_nothing(shop: Workshop, run: Path, tmp_path: Path) -> None:
    """Neither does the answer say so."""
    verdict = check(shop, run, quantize(shop, run, tmp_path / "out"), sample=True)
    assert verdict.answer == "not_verified"
    assert "quantized_sampled" in [one.code for level in verdict.levels for one in level.findings]


def test_an_update_below_the_noise_is_not_said_to_be_there(shop: Workshop, tmp_path: Path) -> None:
    """An update of 0.3 % in 70 000 numbers cannot be made out in int4, and in int8 it can."""
    coarse = check(shop, shop.run, quantize(shop, shop.run, tmp_path / "int4"))
    assert (coarse.answer, accused(coarse)) == ("not_verified", ["quantized_update_unresolved"])
    fine = check(shop, shop.run, quantize(shop, shop.run, tmp_path / "int8", "int8"))
    assert (fine.answer, accused(fine)) == ("equal_within_quantization", [])


def test_a_sound_quantized_model_is_certified(shop: Workshop, run: Path, tmp_path: Path) -> None:
    """With its verdict, so that it can be checked again by hashes; and a changed byte is noticed."""
    from tunesmith.verify import recheck

    out = quantize(shop, run, tmp_path / "out", "int8")
    verdict = check(shop, run, out, certificate=True)
    assert verdict.certificate is not None
    assert verdict.certificate.code == "certificate_written"
    again = recheck(out)
    assert (again.answer, again.good) == ("equal_within_quantization", True)
    document = json.loads((out / "config.json").read_text())
    document["quantization_config"]["ignore"] = []
    (out / "config.json").write_text(json.dumps(document))
    assert recheck(out).answer == "different"


@pytest.mark.parametrize("scheme", ["int4", "w8a8"])
def test_a_quantized_model_is_held_against_the_live_adapter(
    scheme: str, shop: Workshop, run: Path, tmp_path: Path
) -> None:
    """Loaded by Transformers it computes what its codes say; what quantization costs is told beside the tuning."""
    out = quantize(shop, run, tmp_path / "out", scheme)
    verdict = check(shop, run, out, levels=("structure", "weights", "behaviour"))
    assert verdict.answer == "equal_within_quantization"
    codes = [one.code for one in verdict.levels[3].findings]
    assert any(code.startswith("behaviour_quantized_") for code in codes)
    assert ("behaviour_as_stored" if scheme == "int4" else "behaviour_activations") in codes
    assert all(row.rounding_kl is not None and row.rounding_kl > 0 for row in verdict.behaviour)
    torch.testing.assert_close(
        [row.mean_kl for row in verdict.behaviour] if scheme == "int4" else [],
        [row.rounding_kl for row in verdict.behaviour] if scheme == "int4" else [],
        rtol=1e-2,
        atol=1e-6,
    )


def test_a_report_shows_every_class_of_codes(shop: Workshop, run: Path, tmp_path: Path) -> None:
    """In both languages, with the layers that lost most."""
    from tunesmith.report import render_report
    from tunesmith.runs import open_run

    verdict = check(shop, run, quantize(shop, run, tmp_path / "out", rounding="passed-on"))
    page = render_report(
        run=open_run(run), adapter=None, comparison=None, evaluation=None, drift=None, merged=None, verdict=verdict
    )
    assert "Equal within quantization" in page
    assert "量化误差范围内一致" in page
    assert f"{sum(tensor.further for tensor in verdict.quantized):,}" in page
    worst = max(verdict.quantized, key=lambda tensor: tensor.relative_error or 0.0)
    assert worst.name in page.replace("<wbr>", "")

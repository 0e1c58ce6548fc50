"""Adapters of mlx-lm: read as PEFT's would be, and refused by a merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.adapter.making import PREFIX, Arrays, Q, V, pair, write_adapter, write_base
from tunesmith.adapter import Adapter, Stack, describe, distance, misfit
from tunesmith.checkpoint import Checkpoint
from tunesmith.errors import AdapterError, UnsupportedAdapterError

SCALE = 20.0


def write_mlx(directory: Path, tensors: Arrays | None = None, **config: Any) -> Path:
    """A directory as ``mlx_lm.lora`` leaves it; the factors of ``pair`` turned, where none are given."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": "org/base",
        "fine_tune_type": "lora",
        "num_layers": 16,
        "lora_parameters": {"rank": 2, "scale": SCALE, "dropout": 0.0},
        **config,
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors or turned({**pair(Q), **pair(V, seed=1)}), directory / "adapters.safetensors")
    return directory


def turned(tensors: Arrays) -> Arrays:
    """PEFT's factors under mlx-lm's names and in its shapes."""
    short = {".lora_A.weight": ".lora_a", ".lora_B.weight": ".lora_b"}
    return {
        name.removeprefix(PREFIX)[: -len(".lora_A.weight")] + short[name[-len(".lora_A.weight") :]]: value.T.copy()
        for name, value in tensors.items()
    }


def test_it_is_described_as_the_same_adapter_in_peft_form_is(tmp_path: Path) -> None:
    """lora_a is Aᵀ, lora_b is Bᵀ, and scale is what multiplies B·A."""
    base = Checkpoint(write_base(tmp_path / "base", {f"{Q}.weight": (4, 6), f"{V}.weight": (4, 6)}))
    ours = Adapter(write_mlx(tmp_path / "mlx"))
    theirs = Adapter(write_adapter(tmp_path / "peft", {**pair(Q), **pair(V, seed=1)}, lora_alpha=2 * SCALE))
    found, wanted = describe(ours, base), describe(theirs, base)
    modules = {module.module: module for module in found.modules}
    assert modules == {module.module: module for module in wanted.modules}
    assert (found.format, found.peft_type, found.r, found.lora_alpha, found.scaling) == (
        "mlx-lm",
        "LORA",
        2,
        None,
        SCALE,
    )
    assert (found.base_model, found.parameters, found.relative_update) == (
        "org/base",
        wanted.parameters,
        pytest.approx(wanted.relative_update),
    )
    assert describe(ours).findings == ()
    apart = distance(ours, theirs)
    assert (apart.relative, apart.cosine) == (0.0, pytest.approx(1.0))
    assert misfit(ours, base) == []


def test_its_update_is_scale_times_the_product_as_mlx_computes_it(tmp_path: Path) -> None:
    """Of x @ lora_a @ lora_b, which is added to x @ Wᵀ."""
    tensors = turned(pair(Q))
    adapter = Adapter(write_mlx(tmp_path / "mlx", tensors))
    (adapted,) = adapter.adapted
    x = np.random.default_rng(3).standard_normal((5, 6))
    delta = adapted.scaling * (adapter.finite(adapted.lora_B) @ adapter.finite(adapted.lora_A))
    wanted = SCALE * (x @ tensors[f"{Q}.lora_a"].astype(float) @ tensors[f"{Q}.lora_b"].astype(float))
    assert x @ delta.T == pytest.approx(wanted)
    rows = adapter.finite(adapted.lora_B, (1, 3, 1))
    assert np.array_equal(rows, adapter.finite(adapted.lora_B)[1:3])


def test_a_stack_of_experts_is_measured_matrix_by_matrix(tmp_path: Path) -> None:
    """(E, r, in) and (E, out, r), as LoRASwitchLinear has them."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 2, 6)), rng.standard_normal((3, 4, 2))
    name = "model.layers.0.mlp.switch_mlp.up_proj"
    adapter = Adapter(write_mlx(tmp_path / "mlx", {f"{name}.lora_a": a, f"{name}.lora_b": b}))
    assert (adapter.adapted[0].stacked, adapter.adapted[0].r) == (3, 2)
    (module,) = describe(adapter).modules
    assert module.delta_norm == pytest.approx(SCALE * float(np.linalg.norm(b @ a)))


def test_dora_has_its_magnitude(tmp_path: Path) -> None:
    """``X.m``."""
    tensors = turned(pair(Q)) | {f"{Q}.m": np.ones(4, np.float32)}
    adapter = Adapter(write_mlx(tmp_path / "mlx", tensors, fine_tune_type="dora"))
    assert adapter.adapted[0].magnitude == f"{Q}.m"


def test_a_full_fine_tune_is_told_as_one(tmp_path: Path) -> None:
    """Whole tensors, no factors."""
    path = write_mlx(tmp_path / "mlx", {f"{Q}.weight": np.ones((4, 6), np.float32)}, fine_tune_type="full")
    facts = describe(Adapter(path))
    assert (facts.peft_type, facts.r, facts.modules, facts.parameters) == ("FULL", None, (), 24)
    other = write_mlx(tmp_path / "other", {f"{Q}.weight": np.full((4, 6), 2, np.float32)}, fine_tune_type="full")
    assert distance(Adapter(path), Adapter(other)).whole == pytest.approx(0.5)


def test_a_merge_refuses_it_and_says_what_would_do(tmp_path: Path) -> None:
    """There is no live adapter to check such a merge against."""
    base = Checkpoint(write_base(tmp_path / "base", {f"{Q}.weight": (4, 6), f"{V}.weight": (4, 6)}))
    with pytest.raises(UnsupportedAdapterError, match=r"mlx_lm\.fuse"):
        Stack([(write_mlx(tmp_path / "mlx"), 1.0)]).bind(base)


@pytest.mark.parametrize("parameters", [None, {}, {"rank": 2}, {"rank": "8", "scale": 1.0}, {"rank": 2, "scale": None}])
def test_a_configuration_without_rank_or_scale_is_refused(tmp_path: Path, parameters: Any) -> None:
    """mlx-lm itself has no default for them when it loads."""
    with pytest.raises(AdapterError, match="usable number"):
        Adapter(write_mlx(tmp_path / "mlx", lora_parameters=parameters))


def test_peft_weights_beside_them_win(tmp_path: Path) -> None:
    """Tools that write both forms mean the same by them."""
    path = write_adapter(tmp_path / "both")
    save_file(turned(pair(Q)), path / "adapters.safetensors")
    assert Adapter(path).format == "peft"

"""Quantized models by compressed-tensors' own functions, of a tiny run whose update stands out from int4's noise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils.helpers import calculate_qparams
from safetensors.torch import load_file, save_file

from tests.sabotage.workshop import Tensors, Workshop, deltas
from tunesmith.runs import open_run
from tunesmith.verify import Verdict, verify

STRONGER = 10.0  # the workshop's update is ‖Δ‖ / ‖W‖ = 0.003, which a model of 70 000 numbers hides in int4
GROUP = 32

_DYNAMIC = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
SCHEMES: dict[str, dict[str, Any]] = {
    "int4": {"format": "pack-quantized", "weights": {"num_bits": 4, "strategy": "group", "group_size": GROUP}},
    "int8": {"format": "pack-quantized", "weights": {"num_bits": 8, "strategy": "channel"}},
    "w8a8": {
        "format": "int-quantized",
        "weights": {"num_bits": 8, "strategy": "channel"},
        "input_activations": {**_DYNAMIC, "type": "int"},
    },
    "fp8": {
        "format": "float-quantized",
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
        "input_activations": {**_DYNAMIC, "type": "float"},
    },
}  # fmt: skip


def make_stronger(run: Path, out: Path) -> Path:
    """A copy of a run with every B so many times as strong."""
    shutil.copytree(run, out)
    for file in out.rglob("adapter_model.safetensors"):
        tensors = load_file(file)
        save_file({n: t * STRONGER if "lora_B" in n else t for n, t in tensors.items()}, file, {"format": "pt"})
    return out


def scheme_of(scheme: str) -> QuantizationScheme:
    """The package's own record of a scheme."""
    told = {key: value for key, value in SCHEMES[scheme].items() if key != "format"}
    return QuantizationScheme(targets=["Linear"], **told)


def exact_weights(shop: Workshop, run: Path, *, factor: float = 1.0, checkpoint: str = "") -> Tensors:
    """W + factor·Δ of every adapted tensor, float64, by torch."""
    base = load_file(shop.base / "model.safetensors")
    return {name: base[name].double() + factor * d for name, d in deltas(run, checkpoint=checkpoint).items()}


def scales_of(x: torch.Tensor, args: QuantizationArgs, *, clip: float = 1.0) -> torch.Tensor:
    """The scales that the package gives a weight, in bf16."""
    grouped = x.unflatten(1, (-1, args.group_size)) if args.group_size else x[:, None, :]
    scales, _ = calculate_qparams(clip * grouped.amin(-1), clip * grouped.amax(-1), args)
    return scales.bfloat16()


def compressed(scheme: str, x: torch.Tensor, scales: torch.Tensor | None = None) -> Tensors:
    """What the package stores of a weight, rounded to nearest."""
    record = scheme_of(scheme)
    assert record.weights is not None
    scales = scales_of(x, record.weights) if scales is None else scales
    compressor = BaseCompressor.get_value_from_registry(SCHEMES[scheme]["format"])
    stored = compressor.compress({"weight": x, "weight_scale": scales.double()}, record)
    return {**stored, "weight_scale": scales}


def with_errors_passed_on(x: torch.Tensor, scales: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
    """Numbers that round to nearest to what GPTQ makes of x: each column's error is passed on to those that follow."""
    generator = torch.Generator().manual_seed(seed)
    width = x.shape[1]
    inputs = torch.randn(4 * width, width, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    inputs *= torch.logspace(0, -1, width, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(inputs.T @ inputs)).T
    spread = scales.double().repeat_interleave(width // scales.shape[1], 1)
    left, out = x.clone(), torch.zeros_like(x)
    for column in range(width):
        step = spread[:, column]
        out[:, column] = (left[:, column] / step).round().clamp(-8, 7) * step
        error = (left[:, column] - out[:, column]) / upper[column, column]
        left[:, column:] -= error[:, None] * upper[column, column:]
    return out


def quantize(
    shop: Workshop,
    run: Path,
    out: Path,
    scheme: str = "int4",
    *,
    rounding: str = "nearest",
    factor: float = 1.0,
    checkpoint: str = "",
    ignore: tuple[str, ...] = ("lm_head",),
    weights: Callable[[Tensors], Tensors] = lambda exact: exact,
) -> Path:
    """Write base plus adapter as a quantized directory.

    Args:
        shop: holds the base.
        run: the run.
        out: the new directory.
        scheme: of ``SCHEMES``.
        rounding: ``nearest``, or ``passed-on`` as GPTQ does.
        factor: how many times the update is put in.
        checkpoint: which adapter.
        ignore: layers that the configuration leaves out.
        weights: what to make of the exact weights first.
    """
    out.mkdir()
    record = scheme_of(scheme)
    assert record.weights is not None
    tensors = load_file(shop.base / "model.safetensors")
    for name, x in weights(exact_weights(shop, run, factor=factor, checkpoint=checkpoint)).items():
        del tensors[name]
        scales = scales_of(x, record.weights)
        x = with_errors_passed_on(x, scales) if rounding == "passed-on" else x
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{part}": tensor for part, tensor in compressed(scheme, x, scales).items()}
    save_file({name: one.contiguous() for name, one in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    config = QuantizationConfig(
        config_groups={"group_0": record},
        format=SCHEMES[scheme]["format"],
        quantization_status="compressed",
        ignore=list(ignore),
    )
    document = json.loads((shop.base / "config.json").read_text())
    document["quantization_config"] = json.loads(config.model_dump_json())
    (out / "config.json").write_text(json.dumps(document))
    shutil.copy(shop.base / "generation_config.json", out)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (run / file).exists():
            shutil.copy(run / file, out)
    return out


def check(
    shop: Workshop,
    run: Path,
    directory: Path,
    *,
    levels: tuple[str, ...] = ("structure", "assets", "weights"),
    **options: Any,
) -> Verdict:
    """The verdict on a quantized directory."""
    return verify(open_run(run), directory, base_dir=shop.base, base_model="base", levels=levels, **options)

"""Models, tokenizers and adapter configs from directories: what does not fit is told by name, nothing is guessed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypedDict

from tunesmith.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MLX_WEIGHTS, PLAIN_INITS
from tunesmith.errors import AdapterError, CheckpointError, TunesmithError, UnsupportedAdapterError
from tunesmith.models.compute import avoid_cudnn_attention
from tunesmith.models.on_load import on_load_arguments
from tunesmith.models.quantized import is_stored_quantized, make_plain, quiet_bars

_SHOWN_KEYS = 10
_SAMPLED = 256
# These act through hooks of PeftModel.forward, or rebuild the base.
_NOT_BESIDE_A_BASE = ("alora_invocation_tokens", "arrow_config", "layer_replication")


def load_model(
    path: Path, *, dtype: str, device: str, error: type[TunesmithError], quantization: str | None = None
) -> Any:
    """A model with its weights, frozen, in eval mode; weights that do not fit its config are an error.

    Args:
        path: its directory.
        dtype: of weights and activations, also of a model that is stored quantized.
        device: where to put it.
        error: the kind of error to raise.
        quantization: quantize it while it is loaded: see :func:`on_load_arguments`; None leaves it as it is.

    Raises:
        MissingExtraError: it is stored quantized, and the package that reads that is not installed; or it is to be
            quantized, by a package that is not.
        TunesmithError: of the kind ``error``: the model cannot be loaded so.
    """
    import torch
    from transformers import AutoModelForCausalLM

    _require_files(path, ("config.json",), error)
    if (path / "adapter_config.json").exists():
        raise error("This directory holds an adapter, not a complete model.", where=path)
    quantized = is_stored_quantized(path)
    if quantized and quantization is not None:
        raise error("The model is quantized already.", where=path, next_step="leave --quantization out")
    on_load = {} if quantization is None else on_load_arguments(quantization, dtype=dtype, device=device)
    try:
        with quiet_bars() if quantized else nullcontext():
            model, info = AutoModelForCausalLM.from_pretrained(
                str(path),
                dtype=getattr(torch, dtype),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                # so that the misfits come back to us by name, instead of as a sentence on stderr
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **on_load,
            )
    except Exception as problem:
        raise error("The model cannot be loaded.", where=path, **told(problem)) from problem
    details = [f"missing: {key}" for key in sorted(info["missing_keys"])]
    details += [f"not part of the model: {key}" for key in sorted(info["unexpected_keys"])]
    details += [
        f"{key}: the config says {tuple(wanted)}, the file holds {tuple(found)}"
        for key, found, wanted in sorted(info["mismatched_keys"])
    ]
    if details:
        raise error("The model's weights do not fit its config.", where=path, details=_shorten(details))
    if quantized:
        model = make_plain(model)
    avoid_cudnn_attention(device)
    placed = model if quantization is not None else model.to(device)  # the package put it there, packed
    return placed.eval().requires_grad_(False)


def load_config(path: Path) -> Any:
    """A model's config, without its weights.

    Raises:
        CheckpointError: it is absent or cannot be read.
    """
    from transformers import AutoConfig

    _require_files(path, ("config.json",), CheckpointError)
    try:
        return AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError("The model's config cannot be read.", where=path, **told(error)) from error


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a directory.

    Raises:
        CheckpointError: it is absent or cannot be loaded.
    """
    from transformers import AutoTokenizer

    _require_files(path, ("tokenizer_config.json",), CheckpointError)
    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError("The tokenizer cannot be loaded.", where=path, **told(error)) from error


def read_adapter_config(path: Path) -> Any:
    """PEFT's config of an adapter that can live beside its base.

    Raises:
        AdapterError: it is absent or cannot be read.
        UnsupportedAdapterError: it is no LoRA, or changes the base.
    """
    from peft import PeftConfig

    if (path / MLX_WEIGHTS).is_file() and not (path / ADAPTER_WEIGHTS).exists():
        raise UnsupportedAdapterError(
            "An adapter of mlx-lm's runs in mlx-lm only.",
            where=path,
            expected=ADAPTER_WEIGHTS,
            found=MLX_WEIGHTS,
            next_step="merge it with mlx_lm.fuse, and give the merged model's directory",
        )
    # PEFT would fall back to a pickle.
    _require_files(path, (ADAPTER_CONFIG, ADAPTER_WEIGHTS), AdapterError)
    try:
        config = PeftConfig.from_pretrained(str(path))
    except Exception as error:
        raise AdapterError("The adapter's config cannot be read.", where=path, **told(error)) from error
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise UnsupportedAdapterError(
            "Only LoRA adapters can be run here.", where=path, expected="peft_type LORA", found=kind
        )
    strange = [field for field in _NOT_BESIDE_A_BASE if getattr(config, field, None)]
    if config.init_lora_weights not in PLAIN_INITS:
        strange.append("init_lora_weights")
    if strange:
        raise UnsupportedAdapterError(
            "This adapter cannot be run beside its unchanged base.",
            where=path,
            details=[f"{field} = {getattr(config, field)!r}" for field in strange],
        )
    config.inference_mode = True
    return config


def refuse_keys(what: str, path: Path, error: type[TunesmithError], result: Any) -> None:
    """Raise ``error`` if weights were missing or left over, with their names.

    Args:
        what: what that means.
        path: the directory.
        error: the kind of error.
        result: with ``missing_keys`` and ``unexpected_keys``.
    """
    details = [f"missing: {key}" for key in sorted(result.missing_keys)]
    details += [f"not part of the model: {key}" for key in sorted(result.unexpected_keys)]
    if details:
        raise error(what, where=path, details=_shorten(details))


def _require_files(path: Path, names: Sequence[str], error: type[TunesmithError]) -> None:
    if not path.is_dir():
        raise error("There is no such directory.", where=path)
    absent = [name for name in names if not (path / name).is_file()]
    if absent:
        raise error("The directory lacks a file.", where=path, expected=", ".join(absent))


def _shorten(details: list[str]) -> list[str]:
    more = len(details) - _SHOWN_KEYS
    return details if more <= 0 else [*details[:_SHOWN_KEYS], f"… and {more} more"]


class _Told(TypedDict):
    found: str
    details: list[str]


def told(error: BaseException) -> _Told:
    """What a library's exception says: its first line, and the others as details.

    Loading catches every exception of the libraries, because safetensors and tokenizers raise bare ``Exception`` for a
    broken file; the original is kept as the cause.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return {"found": lines[0], "details": _shorten(lines[1:])}


def sample(tensor: Any) -> float:
    """The sum of some elements, spread over all: what a tensor that was written behind autograd's back has not kept."""
    flat = tensor.detach().reshape(-1)
    return float(flat[:: max(1, flat.numel() // _SAMPLED)].float().nan_to_num().sum())

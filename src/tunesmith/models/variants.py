"""The Variant: base, adapters and merged models of one base, loaded once and switched between.

The adapters stay beside the base's weights, live and unmerged, so that a merged model can be held against them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypedDict

from tunesmith.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MLX_WEIGHTS, PLAIN_INITS
from tunesmith.errors import (
    AdapterError,
    AdapterMismatchError,
    BaseModelError,
    CheckpointError,
    DataError,
    TunesmithError,
    UnsupportedAdapterError,
)
from tunesmith.models.compute import dtype_name
from tunesmith.models.quiet import quiet_loading
from tunesmith.progress import Progress, ProgressCallback, no_progress
from tunesmith.record import Part

BASE = "base"
_SHOWN_KEYS = 10
_SAMPLED = 256
# These act through hooks of PeftModel.forward, or rebuild the base.
_NOT_BESIDE_A_BASE = ("alora_invocation_tokens", "arrow_config", "layer_replication")


class Variant(Part):
    """One set of weights that can be talked to.

    Attributes:
        name: ``base``, ``final``, ``checkpoint-N`` or ``merged``; unique within its set.
        kind: what its weights are: the base's own, the base's with a live adapter, or a model of its own.
        path: the directory of the base, the adapter or the model.
    """

    name: str
    kind: Literal["base", "adapter", "full"]
    path: str


class VariantSet:
    """Variants of one base model, whose weights are in memory once.

    One thread at a time has a variant active; others wait.

    Attributes:
        variants: the base, then the adapters, then the full models, in the order they were given; at the end those
            that are :meth:`attached` for a while.
        dtype: the dtype of weights and activations, such as ``float32``; adapter weights are float32 always.
        device: where they live.
    """

    def __init__(self, variants: Sequence[Variant], model: Any, tokenizer: Any, *, dtype: str, device: str) -> None:
        self.variants = tuple(variants)
        self.dtype = dtype
        self.device = device
        self._by_name = {variant.name: variant for variant in self.variants}
        self._model = model
        self._tokenizer = tokenizer
        self._peft: Any = None
        self._adapter_keys: dict[str, str] = {}
        self._adapters_made = 0
        self._full: tuple[str, Any, Any] | None = None
        self._current = BASE
        self._lock = threading.RLock()

    @classmethod
    def load(
        cls,
        base_dir: str | Path,
        *,
        adapters: Mapping[str, str | Path],
        full: Mapping[str, str | Path] | None = None,
        tokenizer_dir: str | Path,
        dtype: str = "float32",
        device: str = "cpu",
        progress: ProgressCallback = no_progress,
    ) -> VariantSet:
        """Load the base once and put every adapter beside it; full models are loaded when they are first active.

        Args:
            base_dir: the base model's directory (config and safetensors).
            adapters: PEFT LoRA adapter directories by variant name.
            full: complete model directories, each with its own tokenizer, by variant name.
            tokenizer_dir: where the tokenizer of the base and the adapters is: the run's.
            dtype: ``float32``, ``bfloat16`` or ``float16``.
            device: ``cpu``, ``cuda`` or ``mps``.
            progress: called with the stage ``load``, in models.

        Raises:
            DataError: a name is used twice, or an unknown dtype.
            BaseModelError: the base is absent, or its weights do not fit its config.
            AdapterError: an adapter is absent or unreadable, does not fit the base, or changes the base's own weights.
            CheckpointError: the tokenizer cannot be read.
        """
        full = full or {}
        variants = [Variant(name=BASE, kind="base", path=str(base_dir))]
        variants += [Variant(name=name, kind="adapter", path=str(path)) for name, path in adapters.items()]
        variants += [Variant(name=name, kind="full", path=str(path)) for name, path in full.items()]
        names = [variant.name for variant in variants]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise DataError("Two variants have the same name.", found=", ".join(twice))
        dtype = dtype_name(dtype)
        total = 1 + len(adapters)
        progress(Progress("load", 0, total, "models", BASE))
        with quiet_loading():
            tokenizer = _load_tokenizer(Path(tokenizer_dir))
            model = _load_model(Path(base_dir), dtype=dtype, device=device, error=BaseModelError)
            result = cls(variants, model, tokenizer, dtype=dtype, device=device)
            for done, (name, path) in enumerate(adapters.items(), 1):
                progress(Progress("load", done, total, "models", name))
                result._attach(name, Path(path))
        result._select(BASE)
        progress(Progress("load", total, total, "models"))
        return result

    @property
    def names(self) -> tuple[str, ...]:
        """The variants' names, ``base`` first."""
        return tuple(self._by_name)

    def variant(self, name: str) -> Variant:
        """The variant of that name.

        Raises:
            DataError: there is none.
        """
        if name not in self._by_name:
            raise DataError("There is no such variant.", expected=", ".join(self.names), found=name)
        return self._by_name[name]

    @contextmanager
    def active(self, name: str) -> Iterator[tuple[Any, Any]]:
        """Have one variant's model and tokenizer, frozen, in eval mode, under ``torch.no_grad``.

        The variant that was active before is active again afterwards, also after an exception.

        Args:
            name: the variant's name.

        Yields:
            The ``PreTrainedModel`` and its tokenizer.

        Raises:
            DataError: there is no such variant.
            CheckpointError: a full model cannot be loaded.
        """
        import torch

        variant = self.variant(name)
        with self._lock:
            if variant.kind == "full":
                with torch.no_grad():
                    yield self._load_full(variant)
                return
            before = self._current
            try:
                self._select(name)
                with torch.no_grad():
                    yield self._model, self._tokenizer
            finally:
                self._select(before)

    @contextmanager
    def attached(self, name: str, path: str | Path) -> Iterator[Variant]:
        """Have one more adapter beside the base for a while; its memory is given back afterwards.

        So a hundred adapters can be looked at one after another in the memory of one.

        Args:
            name: the new variant's name.
            path: its PEFT LoRA adapter directory.

        Yields:
            The variant.

        Raises:
            DataError: there is a variant of that name.
            AdapterError: the adapter is absent or unreadable, does not fit the base, or changes the base's own weights.
        """
        variant = Variant(name=name, kind="adapter", path=str(path))
        with self._lock:
            if name in self._by_name:
                raise DataError("Two variants have the same name.", found=name)
            try:
                with quiet_loading():
                    self._attach(name, Path(path))
                self._by_name[name] = variant
                self.variants = tuple(self._by_name.values())
            except BaseException:
                self._detach(name)
                raise
            finally:
                self._select(self._current)
        try:
            yield variant
        finally:
            with self._lock:
                self._detach(name)

    def _select(self, name: str) -> None:
        self._current = name
        if self._peft is None:
            return
        tuner = self._peft.base_model
        if name == BASE:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            tuner.set_adapter(self._adapter_keys[name])
        # PEFT lets the chosen adapter train; nothing here does.
        self._model.requires_grad_(False)

    def _attach(self, name: str, path: Path) -> None:
        # PEFT makes module names of adapter names, so a dot or its own prefix in them would break it.
        key = f"variant{self._adapters_made}"
        config = _read_adapter_config(path)
        untouched = _fingerprint(self._model)
        self._adapters_made += 1
        self._adapter_keys[name] = key
        try:
            if self._peft is None:
                from peft import PeftModel

                self._peft = PeftModel(self._model, config, adapter_name=key, autocast_adapter_dtype=True)
            result = self._peft.load_adapter(
                str(path),
                key,
                torch_device=self.device,
                # float16 and bfloat16 adapters become float32, float32 ones stay: nothing is rounded.
                autocast_adapter_dtype=True,
                key_mapping=getattr(self._model, "_checkpoint_conversion_mapping", None) or None,
            )
        except Exception as error:
            raise AdapterMismatchError(
                "The adapter cannot be put on this base model.", where=path, **_told(error)
            ) from error
        _refuse_keys("The adapter does not fit this base model.", path, AdapterMismatchError, result)
        if _fingerprint(self._model, only=untouched) != untouched:
            raise UnsupportedAdapterError(
                "This adapter changes weights of the base itself, so it cannot live beside it unmerged.",
                where=path,
                expected="an adapter of LoRA matrices and modules_to_save only",
                found=f"bias = {config.bias!r}, or tensors of the base among the adapter's",
            )
        self._model.eval()

    def _detach(self, name: str) -> None:
        """Forget a variant, also one that was only half made; whatever was active stays so, or the base does."""
        self._by_name.pop(name, None)
        self.variants = tuple(self._by_name.values())
        key = self._adapter_keys.pop(name, None)
        if self._peft is not None and key in self._peft.peft_config:
            with quiet_loading():  # PEFT tells which adapter it makes active in its place
                self._peft.delete_adapter(key)
                if not self._peft.peft_config:
                    # PEFT cannot begin again on wrappers that hold no adapter.
                    self._model, self._peft = self._peft.unload(), None
        self._select(BASE if self._current == name else self._current)

    def _load_full(self, variant: Variant) -> tuple[Any, Any]:
        if self._full is None or self._full[0] != variant.name:
            self._full = None  # one at a time: free the one before first
            path = Path(variant.path)
            with quiet_loading():
                model = _load_model(path, dtype=self.dtype, device=self.device, error=CheckpointError)
                self._full = (variant.name, model, _load_tokenizer(path))
        _, model, tokenizer = self._full
        return model, tokenizer


def context_window(model: Any) -> int | None:
    """The most tokens that the model was made for, or None where its config does not say."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(window) if window else None


def check_token_ids(model: Any, sequences: Sequence[Sequence[int]]) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        CheckpointError: the tokenizer knows tokens that the model does not.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max((max(sequence, default=0) for sequence in sequences), default=0)
    if largest >= rows:
        raise CheckpointError(
            "The tokenizer knows tokens that the model has no embedding for.",
            expected=f"token ids below {rows}",
            found=largest,
            next_step="use the tokenizer that the model was trained with",
        )


def _load_model(path: Path, *, dtype: str, device: str, error: type[TunesmithError]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    _require_files(path, ("config.json",), error)
    if (path / "adapter_config.json").exists():
        raise error("This directory holds an adapter, not a complete model.", where=path)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            # so that the misfits come back to us by name, instead of as a sentence on stderr
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as problem:
        raise error("The model cannot be loaded.", where=path, **_told(problem)) from problem
    details = [f"missing: {key}" for key in sorted(info["missing_keys"])]
    details += [f"not part of the model: {key}" for key in sorted(info["unexpected_keys"])]
    details += [
        f"{key}: the config says {tuple(wanted)}, the file holds {tuple(found)}"
        for key, found, wanted in sorted(info["mismatched_keys"])
    ]
    if details:
        raise error("The model's weights do not fit its config.", where=path, details=_shorten(details))
    return model.to(device).eval().requires_grad_(False)


def _load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    _require_files(path, ("tokenizer_config.json",), CheckpointError)
    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError("The tokenizer cannot be loaded.", where=path, **_told(error)) from error


def _read_adapter_config(path: Path) -> Any:
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
        raise AdapterError("The adapter's config cannot be read.", where=path, **_told(error)) from error
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


def _fingerprint(model: Any, only: Mapping[int, object] | None = None) -> dict[int, object]:
    """Where every tensor of the model lies, how often it was written, and the sum of a sample of its elements.

    Cheap evidence that nobody changed it: loading into it counts as writing, and methods that change the base on
    loading behind autograd's back change all of it.

    Args:
        model: a torch module.
        only: look at these tensors alone, by ``id``.
    """
    return {
        id(tensor): (tensor.data_ptr(), tensor._version, _sample(tensor))
        for tensor in (*model.parameters(), *model.buffers())
        if only is None or id(tensor) in only
    }


def _sample(tensor: Any) -> float:
    flat = tensor.detach().reshape(-1)
    return float(flat[:: max(1, flat.numel() // _SAMPLED)].float().nan_to_num().sum())


def _refuse_keys(what: str, path: Path, error: type[TunesmithError], result: Any) -> None:
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


def _told(error: BaseException) -> _Told:
    """What a library's exception says: its first line, and the others as details.

    Loading catches every exception of the libraries, because safetensors and tokenizers raise bare ``Exception`` for a
    broken file; the original is kept as the cause.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return {"found": lines[0], "details": _shorten(lines[1:])}

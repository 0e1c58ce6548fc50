"""The Variant: base, adapters and merged models of one base, loaded once and switched between.

The adapters stay beside the base's weights, live and unmerged, so that a merged model can be held against them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from tunesmith.adapter import ADAPTER_WEIGHTS
from tunesmith.errors import (
    AdapterMismatchError,
    BaseModelError,
    CheckpointError,
    DataError,
    UnsupportedAdapterError,
)
from tunesmith.models.compute import dtype_name
from tunesmith.models.full import FullModels
from tunesmith.models.loading import (
    load_config,
    load_model,
    load_tokenizer,
    read_adapter_config,
    refuse_keys,
    sample,
    told,
)
from tunesmith.models.quiet import quiet_loading
from tunesmith.models.rows import Routing, RowAdapters
from tunesmith.progress import Progress, ProgressCallback, no_progress
from tunesmith.record import Part

BASE = "base"


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

    def __init__(
        self,
        variants: Sequence[Variant],
        model: Any,
        tokenizer: Any,
        *,
        dtype: str,
        device: str,
        quantization: str | None = None,
        memory_budget_bytes: int | None = None,
    ) -> None:
        self.variants = tuple(variants)
        self.dtype = dtype
        self.device = device
        self._by_name = {variant.name: variant for variant in self.variants}
        self._model = model
        self._tokenizer = tokenizer
        self._peft: Any = None
        self._adapter_keys: dict[str, str] = {}
        self._adapters_made = 0
        self._full = FullModels(memory_budget_bytes, quantization=quantization)
        self._tokenizers: dict[str, Any] = {}
        self._rows: RowAdapters | None = None
        self._refused: str | None = None
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
        quantization: str | None = None,
        memory_budget_bytes: int | None = None,
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
            quantization: quantize every model while it is loaded, the adapters beside it not: see
                :func:`tunesmith.models.on_load.on_load_arguments`; None leaves them as they are.
            memory_budget_bytes: what full models may take together; None for half of the memory that is free.
            progress: called with the stage ``load``, in models.

        Raises:
            DataError: a name is used twice, or an unknown dtype.
            BaseModelError: the base is absent, or its weights do not fit its config.
            MissingExtraError: the package that reads or quantizes a model is not installed.
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
            tokenizer = load_tokenizer(Path(tokenizer_dir))
            model = load_model(
                Path(base_dir), dtype=dtype, device=device, error=BaseModelError, quantization=quantization
            )
            result = cls(
                variants,
                model,
                tokenizer,
                dtype=dtype,
                device=device,
                quantization=quantization,
                memory_budget_bytes=memory_budget_bytes,
            )
            for done, name in enumerate(sorted(adapters, key=lambda name: _trains_tokens(Path(adapters[name]))), 1):
                progress(Progress("load", done, total, "models", name))
                result._attach(name, Path(adapters[name]))
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
                    yield self._full.get(variant.path, dtype=self.dtype, device=self.device)
                return
            before = self._current
            try:
                self._select(name)
                with torch.no_grad():
                    yield self._model, self._tokenizer
            finally:
                self._select(before)

    def tokenizer(self, name: str) -> Any:
        """A variant's tokenizer; no full model is loaded for it.

        Raises:
            DataError: there is no such variant.
            CheckpointError: a full model's tokenizer cannot be loaded.
        """
        variant = self.variant(name)
        if variant.kind != "full":
            return self._tokenizer
        if name not in self._tokenizers:
            with quiet_loading():
                self._tokenizers[name] = load_tokenizer(Path(variant.path))
        return self._tokenizers[name]

    def context_window(self, name: str) -> int | None:
        """The most tokens that a variant was made for, or None where its config does not say; loads no full model.

        Raises:
            DataError: there is no such variant.
            CheckpointError: a full model's config cannot be read.
        """
        variant = self.variant(name)
        config = self._model.config if variant.kind != "full" else load_config(Path(variant.path))
        return context_window(config)

    @property
    def in_turn(self) -> Mapping[str, str]:
        """Adapters that cannot run beside others in one batch, by name, each with the kind of module that is why."""
        rows = self._row_adapters()
        return {name: rows.in_turn[key] for name, key in self._adapter_keys.items() if key in rows.in_turn}

    @property
    def full_bytes(self) -> tuple[int, int]:
        """What full models take in memory now, and what they may take together, in bytes."""
        return self._full.size_bytes, self._full.budget_bytes

    def companies(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Split variants into those that run beside each other in one batch.

        Args:
            names: variants; a name may stand there more than once.

        Raises:
            DataError: there is no such variant.
        """
        distinct, in_turn = dict.fromkeys(names), self.in_turn
        together = [name for name in distinct if self.variant(name).kind != "full" and name not in in_turn]
        return [tuple(together)] * bool(together) + [(name,) for name in distinct if name not in together]

    def run_in_turn(self, module: str) -> None:
        """Have adapters run one after another from now on, because a module is not given the rows of a batch.

        Args:
            module: its kind.
        """
        self._refused = module
        self._row_adapters().refuse(module)

    @contextmanager
    def running(self, names: Sequence[str]) -> Iterator[tuple[Any, Any, Routing | None]]:
        """Have the model of rows of variants, each row with its own adapter, under ``torch.no_grad``.

        Args:
            names: a variant for every row, those of one variant beside each other; all of one company.

        Yields:
            The ``PreTrainedModel``, its tokenizer, and the routing, which must be told of rows that leave the batch;
            None where the model is one variant as it is.

        Raises:
            DataError: there is no such variant.
            CheckpointError: a full model cannot be loaded.
        """
        (company,) = self.companies(names)
        with self._lock:
            if self.variant(company[0]).kind == "full" or company[0] in self.in_turn:
                with self.active(company[0]) as (model, tokenizer), RowAdapters(model, ()).routed(Routing(())):
                    yield model, tokenizer, None
                return
            routing = Routing([self._adapter_keys.get(name) for name in names])
            with self.active(BASE) as (model, tokenizer), self._row_adapters().routed(routing):
                yield model, tokenizer, routing

    def _row_adapters(self) -> RowAdapters:
        with self._lock:
            if self._rows is None:
                self._rows = RowAdapters(self._model, tuple(self._adapter_keys.values()))
                if self._refused is not None:
                    self._rows.refuse(self._refused)
            return self._rows

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
        self._rows = None
        config = read_adapter_config(path)
        own = _bases_own(self._model, path) if config.bias == "none" else frozenset()
        untouched = _fingerprint(self._model, uncounted=own)
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
                "The adapter cannot be put on this base model.", where=path, **told(error)
            ) from error
        refuse_keys("The adapter does not fit this base model.", path, AdapterMismatchError, result)
        if _fingerprint(self._model, only=untouched, uncounted=own) != untouched:
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
        self._rows = None
        if self._peft is not None and key in self._peft.peft_config:
            with quiet_loading():  # PEFT tells which adapter it makes active in its place
                self._peft.delete_adapter(key)
                if not self._peft.peft_config:
                    # PEFT cannot begin again on wrappers that hold no adapter.
                    self._model, self._peft = self._peft.unload(), None
        self._select(BASE if self._current == name else self._current)


def _trains_tokens(path: Path) -> bool:
    """Whether an adapter replaces single tokens' rows; after one that does, PEFT can load none that does not."""
    return bool(getattr(read_adapter_config(path), "trainable_token_indices", None))


def context_window(config: Any) -> int | None:
    """The most tokens that a model was made for, or None where its config does not say."""
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
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


def _bases_own(model: Any, path: Path) -> frozenset[int]:
    """The base's weights, by ``id``, that an adapter's file repeats bit by bit, as PEFT saves an adapted embedding."""
    import torch
    from safetensors import SafetensorError, safe_open

    found = set()
    parameters = {name.replace(".base_layer.", "."): tensor for name, tensor in model.named_parameters()}
    with (
        suppress(SafetensorError),
        safe_open(path / ADAPTER_WEIGHTS, framework="pt") as file,
    ):  # PEFT tells what is wrong
        for key in file.keys():  # noqa: SIM118 - it is no mapping
            parameter = parameters.get(key.removeprefix("base_model.model.").replace(".base_layer.", "."))
            if parameter is not None and torch.equal(file.get_tensor(key).to(parameter), parameter):
                found.add(id(parameter))
    return frozenset(found)


def _fingerprint(
    model: Any, only: Mapping[int, object] | None = None, *, uncounted: frozenset[int] = frozenset()
) -> dict[int, object]:
    """Where every tensor of the model lies, how often it was written, and the sum of a sample of its elements.

    Cheap evidence that nobody changed it: loading into it counts as writing, and methods that change the base on
    loading behind autograd's back change all of it.

    Args:
        model: a torch module.
        only: look at these tensors alone, by ``id``.
        uncounted: tensors, by ``id``, that may be written again with what they hold.
    """
    return {
        id(tensor): (tensor.data_ptr(), 0 if id(tensor) in uncounted else tensor._version, sample(tensor))
        for tensor in (*model.parameters(), *model.buffers())
        if only is None or id(tensor) in only
    }

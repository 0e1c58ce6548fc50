"""One pass of a training played through without numbers: what it multiplies, and what it holds at once.

Torch's fake tensors have shapes, dtypes and a device, and no memory behind them; the very kernels are chosen that
would run.  Every result is watched from its birth to its end, so that the peak is that of the pass, with gradients,
copies and whatever else lives for a moment.  A model is the same layer many times over: one layer of each kind is
played, and then a second one, whose difference is what the others add.
"""

from __future__ import annotations

import logging
import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tunesmith.train.head import summed_nats
from tunesmith.train.rows import IGNORED

_CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
_BACKWARD_PRODUCTS = 2.5  # attention's backward pass has five products, its forward pass two


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass of a batch.

    Attributes:
        flops: multiplications and additions.
        peak_bytes: what is held at once at most, beside weights and their gradients.
    """

    flops: float
    peak_bytes: float

    def plus(self, other: Pass, times: float) -> Pass:
        """This and ``times`` another."""
        return Pass(self.flops + times * other.flops, self.peak_bytes + times * other.peak_bytes)


def play(model: Any, batch: dict[str, torch.Tensor], *, dtype: str, checkpointed: bool, whole: bool = False) -> Pass:
    """Play a batch through a model, forward and backward.

    Args:
        model: the model with its adapter, on the meta device; it is left as it was.
        batch: as :func:`tunesmith.train.batches.collate` makes it.
        dtype: what it is computed in; other than float32, by autocast as the Trainer does.
        checkpointed: whether each layer's inside is computed a second time instead of being kept.
        whole: whether each layer is played, also where another one is just like it.
    """
    layers = _layers(model)
    kinds = _kinds(layers, model.config.get_text_config(), checkpointed=checkpointed)
    again = [kind for kind in kinds if len(kind) > 1]
    first = [kind[0] for kind in kinds]
    if whole or len(first) + len(again) * (len(first) + 1) >= len(layers):
        return _play(model, batch, dtype=dtype, checkpointed=checkpointed)
    with _only(model, layers, first):
        once = _play(model, batch, dtype=dtype, checkpointed=checkpointed)
    total = once
    for kind in again:
        with _only(model, layers, sorted([*first, kind[1]])):
            twice = _play(model, batch, dtype=dtype, checkpointed=checkpointed)
        total = total.plus(twice.plus(once, -1), len(kind) - 1)
    return total


def _layers(model: Any) -> Sequence[Any]:
    """The model's list of layers; empty where there is not one."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    lists = [one for one in model.modules() if isinstance(one, torch.nn.ModuleList) and len(one) == count]
    return lists[0] if len(lists) == 1 else ()


def _kinds(layers: Sequence[Any], config: Any, *, checkpointed: bool) -> list[list[int]]:
    """The numbers of the layers that are like each other, in the order of their first ones."""
    named: Any = getattr(config, "layer_types", None) or [None] * len(layers)
    kinds: dict[object, list[int]] = {}
    reached = checkpointed  # whether a gradient goes on to what lies before
    for at, layer in enumerate(layers):
        weights = [(name, weight.shape, weight.requires_grad) for name, weight in layer.named_parameters()]
        trained = any(requires_grad for _, _, requires_grad in weights)
        kinds.setdefault((type(layer), named[at], reached, tuple(weights)), []).append(at)
        reached = reached or trained
    return list(kinds.values())


@contextmanager
def _only(model: Any, layers: Any, chosen: Sequence[int]) -> Iterator[None]:
    """Leave a model only some of its layers for a while."""
    config, every = model.config.get_text_config(), list(layers)
    types = getattr(config, "layer_types", None)

    def put(numbers: Sequence[int]) -> None:
        del layers[:]
        layers.extend(every[at] for at in numbers)
        config.num_hidden_layers = len(numbers)
        if types is not None:
            config.layer_types = [types[at] for at in numbers]

    put(chosen)
    try:
        yield
    finally:
        put(range(len(every)))


def _play(model: Any, batch: dict[str, torch.Tensor], *, dtype: str, checkpointed: bool) -> Pass:
    supervised = int((batch["shift_labels"] != IGNORED).sum())
    pads = "row_bounds" not in batch and not bool(batch["attention_mask"].all())
    half = getattr(torch, dtype)
    with (
        FakeTensorMode(allow_non_fake_inputs=True) as fake,
        _hushed(),
        _faked(model),
        _recomputing(model, checkpointed),
    ):
        inputs = _inputs(batch, fake, pads=pads)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        with _Watch(trained) as watch, torch.autocast("cpu", half, enabled=half != torch.float32):
            head = model.get_output_embeddings()
            summed_nats(
                model,
                inputs,
                torch.zeros(supervised, dtype=torch.long),
                head=head,
                keep=lambda hidden: hidden.flatten(0, 1)[:supervised],
                plain=_is_plain(model, head),
            ).backward()
    return Pass(watch.flops, watch.peak_bytes)


def _is_plain(model: Any, head: Any) -> bool:
    """What ``head.is_plain_head`` finds out with numbers, told by the configuration's words for it."""
    config = model.config.get_text_config()
    changed = any(getattr(config, key, None) not in (None, 1, 1.0) for key in _CHANGES_LOGITS)
    return type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad and not changed


def _inputs(batch: dict[str, torch.Tensor], fake: FakeTensorMode, *, pads: bool) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        key: fake.from_tensor(batch[key]) for key in ("input_ids", "position_ids") if key in batch
    }
    if "row_bounds" in batch:  # where rows end is read, and so must be there
        return inputs | {
            "row_bounds": batch["row_bounds"].as_subclass(_Real),
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
        }
    rows, longest = batch["input_ids"].shape
    return inputs | ({"attention_mask": torch.ones(rows, 1, longest, longest, dtype=torch.bool)} if pads else {})


class _Real(torch.Tensor):  # type: ignore[misc] # torch is untyped here
    """A tensor whose numbers are there, among fake ones."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with _disable_current_modes():
            return super().__torch_function__(func, types, args, kwargs)


@contextmanager
def _faked(model: Any) -> Iterator[None]:
    """Give a model of the meta device fake weights for a while."""
    before = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    # One weight in two places stays one.
    made: dict[int, Any] = {}

    def faked(tensor: Any) -> Any:
        if tensor is None or tensor.device.type != "meta":
            return tensor
        if id(tensor) not in made:
            fake = torch.empty_like(tensor, device="cpu")
            is_weight = isinstance(tensor, torch.nn.Parameter)
            made[id(tensor)] = torch.nn.Parameter(fake, tensor.requires_grad) if is_weight else fake
        return made[id(tensor)]

    try:
        for module, parameters, buffers in before:
            module._parameters.update({name: faked(one) for name, one in parameters.items()})
            module._buffers.update({name: faked(one) for name, one in buffers.items()})
        yield
    finally:
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


@contextmanager
def _recomputing(model: Any, checkpointed: bool) -> Iterator[None]:
    if not checkpointed:
        yield
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()  # as PEFT's models need it: what is frozen before the first layer has none
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):  # no number is drawn, so no generator's state is kept
            module._gradient_checkpointing_func = partial(module._gradient_checkpointing_func, preserve_rng_state=False)
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()


@contextmanager
def _hushed() -> Iterator[None]:
    """Silence of what torch says of a model that looks at values; and of Transformers, which renames its methods."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


class _Watch(TorchDispatchMode):  # type: ignore[misc] # torch is untyped here
    """Counts products, and the bytes of all results that are still alive.

    Args:
        trained: weights whose gradients are not counted.
    """

    def __init__(self, trained: Sequence[torch.nn.Parameter]) -> None:
        super().__init__()
        self.flops = 0.0
        self.peak_bytes = 0
        self._held = 0
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._hooks = [weight.register_post_accumulate_grad_hook(self._forget_gradient) for weight in trained]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for at every turn
        # Torch's own description of this product knows bfloat16 only.
        result = _grouped(*args, **(kwargs or {})) if "_grouped_mm" in str(func) else func(*args, **(kwargs or {}))
        self.flops += _flops(func, args, kwargs or {}, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor, [*tree_leaves(args)])
        return result

    def _see(self, tensor: torch.Tensor, given: Sequence[Any]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or any(isinstance(one, torch.Tensor) and _is_of(one, key) for one in given):
            return  # a view, or written in place
        size = storage.nbytes()
        self._alive[key] = (weakref.ref(storage, lambda _: self._forget(key)), size)
        self._held += size
        self.peak_bytes = max(self.peak_bytes, self._held)

    def _forget(self, key: int) -> None:
        _, size = self._alive.pop(key, (None, 0))
        self._held -= size

    def _forget_gradient(self, weight: torch.Tensor) -> None:
        if weight.grad is not None:
            self._forget(weight.grad.untyped_storage()._cdata)


def _is_of(tensor: torch.Tensor, key: int) -> bool:
    return bool(tensor.untyped_storage()._cdata == key)


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> float:
    """Multiplications and additions of an operation; 0 of those without products."""
    name = str(func)
    if "_scaled_dot_product_flash_attention_for_cpu_backward" in name:
        return _BACKWARD_PRODUCTS * _attention_flops(*args[1:4])
    if "_scaled_dot_product_flash_attention_for_cpu" in name:
        return _attention_flops(*args[:3])
    if "grouped_mm" in name:
        backward = "backward" in name
        rows, weights = args[1:3] if backward else args[:2]
        return float(2 * rows.numel() * weights.shape[-1] * (2 if backward else 1))
    count: Callable[..., float] | None = flop_registry.get(getattr(func, "_overloadpacket", None))
    return 0.0 if count is None else float(count(*args, **kwargs, out_val=result))


def _grouped(rows: torch.Tensor, weights: torch.Tensor, offs: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """The result of a product by groups: of rows by the matrix of their group, or of two by the rows of each."""
    groups = () if weights.dim() == 3 else (len(offs),)
    return rows.new_empty(*groups, rows.shape[0], weights.shape[-1])


def _attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> float:
    pairs = math.prod(query.shape[:-1]) * key.shape[-2]
    return float(2 * pairs * (query.shape[-1] + value.shape[-1]))

"""One forward pass for many variants: every row of a batch is given the adapter of its own variant.

The base's product with a weight is made once for all rows, and each row adds what its own adapter adds.  Which numbers
those are is PEFT's: adapters are loaded by PEFT, and read here from its layers.  What is left alone is left to PEFT's
own ``forward``, which runs for the rows of one adapter at a time.

Rows of one adapter stand beside each other in the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from tunesmith.models.products import Product, products_of

if TYPE_CHECKING:
    import torch

Forward = Callable[..., Any]

# Below so many tokens a batch, the adapters' factors lie beside each other and are multiplied with all rows at once:
# that is a few calls instead of a few for every adapter, and what is computed in vain costs less than the calls.
_STACKED_TOKENS = 64
# Stacked factors are copies; of adapters that are larger than this share of their base none are made.
_STACKED_SHARE = 0.1


class NotRowwiseError(Exception):
    """A layer is given something else than the rows of the batch, so nobody can say whose they are."""


class Segment(NamedTuple):
    """Rows beside each other that have one adapter; ``key`` is None for the base's."""

    key: str | None
    start: int
    stop: int


class Routing:
    """Which row of a running batch has which adapter.

    Args:
        keys: PEFT's adapter name for every row, None for the base; rows of one adapter are neighbours.
    """

    def __init__(self, keys: Sequence[str | None]) -> None:
        self._keys = list(keys)
        self._segments: dict[frozenset[str], tuple[Segment, ...]] = {}
        self._masks: dict[int, torch.Tensor] = {}

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self._keys)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in their order."""
        self._keys = [self._keys[row] for row in rows]
        self._segments.clear()
        self._masks.clear()

    def segments(self, held: frozenset[str]) -> tuple[Segment, ...]:
        """The batch in pieces, as a layer sees it that holds these adapters: all others' rows are the base's."""
        if held not in self._segments:
            pieces: list[Segment] = []
            for row, key in enumerate(self._keys):
                key = key if key in held else None
                if pieces and pieces[-1].key == key:
                    pieces[-1] = pieces[-1]._replace(stop=row + 1)
                else:
                    pieces.append(Segment(key, row, row + 1))
            self._segments[held] = tuple(pieces)
        return self._segments[held]

    def others(self, spans: tuple[Segment, ...], device: torch.device) -> torch.Tensor:
        """Which of the stacked ranks are not a row's own: bool (rows, 1, ranks).

        Args:
            spans: the ranks of every adapter in the stack; one object for all layers where they are the same.
            device: where to put it.
        """
        import torch

        found = self._masks.get(id(spans))  # a hash of its own contents at every layer would cost more than the mask
        if found is None:
            mask = torch.ones(self.rows, 1, spans[-1].stop, dtype=torch.bool)
            columns = {span.key: span for span in spans}
            for row, key in enumerate(self._keys):
                if key in columns:
                    mask[row, :, columns[key].start : columns[key].stop] = False
            found = self._masks[id(spans)] = mask.to(device)
        return found


@dataclass(frozen=True)
class _Factors:
    """What one adapter adds to one linear layer.

    Attributes:
        A_IR: (in, r), float32.
        B_RO: (r, out), float32, scaling included.
        gain_O: (out,), float32: DoRA's magnitude over the norm of the updated weight; None without DoRA.
    """

    A_IR: torch.Tensor
    B_RO: torch.Tensor
    gain_O: torch.Tensor | None = None


@dataclass(frozen=True)
class _Stack:
    """Several adapters' factors beside each other."""

    spans: tuple[Segment, ...]
    A_IR: torch.Tensor
    B_RO: torch.Tensor


class RowAdapters:
    """The adapters beside one loaded base, for batches whose rows have different ones.

    Args:
        model: a ``PreTrainedModel`` with PEFT's layers in it, or without any.
        keys: PEFT's names of the adapters on it.

    Attributes:
        in_turn: adapters whose rows cannot run beside others', each with the kind of module that is why.
    """

    def __init__(self, model: Any, keys: Sequence[str]) -> None:
        self._model, self._products = model, products_of(model)
        self.in_turn: dict[str, str] = {}
        self._routed: list[tuple[Any, Callable[[Routing], Forward]]] = []
        self._linears: list[_Linear] = []
        inside: set[int] = set()
        for module in model.modules():
            if id(module) in inside or not (kind := _kind(module)):
                continue
            held = _all_keys(module).intersection(keys)
            nested = [child for child in module.modules() if child is not module]
            inside.update(id(child) for child in nested)
            if not held:
                continue
            if kind == "other" or _wraps_another(module, nested):
                self.in_turn |= dict.fromkeys(held, type(module).__name__)
                continue
            self._take(module, kind, held)
        self._stack()

    def refuse(self, module: str) -> None:
        """Have every adapter run in turn from now on, because of a module that is not given the batch's rows."""
        layers = [*(linear.layer for linear in self._linears), *(layer for layer, _ in self._routed)]
        self.in_turn |= {key: module for layer in layers for key in _all_keys(layer)}

    @contextmanager
    def routed(self, routing: Routing) -> Iterator[None]:
        """Have every layer give each row its own adapter, until the end of the block, also after an exception."""
        before: list[tuple[Any, Forward | None]] = []
        self._products.forget_changed()
        try:
            for module, made in self._forwards(routing):
                before.append((module, module.__dict__.get("forward")))
                module.forward = made
            yield
        finally:
            for module, forward in reversed(before):
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward

    def _forwards(self, routing: Routing) -> Iterator[tuple[Any, Forward]]:
        for linear in self._linears:
            yield linear.layer, functools.partial(linear.forward, routing)
        for module, make in self._routed:
            yield module, make(routing)
        taken = {id(linear.layer.base_layer) for linear in self._linears}
        for module in self._model.modules():
            product = self._products.of(module) if id(module) not in taken else None
            if product is not None:
                yield module, product

    def _take(self, module: Any, kind: str, held: frozenset[str]) -> None:
        if kind == "linear":
            factors = {key: _factors(module, key) for key in held}
            if None not in factors.values():
                product = self._products.of(module.base_layer)
                self._linears.append(
                    _Linear(module, product, {key: one for key, one in factors.items() if one is not None})
                )
                return
        if kind == "tokens":
            self._routed.append((module, lambda routing: functools.partial(_tokens_forward, module, held, routing)))
            return
        self._routed.append((module, lambda routing: functools.partial(_sliced_forward, module, held, routing)))

    def _stack(self) -> None:
        """Put factors beside each other, where that is a small matter and no adapter can spoil another's rows."""
        import torch

        factors = [one for linear in self._linears for one in linear.factors.values()]
        base = sum(parameter.numel() for parameter in self._model.parameters())
        small = sum(one.A_IR.numel() + one.B_RO.numel() for one in factors) <= _STACKED_SHARE * base
        if small and all(bool(torch.isfinite(one.B_RO).all()) for one in factors):
            known: dict[tuple[Segment, ...], tuple[Segment, ...]] = {}
            for linear in self._linears:
                linear.stack(known)


class _Linear:
    """A linear layer and what each adapter adds to it.

    Args:
        layer: PEFT's ``lora.Linear``.
        product: what to use in its base layer's place; None for that itself.
        factors: by adapter.
    """

    def __init__(self, layer: Any, product: Product | None, factors: Mapping[str, _Factors]) -> None:
        self.layer = layer
        self.factors = dict(factors)
        self._held = frozenset(factors)
        self._base = layer.base_layer
        self._product = product or self._base
        self._gains = any(one.gain_O is not None for one in factors.values())
        self._stacked: _Stack | None = None

    def stack(self, known: dict[tuple[Segment, ...], tuple[Segment, ...]]) -> None:
        """Put the factors of several adapters beside each other.

        Args:
            known: the spans of other layers, so that equal ones are one object.
        """
        import torch

        if len(self.factors) < 2:
            return
        spans, stop = [], 0
        for key, one in self.factors.items():
            spans.append(Segment(key, stop, stop := stop + one.A_IR.shape[1]))
        A_RI = torch.cat([one.A_IR.t() for one in self.factors.values()])
        B_RO = torch.cat([one.B_RO for one in self.factors.values()])
        whole = tuple(spans)
        self._stacked = _Stack(known.setdefault(whole, whole), A_RI.t().contiguous(), B_RO)

    def forward(self, routing: Routing, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """The layer's output (rows, tokens, out), in the base's dtype, for x (rows, tokens, in)."""
        result = self._product(x)
        segments = routing.segments(self._held)
        if len(segments) == 1 and segments[0].key is None:
            return result
        alone = len(segments) == 1
        if alone:  # whatever it is given is that one adapter's
            segments = (Segment(segments[0].key, 0, x.shape[0]),)
        elif x.dim() != 3 or x.shape[0] != routing.rows:
            raise NotRowwiseError(type(self.layer).__name__)
        dtype, x = result.dtype, x.float()
        if self._gains:
            result = result.float()
        if alone:
            one = self.factors[segments[0].key or ""]
            result = _with(result, x @ one.A_IR, one.B_RO)
        elif self._stacked and x.shape[0] * x.shape[1] <= _STACKED_TOKENS:
            ranks = x @ self._stacked.A_IR
            # not by multiplying: another adapter's infinity would become a NaN in this row
            ranks.masked_fill_(routing.others(self._stacked.spans, x.device), 0)
            result = _with(result, ranks, self._stacked.B_RO)
        else:
            for key, start, stop in segments:
                if key is not None:
                    one = self.factors[key]
                    result[start:stop] += (x[start:stop] @ one.A_IR) @ one.B_RO
        if self._gains:
            self._apply_gains(result, segments)
        return result.to(dtype)

    def _apply_gains(self, result: torch.Tensor, segments: Sequence[Segment]) -> None:
        bias = self._base.bias
        for key, start, stop in segments:
            gain_O = self.factors[key].gain_O if key is not None else None
            if gain_O is None:
                continue
            rows = result[start:stop]
            if bias is None:
                rows *= gain_O
            else:
                rows.sub_(bias).mul_(gain_O).add_(bias)


def _with(result: torch.Tensor, ranks: torch.Tensor, B_RO: torch.Tensor) -> torch.Tensor:
    """``result + ranks @ B_RO`` over all leading axes, summed in float32 and rounded once; changes ``result``."""
    import torch

    ranks = ranks.reshape(-1, ranks.shape[-1])
    if result.dtype == torch.float32:
        return torch.addmm(result.reshape(-1, result.shape[-1]), ranks, B_RO).view(result.shape)
    return result.add_((ranks @ B_RO).view(result.shape))


def _kind(module: Any) -> str | None:
    """What a module of PEFT's is to us: ``linear``, ``tokens``, ``rowwise`` or ``other``; None for others' modules."""
    from peft.tuners.lora import layer as lora
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, AuxiliaryTrainingWrapper):
        return "tokens" if "token_adapter" in module._modules else "rowwise"
    if not isinstance(module, BaseTunerLayer):
        return None
    if type(module) is lora.Linear:
        return "linear"
    rowwise = [getattr(lora, name, None) for name in ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d")]
    return "rowwise" if isinstance(module, tuple(filter(None, rowwise))) or _is_quantized_linear(module) else "other"


def _is_quantized_linear(module: Any) -> bool:
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt")


def _all_keys(module: Any) -> frozenset[str]:
    """The adapters that a module of PEFT's holds anything of."""
    if "token_adapter" in module._modules:
        return frozenset(module.token_adapter.trainable_tokens_delta)
    names = ("lora_A", "lora_embedding_A", "modules_to_save")  # ParameterDicts are modules too
    return frozenset(key for name in names for key in module._modules.get(name) or ())


def _wraps_another(module: Any, nested: Sequence[Any]) -> bool:
    """Whether a module of PEFT's lies within another, other than the one that it is made of."""
    own = module._modules.get("token_adapter")
    return any(child is not own and _kind(child) for child in nested)


def _factors(layer: Any, key: str) -> _Factors | None:
    """What an adapter adds to a linear layer; None where it is more than two factors and a magnitude."""
    if getattr(layer, "merged", False) or getattr(layer, "lora_bias", {}).get(key):
        return None
    variant = type(getattr(layer, "lora_variant", {}).get(key)).__name__
    if variant not in ("NoneType", "DoraLinearVariant"):
        return None
    A_RI, B_OR = layer.lora_A[key].weight, layer.lora_B[key].weight
    scaling = layer.scaling[key]
    gain_O = None
    if variant == "DoraLinearVariant":
        gain_O = _gain(layer, key, scaling)
    return _Factors(A_RI.detach().float().t().contiguous(), (B_OR.detach().float() * scaling).t().contiguous(), gain_O)


def _gain(layer: Any, key: str, scaling: float) -> torch.Tensor:
    """DoRA's magnitude over the norm of W + s·B·A, row by row, in float32.  Source: arXiv 2402.09353, equation 5."""
    W_OI = layer.base_layer.weight.detach().float()
    if getattr(layer, "fan_in_fan_out", False):
        W_OI = W_OI.t()
    B_OR, A_RI = layer.lora_B[key].weight.detach().float(), layer.lora_A[key].weight.detach().float()
    norm_O = (W_OI + scaling * (B_OR @ A_RI)).norm(dim=1)
    gain_O: torch.Tensor = layer.lora_magnitude_vector[key].weight.detach().float() / norm_O
    return gain_O


def _sliced_forward(module: Any, held: frozenset[str], routing: Routing, x: torch.Tensor, *args: Any, **kw: Any) -> Any:
    """PEFT's own forward, for the rows of one adapter at a time."""
    import torch

    segments = routing.segments(held)
    if len(segments) == 1:  # whatever it is given is that one adapter's
        with _acting(module, segments[0].key):
            return type(module).forward(module, x, *args, **kw)
    # of two dimensions, numbers are gathered tokens, and token ids are rows
    rowwise = x.shape[0] == routing.rows and x.dim() > (2 if x.is_floating_point() else 1)
    if not rowwise or any(isinstance(one, torch.Tensor) for one in (*args, *kw.values())):
        raise NotRowwiseError(type(module).__name__)
    parts = []
    for key, start, stop in segments:
        with _acting(module, key):
            parts.append(type(module).forward(module, x[start:stop], *args, **kw))
    return torch.cat(parts)


@contextmanager
def _acting(module: Any, key: str | None) -> Iterator[None]:
    before = module._active_adapter, module._disable_adapters
    module._active_adapter, module._disable_adapters = [key] if key is not None else before[0], key is None
    try:
        yield
    finally:
        module._active_adapter, module._disable_adapters = before


def _tokens_forward(module: Any, held: frozenset[str], routing: Routing, x: torch.Tensor) -> torch.Tensor:
    """An embedding, or the head that is tied to it, with some tokens' rows replaced; PEFT copies the whole of it."""
    import torch

    layer = module.token_adapter
    result: torch.Tensor = layer.base_layer(x)
    segments = routing.segments(held)
    if len(segments) == 1:
        segments = (Segment(segments[0].key, 0, x.shape[0]),)
    elif x.shape[0] != routing.rows:
        raise NotRowwiseError(type(module).__name__)
    for key, start, stop in segments:
        if key is None:
            continue
        tokens = torch.as_tensor(layer.token_indices[key], device=x.device)
        trained_TC = layer.trainable_tokens_delta[key].detach().to(result.dtype)
        if isinstance(layer.base_layer, torch.nn.Embedding):
            scale = getattr(layer.base_layer, "embed_scale", None)
            trained_TC = trained_TC if scale is None else trained_TC * scale.to(trained_TC.dtype)
            for token, row_C in zip(tokens, trained_TC, strict=True):
                result[start:stop][x[start:stop] == token] = row_C
        else:
            result[start:stop][..., tokens] = x[start:stop] @ trained_TC.t()
    return result

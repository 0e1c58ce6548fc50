"""Adapters on one base: from PEFT's tensors to typed updates on the base's, with nothing left over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tunesmith.adapter.config import listed
from tunesmith.adapter.experts import (
    Piece,
    Stacked,
    orientations,
    registered_order,
    stacked_parameters,
    transposed_by_version,
)
from tunesmith.adapter.heads import HEADED_TASKS
from tunesmith.adapter.keys import Key
from tunesmith.adapter.load import Adapted, Adapter
from tunesmith.adapter.places import Places, is_embedding, is_head, layer_of
from tunesmith.adapter.records import Added, LowRank, Magnitude, Replaced, Rows, Update
from tunesmith.checkpoint import FLOAT_DTYPES, same_values
from tunesmith.errors import AdapterError

# Architectures with Conv1D layers, stored as (in, out), and which of their modules those are.
_CONV1D_MODELS = {"clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"}
_CONV1D_MODULES = {"c_attn", "q_attn", "c_proj", "c_fc"}

_LAYERS = 10_000


@dataclass
class Bound:
    """What one adapter asks of the base, before ties and several adapters are looked at.

    Attributes:
        updates: what becomes of the base's tensors, and of new ones.
        shared: tensors that the adapter stores for the base's own, under a wrapper: by target.
        copies: those of the updates that are trained copies of whole modules (``modules_to_save``), by target.
        misfits: what has no place, or another shape.
        absent: names that the base lacks, by the place of their line in ``misfits``.
        refusals: what cannot be merged truly.
    """

    updates: list[Update] = field(default_factory=list)
    shared: dict[str, Replaced] = field(default_factory=dict)
    copies: dict[str, Replaced] = field(default_factory=dict)
    misfits: list[str] = field(default_factory=list)
    absent: dict[int, str] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)


class Binder:
    """One adapter of a stack, on its way to the base's names.

    Args:
        adapter: the adapter.
        index: its place in the stack.
        weight: what its updates are multiplied by.
        places: the base's names.
    """

    def __init__(self, adapter: Adapter, index: int, weight: float, places: Places) -> None:
        self.adapter, self.index, self.weight, self.places = adapter, index, weight, places
        self.bound = Bound()
        self._model_type = str(places.base.config.get("model_type"))
        self._renumbered = replicated_layers(adapter)

    def bind(self) -> Bound:
        """Place every tensor of the adapter."""
        self._whole_tensors()
        experts: dict[str, list[Adapted]] = {}
        for adapted in self.adapter.adapted:
            name = self._weight_of(adapted)
            if name is None:
                experts.setdefault(adapted.module, []).append(adapted)
            else:
                self._layer(adapted, name)
        for module, pairs in experts.items():
            self._experts(module, pairs)
        self._check_rows_alone()
        return self.bound

    def _check_rows_alone(self) -> None:
        """PEFT trains token rows of a plain embedding only, so what both would mean on one tensor is nowhere said."""
        trained = {update.name for update in self.bound.updates if isinstance(update, Rows)}
        self.bound.refusals += [
            f"{update.lora_A}: an adapter on {update.name} beside trained rows of it"
            for update in self.bound.updates
            if isinstance(update, LowRank) and update.name in trained
        ]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor as the adapter's model has it: its own, where the adapter stores it whole."""
        replaced = self.bound.shared.get(name) or self.bound.copies.get(name)
        if replaced is not None:
            return self.adapter.header.tensors[replaced.tensor].shape
        source = self._source(name)
        return self.places.tensors[source].shape if source in self.places.tensors else None

    def _place(self, name: str) -> str | None:
        """The base's spelling of a name, where the model has such a tensor."""
        source = self._source(name)
        found = self.places.find(source)
        if found is None or source == name:
            return found
        return self._renumber_back(found, name)

    def _source(self, name: str) -> str:
        """The name that a tensor of a replicated layer has in the base."""
        layer = layer_of(name)
        if not self._renumbered or layer is None:
            return name
        start, number, end = layer
        if number >= len(self._renumbered):
            return name
        return f"{start}{self._renumbered[number]}{end}"

    def _renumber_back(self, found: str, name: str) -> str:
        layer, wanted = layer_of(found), layer_of(name)
        return found if layer is None or wanted is None else f"{layer[0]}{wanted[1]}{layer[2]}"

    def _weight_of(self, adapted: Adapted) -> str | None:
        """The tensor that a pair adapts, where it is a layer's own weight."""
        if adapted.parameter not in (None, "weight"):
            return None
        for leaf in ("weight", "in_proj_weight"):
            name = self._place(f"{adapted.module}.{leaf}")
            if name is not None:
                return name
        if is_head(adapted.module) and self.places.embedding and self.places.tied:
            return self.places.head or self.places.written_as(f"{adapted.module}.weight")
        return None

    def _layer(self, adapted: Adapted, name: str) -> None:
        shape = self.shape(name)
        if adapted.stacked != 1:
            self.bound.misfits.append(
                f"{adapted.module}: {adapted.r * adapted.stacked} rows of lora_A, where r is {adapted.r}"
            )
            return
        if shape is None and self.places.embedding:  # a tied head that the files do not hold
            shape = self.shape(self.places.embedding)
        a, b = (self.adapter.header.tensors[tensor].shape for tensor in (adapted.lora_A, adapted.lora_B))
        transposed = None if shape is None else self._orientation(adapted, a, b, shape)
        if transposed is None:
            self.bound.misfits.append(
                f"{adapted.module}: the adapter's shape is A {list(a)} and B {list(b)}, the base's "
                f"{list(shape or ())} ({name})"
            )
            return
        self._check_dtype(name)
        self._check_lookup(adapted)
        self.bound.updates.append(self._low_rank(adapted, name, transposed=transposed))
        if adapted.bias:
            self._lora_bias(adapted)
        if adapted.magnitude:
            self._magnitude(adapted, name, shape, transposed=transposed)

    def _orientation(
        self, adapted: Adapted, a: tuple[int, ...], b: tuple[int, ...], shape: tuple[int, ...]
    ) -> bool | None:
        """Whether the base stores the transpose of B·A; None where the shapes do not fit."""
        if adapted.embedding:
            return True if shape == (a[1], b[0]) else None
        if len(shape) != len(a):
            return None
        if len(shape) > 2:
            return False if shape == (b[0], *a[1:]) and set(b[2:]) == {1} else None
        as_is, turned = shape == (b[0], a[1]), shape == (a[1], b[0])
        conv1d = self._model_type in _CONV1D_MODELS and adapted.module.rpartition(".")[2] in _CONV1D_MODULES
        if as_is and turned:
            return conv1d
        if turned:
            return True if conv1d or self.adapter.config.get("fan_in_fan_out") else None
        return False if as_is and not conv1d else None

    def _low_rank(self, adapted: Adapted, name: str, *, transposed: bool) -> LowRank:
        return LowRank(
            name=name,
            module=adapted.module,
            r=adapted.r,
            scaling=adapted.scaling * self.weight,
            lora_A=adapted.lora_A,
            lora_B=adapted.lora_B,
            adapter=self.index,
            transposed=transposed,
        )

    def _lora_bias(self, adapted: Adapted) -> None:
        name = self._place(f"{adapted.module}.bias")
        if name is None:
            self.bound.refusals.append(
                f"{adapted.bias}: lora_bias on a layer that has no bias in the base, so its model has no place for it"
            )
            return
        if self.shape(name) != self.adapter.header.tensors[adapted.bias or ""].shape:
            self.bound.misfits.append(f"{adapted.bias}: not of the shape of the base's {name}")
            return
        self.bound.updates.append(
            Added(
                name=name,
                module=adapted.module,
                tensor=adapted.bias or "",
                scaling=adapted.scaling * self.weight,
                adapter=self.index,
            )
        )

    def _magnitude(self, adapted: Adapted, name: str, shape: tuple[int, ...] | None, *, transposed: bool) -> None:
        info = self.adapter.header.tensors[adapted.magnitude or ""]
        wanted = (shape or (0,))[1 if transposed else 0]
        if info.elements != wanted or info.dtype not in FLOAT_DTYPES:
            self.bound.misfits.append(
                f"{adapted.magnitude}: {info.dtype} {list(info.shape)}, where {wanted} numbers are expected"
            )
            return
        self.bound.updates.append(
            Magnitude(
                name=name,
                module=adapted.module,
                tensor=adapted.magnitude or "",
                per="column" if transposed else "row",
                adapter=self.index,
            )
        )

    def _check_dtype(self, name: str) -> None:
        source = self._source(name)
        if source in self.places.tensors and self.places.tensors[source].dtype not in FLOAT_DTYPES:
            self.bound.refusals.append(
                f"{name}: the base stores it as {self.places.tensors[source].dtype}, which is a quantized form; "
                "merge into the full-precision model"
            )

    def _check_lookup(self, adapted: Adapted) -> None:
        """PEFT looks an embedding's update up as it is given, whatever the layer itself makes of the index."""
        if not adapted.embedding:
            return
        if adapted.module.endswith("embed_positions"):
            self.bound.refusals.append(f"{adapted.lora_A}: learned positions, whose lookup may have an offset")
        if self.places.base.config.get("is_encoder_decoder"):
            self.bound.refusals.append(
                f"{adapted.lora_A}: an embedding that encoder and decoder share, and that PEFT adapts in one place only"
            )

    def _experts(self, module: str, pairs: Sequence[Adapted]) -> None:
        """Pairs on parameters that are no layer's weight."""
        place = self.places.find_module(module)
        stacks = stacked_parameters(self.places.tensors, place) if place else {}
        parameters = {adapted.parameter or self._by_shape(adapted, stacks): adapted for adapted in pairs}
        fits: dict[str, set[bool]] = {}
        for parameter, adapted in parameters.items():
            stack = stacks.get(parameter) if parameter else None
            a, b = (self.adapter.header.tensors[tensor].shape for tensor in (adapted.lora_A, adapted.lora_B))
            fits[parameter] = orientations(a, b, stack) if stack and adapted.stacked == stack.shape[0] else set()
            if not fits[parameter]:
                self._no_stack(adapted, parameter, stack, a, b)
        known = {next(iter(ways)) for ways in fits.values() if len(ways) == 1}
        for parameter, adapted in parameters.items():
            if fits[parameter]:
                transposed = self._settle(fits[parameter], known)
                if transposed is None:
                    self.bound.refusals.append(
                        f"{adapted.lora_A}: a square matrix that may be adapted either way round, and neither another "
                        "parameter of the module nor peft_version (adapter_config.json) tells which"
                    )
                    continue
                self._stacked(adapted, stacks[parameter], transposed=transposed)

    def _settle(self, ways: set[bool], known: set[bool]) -> bool | None:
        if len(ways) == 1:
            return next(iter(ways))
        if len(known) == 1:  # the other parameter of the same module went through the same PEFT
            return next(iter(known))
        return transposed_by_version(self._model_type, self.adapter.config.get("peft_version"))

    def _by_shape(self, adapted: Adapted, stacks: dict[str, Stacked]) -> str:
        """The one parameter of a module that a pair fits, where the configuration names none."""
        a, b = (self.adapter.header.tensors[tensor].shape for tensor in (adapted.lora_A, adapted.lora_B))
        fitting = [
            name
            for name, stack in stacks.items()
            if adapted.stacked == stack.shape[0] and stack.shape[0] > 1 and orientations(a, b, stack)
        ]
        return min(fitting, key=registered_order) if len(fitting) == 1 else ""

    def _no_stack(
        self, adapted: Adapted, parameter: str, stack: Stacked | None, a: tuple[int, ...], b: tuple[int, ...]
    ) -> None:
        if stack is None:
            name = f"{adapted.module}.{parameter or 'weight'}"
            if name in self.places.ambiguous:
                several = ", ".join(self.places.ambiguous[name])
                self.bound.misfits.append(f"{name}: fits several of the base's tensors: {several}")
            else:
                self._absent(f"{name}: not in the base{_megatron(name)}", name)
        else:
            self.bound.misfits.append(
                f"{adapted.module}.{parameter}: the adapter's shape is A {list(a)} and B {list(b)} with r = {adapted.r}"
                f", the base's {list(stack.shape)}"
            )

    def _absent(self, problem: str, name: str) -> None:
        self.bound.absent[len(self.bound.misfits)] = name
        self.bound.misfits.append(problem)

    def _stacked(self, adapted: Adapted, stack: Stacked, *, transposed: bool) -> None:
        experts, r = stack.shape[0], adapted.r
        for expert, pieces in enumerate(stack.pieces):
            for piece in pieces:
                self._check_dtype(piece.name)
                update = self._low_rank(adapted, piece.name, transposed=transposed)
                self.bound.updates.append(update.model_copy(update=_cut(piece, expert, experts, r, transposed)))

    def _whole_tensors(self) -> None:
        """Tensors that the adapter stores whole: under a wrapper for the base's own, or a trained copy."""
        seen: dict[str, Key] = {}
        for key in self.adapter.whole:
            if key.part == "tokens":
                continue
            trained = key.part == "saved" or (key.part == "plain" and self._is_saved_module(key.module))
            slot = f"{'copy' if trained else 'own'} of {key.target}"
            if slot in seen:
                self._check_same(seen[slot], key)
                continue
            seen[slot] = key
            self._whole(key, trained=trained)
        for key in self.adapter.whole:
            if key.part == "tokens":
                self._tokens(key)

    def _check_same(self, first: Key, second: Key) -> None:
        header = self.adapter.header
        if not same_values(header, first.tensor, header, second.tensor):
            self.bound.refusals.append(f"{first.tensor} and {second.tensor}: two tensors for one place, which differ")

    def _whole(self, key: Key, *, trained: bool) -> None:
        name = self._place(key.target)
        if name is None and is_head(key.module) and self.places.embedding:
            name = self.places.written_as(key.target)
            trained = trained or not self.places.tied
        if name is None and (not trained or self._in_another_form(key.module)):
            self._absent(f"{key.tensor}: {key.target} is not in the base", key.target)
            return
        if name is None and self.adapter.config.get("task_type") not in HEADED_TASKS:
            self.bound.refusals.append(
                f"{key.tensor}: {key.target} is new, and no task_type (adapter_config.json) says which class has it; "
                f"such as {', '.join(HEADED_TASKS)}"
            )
            return
        update = Replaced(
            name=name or self.places.written_as(key.target), module=key.module, tensor=key.tensor, adapter=self.index
        )
        info = self.adapter.header.tensors[key.tensor]
        if info.dtype not in FLOAT_DTYPES:
            self.bound.refusals.append(f"{key.tensor}: stored as {info.dtype}, which cannot be computed with here")
        resizable = is_embedding(key.module) or is_head(key.module)
        before = self.shape(update.name)
        if (
            before is not None
            and before != info.shape
            and not (resizable and before[1:] == info.shape[1:])
            and (not trained or self.adapter.config.get("task_type") in (None, "CAUSAL_LM"))
        ):
            self.bound.misfits.append(
                f"{key.tensor}: the adapter's shape is {list(info.shape)}, the base's {list(before)} ({update.name})"
            )
            return
        if trained:
            self.bound.copies[update.name] = update
            self.bound.updates.append(update)
        else:
            self.bound.shared[update.name] = update

    def _in_another_form(self, module: str) -> bool:
        """Whether the base has a module under other tensors' names: experts, fused in memory and split on disk."""
        return self.places.find_module(module) is not None

    def _is_saved_module(self, module: str) -> bool:
        """Whether ``modules_to_save`` names a module, or one that it is part of."""
        saved = listed(self.adapter.config, "modules_to_save")
        if is_head(module) and self.adapter.config.get("ensure_weight_tying") and self.places.tied:
            module = str(self.places.embedding).removesuffix(".weight")  # the head is saved with what it is tied to
        parts = module.split(".")
        heads = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        return any(head == name or head.endswith(f".{name}") for name in saved for head in heads)

    def _tokens(self, key: Key) -> None:
        name = self._place(f"{key.module}.weight")
        if name is None and is_head(key.module) and self.places.tied:
            name = self.places.written_as(f"{key.module}.weight")
        indices = self._token_indices(key.module)
        info = self.adapter.header.tensors[key.tensor]
        shape = self.shape(name) if name else None
        if name and shape is None and self.places.embedding:
            shape = self.shape(self.places.embedding)
        if name is None or shape is None:
            self.bound.misfits.append(f"{key.tensor}: {key.module}.weight is not in the base")
        elif indices is None:
            self.bound.misfits.append(f"{key.tensor}: trainable_token_indices does not say which rows these are")
        elif info.shape != (len(indices), *shape[1:]) or info.dtype not in FLOAT_DTYPES:
            self.bound.misfits.append(
                f"{key.tensor}: {info.dtype} {list(info.shape)} for {len(indices)} rows of {list(shape)} ({name})"
            )
        elif not all(0 <= index < shape[0] for index in indices) or len(set(indices)) != len(indices):
            self.bound.misfits.append(f"{key.tensor}: trainable_token_indices are not {shape[0]} rows' own, each once")
        else:
            self.bound.updates.append(
                Rows(name=name, module=key.module, tensor=key.tensor, indices=indices, adapter=self.index)
            )

    def _token_indices(self, module: str) -> tuple[int, ...] | None:
        stated = self.adapter.config.get("trainable_token_indices")
        if isinstance(stated, dict):
            hits = [value for name, value in stated.items() if module == name or module.endswith(f".{name}")]
            # A head that is tied follows the embedding's list.
            stated = hits[0] if len(hits) == 1 else next(iter(stated.values())) if len(stated) == 1 else None
        if not isinstance(stated, list) or not all(type(index) is int for index in stated):
            return None
        return tuple(stated)


def _cut(piece: Piece, expert: int, experts: int, r: int, transposed: bool) -> dict[str, object]:
    """Which part of the factors belongs to one piece of one expert."""
    cut: dict[str, object] = {"block": piece.block}
    if experts > 1:
        cut |= {"A_rows": (expert * r, (expert + 1) * r, 1), "B_columns": (expert, r * experts, experts)}
    if piece.rows is not None:
        cut["A_columns" if transposed else "B_rows"] = piece.rows
    return cut


def _megatron(name: str) -> str:
    fused = ("linear_qkv", "linear_fc1", "linear_proj", "dense_h_to_4h")
    return (
        " (a layer of Megatron; convert the adapter to transformers' names first)"
        if any(part in name for part in fused)
        else ""
    )


def replicated_layers(adapter: Adapter) -> list[int]:
    """The base's layer that each layer of the tuned model is; empty where ``layer_replication`` is not used.

    Raises:
        AdapterError: it is no list of ranges, or they hold more layers than any model.
    """
    ranges = adapter.config.get("layer_replication")
    if not ranges:
        return []
    pairs = [pair for pair in ranges if _is_range(pair)] if isinstance(ranges, list) else []
    if not isinstance(ranges, list) or len(pairs) != len(ranges) or sum(end - start for start, end in pairs) > _LAYERS:
        raise AdapterError(
            "layer_replication is no list of layers.",
            where=adapter.path / "adapter_config.json",
            expected=f"ranges such as [[0, 4], [2, 6]], of at most {_LAYERS} layers",
            found=str(ranges)[:100],
        )
    return [layer for start, end in pairs for layer in range(start, end)]


def _is_range(pair: object) -> bool:
    return (
        isinstance(pair, list) and len(pair) == 2 and all(type(one) is int for one in pair) and 0 <= pair[0] < pair[1]
    )

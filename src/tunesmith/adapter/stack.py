"""Adapters that act together on one base, each with a weight; most often just one."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

from tunesmith.adapter.bind import Binder, Bound, replicated_layers
from tunesmith.adapter.heads import HEADED_TASKS, LABELLED_TASKS, label_names, tuned_class
from tunesmith.adapter.load import ADAPTER_CONFIG, Adapter
from tunesmith.adapter.places import Places, layer_of
from tunesmith.adapter.records import (
    Added,
    Binding,
    Copied,
    LowRank,
    Magnitude,
    Replaced,
    Rows,
    Update,
)
from tunesmith.adapter.ties import Ties
from tunesmith.checkpoint import Array, Checkpoint, Float64, Header, TensorInfo, read_rows, stamp_of
from tunesmith.errors import AdapterError, AdapterMismatchError, UnsupportedAdapterError
from tunesmith.record import Finding, Value

WholeTensor = Added | Magnitude | Replaced | Rows

_SHOWN = 8
_CLASSIFIER = re.compile(r"(^|\.)(score|classifier|out_proj|qa_outputs)\.weight$")


class Stack:
    """Adapters that are summed: W' = W + Σ weight·scaling·B·A.

    Args:
        adapters: directories and weights.

    Attributes:
        adapters: the opened adapters.
        weights: the weight of each.

    Raises:
        AdapterError: one of them cannot be read, or a weight is not a finite number.
    """

    def __init__(self, adapters: Sequence[tuple[str | os.PathLike[str], float]]) -> None:
        self.adapters = tuple(Adapter(path) for path, _ in adapters)
        self.weights = tuple(float(weight) for _, weight in adapters)
        for adapter, weight in zip(self.adapters, self.weights, strict=True):
            if not math.isfinite(weight):
                raise AdapterError("An adapter's weight is not a finite number.", where=adapter.path, found=weight)

    def __reduce__(self) -> tuple[Any, ...]:
        """To a worker go the paths, and it opens them once; whether it finds the same there, the binding tells."""
        paths = (str(adapter.path.absolute()) for adapter in self.adapters)
        return _opened, (tuple(zip(paths, self.weights, strict=True)), self._stamps)

    @cached_property
    def _stamps(self) -> str:
        """What changes when an adapter is written anew, for one that is open keeps some of its tensors."""
        files = [path for one in self.adapters for path in (one.path / ADAPTER_CONFIG, one.header.path)]
        return repr([stamp_of(file) for file in files])

    def bind(self, base: Checkpoint, *, base_is_residual: bool = False) -> Binding:
        """What the adapters make of a base.

        Args:
            base: the base model.
            base_is_residual: take the base as what remained of it after an initialisation that subtracts the
                adapter's start (PiSSA and its like).

        Returns:
            Every change, by tensor; every adapter tensor is in exactly one of them.

        Raises:
            UnsupportedAdapterError: something cannot be merged truly; every reason is listed.
            AdapterMismatchError: names or shapes do not fit; all that do not are listed.
        """
        for adapter in self.adapters:
            adapter.require_mergeable(base_is_residual=base_is_residual)
        check_base_form(base)
        places = Places(base)
        bounds = [
            Binder(adapter, index, weight, places).bind()
            for index, (adapter, weight) in enumerate(zip(self.adapters, self.weights, strict=True))
        ]
        self._raise_misfits(bounds, places)
        return _Union(self, places, bounds).binding()

    def factors(self, update: LowRank) -> tuple[Float64, Float64]:
        """The factors of one update as the base stores its tensor: Δ = scaling · B @ A, whatever ``transposed`` says.

        Args:
            update: one of a binding's.

        Returns:
            A of shape (r, columns) and B of shape (rows, r), float64, exact: of W as a matrix (first dimension by all
            the others), or of the one block.

        Raises:
            AdapterError: a factor holds NaN or infinity.
        """
        adapter = self.adapters[update.adapter]
        a = adapter.finite(update.lora_A, update.A_rows, update.A_columns)
        b = adapter.finite(update.lora_B, update.B_rows, update.B_columns)
        return (b.T, a.T) if update.transposed else (a, b)

    def info(self, update: WholeTensor) -> TensorInfo:
        """Shape and dtype of the tensor that an update stores whole."""
        return self.adapters[update.adapter].header.tensors[update.tensor]

    def rows(self, update: WholeTensor, start: int = 0, stop: int | None = None) -> Array:
        """Rows of the tensor that an update stores whole, as stored (BF16 as uint16 patterns)."""
        return read_rows(self.adapters[update.adapter].header, update.tensor, start, stop)

    def _raise_misfits(self, bounds: Sequence[Bound], places: Places) -> None:
        # To look for the nearest name is slow, so that is done for the names that are shown.
        misfits = [
            (problem, bound.absent.get(place)) for bound in bounds for place, problem in enumerate(bound.misfits)
        ]
        if not misfits:
            return
        shown = [problem + (places.nearest(name) if name else "") for problem, name in misfits[:_SHOWN]]
        more = [f"… and {len(misfits) - _SHOWN} more"] if len(misfits) > _SHOWN else []
        count = sum(len(adapter.adapted) + len(adapter.whole) for adapter in self.adapters)
        named = self.adapters[0].base_model
        raise AdapterMismatchError(
            f"The adapter does not fit this base model: {len(misfits)} of {count} have no place.",
            where=", ".join(str(adapter.path) for adapter in self.adapters),
            expected=f"base model {named}" if named else None,
            found=f"base model {places.base.path}",
            details=[*shown, *more],
            next_step="pass --base with the model that was tuned",
        )


class _Union:
    """Several adapters' updates of one base, as one binding."""

    def __init__(self, stack: Stack, places: Places, bounds: Sequence[Bound]) -> None:
        self.stack, self.places = stack, places
        self.updates: list[Update] = [update for bound in bounds for update in bound.updates]
        self.refusals = [reason for bound in bounds for reason in bound.refusals]
        self.findings: list[Finding] = [finding for adapter in stack.adapters for finding in adapter.findings]
        self.config: dict[str, Any] = {}
        self.dropped: list[str] = []
        self.shared = self._shared(bounds)

    def binding(self) -> Binding:
        self._check_alone()
        ties = Ties(self.places, self.stack.adapters, self.refusals.append)
        self.updates = ties.settle(self.updates, self.shared)
        self.config |= ties.config
        self.dropped += ties.dropped
        self.findings += ties.findings
        self._replicate()
        shapes = self._shapes()
        self._check_shapes(shapes)
        self._vocabulary(shapes)
        self._task()
        if self.refusals:
            raise UnsupportedAdapterError(
                "This adapter holds what this version cannot merge truly, so it is refused rather than merged in part.",
                where=", ".join(str(adapter.path) for adapter in self.stack.adapters),
                details=_some(self.refusals),
            )
        return Binding(
            updates=tuple(self.updates),
            shapes=shapes,
            dropped=tuple(self.dropped),
            config=self.config,
            findings=tuple(self.findings),
        )

    def _shared(self, bounds: Sequence[Bound]) -> dict[str, Replaced]:
        """What adapters store of the base's own, where it is not what the base holds anyway."""
        kept: dict[str, Replaced] = {}
        for bound in bounds:
            for name, update in bound.shared.items():
                if self._is_the_base(update):
                    continue
                if self.stack.weights[update.adapter] != 1 and name.endswith(".bias"):
                    self.refusals.append(f"{update.tensor}: a trained bias replaces the base's, and cannot be weighted")
                if name in kept:
                    self.refusals.append(
                        f"{update.tensor}: two adapters hold the base's own {name}, and differ from it"
                    )
                kept[name] = update
        return kept

    def _is_the_base(self, update: Replaced) -> bool:
        name = update.name if update.name in self.places.tensors else self.places.embedding
        return name is not None and self.places.same_as(name, self._header(update), update.tensor)

    def _header(self, update: Replaced) -> Header:
        return self.stack.adapters[update.adapter].header

    def _check_alone(self) -> None:
        """Only what is added can be summed with weights; whatever is stored whole must be alone on its tensor."""
        touching: dict[str, set[int]] = {}
        for update in self.updates:
            if not isinstance(update, Copied):
                touching.setdefault(update.name, set()).add(update.adapter)
        for update in self.updates:
            if isinstance(update, Replaced | Rows | Magnitude) and (
                len(touching[update.name]) > 1 or self.stack.weights[update.adapter] != 1
            ):
                self.refusals.append(
                    f"{update.tensor}: replaces or rescales {update.name}, which cannot be weighted or summed with "
                    "another adapter's update"
                )

    def _replicate(self) -> None:
        """Write the layers that ``layer_replication`` repeats, each a tensor of its own."""
        layouts = {tuple(replicated_layers(adapter)) for adapter in self.stack.adapters}
        if layouts == {()}:
            return
        if len(layouts) > 1:
            self.refusals.append("layer_replication differs between the adapters")
            return
        layers = list(layouts.pop())
        count = self.places.setting("num_hidden_layers")
        if not isinstance(count, int) or not all(0 <= layer < count for layer in layers):
            self.refusals.append(f"layer_replication: the base has {count} layers")
            return
        copies: list[Update] = []
        for name in self.places.tensors:
            parts = layer_of(name)
            if parts is None or "vision" in name or "visual" in name:
                continue
            before, number, after = parts
            copies += [
                Copied(name=f"{before}{place}{after}", source=name)
                for place, layer in enumerate(layers)
                if layer == number and place != number
            ]
            if number >= len(layers):
                self.dropped.append(name)
        self.updates = copies + self.updates
        section = self.places.section()
        self.config[f"{section}num_hidden_layers"] = len(layers)
        types = self.places.setting("layer_types")
        if isinstance(types, list) and len(types) == count:
            self.config[f"{section}layer_types"] = tuple(types[layer] for layer in layers)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for update in self.updates:
            before = self.places.tensors.get(update.name)
            after = before.shape if before else None
            if isinstance(update, Replaced):
                after = self.stack.info(update).shape
            elif isinstance(update, Copied):
                after = self.places.tensors[update.source].shape
            if after is not None and (before is None or before.shape != after):
                shapes[update.name] = after
        return shapes

    def _check_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """One adapter's tensor may have another shape than the one that the others were bound to."""
        for update in self.updates:
            shape = shapes.get(update.name)
            if shape is None or isinstance(update, Copied | Replaced):
                continue
            if isinstance(update, LowRank):
                infos = self.stack.adapters[update.adapter].header.tensors
                rows, columns = infos[update.lora_B].shape[0], infos[update.lora_A].shape[1]
                fits = shape[:2] == ((columns, rows) if update.transposed else (rows, columns))
            elif isinstance(update, Rows):
                fits = max(update.indices, default=0) < shape[0]
            else:
                fits = self.stack.info(update).elements in shape
            if not fits:
                self.refusals.append(f"{update.module}: fits the base's {update.name}, not the adapters' {list(shape)}")

    def _vocabulary(self, shapes: dict[str, tuple[int, ...]]) -> None:
        sizes = {name: shape[0] for name, shape in shapes.items() if self.places.is_vocabulary(name)}
        if not sizes or self.places.embedding is None:
            return
        others = {self.places.embedding, self.places.head} - sizes.keys() - set(self.dropped) - {None}
        rows = set(sizes.values()) | {self.places.tensors[str(name)].shape[0] for name in others}
        if len(rows) > 1:
            self.refusals.append(
                f"the vocabulary would have {' and '.join(map(str, sorted(rows)))} rows at once: "
                f"{', '.join([*sizes, *map(str, others)])}"
            )
            return
        size, before = rows.pop(), self.places.tensors[str(self.places.embedding)].shape[0]
        if size != before:
            self.config[f"{self.places.section()}vocab_size"] = size
            self.findings.append(
                Finding(code="vocabulary_resized", severity="info", params={"before": before, "after": size})
            )

    def _task(self) -> None:
        """A head that the base lacks: the tuned model is of another class."""
        task = next(
            (task for adapter in self.stack.adapters if (task := adapter.config.get("task_type")) in HEADED_TASKS), None
        )
        if task is None:
            return
        config = self.places.base.config
        before = self.places.architecture
        if task == "QUESTION_ANS" and str(self.places.embedding).startswith("model."):
            self.refusals.append(
                f"task_type = 'QUESTION_ANS': {tuned_class(before, config.get('model_type'), task)} looks for its "
                "tower under another name than the base's files have"
            )
        after = tuned_class(before, config.get("model_type"), task)
        if before and after != before:
            self.config["architectures"] = (after,)
            params: dict[str, Value] = {"before": before, "after": after}
            self.findings.append(Finding(code="architecture_changed", severity="info", params=params))
            if self.places.head and self.places.head not in {update.name for update in self.updates}:
                self.dropped.append(self.places.head)
        heads = [update for update in self.updates if isinstance(update, Replaced) and _CLASSIFIER.search(update.name)]
        if task in LABELLED_TASKS and heads:
            self.config |= label_names(self.stack.info(heads[0]).shape[0], config.get("id2label"))


def check_base_form(base: Checkpoint) -> None:
    """Refuse a base whose weights are quantized.

    Raises:
        UnsupportedAdapterError: ``config.json`` says that it is.
    """
    if base.config.get("quantization_config"):
        raise UnsupportedAdapterError(
            "The base model is quantized; a merge into it would round every weight again.",
            where=base.path / "config.json",
            expected="the full-precision model that it was made from",
            found="quantization_config",
            next_step="pass --base with the full-precision model; for an adapter that was trained on a 4-bit base, "
            "add --base-view nf4",
        )


def _some(problems: Sequence[str]) -> list[str]:
    more = len(problems) - _SHOWN
    return [*problems[:_SHOWN], *([f"… and {more} more"] if more > 0 else [])]


@lru_cache(maxsize=4)
def _opened(adapters: tuple[tuple[str, float], ...], stamps: str) -> Stack:  # noqa: ARG001 - a key of the cache
    return Stack(adapters)

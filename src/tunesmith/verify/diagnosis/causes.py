"""Why a merged model differs: from the findings, from the tallies, and by asking "what if" of what is wrong.

What was left out shows in the tallies.  Of the rest, the first tensor that nothing has explained yet is asked what may
have become of it (:mod:`tunesmith.verify.diagnosis.hypotheses`).  The answer is tried on the others and takes those
that it explains; and so on, so that causes that came together are told apart.  A few tensors are asked, and of very
many only some are tried, so that the price does not grow with the model.  Where nothing explains a tensor: is it one
number, one tensor, the update, or the base?
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tunesmith.adapter import Copied, Rows, Update
from tunesmith.checkpoint import FLOAT_DTYPES, Checkpoint
from tunesmith.record import Finding
from tunesmith.verify.diagnosis.hypotheses import ASKED_TENSORS, Evidence, Hypothesis, Questions, cause, spread
from tunesmith.verify.records import TensorVerdict
from tunesmith.verify.structure import embeddings_of, is_copy, is_head, unties
from tunesmith.verify.weights import FEW_ELEMENTS, Expectation, strays

_TRIED_TENSORS = 64  # of those that are left, an answer is tried on
_LIKE_GAIN = 0.15
_MOST_CAUSES = 8

# What the findings of the other levels mean as a cause; the weights' causes take more asking.
_CAUSE_OF = {
    "structure_broken": "cause_unreadable",
    "weights_pickled": "cause_pickled",
    "weights_gguf": "cause_gguf",
    "weights_quantized": "cause_quantized",
    "quantization_unknown": "cause_quantization_unknown",
    "quantized_misfit": "cause_quantized_misfit",
    "quantized_unstated": "cause_quantized_unstated",
    "quantized_left_plain": "cause_quantized_left_plain",
    "quantized_other_checkpoint": "cause_other_checkpoint",
    "quantized_viewed_start": "cause_base_dequantized",
    "quantized_stored_start": "cause_base_not_dequantized",
    "experts_transposed": "cause_experts_layout",
    "experts_apart": "cause_experts_layout",
    "vocabulary_padded": "cause_vocabulary_padded",
    "vocabulary_short": "cause_vocabulary_short",
    "tied_head_differs": "cause_head_differs",
    "adapter_beside_weights": "cause_adapter_beside",
    "tensors_missing": "cause_tensors_missing",
    "tensors_extra": "cause_tensors_extra",
    "tied_head_missing": "cause_tied_head",
    "head_declared_tied": "cause_tied_head",
    "shape_differs": "cause_shape",
    "dtype_unknown": "cause_structure",
    "base_changed": "cause_base_changed",
    "tokenizer_differs": "cause_tokenizer",
    "tokenizer_missing_in_merged": "cause_tokenizer",
    "chat_template_differs": "cause_chat_template",
    "chat_template_missing": "cause_chat_template",
    "config_differs": "cause_config",
    "config_unreadable": "cause_config_unreadable",
    "quantization_declared": "cause_quantization_declared",
    "generation_config_differs": "cause_generation_config",
    "generation_config_missing": "cause_generation_config",
    "behaviour_far": "cause_behaviour",
    "behaviour_read_otherwise": "cause_behaviour",
    "behaviour_unloadable": "cause_behaviour",
    "behaviour_prompt_ids_differ": "cause_behaviour",
}


def diagnose_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Causes that the findings of the structure, assets and behaviour levels name by themselves, each once."""
    causes: dict[str, Finding] = {}
    for finding in findings:
        code = _CAUSE_OF.get(finding.code)
        if finding.severity == "error" and code is not None:
            causes.setdefault(code, Finding(code=code, severity="error", params=finding.params))
    if "cause_config_unreadable" in causes:  # then the directory could not be opened for that reason
        causes.pop("cause_unreadable", None)
    return list(causes.values())


def diagnose_weights(
    tensors: Sequence[TensorVerdict],
    merged: Checkpoint,
    expectation: Expectation,
    others: Mapping[str, Expectation],
    bases: Mapping[str, Expectation] | None = None,
) -> list[Finding]:
    """The likeliest causes of weights that are not base + adapter.

    Args:
        tensors: every tensor's verdict.
        merged: the merged model.
        expectation: what it should hold.
        others: what it would hold with the run's other adapters, by name.
        bases: what it would hold on other bases that are at hand, by name.

    Returns:
        What was left out first, then what became of the others; empty where nothing is outside.
    """
    bad = [tensor for tensor in tensors if tensor.outside]
    touched = [tensor for tensor in tensors if tensor.module is not None]
    of_head = _of_tied_head(bad, merged, expectation)
    causes = [cause("cause_tied_head")] if of_head else []
    endless = {tensor.name: tensor.not_finite for tensor in bad if tensor.not_finite}
    if endless:
        causes.append(_counted("cause_not_finite", endless))
        bad = [tensor for tensor in bad if tensor.outside > tensor.not_finite]
    bad = [tensor for tensor in bad if tensor.name not in of_head]
    if bad and touched and all(tensor.unchanged == tensor.elements for tensor in touched):
        causes, bad = [cause("cause_not_applied"), *causes], [tensor for tensor in bad if tensor.module is None]
    else:
        absent = [tensor for tensor in bad if tensor.module is not None and tensor.unchanged == tensor.elements]
        rows = [tensor for tensor in absent if _is_of_rows(expectation.updates[tensor.name])]
        rest = [tensor for tensor in absent if tensor not in rows]
        causes = [*([_left_out(rest, touched)] if rest else []), *([_rows_missing(rows)] if rows else []), *causes]
        bad = [tensor for tensor in bad if tensor not in absent]
    # What is there no arithmetic for is its own cause.
    opaque = [tensor for tensor in bad if merged.info(tensor.name).dtype not in FLOAT_DTYPES]
    bad = [tensor for tensor in bad if tensor not in opaque]
    if bad:
        causes += _Inquiry(merged, expectation, Questions(expectation, others, bases or {})).causes(bad, tensors)
    elif opaque:
        causes.append(_few_elements({tensor.name: tensor.outside for tensor in opaque}))
    elif not causes and (few := strays(tensors)):
        causes.append(_few_elements(few))
    return causes


def _of_tied_head(bad: Sequence[TensorVerdict], merged: Checkpoint, expectation: Expectation) -> set[str]:
    """The bad tensors that are so because a head that the adapters untie was written as one with its embedding."""
    heads = [name for name in expectation.updates if is_head(name)] if unties(expectation.binding) else []
    names = {tensor.name: tensor for tensor in bad}
    found = set()

    def evidence(name: str) -> Evidence:
        return Evidence.of(names[name], merged, expectation)

    for head in heads:
        updates = expectation.updates[head]
        bare = [update for update in updates if isinstance(update, Copied)]
        own = [update for update in updates if not isinstance(update, Copied)]
        for embedding in embeddings_of(expectation.base):
            if head in names and (
                (embedding in merged.tensors and is_copy(merged, head, embedding))
                or (bare and evidence(head).explained_by(expectation.tensor(head, bare)))
            ):
                found.add(head)
            # What was meant for the head alone went into the one tensor that both are.
            both = [*expectation.updates.get(embedding, ()), *own]
            if embedding in names and evidence(embedding).explained_by(expectation.tensor(embedding, both)):
                found.add(embedding)
    return found


def _is_of_rows(updates: Sequence[Update]) -> bool:
    return all(isinstance(update, Rows) for update in updates)


def _rows_missing(tensors: Sequence[TensorVerdict]) -> Finding:
    return cause("cause_rows_missing", tensor=tensors[0].name, count=len(tensors))


def _left_out(absent: Sequence[TensorVerdict], touched: Sequence[TensorVerdict]) -> Finding:
    names = _by_layer([str(tensor.module) for tensor in absent], [str(tensor.module) for tensor in touched])
    modules = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    return cause("cause_partly_applied", modules=modules, count=len(absent), total=len(touched))


def _by_layer(modules: Sequence[str], every: Sequence[str]) -> list[str]:
    """Module names, those of a wholly listed layer as one (``model.layers.3.*``)."""

    def layer(module: str) -> str:
        parts = module.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        return module if place is None else ".".join(parts[: place + 1]) + ".*"

    listed = set(modules)
    partial = {layer(module) for module in every if module not in listed}
    return list(dict.fromkeys(module if layer(module) in partial else layer(module) for module in modules))


def _few_elements(counts: dict[str, int]) -> Finding:
    return _counted("cause_one_element", counts)


def _counted(code: str, counts: dict[str, int]) -> Finding:
    """A cause with the number of its elements, and the tensor that has the most of them."""
    return cause(code, tensor=max(counts, key=lambda name: counts[name]), count=sum(counts.values()))


class _Inquiry:
    """Cause after cause, until nothing is left or nothing answers."""

    def __init__(self, merged: Checkpoint, expectation: Expectation, questions: Questions) -> None:
        self._merged, self._expectation, self._questions = merged, expectation, questions
        self._pieces: dict[str, Evidence] = {}

    def causes(self, bad: Sequence[TensorVerdict], tensors: Sequence[TensorVerdict]) -> list[Finding]:
        """The causes of bad tensors, those of adapted ones first."""
        left = sorted(bad, key=lambda tensor: tensor.module is None)
        seeds = self._seeds(left)
        found: list[Finding] = []
        while seeds and len(found) < _MOST_CAUSES:
            seed, *seeds = seeds
            hypothesis = self._answer(seed, left)
            mine = self._explained(hypothesis, seed, left) if hypothesis is not None else []
            finding = hypothesis.cause(mine) if hypothesis is not None else None
            if finding is None:
                continue
            found.append(finding)
            left = [tensor for tensor in left if tensor not in mine]
            seeds = [tensor for tensor in seeds if tensor in left] or self._seeds(left)
        return [*found, *([self._unexplained(left, tensors)] if left else [])]

    def _seeds(self, left: Sequence[TensorVerdict]) -> list[TensorVerdict]:
        """Those to ask; untouched tensors say nothing about the update, so both kinds are heard."""
        return [tensor for kind in _kinds(left) for tensor in spread(kind, ASKED_TENSORS)]

    def _evidence(self, tensor: TensorVerdict) -> Evidence:
        if tensor.name not in self._pieces:
            self._pieces[tensor.name] = Evidence.of(tensor, self._merged, self._expectation)
        return self._pieces[tensor.name]

    def _answer(self, seed: TensorVerdict, left: Sequence[TensorVerdict]) -> Hypothesis | None:
        alike, piece = [tensor for tensor in left if _like_gain(tensor, seed)], self._evidence(seed)
        pieces = [self._evidence(tensor) for tensor in spread(alike, ASKED_TENSORS)]
        base_is_right = all(tensor.outside <= FEW_ELEMENTS for tensor in left if tensor.module is None)
        asked = self._questions.ask(piece, pieces, base_is_right=base_is_right)
        return next((one for one in asked if one.explains(piece) and one.cause(alike) is not None), None)

    def _explained(
        self, hypothesis: Hypothesis, seed: TensorVerdict, left: Sequence[TensorVerdict]
    ) -> list[TensorVerdict]:
        """All that are left and that the hypothesis explains; of very many, some speak for the others."""

        def fits(tensor: TensorVerdict) -> bool:
            return tensor is seed or hypothesis.explains(self._evidence(tensor))

        alike = [tensor for tensor in left if _like_gain(tensor, seed)]
        tried = spread(alike, _TRIED_TENSORS)
        explained = {tensor.name for tensor in tried if fits(tensor)}
        if len(explained) == len(tried):
            explained |= {tensor.name for tensor in alike}
        others = [tensor for tensor in left if tensor.name not in explained]
        return [tensor for tensor in left if tensor.name in explained or (tensor in others and fits(tensor))]

    def _unexplained(self, left: Sequence[TensorVerdict], tensors: Sequence[TensorVerdict]) -> Finding:
        outside = {tensor.name: tensor.outside for tensor in left}
        if sum(outside.values()) <= FEW_ELEMENTS:
            return _few_elements(outside)
        touched = [tensor for tensor in tensors if tensor.module is not None]
        bad_touched, untouched = _kinds(left)
        if len(bad_touched) == len(touched) > 1:
            if untouched:
                return cause("cause_other_base", count=len(untouched), worst=untouched[0].name)
            return cause("cause_other_adapter", count=len(touched))
        if not bad_touched and 2 * len(untouched) > len(tensors) - len(touched) and len(untouched) > 1:
            return cause("cause_other_base", count=len(untouched), worst=untouched[0].name)
        worst = max(left, key=lambda tensor: tensor.outside / tensor.elements)
        return cause("cause_tensors_outside", count=len(left), total=len(tensors), worst=worst.name)


def _kinds(left: Sequence[TensorVerdict]) -> list[list[TensorVerdict]]:
    """Tensors that an adapter touches, and those that none does."""
    return [[tensor for tensor in left if (tensor.module is None) is untouched] for untouched in (False, True)]


def _like_gain(tensor: TensorVerdict, other: TensorVerdict) -> bool:
    """Whether as much of two tensors' updates is there, as far as can be told from their gains."""
    if tensor.gain is None or other.gain is None:
        return tensor.gain is other.gain
    return abs(tensor.gain - other.gain) <= _LIKE_GAIN * max(abs(tensor.gain), abs(other.gain))

"""Level 3, every kind of update: hand-made bindings, and merges that an independent hand has written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.verify.making import (
    BIAS,
    CONV,
    DTYPES,
    EMBEDDING,
    EXPERT_COUNT,
    EXPERTS,
    GATE,
    HEAD,
    KINDS,
    LINEAR,
    NORM,
    SCALING,
    SCORE,
    TURNED,
    Bench,
    Tensors,
    nudge,
    round_once,
)
from tunesmith.checkpoint import Checkpoint
from tunesmith.report import finding_text
from tunesmith.verify.diagnosis.causes import diagnose_weights

PATTERNS = {"bf16": torch.int16, "fp16": torch.int16}


@pytest.mark.parametrize("dtype", PATTERNS)
def test_the_writers_own_rounding_is_to_the_nearest(dtype: str) -> None:
    """Against all values of the dtype, sorted; the writer must not share a mistake with what it tests."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(DTYPES[dtype]).double()
    line = every[every.isfinite()].unique()
    exact = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    gaps = (exact[:, None] - line[None, :]).abs()
    assert (round_once(exact, DTYPES[dtype]).double() == line[gaps.argmin(1)]).all()
    middle = (line[20000:20400] + line[20001:20401]) / 2
    assert (round_once(middle, DTYPES[dtype]).view(torch.int16) % 2 == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_merge_of_every_kind_is_exact_in_every_element(kind: str, dtype: str, tmp_path: Path) -> None:
    """Whatever becomes of a tensor, rounded once it is recognized; and every tensor is looked at."""
    bench = Bench(tmp_path, KINDS[kind](), DTYPES[dtype])
    verdicts = bench.verdicts(bench.merge())
    assert {verdict.name for verdict in verdicts} == {*bench.exact, *bench.whole}
    assert [verdict for verdict in verdicts if verdict.exact != verdict.elements] == []
    touched = {update.name for update in bench.binding.updates}
    assert {verdict.name for verdict in verdicts if verdict.module is not None} == touched


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_that_is_stored_in_fewer_bits_is_exact(kind: str, dtype: str, tmp_path: Path) -> None:
    """A float32 base, written in bf16 or fp16: the nearest value there, of tensors that are only copied too."""
    bench = Bench(tmp_path, KINDS[kind](), torch.float32)
    verdicts = bench.verdicts(bench.merge(dtype=DTYPES[dtype]))
    assert [verdict for verdict in verdicts if verdict.exact != verdict.elements] == []


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["dora", "dora-conv1d", "dora-convolution", "dora-embedding", "bias", "experts"])
def test_a_merge_of_a_base_that_was_cast_first_is_rounded_twice_and_no_worse(
    kind: str, dtype: str, tmp_path: Path
) -> None:
    """What PEFT does with a float32 base that is loaded in bf16 or fp16; DoRA's norms are those of the cast base."""
    bench = Bench(tmp_path, KINDS[kind](), torch.float32)
    cast = {name: tensor.to(DTYPES[dtype]).double() for name, tensor in bench.base.items()}
    computed = {name: round_once(exact, DTYPES[dtype]) for name, exact in bench.kind.exact(cast).items()}
    verdicts = bench.verdicts(bench.merge(lambda tensors: tensors.update(computed), dtype=DTYPES[dtype]))
    assert sum(verdict.outside + verdict.faithful for verdict in verdicts) == 0
    assert sum(verdict.twice_rounded for verdict in verdicts) > 20


def test_adapters_that_were_merged_one_after_another_are_rounded_twice_and_no_worse(tmp_path: Path) -> None:
    """Each merge rounds to the dtype; in either order.  One step beyond that is outside."""
    bench = Bench(tmp_path, KINDS["two-adapters"](), torch.bfloat16)
    first, second = (_alone(bench, number) for number in (0, 1))
    start = bench.base[LINEAR].double()
    for one, other in ((first, second), (second, first)):
        value = round_once(round_once(start + one, torch.bfloat16).double() + other, torch.bfloat16)
        verdicts = bench.verdicts(bench.merge(lambda tensors, value=value: tensors.update({LINEAR: value})))
        assert sum(verdict.outside + verdict.faithful for verdict in verdicts) == 0
        assert sum(verdict.twice_rounded for verdict in verdicts) > 100
        index = int((value.double() - bench.exact[LINEAR]).abs().view(-1).argmax())
        away = 1 if value.double().view(-1)[index].abs() > bench.exact[LINEAR].view(-1)[index].abs() else -1

        def spoil(tensors: Tensors, value: torch.Tensor = value, index: int = index, away: int = away) -> None:
            tensors[LINEAR] = value.clone()
            nudge(LINEAR, index, away)(tensors)

        assert bench.outside(spoil) == {LINEAR: 1}


def _alone(bench: Bench, adapter: int) -> torch.Tensor:
    """One of two adapters' updates of the linear layer."""
    tensors = bench.kind.tensors[adapter]
    update = bench.kind.updates[adapter]
    return update.scaling * tensors[update.lora_B].double() @ tensors[update.lora_A].double()


def _without_magnitude(bench: Bench, name: str) -> Callable[[Tensors], None]:
    factors = bench.kind.tensors[0]
    a, b = (next(factor.double() for key, factor in factors.items() if f"lora_{side}" in key) for side in "AB")
    delta = SCALING * b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1)
    start = bench.base[name].double()
    delta = delta.T if name in (TURNED, EMBEDDING) else delta.reshape(start.shape)
    return lambda tensors: tensors.update({name: round_once(start + delta, bench.dtype)})


def _wrong_axis(bench: Bench) -> Callable[[Tensors], None]:
    # The norms of the columns where those of the rows are meant; there are more rows than columns.
    factors = bench.kind.tensors[0]
    a, b, m = (
        factors[f"base_model.model.lin.lora_{part}"].double() for part in ("A.weight", "B.weight", "magnitude_vector")
    )
    v = bench.base[LINEAR].double() + SCALING * b @ a
    wrong = v * (m[:40] / v.norm(dim=0))
    return lambda tensors: tensors.update({LINEAR: round_once(wrong, bench.dtype)})


def _interleaved_wrongly(bench: Bench) -> Callable[[Tensors], None]:
    factors = bench.kind.tensors[0]
    a, b = (factors[f"base_model.model.experts.lora_{side}.weight"].double() for side in "AB")
    r = a.shape[0] // EXPERT_COUNT
    parts = [b[:, e * r : (e + 1) * r] @ a[e * r : (e + 1) * r] for e in range(EXPERT_COUNT)]
    wrong = bench.base[EXPERTS].double() + SCALING * torch.stack(parts)
    return lambda tensors: tensors.update({EXPERTS: round_once(wrong, bench.dtype)})


def _gate_up_swapped(bench: Bench) -> Callable[[Tensors], None]:
    start = bench.base[EXPERTS].double()
    delta = bench.exact[EXPERTS] - start
    wrong = start + torch.cat([delta[:, GATE:], delta[:, :GATE]], dim=1)
    return lambda tensors: tensors.update({EXPERTS: round_once(wrong, bench.dtype)})


def _rows_elsewhere(bench: Bench) -> Callable[[Tensors], None]:
    rows = next(iter(bench.kind.tensors[0].values()))

    def change(tensors: Tensors) -> None:
        tensors[EMBEDDING] = bench.base[EMBEDDING].clone()
        tensors[EMBEDDING][[298, 1, 8]] = rows.to(bench.dtype)

    return change


def _base_of(name: str) -> Callable[[Bench], Callable[[Tensors], None]]:
    return lambda bench: lambda tensors: tensors.update({name: bench.base[name].clone()})


def _not_untied(bench: Bench) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({HEAD: bench.base[EMBEDDING].clone()})


def _scaled_otherwise(bench: Bench) -> Callable[[Tensors], None]:
    start = bench.base[LINEAR].double()
    return lambda tensors: tensors.update({LINEAR: round_once(start + (bench.exact[LINEAR] - start) / 2, bench.dtype)})


MUTANTS: dict[str, tuple[str, str, Callable[[Bench], Callable[[Tensors], None]]]] = {
    "magnitude-ignored": ("dora", LINEAR, lambda bench: _without_magnitude(bench, LINEAR)),
    "magnitude-ignored-conv1d": ("dora-conv1d", TURNED, lambda bench: _without_magnitude(bench, TURNED)),
    "magnitude-ignored-convolution": ("dora-convolution", CONV, lambda bench: _without_magnitude(bench, CONV)),
    "magnitude-ignored-embedding": ("dora-embedding", EMBEDDING, lambda bench: _without_magnitude(bench, EMBEDDING)),
    "norm-of-the-wrong-axis": ("dora", LINEAR, _wrong_axis),
    "experts-interleaved-wrongly": ("experts", EXPERTS, _interleaved_wrongly),
    "gate-and-up-swapped": ("experts", EXPERTS, _gate_up_swapped),
    "experts-left-out": ("experts", EXPERTS, _base_of(EXPERTS)),
    "rows-at-wrong-indices": ("token-rows", EMBEDDING, _rows_elsewhere),
    "rows-left-out": ("token-rows", EMBEDDING, _base_of(EMBEDDING)),
    "head-not-untied": ("untied", HEAD, _not_untied),
    "scaling-without-rslora": ("plain", LINEAR, _scaled_otherwise),
    "lora-bias-forgotten": ("bias", BIAS, _base_of(BIAS)),
    "saved-module-left-out": ("saved", NORM, _base_of(NORM)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_merge_that_misread_its_adapter_is_outside(mutant: str, dtype: str, tmp_path: Path) -> None:
    """Every mistake shows, in the tensor that it was made in and in no other."""
    kind, name, spoil = MUTANTS[mutant]
    bench = Bench(tmp_path, KINDS[kind](), DTYPES[dtype])
    outside = bench.outside(spoil(bench))
    assert set(outside) == {name}
    assert outside[name] >= bench.exact[name].numel() / 100


def largest(bench: Bench, name: str) -> int:
    """The largest of the last numbers of a tensor, beside which the rounding of its update is least."""
    values = bench.exact[name].abs().reshape(-1)
    last = len(values) * 3 // 4
    return last + int(values[last:].argmax())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("steps", [2, -2])
@pytest.mark.parametrize("kind", KINDS)
def test_one_element_two_steps_from_the_nearest_value_is_outside(
    kind: str, steps: int, dtype: str, tmp_path: Path
) -> None:
    """In every tensor, touched or not, and in the last tile of those that have several."""
    bench = Bench(tmp_path, KINDS[kind](), DTYPES[dtype])
    for name in (update.name for update in bench.binding.updates):
        index = largest(bench, name)
        assert bench.outside(nudge(name, index, steps)) == {name: 1}
    untouched = next(name for name in (CONV, TURNED) if name not in bench.binding.by_name)
    assert bench.outside(nudge(untouched, 3, 1)) == {untouched: 1}


@pytest.mark.parametrize("kind", ["plain", "saved", "token-rows", "untied", "bias", "experts"])
def test_one_float32_element_two_steps_from_the_nearest_value_is_outside(kind: str, tmp_path: Path) -> None:
    """Float32 sums of few terms leave no room for it; a trained magnitude's norm does, and is said to."""
    bench = Bench(tmp_path, KINDS[kind](), torch.float32)
    name = bench.binding.updates[0].name
    assert bench.outside(nudge(name, largest(bench, name), 2)) == {name: 1}


@pytest.mark.parametrize("name", ["positions", "mask"])
def test_a_tensor_that_no_arithmetic_is_for_is_held_to_its_bytes(name: str, tmp_path: Path) -> None:
    """One changed integer is one element outside; none is exact and unchanged."""
    bench = Bench(tmp_path, KINDS["plain"](), torch.bfloat16)

    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[11] += 1

    assert bench.outside(change) == {name: 1}


def test_a_copied_value_that_is_only_stored_anew_has_no_second_neighbour(tmp_path: Path) -> None:
    """Norms that were cut off to bf16 instead of rounded are outside; where something is added, they are not."""
    bench = Bench(tmp_path, KINDS["plain"](), torch.float32)

    def truncate(name: str) -> Callable[[Tensors], None]:
        cut = (bench.exact[name].float().view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()
        return lambda tensors: tensors.update({name: cut})

    untouched = bench.verdicts(bench.merge(truncate(NORM), dtype=torch.bfloat16))
    assert {verdict.name for verdict in untouched if verdict.outside} == {NORM}
    adapted = bench.verdicts(bench.merge(truncate(LINEAR), dtype=torch.bfloat16))
    assert {verdict.name for verdict in adapted if verdict.faithful} == {LINEAR}
    assert not any(verdict.outside for verdict in adapted)


def test_unchanged_means_equal_to_the_bases_own_tensor_whatever_it_begins_as(tmp_path: Path) -> None:
    """New tensors and resized ones have none; of an embedding with three new rows, the others are unchanged."""
    for kind, name, unchanged in (("saved", SCORE, 0), ("resized", EMBEDDING, 0), ("token-rows", EMBEDDING, 297 * 256)):
        bench = Bench(tmp_path / kind, KINDS[kind](), torch.bfloat16)
        verdict = next(verdict for verdict in bench.verdicts(bench.merge()) if verdict.name == name)
        assert verdict.unchanged == pytest.approx(unchanged, abs=20)


def test_a_tensor_that_the_tuned_model_does_not_have_is_not_compared(tmp_path: Path) -> None:
    """Where it is there all the same, the structure level says so; the base's is not what it should be."""
    bench = Bench(tmp_path, KINDS["untied"](), torch.bfloat16)
    verdicts = bench.verdicts(bench.merge(lambda tensors: tensors.update({NORM: torch.zeros(40).bfloat16()})))
    assert NORM not in {verdict.name for verdict in verdicts}
    assert not any(verdict.outside for verdict in verdicts)


@pytest.mark.parametrize("spoil", ["noise", "half", "elsewhere", "integers"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_question_can_be_asked_of_every_kind(kind: str, spoil: str, tmp_path: Path) -> None:
    """A cause is named for whatever is wrong, with a text; other adapters' answers are heard where they fit."""
    bench = Bench(tmp_path, KINDS[kind](), torch.bfloat16)
    other = Bench(tmp_path / "other", KINDS["dora" if kind == "plain" else "plain"](), torch.bfloat16)

    def change(tensors: Tensors) -> None:
        if spoil == "integers":
            tensors["mask"] = tensors["mask"] + 1
            return
        for name in bench.binding.by_name:
            noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(1)) * 0.1
            start = bench.base.get(name, torch.zeros(())).float()
            fits = start.shape == tensors[name].shape
            moved = {"noise": noise, "half": tensors[name].float() / 2, "elsewhere": start if fits else noise}
            tensors[name] = moved[spoil].to(torch.bfloat16)

    out = bench.merge(change)
    verdicts = bench.verdicts(out)
    causes = diagnose_weights(verdicts, Checkpoint(out), bench.expectation, {"other": other.expectation})
    assert causes
    assert all(finding_text(cause, lang) for cause in causes for lang in ("en", "zh"))
    assert all(cause.params.get("count") != 0 for cause in causes)
    if spoil == "integers":
        assert [(cause.code, cause.params["count"]) for cause in causes] == [("cause_one_element", 64)]


def test_rows_that_were_left_out_beside_another_update_are_told_by_their_cause(tmp_path: Path) -> None:
    """The embedding is longer and adapted, as it should be; only its trained rows are not there."""
    bench = Bench(tmp_path, KINDS["resized"](), torch.bfloat16)
    tensors = bench.kind.tensors[0]
    a, b = (next(factor.double() for key, factor in tensors.items() if f"lora_{side}" in key) for side in "AB")
    whole = tensors["base_model.model.embed_tokens.base_layer.weight"].double()
    without = round_once(whole + SCALING * (b @ a).T, torch.bfloat16)
    out = bench.merge(lambda merged: merged.update({EMBEDDING: without}))
    causes = diagnose_weights(bench.verdicts(out), Checkpoint(out), bench.expectation, {})
    assert [(cause.code, dict(cause.params)) for cause in causes] == [
        ("cause_rows_missing", {"tensor": EMBEDDING, "count": 1})
    ]


@pytest.mark.parametrize(
    ("mutant", "code"),
    [("experts-interleaved-wrongly", "cause_experts_sliced"), ("gate-and-up-swapped", "cause_gate_up_swapped")],
)
def test_experts_that_were_cut_wrongly_are_told_by_their_cause(mutant: str, code: str, tmp_path: Path) -> None:
    """The update is all there, in other columns or rows of the stack."""
    kind, name, spoil = MUTANTS[mutant]
    bench = Bench(tmp_path, KINDS[kind](), torch.bfloat16)
    out = bench.merge(spoil(bench))
    causes = diagnose_weights(bench.verdicts(out), Checkpoint(out), bench.expectation, {})
    assert [(cause.code, cause.params["tensor"]) for cause in causes] == [(code, name)]

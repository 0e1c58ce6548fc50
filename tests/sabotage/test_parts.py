"""The weights level gives the same verdicts whatever does the work, and however it is cut."""

from __future__ import annotations

import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tests.sabotage.workshop import Workshop
from tunesmith.adapter import Stack
from tunesmith.checkpoint import Checkpoint
from tunesmith.progress import Cancellation, no_progress
from tunesmith.runs import open_run
from tunesmith.verify import verify
from tunesmith.verify.weights import check, expected
from tunesmith.verify.weights.check import check_weights
from tunesmith.verify.weights.expected import Expectation
from tunesmith.verify.weights.parts import Part, batched


@pytest.mark.parametrize("rounding", ["nearest", "faithful"])
def test_a_merge_is_judged_alike_compiled_in_parts_and_in_processes(
    rounding: str, shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same verdicts, whatever does the work and however it is cut."""
    base = Checkpoint(shop.base)
    stack = Stack([(shop.run, 1.0)])
    expectation = Expectation(base, stack, stack.bind(base))
    merged = Checkpoint({"nearest": shop.nearest, "faithful": shop.merged}[rounding])

    def verdicts(**options: object) -> list[dict[str, object]]:
        found = check_weights(merged, expectation, progress=no_progress, cancellation=Cancellation(), **options)
        return [tensor.model_dump() for tensor in found]

    plain = verdicts()
    assert sum(int(str(one["faithful"])) for one in plain) > 100 or rounding == "nearest"
    pickle.loads(pickle.dumps(expectation))  # noqa: S301 - our own, just made: this is how a process gets it
    with ProcessPoolExecutor(2) as pool:
        assert verdicts(executor=pool) == plain
    monkeypatch.setattr(check, "_PAYS_TO_COMPILE", 0)
    monkeypatch.setattr(check, "_PART_ELEMENTS", 1000)
    for ours, theirs in zip(verdicts(), plain, strict=True):
        assert {k: v for k, v in ours.items() if not isinstance(v, float)} == {
            k: v for k, v in theirs.items() if not isinstance(v, float)
        }
        floats = {k: v for k, v in theirs.items() if isinstance(v, float)}
        assert {k: ours[k] for k in floats} == pytest.approx(floats, rel=1e-9)


def test_a_sample_looks_at_a_part_and_says_of_how_many(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """First, last and another tile of every tensor, the same on every run."""
    base = Checkpoint(shop.base)
    stack = Stack([(shop.run, 1.0)])
    expectation = Expectation(base, stack, stack.bind(base))
    monkeypatch.setattr(expected, "_TILE_ELEMENTS", 512)
    merged = Checkpoint(Path(shop.merged))
    options = {"progress": no_progress, "cancellation": Cancellation()}
    looked = check_weights(merged, expectation, sample=True, **options)
    assert looked == check_weights(merged, expectation, sample=True, **options)
    every = check_weights(merged, expectation, **options)
    assert [tensor.name for tensor in looked] == [tensor.name for tensor in every]
    assert sum(t.elements for t in looked) < 0.5 * sum(t.elements for t in every)
    assert all(0 < t.elements <= 3 * 512 for t in looked)


def test_a_whole_verification_may_be_given_its_workers(shop: Workshop) -> None:
    """The same answer, by processes of the caller's."""
    with ProcessPoolExecutor(2) as pool:
        verdict = verify(
            open_run(shop.run), shop.merged, base_dir=shop.base, base_model="base", levels=["weights"], executor=pool
        )
    assert verdict.answer == "equal_within_rounding"
    assert sum(tensor.elements for tensor in verdict.tensors) == sum(
        info.elements for info in Checkpoint(shop.base).tensors.values()
    )


@pytest.mark.parametrize("slots", [1, 3, 1000])
def test_batches_hold_every_part_once_in_order(slots: int) -> None:
    """None is larger than a unit of a merge, or than its one part; every slot has some, where there are enough."""
    sizes = [1 << 23] * 40 + [10] * 300 + [1 << 26, 5, 1 << 23]
    parts = [Part(f"tensor-{place}", 0, 1, size) for place, size in enumerate(sizes)]
    batches = list(batched(parts, slots))
    assert [part for batch in batches for part in batch] == parts
    assert all(len(batch) == 1 or sum(part.elements for part in batch) <= 1 << 25 for batch in batches)
    assert min(4 * slots, 40) <= len(batches) <= len(parts)
    assert len(batches) < 20 or slots > 1

"""Every kind of update against its formula in float64, written out here; rounded once, by exact rationals."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

import pytest
import torch

from tests.merge.exact import raw_bytes, round_tensor
from tests.merge.handmade import Tensors, carry_out, file_bytes, load, numbers, write_model, write_tensors
from tunesmith.adapter import Added, Binding, Copied, LowRank, Magnitude, Replaced, Rows, Update
from tunesmith.errors import CheckpointError
from tunesmith.merge import units, work
from tunesmith.merge.tiles import TileSums

DTYPES = ["BF16", "F16", "F32"]
ROUNDINGS = ["nearest", "stochastic", "faithful"]


@pytest.fixture(scope="module", autouse=True)
def _feedback_however_large_the_update() -> Iterator[None]:
    """These updates are large against the grid; a merge would round them to nearest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "ENOUGH", math.inf)
        yield


def low(name: str, a: str = "a", b: str = "b", **more: object) -> LowRank:
    """A low-rank update with the factors of these names."""
    return LowRank(**{"name": name, "module": name, "r": 3, "scaling": 0.5, "lora_A": a, "lora_B": b, **more})


def product(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """B·A as a sum of outer products in float64."""
    total = torch.zeros(b.shape[0], a.shape[1], dtype=torch.float64)
    for index in range(a.shape[0]):
        total += torch.outer(b[:, index].double(), a[index].double())
    return total


def merged(
    tmp_path: Path, base: Tensors, adapter: Tensors, updates: Sequence[Update], **binding: object
) -> dict[str, torch.Tensor]:
    """The tensors that the engine makes of a base in one file."""
    write_model(tmp_path / "base", base)
    write_tensors(tmp_path / "adapter", adapter)
    made = Binding(updates=tuple(updates), **binding)
    carry_out(tmp_path / "base", [tmp_path / "adapter"], made, tmp_path / "out")
    return load(tmp_path / "out")


def check(found: torch.Tensor, exact: torch.Tensor, dtype: str) -> None:
    """To the last bit, the sign of zero included."""
    assert found.shape == exact.shape
    assert raw_bytes(found.reshape(-1)) == raw_bytes(round_tensor(exact, dtype).reshape(-1))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units and tiles so small that every tensor is cut in several."""
    monkeypatch.setattr(units, "UNIT_BYTES", 200)
    monkeypatch.setattr(work, "TILE_ELEMENTS", 24)


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_updates_of_one_tensor_add_up(tmp_path: Path, dtype: str) -> None:
    """In float64, before the one rounding."""
    w = numbers(11, 8, dtype=dtype)
    adapter = {
        "a": numbers(3, 8, seed=1, dtype="F32"),
        "b": numbers(11, 3, seed=2, dtype="F32", scale=0.01),
        "c": numbers(2, 8, seed=3, dtype="BF16"),
        "d": numbers(11, 2, seed=4, dtype="F16", scale=0.01),
    }
    updates = [low("w"), low("w", "c", "d", r=2, scaling=-1.5)]
    found = merged(tmp_path, {"w": w}, adapter, updates)["w"]
    exact = w.double() + 0.5 * product(adapter["b"], adapter["a"]) - 1.5 * product(adapter["d"], adapter["c"])
    check(found, exact, dtype)


def test_a_tensor_of_several_dimensions_is_a_matrix_of_its_first_by_all_the_others(tmp_path: Path) -> None:
    """A convolution's kernel."""
    w = numbers(5, 2, 3, dtype="BF16")
    adapter = {"a": numbers(3, 6, seed=1), "b": numbers(5, 3, seed=2)}
    found = merged(tmp_path, {"w": w}, adapter, [low("w")])["w"]
    check(found, w.double() + 0.5 * product(adapter["b"], adapter["a"]).reshape(5, 2, 3), "BF16")


def test_a_transposed_update_is_added_as_the_tensor_is_stored(tmp_path: Path) -> None:
    """Conv1D holds (in, out)."""
    w = numbers(8, 11, dtype="BF16")
    adapter = {"a": numbers(3, 8, seed=1), "b": numbers(11, 3, seed=2)}
    found = merged(tmp_path, {"w": w}, adapter, [low("w", transposed=True)])["w"]
    check(found, w.double() + 0.5 * product(adapter["b"], adapter["a"]).T, "BF16")


def test_blocks_of_a_stack_get_their_own_updates_and_the_others_keep_their_bytes(tmp_path: Path) -> None:
    """Experts in one tensor; block 1 gets two, block 2 none, and its −0.0 stays."""
    w = numbers(4, 5, 6, dtype="BF16")
    w[2, 3, 3] = -0.0
    adapter = {"a": numbers(12, 6, seed=1), "b": numbers(5, 12, seed=2)}
    spans = {e: {"block": e, "A_rows": (3 * e, 3 * e + 3, 1), "B_columns": (e, 12, 4)} for e in range(4)}
    updates = [low("w", **spans[e]) for e in (0, 1, 3)] + [low("w", scaling=2.0, **spans[1])]
    found = merged(tmp_path, {"w": w}, adapter, updates)["w"]
    exact = w.double().clone()
    for e, scaling in ((0, 0.5), (1, 2.5), (3, 0.5)):
        exact[e] += scaling * product(adapter["b"][:, e::4], adapter["a"][3 * e : 3 * e + 3])
    check(found, exact, "BF16")
    assert raw_bytes(found[2]) == raw_bytes(w[2])


def test_a_copied_tensor_begins_as_another_and_takes_updates(tmp_path: Path) -> None:
    """A head that was tied, and a copy that nothing is added to."""
    w = numbers(7, 8, dtype="BF16")
    adapter = {"a": numbers(3, 8, seed=1), "b": numbers(7, 3, seed=2)}
    updates = [low("head"), Copied(name="head", source="w"), Copied(name="twin", source="w")]
    shapes = {"head": (7, 8), "twin": (7, 8)}
    found = merged(tmp_path, {"w": w}, adapter, updates, shapes=shapes)
    check(found["head"], w.double() + 0.5 * product(adapter["b"], adapter["a"]), "BF16")
    assert raw_bytes(found["w"]) == raw_bytes(found["twin"]) == raw_bytes(w)


def test_a_tensor_can_begin_as_a_copy_of_one_that_itself_changes(tmp_path: Path) -> None:
    """A replicated layer begins as the base's, not as what the merge makes of it."""
    w, v = numbers(7, 8), numbers(7, 8, seed=9)
    adapter = {"a": numbers(3, 8, seed=1), "b": numbers(7, 3, seed=2)}
    found = merged(tmp_path, {"v": v, "w": w}, adapter, [low("w"), Copied(name="v", source="w")])
    assert raw_bytes(found["v"]) == raw_bytes(w)
    assert raw_bytes(found["w"]) != raw_bytes(w)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_replaced_tensor_is_the_adapters_in_the_bases_dtype(tmp_path: Path, dtype: str, stored: str) -> None:
    """Of another shape, with an update on top; and one that is new."""
    base = {"w": numbers(7, 8, dtype=dtype), "z": numbers(3, dtype=dtype)}
    adapter = {
        "w.new": numbers(9, 8, seed=5, dtype=stored),
        "s.new": numbers(4, seed=6, dtype=stored),
        "a": numbers(3, 8, seed=1),
        "b": numbers(9, 3, seed=2),
    }
    updates = [
        Replaced(name="w", module="w", tensor="w.new"),
        low("w"),
        Replaced(name="score", module="score", tensor="s.new"),
    ]
    found = merged(tmp_path, base, adapter, updates, shapes={"w": (9, 8), "score": (4,)})
    check(found["w"], adapter["w.new"].double() + 0.5 * product(adapter["b"], adapter["a"]), dtype)
    check(found["score"], adapter["s.new"].double(), dtype)
    assert raw_bytes(found["z"]) == raw_bytes(base["z"])


def test_rows_are_put_in_before_anything_is_added(tmp_path: Path) -> None:
    """In the order of their indices, which need not rise; the other rows keep their bytes where nothing is added."""
    w, v = numbers(9, 8), numbers(9, 8, seed=7)
    v[4, 4] = -0.0
    adapter = {"rows": numbers(3, 8, seed=5, dtype="F32"), "a": numbers(3, 8, seed=1), "b": numbers(9, 3, seed=2)}
    rows = [Rows(name=name, module=name, tensor="rows", indices=(7, 0, 2)) for name in ("w", "v")]
    found = merged(tmp_path, {"w": w, "v": v}, adapter, [low("w"), *rows])
    for name, begun in (("w", w), ("v", v)):
        exact = begun.double().clone()
        exact[[7, 0, 2]] = adapter["rows"].double()
        if name == "w":
            exact += 0.5 * product(adapter["b"], adapter["a"])
        check(found[name], exact, "BF16")
    assert raw_bytes(found["v"][4]) == raw_bytes(v[4])


@pytest.mark.parametrize("shape", [(6,), (6, 5), ()])
def test_an_added_tensor_is_scaled_and_added(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """A bias of lora_B; twice, which adds up."""
    w, x = numbers(*shape), numbers(*shape, seed=3, dtype="F32", scale=0.01)
    updates = [Added(name="w", module="w", tensor="x", scaling=scaling) for scaling in (2.0, -0.25)]
    found = merged(tmp_path, {"w": w}, {"x": x}, updates)["w"]
    check(found, w.double() + 1.75 * x.double(), "BF16")


@pytest.mark.parametrize("per", ["row", "column"])
@pytest.mark.parametrize("shape", [(9, 8), (5, 2, 3)])
def test_dora_scales_the_sum_to_its_magnitude(
    tmp_path: Path, per: Literal["row", "column"], shape: tuple[int, ...]
) -> None:
    """W' = m / ‖V‖ · V, the norm of every stored row or column; float64's own noise may turn a tie, and only a tie."""
    rows, columns = shape[0], int(torch.tensor(shape[1:]).prod())
    w = numbers(*shape)
    m = numbers(rows if per == "row" else columns, seed=6, dtype="F32").abs() + 1
    adapter = {"a": numbers(3, columns, seed=1), "b": numbers(rows, 3, seed=2), "m": m.reshape(1, -1)}
    found = merged(tmp_path, {"w": w}, adapter, [Magnitude(name="w", module="w", tensor="m", per=per), low("w")])["w"]
    v = w.double().reshape(rows, columns) + 0.5 * product(adapter["b"], adapter["a"])
    dimension = 1 if per == "row" else 0
    ratio = m.double() / v.pow(2).sum(dimension).sqrt()
    exact = ratio[:, None] * v if per == "row" else ratio * v
    check(found, exact.reshape(shape), "BF16")


@pytest.mark.parametrize("to", DTYPES)
def test_a_conversion_rounds_every_floating_point_tensor_once(tmp_path: Path, to: str) -> None:
    """From the sum in float64, not from the sum in the base's dtype; integers and their bytes stay."""
    base = {"w": numbers(7, 8, dtype="F32"), "v": numbers(6, 5, dtype="BF16"), "n": torch.arange(5)}
    adapter = {"a": numbers(3, 8, seed=1), "b": numbers(7, 3, seed=2)}
    write_model(tmp_path / "base", base)
    write_tensors(tmp_path / "adapter", adapter)
    binding = Binding(updates=(low("w"),))
    carry_out(tmp_path / "base", [tmp_path / "adapter"], binding, tmp_path / "out", convert_to=to)
    found = load(tmp_path / "out")
    check(found["w"], base["w"].double() + 0.5 * product(adapter["b"], adapter["a"]), to)
    check(found["v"], base["v"].double(), to)
    assert torch.equal(found["n"], base["n"])


@pytest.mark.parametrize("bad", [1e6, float("nan"), float("inf")])
def test_a_conversion_that_does_not_stay_finite_is_refused_naming_the_tensor(tmp_path: Path, bad: float) -> None:
    """fp16 ends at 65,504; nothing is added here, and still it would be lost."""
    w = numbers(7, 8, dtype="F32")
    w[6, 1] = bad
    write_model(tmp_path / "base", {"w": w})
    write_tensors(tmp_path / "adapter", {"x": numbers(1)})
    with pytest.raises(CheckpointError, match=r"finite|NaN or infinity") as caught:
        carry_out(tmp_path / "base", [tmp_path / "adapter"], Binding(updates=()), tmp_path / "out", convert_to="F16")
    assert str(caught.value.where).endswith(": w")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nonfinite_norm_is_refused(tmp_path: Path, dtype: str) -> None:
    """A row of zeros has no direction."""
    w = numbers(4, 4, dtype=dtype)
    w[2] = 0
    update = Magnitude(name="w", module="w", tensor="m", per="row")
    with pytest.raises(CheckpointError, match="finite"):
        merged(tmp_path, {"w": w}, {"m": torch.ones(4)}, [update])


def test_what_rounding_kept_is_told_of_every_tensor_that_something_is_added_to(tmp_path: Path) -> None:
    """Δ is what the exact result adds to what the tensor began as: here a row that was put in, and DoRA's ratio."""
    base = {name: numbers(9, 8, seed=seed) for seed, name in enumerate("wdrc")}
    adapter = {
        "a": numbers(3, 8, seed=1),
        "b": numbers(9, 3, seed=2, scale=1e-3),
        "m": torch.full((9,), 3.0),
        "rows": numbers(1, 8, seed=8),
    }
    rows = Rows(name="w", module="w", tensor="rows", indices=(2,))
    updates = (
        low("w"), rows, low("d"), Magnitude(name="d", module="d", tensor="m", per="row"),
        Rows(name="r", module="r", tensor="rows", indices=(2,)),
    )  # fmt: skip
    write_model(tmp_path / "base", base)
    write_tensors(tmp_path / "adapter", adapter)
    _, sums = carry_out(tmp_path / "base", [tmp_path / "adapter"], Binding(updates=updates), tmp_path / "out")
    found = load(tmp_path / "out")
    assert sums.keys() == {"w", "d"}
    begun = base["w"].double().clone()
    begun[2] = adapter["rows"][0].double()
    update = 0.5 * product(adapter["b"], adapter["a"])
    v = base["d"].double() + update
    deltas = {"w": (begun, update), "d": (base["d"].double(), 3 * v / v.norm(dim=1, keepdim=True) - base["d"].double())}
    for name, (start, delta) in deltas.items():
        realised = found[name].double() - start
        assert sums[name].elements == 72
        assert sums[name].unchanged == int((realised == 0).sum())
        assert sums[name].delta_delta == pytest.approx(float((delta**2).sum()), rel=1e-12)
        assert sums[name].realised_delta == pytest.approx(float((realised * delta).sum()), rel=1e-12)
        assert sums[name].error_error == pytest.approx(float(((realised - delta) ** 2).sum()), rel=1e-9)


def everything(root: Path) -> tuple[Path, list[Path], Binding]:
    """A base in two files and two adapters, with every kind of update."""
    first = {"w": numbers(31, 16), "e": numbers(4, 5, 6), "t": numbers(40, 16, seed=3)}
    second = {"d": numbers(16, 9, seed=4), "k": numbers(3, 2, 2, 2, seed=5), "bias": numbers(31, seed=6)}
    base = write_model(root / "base", first, second)
    one = {
        "a": numbers(3, 16, seed=11), "b": numbers(31, 3, seed=12), "ea": numbers(12, 6, seed=13),
        "eb": numbers(5, 12, seed=14), "rows": numbers(2, 16, seed=15), "x": numbers(31, seed=16),
        "da": numbers(3, 9, seed=17), "db": numbers(16, 3, seed=18), "m": numbers(9, seed=19).abs() + 1,
    }  # fmt: skip
    two = {"a": numbers(3, 16, seed=21), "b": numbers(31, 3, seed=22), "s": numbers(2, 16, seed=23)}
    updates = (
        low("w"), low("w", adapter=1), Added(name="bias", module="w", tensor="x", scaling=1.0),
        *(low("e", "ea", "eb", block=e, A_rows=(3 * e, 3 * e + 3, 1), B_columns=(e, 12, 4)) for e in (0, 1, 3)),
        Rows(name="t", module="t", tensor="rows", indices=(39, 1)), low("d", "da", "db"),
        Magnitude(name="d", module="d", tensor="m", per="column"),
        Replaced(name="score", module="score", tensor="s", adapter=1), Copied(name="head", source="t"),
    )  # fmt: skip
    adapters = [write_tensors(root / "one", one), write_tensors(root / "two", two)]
    return base, adapters, Binding(updates=updates, shapes={"score": (2, 16), "head": (40, 16)})


@dataclass(frozen=True)
class Whole:
    """What everything becomes in one unit a file and one tile a tensor.

    Attributes:
        rounding: how what has a low-rank update was rounded.
        files: the bytes of every file of weights.
        sums: what rounding kept of every tensor.
    """

    rounding: str
    files: dict[str, bytes]
    sums: dict[str, TileSums]


@pytest.fixture(scope="module", params=ROUNDINGS)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Everything, uncut, for each rounding that needs no data."""
    root = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "UNIT_BYTES", 1 << 30)
        patch.setattr(work, "TILE_ELEMENTS", 1 << 30)
        base, adapters, binding = everything(root)
        _, sums = carry_out(base, adapters, binding, root / "out", rounding=request.param)
    return Whole(request.param, file_bytes(root / "out"), sums)


def test_the_roundings_make_different_bytes(tmp_path: Path) -> None:
    """Or that they do not depend on how the work is cut would be shown of one only."""
    base, adapters, binding = everything(tmp_path)
    made = []
    for rounding in ROUNDINGS:
        carry_out(base, adapters, binding, tmp_path / rounding, rounding=rounding)
        made.append(file_bytes(tmp_path / rounding))
    assert all(one != other for one, other in combinations(made, 2))


@pytest.mark.parametrize("tile", [1, 17, 64, 1 << 30])
@pytest.mark.parametrize("unit", [1, 100, 777, 1 << 30])
def test_bytes_do_not_depend_on_how_the_work_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Whole, unit: int, tile: int
) -> None:
    """Units of a byte are single rows; the order in which they run is no matter either.  Nor do the sums."""
    monkeypatch.setattr(units, "UNIT_BYTES", unit)
    monkeypatch.setattr(work, "TILE_ELEMENTS", tile)
    monkeypatch.setattr(work, "FEEDBACK_TILES", 1)
    base, adapters, binding = everything(tmp_path)
    _, sums = carry_out(base, adapters, binding, tmp_path / "out", rounding=reference.rounding)
    assert file_bytes(tmp_path / "out") == reference.files
    assert sums.keys() == reference.sums.keys()
    for name, kept in sums.items():
        assert asdict(kept) == pytest.approx(asdict(reference.sums[name]), rel=1e-9), name


def feed_back() -> None:
    """In a process that does not inherit the fixture's setting."""
    work.ENOUGH = math.inf


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[str, Executor]]:
    """Executors of several kinds; processes take their time to start, and only those that are used do."""
    spawn = multiprocessing.get_context("spawn")
    with ThreadPoolExecutor(3) as threads, ProcessPoolExecutor(2, mp_context=spawn, initializer=feed_back) as processes:
        yield {"threads": threads, "processes": processes}


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_bytes_do_not_depend_on_who_runs_the_units(
    tmp_path: Path, reference: Whole, pools: dict[str, Executor], kind: str
) -> None:
    """A unit is paths and numbers, and travels to another process as it is."""
    base, adapters, binding = everything(tmp_path)
    carry_out(base, adapters, binding, tmp_path / "out", rounding=reference.rounding, executor=pools[kind])
    assert file_bytes(tmp_path / "out") == reference.files


@pytest.mark.parametrize("shard_bytes", [1, 500, 1500, 1 << 30])
def test_tensors_do_not_depend_on_the_files_they_lie_in(tmp_path: Path, reference: Whole, shard_bytes: int) -> None:
    """From a file a tensor to one file for all."""
    base, adapters, binding = everything(tmp_path)
    files, _ = carry_out(
        base, adapters, binding, tmp_path / "out", shard_bytes=shard_bytes, rounding=reference.rounding
    )
    (tmp_path / "whole").mkdir()
    for name, data in reference.files.items():
        (tmp_path / "whole" / name).write_bytes(data)
    ours, theirs = load(tmp_path / "out"), load(tmp_path / "whole")
    assert {name: raw_bytes(tensor) for name, tensor in ours.items()} == {
        name: raw_bytes(tensor) for name, tensor in theirs.items()
    }
    assert (len(files) == 1) == (shard_bytes == 1 << 30)

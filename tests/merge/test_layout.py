"""Where tensors lie in the merged model: the base's files where they can stay, and sound files where they cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.merge.exact import raw_bytes
from tests.merge.handmade import carry_out, load, numbers, write_model, write_tensors
from tunesmith.adapter import Binding, Copied, Replaced, Stack
from tunesmith.checkpoint import Checkpoint, read_header
from tunesmith.errors import OutputError
from tunesmith.merge.layout import OutputFile, index_of, layout_of
from tunesmith.merge.plan import size_in_bytes

NEW = Replaced(name="score", module="score", tensor="s")
ADDED = Binding(updates=(NEW,), shapes={"score": (2, 8)})


def two_shards() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A base's tensors in two files."""
    return {"a": numbers(5, 8), "b": numbers(3, seed=1)}, {"c": numbers(4, 8, seed=2), "d": numbers(2, seed=3)}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter with a tensor that the base lacks, in float32."""
    return write_tensors(tmp_path / "adapter", {"s": numbers(2, 8, seed=9, dtype="F32")})


def sound(folder: Path) -> Checkpoint:
    """A directory that our strict reader and the format's own both read, every tensor aligned to its numbers."""
    model = Checkpoint(folder)
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as theirs:
            assert set(theirs.keys()) == set(read_header(file).tensors)
    for info in model.tensors.values():
        assert info.begin % {"BF16": 2, "F32": 4, "I64": 8}[info.dtype] == 0
    if model.indexed:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(info.size_bytes for info in model.tensors.values())
        assert index["weight_map"] == {name: model.shard_of(name) for name in sorted(model.tensors)}
    return model


def test_headers_stay_byte_for_byte_where_nothing_moves(tmp_path: Path, adapter: Path) -> None:
    """Metadata, order, padding and all, even of an odd length; so does the index."""
    base = write_model(tmp_path / "base", *two_shards(), metadata={"format": "pt", "who": "x"})
    odd = base / "model-00001-of-00002.safetensors"
    raw = odd.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    odd.write_bytes((length + 3).to_bytes(8, "little") + raw[8 : 8 + length] + b"   " + raw[8 + length :])
    carry_out(base, [adapter], Binding(updates=()), tmp_path / "out")
    for file in (*base.glob("*.safetensors"), base / "model.safetensors.index.json"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_new_tensor_of_a_single_file_goes_to_a_second_one_with_an_index(tmp_path: Path, adapter: Path) -> None:
    """The first file's bytes stay, under the name that a loader expects of a shard."""
    base = write_model(tmp_path / "base", {"a": numbers(5, 8)}, metadata={"format": "pt", "who": "x"})
    carry_out(base, [adapter], ADDED, tmp_path / "out")
    model = sound(tmp_path / "out")
    assert list(model.shards) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    first = (tmp_path / "out" / "model-00001-of-00002.safetensors").read_bytes()
    assert first == (base / "model.safetensors").read_bytes()
    assert model.info("score").dtype == "BF16"
    assert model.shards["model-00002-of-00002.safetensors"].metadata == {"format": "pt", "who": "x"}


def test_shards_are_counted_anew_when_one_is_added(tmp_path: Path, adapter: Path) -> None:
    """``-of-00002`` becomes ``-of-00003`` in every name."""
    base = write_model(tmp_path / "base", *two_shards())
    carry_out(base, [adapter], ADDED, tmp_path / "out")
    assert list(sound(tmp_path / "out").shards) == [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]


def test_shards_with_names_of_their_own_keep_them(tmp_path: Path, adapter: Path) -> None:
    """The new one gets a name that is free."""
    base = write_model(tmp_path / "base", *two_shards())
    index = base / "model.safetensors.index.json"
    for old, new in (("model-00001-of-00002", "left"), ("model-00002-of-00002", "model-merged-1")):
        (base / f"{old}.safetensors").rename(base / f"{new}.safetensors")
        index.write_text(index.read_text().replace(old, new))
    carry_out(base, [adapter], ADDED, tmp_path / "out")
    assert sorted(sound(tmp_path / "out").shards) == [
        "left.safetensors", "model-merged-1.safetensors", "model-merged-2.safetensors",
    ]  # fmt: skip


def test_a_dropped_tensor_is_gone_and_a_file_that_held_nothing_else_too(tmp_path: Path, adapter: Path) -> None:
    """The other file keeps its bytes; names and index are counted anew."""
    first, second = two_shards()
    base = write_model(tmp_path / "base", first, second)
    carry_out(base, [adapter], Binding(updates=(), dropped=("d",)), tmp_path / "one")
    assert set(sound(tmp_path / "one").tensors) == {"a", "b", "c"}
    assert raw_bytes(load(tmp_path / "one")["c"]) == raw_bytes(second["c"])
    carry_out(base, [adapter], Binding(updates=(), dropped=("c", "d")), tmp_path / "two")
    model = sound(tmp_path / "two")
    assert list(model.shards) == ["model-00001-of-00001.safetensors"]
    whole = (tmp_path / "two" / "model-00001-of-00001.safetensors").read_bytes()
    assert whole == (base / "model-00001-of-00002.safetensors").read_bytes()


def test_a_resized_tensor_moves_those_behind_it(tmp_path: Path, adapter: Path) -> None:
    """Their numbers stay; the file's metadata too."""
    tensors = {"a": numbers(5, 8), "b": numbers(3, seed=1), "c": numbers(4, 8, seed=2)}
    base = write_model(tmp_path / "base", tensors, metadata={"format": "pt", "who": "x"})
    binding = Binding(updates=(Replaced(name="a", module="a", tensor="s"),), shapes={"a": (2, 8)})
    carry_out(base, [adapter], binding, tmp_path / "out")
    model, found = sound(tmp_path / "out"), load(tmp_path / "out")
    assert found["a"].shape == (2, 8)
    assert all(raw_bytes(found[name]) == raw_bytes(tensors[name]) for name in ("b", "c"))
    assert model.shards["model.safetensors"].metadata == {"format": "pt", "who": "x"}


def test_mixed_dtypes_stay_aligned(tmp_path: Path, adapter: Path) -> None:
    """Three bf16 numbers before a float32 one would leave it on an odd address."""
    tensors = {"a": numbers(3), "n": torch.arange(3), "f": numbers(5, dtype="F32")}
    base = write_model(tmp_path / "base", tensors)
    binding = Binding(updates=(Copied(name="z", source="f"),), shapes={"z": (5,)})
    carry_out(base, [adapter], binding, tmp_path / "out", shard_bytes=1 << 20)
    model, found = sound(tmp_path / "out"), load(tmp_path / "out")
    assert model.info("z").dtype == "F32"
    assert all(raw_bytes(found[name]) == raw_bytes(tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(("size", "files"), [(1, 4), (70, 3), (100, 2), (1000, 1)])
def test_no_file_of_several_tensors_is_larger_than_asked(tmp_path: Path, adapter: Path, size: int, files: int) -> None:
    """a, b, c, d take 80, 6, 64 and 4 bytes; one that is larger by itself has a file to itself."""
    base = write_model(tmp_path / "base", *two_shards())
    carry_out(base, [adapter], Binding(updates=()), tmp_path / "out", shard_bytes=size)
    model = sound(tmp_path / "out")
    assert len(model.shards) == files
    assert model.indexed == (files > 1)
    for header in model.shards.values():
        assert len(header.tensors) == 1 or sum(info.size_bytes for info in header.tensors.values()) <= size


def test_an_index_that_counts_wrongly_is_mended(tmp_path: Path, adapter: Path) -> None:
    """``total_size`` is bytes; what else is in the index stays."""
    base = write_model(tmp_path / "base", *two_shards())
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["metadata"] |= {"total_size": 77, "total_parameters": 1, "note": "x"}
    path.write_text(json.dumps(index))
    carry_out(base, [adapter], ADDED, tmp_path / "out")
    sound(tmp_path / "out")
    metadata = json.loads((tmp_path / "out" / path.name).read_text())["metadata"]
    assert (metadata["note"], metadata["total_parameters"]) == ("x", 40 + 3 + 32 + 2 + 16)


def test_names_of_any_letters_survive(tmp_path: Path, adapter: Path) -> None:
    """Headers are UTF-8."""
    base = write_model(tmp_path / "base", {"模型.weight": numbers(3), 'q"\\': numbers(2)})
    carry_out(base, [adapter], ADDED, tmp_path / "out", shard_bytes=1 << 20)
    assert set(sound(tmp_path / "out").tensors) == {"模型.weight", 'q"\\', "score"}


def test_empty_tensors_and_scalars_have_a_place(tmp_path: Path, adapter: Path) -> None:
    """As in the base, and where everything moves."""
    tensors = {"e": torch.zeros(0, 4), "s": torch.tensor(3.5), "n": torch.tensor(7)}
    base = write_model(tmp_path / "base", tensors)
    for number, options in enumerate(({}, {"shard_bytes": 8}, {"convert_to": "BF16"})):
        carry_out(base, [adapter], Binding(updates=()), tmp_path / str(number), **options)
        sound(tmp_path / str(number))
        found = load(tmp_path / str(number))
        assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in tensors.items()}
        assert found["s"].item() == 3.5


def test_no_index_is_written_for_a_single_file(tmp_path: Path, adapter: Path) -> None:
    """A loader prefers the single file, but a stale index beside it misleads people."""
    base = Checkpoint(write_model(tmp_path / "base", *two_shards()))
    files = layout_of(base, Binding(updates=()), Stack([(adapter, 1.0)]), shard_bytes=1 << 30)
    assert [file.filename for file in files] == ["model.safetensors"]
    assert index_of(base, files) is None
    assert isinstance(files[0], OutputFile)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5gb", 15 * 10**8), ("2GiB", 2 << 30), (" 7 KB ", 7000), (12, 12)],
)
def test_sizes_are_read_as_the_hub_writes_them(text: str | int, size: int) -> None:
    """GB is 10⁹ bytes, GiB is 2³⁰."""
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "-5GB", "0MB", "5 parsecs", 0, -1, "1e9GB"])
def test_what_is_no_size_is_refused(text: str | int) -> None:
    """Rather than guessed."""
    with pytest.raises(OutputError, match="no size"):
        size_in_bytes(text)

"""Checkpoint: a directory of weights as a loader sees it, read lazily and exactly."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tunesmith.checkpoint import Checkpoint, as_float64, read_json_object, stored_array
from tunesmith.errors import CheckpointError

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def single(directory: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """A model directory with one weights file."""
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return directory


def sharded(directory: Path, shards: dict[str, dict[str, torch.Tensor]], weight_map: Any = None) -> Path:
    """A model directory with shards and an index, which may be wrong on purpose."""
    directory.mkdir(exist_ok=True)
    for filename, tensors in shards.items():
        save_file(tensors, directory / filename)
    right = {name: filename for filename, tensors in shards.items() for name in tensors}
    index = {"metadata": {}, "weight_map": right if weight_map is None else weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text("{}")
    return directory


def two_shards(**weight_map: str) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]:
    """Shards ``s1`` with a and b, ``s2`` with c; and their map with changes."""
    shards = {
        "s1.safetensors": {"a": torch.zeros(2, 2), "b": torch.ones(3)},
        "s2.safetensors": {"c": torch.zeros(2)},
    }
    right = {"a": "s1.safetensors", "b": "s1.safetensors", "c": "s2.safetensors"}
    return shards, {**right, **weight_map}


@pytest.mark.parametrize("dtype", FLOATS)
def test_tensors_of_every_float_dtype_are_read_exactly(tmp_path: Path, dtype: str) -> None:
    """Whole and by rows, against torch's own conversion."""
    tensor = torch.randn(7, 3, dtype=torch.float64).to(FLOATS[dtype])
    model = Checkpoint(single(tmp_path / "m", {"w": tensor, "s": tensor[0, 0].clone()}))
    assert model.info("w").dtype == dtype
    exact = tensor.to(torch.float64).numpy()
    assert np.array_equal(model.read_float64("w"), exact)
    assert np.array_equal(model.read_float64("w", 2, 5), exact[2:5])
    assert np.array_equal(model.read_float64("w", 6, 99), exact[6:])
    assert model.read_float64("s").shape == ()
    assert float(model.read_float64("s")) == exact[0, 0]


def test_bf16_is_decoded_exactly_for_all_patterns() -> None:
    """All 65,536 of them, NaNs and subnormals too, against torch."""
    patterns = np.arange(2**16, dtype=np.uint16)
    ours = as_float64(stored_array(patterns.tobytes(), "BF16", (2**16,)), "BF16")
    theirs = torch.from_numpy(patterns.view(np.int16)).view(torch.bfloat16).to(torch.float64).numpy()
    assert np.array_equal(ours, theirs, equal_nan=True)
    assert np.array_equal(np.signbit(ours), np.signbit(theirs))


def test_f16_is_decoded_exactly_for_all_patterns() -> None:
    """All 65,536 of them, against torch."""
    patterns = np.arange(2**16, dtype=np.uint16)
    ours = as_float64(stored_array(patterns.tobytes(), "F16", (2**16,)), "F16")
    theirs = torch.from_numpy(patterns.view(np.int16)).view(torch.float16).to(torch.float64).numpy()
    assert np.array_equal(ours, theirs, equal_nan=True)


def test_a_quantized_tensor_is_refused_when_it_is_computed_with(tmp_path: Path) -> None:
    """It is listed, for it is sound; but its numbers are not weights."""
    model = Checkpoint(single(tmp_path / "m", {"q": torch.zeros(4, dtype=torch.int8)}))
    assert model.info("q").dtype == "I8"
    with pytest.raises(CheckpointError, match="dtype"):
        model.read("q")


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    """Every tensor from the shard that the index names."""
    shards, _ = two_shards()
    model = Checkpoint(sharded(tmp_path / "m", shards))
    assert model.indexed
    assert set(model.tensors) == {"a", "b", "c"}
    assert model.shard_of("c") == "s2.safetensors"
    assert np.array_equal(model.read_float64("b"), np.ones(3))


def test_the_single_file_wins_over_an_index(tmp_path: Path) -> None:
    """As in transformers; so what we merge is what it loads."""
    shards, _ = two_shards()
    directory = single(sharded(tmp_path / "m", shards), {"only": torch.ones(1)})
    model = Checkpoint(directory)
    assert not model.indexed
    assert set(model.tensors) == {"only"}


@pytest.mark.parametrize(
    ("weight_map", "named"),
    [
        (two_shards(c="s1.safetensors")[1], "c"),
        (two_shards(ghost="s1.safetensors")[1], "ghost"),
        ({"a": "s1.safetensors", "b": "s1.safetensors"} | {"c": "s2.safetensors"} | {"d": "s2.safetensors"}, "d"),
        ({"a": "s1.safetensors", "c": "s2.safetensors"}, "b"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path, weight_map: Any, named: str) -> None:
    """Wrong shard, unknown tensor, or one that the index forgot; each is named."""
    shards, _ = two_shards()
    with pytest.raises(CheckpointError, match="disagree") as caught:
        Checkpoint(sharded(tmp_path / "m", shards, weight_map))
    assert any(line.startswith(f"{named}:") for line in caught.value.details)


def test_all_disagreements_of_an_index_are_listed_at_once(tmp_path: Path) -> None:
    """One run of the tool shows them all."""
    shards, _ = two_shards()
    weight_map = {"a": "s2.safetensors", "b": "s2.safetensors", "c": "s1.safetensors"}
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(sharded(tmp_path / "m", shards, weight_map))
    assert [line.split(":")[0] for line in caught.value.details] == ["a", "b", "c"]


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    """A loader would take one of them by chance."""
    twice = {"a": torch.zeros(2), "b": torch.ones(2)}
    shards = {"s1.safetensors": twice, "s2.safetensors": {"a": torch.ones(2), "c": torch.ones(2)}}
    with pytest.raises(CheckpointError, match="more than one shard"):
        Checkpoint(sharded(tmp_path / "m", shards))


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "sub/s.safetensors", "..", ".", ""])
def test_an_index_that_leaves_its_directory_is_refused(tmp_path: Path, shard: str) -> None:
    """Refused for its name, before anything is opened."""
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    with pytest.raises(CheckpointError, match="outside its directory"):
        Checkpoint(sharded(tmp_path / "m", {}, {"a": shard}))


@pytest.mark.parametrize("weight_map", [{}, [], {"a": 1}, "x", {"a": "bad\0name.safetensors"}])
def test_a_weight_map_that_is_none_is_refused(tmp_path: Path, weight_map: Any) -> None:
    """Empty, of another type, or with names that no file can have."""
    with pytest.raises(CheckpointError):
        Checkpoint(sharded(tmp_path / "m", {}, weight_map))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    """An interrupted download is the usual reason."""
    shards, _ = two_shards()
    directory = sharded(tmp_path / "m", shards)
    (directory / "s2.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(directory)
    assert "s2.safetensors" in str(caught.value.where)


def test_all_missing_shards_are_named_at_once(tmp_path: Path) -> None:
    """With how many they are of how many; a link to nothing is missing too."""
    shards, _ = two_shards()
    directory = sharded(tmp_path / "m", shards)
    (directory / "s1.safetensors").unlink()
    (directory / "s2.safetensors").unlink()
    (directory / "s2.safetensors").symlink_to("../../blobs/gone")
    with pytest.raises(CheckpointError, match="2 of the 2 shards") as caught:
        Checkpoint(directory)
    assert caught.value.details == ("s1.safetensors", "s2.safetensors")
    assert "finish the download" in str(caught.value.next_step)


def test_weights_that_are_a_link_to_nothing_are_told_from_none(tmp_path: Path) -> None:
    """A cache that was cleaned; with an index beside it, the shards are read, as a loader does."""
    shards, _ = two_shards()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").symlink_to("../blobs/gone")
    with pytest.raises(CheckpointError, match="symlink that leads nowhere") as caught:
        Checkpoint(tmp_path)
    assert caught.value.found == "../blobs/gone"
    assert set(Checkpoint(sharded(tmp_path, shards)).tensors) == {"a", "b", "c"}


@pytest.mark.parametrize("shard", ["pytorch_model.bin", "config.json", "s1", "s\n1.safetensors", "\x1b[2J.safetensors"])
def test_an_index_that_names_what_cannot_be_a_shard_is_refused(tmp_path: Path, shard: str) -> None:
    """A loader unpickles what has another ending; and a merge writes files of these names."""
    directory = sharded(tmp_path / "m", {}, {"a": shard})
    (directory / shard).write_bytes((single(tmp_path / "x", {"a": torch.zeros(1)}) / "model.safetensors").read_bytes())
    (directory / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be shards") as caught:
        Checkpoint(directory)
    assert caught.value.details == (repr(shard),)


def test_names_that_no_terminal_should_see_are_quoted(tmp_path: Path) -> None:
    """In the list of disagreements; they are the file's own words."""
    shards, weight_map = two_shards()
    with pytest.raises(CheckpointError, match="disagree") as caught:
        Checkpoint(sharded(tmp_path / "m", shards, {**weight_map, "x\x1b[2J\n": "s1.safetensors"}))
    assert caught.value.details[0].startswith(r"'x\x1b[2J\n': the index says s1.safetensors")


def test_rows_beyond_the_end_are_no_rows(tmp_path: Path) -> None:
    """As a slice has it."""
    model = Checkpoint(single(tmp_path / "m", {"w": torch.ones(3, 2)}))
    assert model.read("w", 5).shape == (0, 2)
    assert model.read("w", 5, 9).shape == (0, 2)


def test_a_file_that_vanishes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """Of ours, that names it."""
    model = Checkpoint(single(tmp_path / "m", {"w": torch.ones(3, 2)}))
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        model.read("w")
    assert str(caught.value.where).endswith("model.safetensors")


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        """What unpickling calls."""
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickled_weights_are_refused_with_advice_and_never_opened(tmp_path: Path, name: str) -> None:
    """The trap in them does not spring."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(CheckpointError, match="pickles") as caught:
        Checkpoint(tmp_path)
    assert "safe_serialization=True" in str(caught.value.next_step)
    assert not (tmp_path / "sprung").exists()


def test_a_directory_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    """So that a wrong path is recognised."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no safetensors weights") as caught:
        Checkpoint(tmp_path)
    assert caught.value.found == "config.json"


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b"])
def test_a_directory_that_no_file_system_can_have_is_not_there(path: str) -> None:
    """And no crash."""
    with pytest.raises(CheckpointError, match="not there"):
        Checkpoint(path)


def test_a_missing_directory_a_file_and_a_missing_config_are_told_apart(tmp_path: Path) -> None:
    """Three different mistakes, three messages."""
    file = tmp_path / "f"
    file.write_text("")
    with pytest.raises(CheckpointError, match="not there"):
        Checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match="not a directory"):
        Checkpoint(file)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(tmp_path)
    assert str(caught.value.where).endswith("config.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"1", b"\xff\xfe", b"[" * 100_000])
def test_a_json_file_that_is_no_object_is_refused(tmp_path: Path, content: bytes) -> None:
    """Damaged, of another type, of another encoding, or nested without end."""
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"not valid JSON|not a JSON object"):
        read_json_object(file)


def nested(levels: int) -> bytes:
    """A JSON object with this many levels."""
    return b'{"a":' * levels + b"1" + b"}" * levels


def test_a_json_file_that_could_not_be_written_again_is_refused(tmp_path: Path) -> None:
    """A merge writes the config again: half a surrogate pair, and nesting that a writer's recursion cannot follow."""
    file = tmp_path / "config.json"
    for content in (rb'{"a": "\ud83d\ude00"}', rb'{"a": "\\ud800"}', b'{"a": [Infinity, NaN]}', nested(100)):
        file.write_bytes(content)
        assert read_json_object(file)
    for content in (rb'{"a": "\ud800"}', rb'{"\uDFFF": 1}', nested(101), nested(900)):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="not valid JSON"):
            read_json_object(file)


def test_a_json_file_without_end_is_refused_unread(tmp_path: Path) -> None:
    """By its size; the file is sparse."""
    file = tmp_path / "config.json"
    with file.open("wb") as sparse:
        sparse.truncate(10**12)
    with pytest.raises(CheckpointError, match="far too long"):
        read_json_object(file)


def test_a_byte_order_mark_in_a_json_file_is_no_hindrance(tmp_path: Path) -> None:
    """Editors on Windows leave one."""
    file = tmp_path / "config.json"
    file.write_bytes('\ufeff{"a": 1}'.encode())
    assert read_json_object(file) == {"a": 1}


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    """A half-synced disk must not become zeros."""
    model = Checkpoint(single(tmp_path / "m", {"w": torch.zeros(100)}))
    file = tmp_path / "m" / "model.safetensors"
    shutil.copy(file, tmp_path / "copy")
    file.write_bytes((tmp_path / "copy").read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="shorter"):
        model.read("w")


def test_blocks_are_the_rows_that_read_gives(tmp_path: Path) -> None:
    """From a file that is opened once; one that became shorter is told of."""
    rows = torch.arange(60, dtype=torch.float32).reshape(20, 3)
    save_file({"a": torch.zeros(5), "w": rows}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    model = Checkpoint(tmp_path)
    first, second = model.blocks("w", (0, 17), 3)
    assert np.array_equal(first, model.read_float64("w", 0, 3))
    assert np.array_equal(second, model.read_float64("w", 17, 20))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(model.info("w").begin + 10)
    with pytest.raises(CheckpointError, match="shorter"):
        list(model.blocks("w", (0, 17), 3))

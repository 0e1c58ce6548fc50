"""Base and adapter by their addresses: the same model, whatever fails on the way, and read once."""

from __future__ import annotations

import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

import tunesmith as ts
from tests.storage.conftest import Asked, files_of, upload
from tests.tiny_models import TinyRun, build_adapter, build_base
from tunesmith.adapter import Adapter, load
from tunesmith.checkpoint import Checkpoint, StoragePath, storage_path
from tunesmith.checkpoint.ranges import RangeReader, read_at, read_on
from tunesmith.errors import CheckpointError, RunError, TunesmithError

BASE, ADAPTER = "memory://bucket/base", "memory://bucket/run/adapter"


@pytest.fixture
def stored(asked: Asked, tiny: TinyRun) -> Asked:
    """The tiny base and its adapter, in memory."""
    upload(tiny.base, BASE)
    upload(tiny.adapters["final"], ADAPTER)
    asked.ranges.clear()
    return asked


@pytest.mark.parametrize("url", ["s3://bucket/a/b", "gs://bucket/a", "hf://org/name@main/a", "memory://a/b"])
def test_an_address_survives_path_and_pickle(url: str) -> None:
    """The command line makes a ``Path`` of what is typed, which takes a slash away."""
    path = storage_path(url)
    assert isinstance(path, StoragePath)
    assert str(path) == url
    assert storage_path(Path(url)) == storage_path(f"{url}/") == pickle.loads(pickle.dumps(path)) == path  # noqa: S301


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("/a/b", "/a/b"),
        ("a", "a"),
        ("file:///a/b", "/a/b"),
        ("file:/a/b", "/a/b"),
        ("FILE:///a", "/a"),
        ("C:/a", "C:/a"),
        ("C:\\a", "C:\\a"),
        ("run:0.5", "run:0.5"),
        ("s3", "s3"),
    ],
)
def test_what_is_no_address_is_a_plain_path(text: str, local: str) -> None:
    """The disk's paths go the way that they always went; a drive's letter is no scheme."""
    path = storage_path(text)
    assert not isinstance(path, StoragePath)
    assert str(path) == local


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/a",
        "http://host/a",
        "az://a/b",
        "s3://",
        "hf://",
        "s3://key:secret@bucket/a",
        "s3://bucket/a?X-Amz-Signature=secret",
    ],
)
def test_odd_addresses_are_refused_without_their_secrets(url: str) -> None:
    """An address that holds a secret is not repeated; and the command line makes a ``Path`` of what is typed."""
    for typed in (url, Path(url)):
        with pytest.raises(CheckpointError) as caught:
            storage_path(typed)
        assert "secret" not in str(caught.value)
        assert caught.value.expected


def test_a_folder_that_ends_in_a_colon_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one; two slashes still make an address."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "az:").mkdir()
    assert storage_path("az:/b") == Path("az:/b")
    with pytest.raises(CheckpointError, match="no such storage"):
        storage_path("az://b")


def test_a_storage_path_is_never_taken_for_a_local_one() -> None:
    """What would open a local file of that name fails instead."""
    with pytest.raises(TypeError):
        open(storage_path("s3://bucket/a"))  # noqa: PTH123, SIM115
    with pytest.raises(TypeError):
        Path(storage_path("s3://bucket/a"))


def test_a_checkpoint_is_the_same_from_a_storage(stored: Asked, tiny: TinyRun) -> None:
    """Headers and numbers; a tensor is read by its range."""
    ours, theirs = Checkpoint(BASE), Checkpoint(tiny.base)
    assert ours.tensors == theirs.tensors
    assert ours.config == theirs.config
    stored.ranges.clear()
    name = "model.layers.0.mlp.down_proj.weight"
    assert (ours.read(name, 3, 9) == theirs.read(name, 3, 9)).all()
    assert stored.total == ours.info(name).size_bytes // ours.info(name).shape[0] * 6


@pytest.mark.parametrize(("together", "requests"), [(0, 12), (2000, 10), (2 << 20, 1)])
def test_an_adapter_is_the_same_from_a_storage(
    stored: Asked, tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, together: int, requests: int
) -> None:
    """Its factors are asked for with their neighbours, every byte once, however many threads want them."""
    monkeypatch.setattr(load, "_TOGETHER_BYTES", together)
    ours, theirs = Adapter(ADAPTER), Adapter(tiny.adapters["final"])
    assert ours.adapted == theirs.adapted
    factors = [name for pair in ours.adapted for name in (pair.lora_B, pair.lora_A)]
    stored.ranges.clear()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ours.finite, factors * 3))
    for name, values in zip(factors * 3, found, strict=True):
        assert (values == theirs.finite(name)).all()
    assert (len(factors), len(stored.ranges)) == (12, requests)
    assert stored.total == sum(info.size_bytes for info in theirs.header.tensors.values())


def test_what_is_kept_of_an_adapter_is_bounded(stored: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read longest ago goes, and is read again where it is wanted again."""
    monkeypatch.setattr(load, "_TOGETHER_BYTES", 0)
    monkeypatch.setattr(load, "_KEPT_FAR_BYTES", 3000)
    adapter = Adapter(ADAPTER)
    factors = [name for pair in adapter.adapted for name in (pair.lora_A, pair.lora_B)]
    stored.ranges.clear()
    for name in (*factors, *factors, factors[-1]):
        adapter.finite(name)
        assert 0 < sum(one.nbytes for one in adapter._kept.values()) == adapter._kept_bytes <= 3000
    assert len(stored.ranges) == 24


@pytest.mark.parametrize(("rounding", "dtype"), [("nearest", "auto"), ("nearest", "bf16"), ("faithful", "bf16")])
@pytest.mark.usefixtures("stored")
def test_a_merge_from_a_storage_has_the_bytes_of_a_local_one(
    tiny: TinyRun, tmp_path: Path, rounding: str, dtype: str
) -> None:
    """Every file, and both plans say the same."""
    options = {"dtype": dtype, "rounding": rounding}
    local = ts.plan_merge(tiny.adapters["final"], tmp_path / "local", base=str(tiny.base), **options)
    far = ts.plan_merge(ADAPTER, tmp_path / "far", base=BASE, **options)
    assert far.shards == local.shards
    assert far.read_bytes == local.read_bytes
    ts.merge(local, certificate=False)
    ts.merge(far, certificate=False)
    assert files_of(tmp_path / "far") == files_of(tmp_path / "local")


def test_a_merge_reads_what_its_plan_says(asked: Asked, tmp_path: Path) -> None:
    """Each byte of base and adapter once, and the headers a few times more; with a certificate asked for, no more."""
    build_base(
        tmp_path / "base", hidden_size=512, intermediate_size=1024, num_hidden_layers=2
    ).bfloat16().save_pretrained(tmp_path / "base")
    adapter = build_adapter(
        tmp_path / "base",
        tmp_path / "adapter",
        seed=1,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    upload(tmp_path / "base", BASE)
    upload(adapter, ADAPTER)
    plan = ts.plan_merge(ADAPTER, tmp_path / "out", base=BASE, rounding="faithful")
    asked.ranges.clear()
    merged = ts.merge(plan)
    assert [finding.code for finding in merged.findings if finding.severity == "warning"] == ["certificate_not_written"]
    weights = sum(stop - start for name, start, stop in asked.ranges if name.endswith(".safetensors"))
    assert weights <= 1.05 * plan.read_bytes
    assert weights >= plan.read_bytes - 200_000  # headers, which the plan counts too


def test_an_answer_that_fails_now_and_then_changes_nothing(stored: Asked, tiny: TinyRun, tmp_path: Path) -> None:
    """Resets, short answers and long ones: asked again."""

    def unsteady(count: int, _start: int, data: bytes) -> bytes:
        if count % 5 == 1:
            raise ConnectionResetError("reset by peer")
        return {2: data[:-1], 4: data + b"x"}.get(count % 5, data)

    stored.answer = unsteady
    ts.merge(ts.plan_merge(ADAPTER, tmp_path / "far", base=BASE), certificate=False)
    stored.answer = lambda _count, _start, data: data
    ts.merge(ts.plan_merge(tiny.adapters["final"], tmp_path / "local", base=str(tiny.base)), certificate=False)
    assert files_of(tmp_path / "far") == files_of(tmp_path / "local")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda data: data[:-1], "The storage gives other bytes than were asked for."),
        (lambda data: data + b"\0", "The storage gives other bytes than were asked for."),
        (lambda _: (_ for _ in ()).throw(TimeoutError("late")), "The storage could not be reached"),
        (lambda _: (_ for _ in ()).throw(PermissionError("Forbidden")), "The storage refuses access."),
    ],
)
def test_an_answer_that_stays_wrong_is_an_error_and_leaves_nothing(
    stored: Asked, tmp_path: Path, wrong, sentence: str
) -> None:
    """Never a wrong shard, never one filled up with zeros."""
    plan = ts.plan_merge(ADAPTER, tmp_path / "out", base=BASE)
    stored.answer = lambda _count, start, data: wrong(data) if start > 100_000 else data
    with pytest.raises(TunesmithError) as caught:
        ts.merge(plan, certificate=False)
    assert caught.value.what.startswith(sentence)
    assert not list(tmp_path.iterdir())


def test_a_base_that_changes_meanwhile_is_noticed(stored: Asked, tiny: TinyRun, tmp_path: Path) -> None:
    """By its tag, though its size is the same."""
    plan = ts.plan_merge(ADAPTER, tmp_path / "out", base=BASE)
    done = []

    def changing(_count: int, start: int, data: bytes) -> bytes:
        if start > 100_000 and not done:
            done.append(1)
            upload(tiny.base, BASE)
        return data

    stored.answer = changing
    with pytest.raises(CheckpointError, match="changed while it was read"):
        ts.merge(plan, certificate=False)
    assert done
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("base", ["memory://bucket/nothing", "memory://nowhere/at/all"])
@pytest.mark.usefixtures("stored")
def test_a_base_that_is_not_there_is_told(tmp_path: Path, base: str) -> None:
    """By its address."""
    with pytest.raises(CheckpointError, match="The model directory is not there") as caught:
        ts.plan_merge(ADAPTER, tmp_path / "out", base=base)
    assert caught.value.where == base


@pytest.mark.usefixtures("stored")
def test_an_address_without_an_adapter_is_told(tmp_path: Path) -> None:
    """A whole run in a storage is none."""
    with pytest.raises(RunError, match="no adapter at this address"):
        ts.plan_merge("memory://bucket/run", tmp_path / "out", base=BASE)


def test_a_reader_asks_once_for_the_range_it_holds(asked: Asked) -> None:
    """Whatever is read of it, in whatever order; what lies outside is a request of its own."""
    data = bytes(range(256)) * 64
    fsspec.filesystem("memory").pipe_file("/b/file", data)
    path = storage_path("memory://b/file")
    reader = RangeReader(path, (1000, 9000))
    for start, stop in [(5000, 5010), (1000, 2000), (8999, 9000), (3, 7), (8990, 9010)]:
        view = memoryview(bytearray(stop - start))
        reader.read_into(view, start)
        assert bytes(view) == data[start:stop]
    assert [(start, stop) for _, start, stop in asked.ranges] == [(1000, 9000), (3, 7), (8990, 9010)]
    with pytest.raises(CheckpointError, match="other bytes"):
        read_at(path, len(data) - 4, 8)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, with the command to type."""
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(TunesmithError, match="gcsfs") as caught:
        Checkpoint("gs://bucket/base")
    assert caught.value.next_step == 'pip install "tunesmith[scale]"'


LEVELS = ("structure", "assets", "weights")
MERGED = "memory://bucket/merged"


@pytest.mark.usefixtures("stored")
def test_verify_says_of_a_storage_what_it_says_of_a_disk(tiny: TinyRun, tmp_path: Path) -> None:
    """Level by level and tensor by tensor; no certificate is written there, and that is told."""
    plan = ts.plan_merge(tiny.adapters["final"], tmp_path / "merged", base=str(tiny.base), dtype="bf16")
    ts.merge(plan, certificate=False)
    upload(tmp_path / "merged", MERGED)
    local = ts.verify(
        tiny.adapters["final"], tmp_path / "merged", base=str(tiny.base), levels=LEVELS, certificate=False
    )
    far = ts.verify(ADAPTER, MERGED, base=BASE, levels=LEVELS)
    assert far.answer == local.answer == "identical"
    assert [level.findings for level in far.levels] == [level.findings for level in local.levels]
    assert far.tensors == local.tensors
    assert far.certificate is not None
    assert far.certificate.code == "certificate_not_written"


def test_verify_reads_on_and_not_ten_times(stored: Asked, tiny: TinyRun) -> None:
    """Rows are asked for in few requests, and nearly nothing twice."""
    upload(tiny.merged, MERGED)
    ts.verify(ADAPTER, MERGED, base=BASE, levels=("structure", "weights"), certificate=False)
    size = sum(file.stat().st_size for folder in (tiny.base, tiny.merged) for file in folder.glob("*.safetensors"))
    weights = [stop - start for name, start, stop in stored.ranges if name.endswith(".safetensors")]
    assert sum(weights) < 4 * size


@pytest.mark.usefixtures("stored")
def test_verify_notices_one_changed_byte_in_a_storage(tiny: TinyRun) -> None:
    """The answer is different, and the tensor is named."""
    upload(tiny.merged, MERGED)
    assert ts.verify(ADAPTER, MERGED, base=BASE, levels=LEVELS).answer == "equal_within_rounding"
    fs = fsspec.filesystem("memory")
    header = Checkpoint(MERGED)
    info = header.info("model.layers.1.self_attn.q_proj.weight")
    data = bytearray(fs.cat_file("bucket/merged/model.safetensors"))
    data[info.begin + 3] ^= 0x40
    fs.pipe_file("bucket/merged/model.safetensors", bytes(data))
    verdict = ts.verify(ADAPTER, MERGED, base=BASE, levels=LEVELS)
    assert verdict.answer == "different"
    assert [tensor.name for tensor in verdict.tensors if tensor.outside or tensor.not_finite] == [info.name]


@pytest.mark.usefixtures("stored")
def test_behaviour_is_not_measured_from_a_storage(tiny: TinyRun) -> None:
    """A live model is loaded from a disk alone; that is said, and the rest stands."""
    upload(tiny.merged, MERGED)
    verdict = ts.verify(ADAPTER, MERGED, base=BASE)
    assert verdict.answer == "equal_within_rounding"
    assert [finding.code for finding in verdict.levels[3].findings] == ["behaviour_not_measured"]


@pytest.mark.usefixtures("stored")
def test_what_is_not_there_to_verify_is_told() -> None:
    """By its address."""
    with pytest.raises(CheckpointError, match="The merged model is not there") as caught:
        ts.verify(ADAPTER, "memory://bucket/none", base=BASE)
    assert caught.value.where == "memory://bucket/none"


@pytest.mark.usefixtures("stored")
def test_verbs_that_load_a_model_refuse_a_storage(tiny: TinyRun) -> None:
    """By one sentence, before torch is asked to open an address."""
    for run, options in ((ADAPTER, {}), (tiny.adapters["final"], {"base": BASE})):
        with pytest.raises(TunesmithError, match="can be merged and verified, and nothing else"):
            ts.compare(run, ["final"], **options)
    with pytest.raises(TunesmithError, match="can be merged and verified, and nothing else"):
        ts.open_run(ADAPTER)


def test_whoever_reads_on_is_given_what_was_read_ahead(asked: Asked) -> None:
    """One request for many rows, no byte beyond the tensor's end, and nothing of what another reader was given."""
    data = bytes(range(256)) * 64
    fsspec.filesystem("memory").pipe_file("/b/file", data)
    path, first, second = storage_path("memory://b/file"), object(), object()
    for start in range(100, 1100, 100):
        assert read_on(path, start, 100, end=1000, owner=first) == data[start : start + 100]
    assert [(start, stop) for _, start, stop in asked.ranges] == [(100, 200), (200, 1000), (1000, 1100)]
    fsspec.filesystem("memory").pipe_file("/b/file", bytes(len(data)))
    assert read_on(path, 300, 100, end=1000, owner=second) == bytes(100)

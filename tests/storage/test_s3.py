"""A real S3 API on the loopback: what memory cannot show, such as requests, tags, refusals and a bad connection."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tunesmith as ts
from tests.storage.conftest import files_of, upload
from tests.storage.server import Door, s3_server
from tests.tiny_models import TinyRun
from tunesmith.checkpoint import Checkpoint
from tunesmith.errors import CheckpointError, TunesmithError

pytest.importorskip("s3fs", reason="needs s3fs (the extra scale)")
pytest.importorskip("moto", reason="needs moto (the dev extra)")

BASE, ADAPTER = "s3://models/base", "s3://models/run/adapter"


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, Door]]:
    """The server."""
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(address: tuple[str, Door], tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> Door:
    """The tiny base and adapter in a bucket, and no faults."""
    url, door = address
    for key, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "a-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("tunesmith.checkpoint.storage._FIRST_WAIT_S", 0.001)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    door.fault = lambda _count, _environ: None
    fs = s3fs.S3FileSystem(use_listings_cache=False)
    if not fs.exists("models"):
        fs.mkdir("models")
        upload(tiny.base, BASE)
        upload(tiny.adapters["final"], ADAPTER)
    door.read_bytes, door.reads = 0, 0
    door.calls.clear()
    return door


def test_a_merge_from_s3_has_the_bytes_of_a_local_one(s3: Door, tiny: TinyRun, tmp_path: Path) -> None:
    """With few bytes more than the plan says, counted at the server."""
    local = ts.plan_merge(tiny.adapters["final"], tmp_path / "local", base=str(tiny.base))
    far = ts.plan_merge(ADAPTER, tmp_path / "far", base=BASE)
    ts.merge(local, certificate=False)
    s3.read_bytes = 0
    ts.merge(far, certificate=False)
    assert files_of(tmp_path / "far") == files_of(tmp_path / "local")
    assert s3.read_bytes <= 1.05 * far.read_bytes + 200_000  # headers and small files; the model itself is 0.6 MB


@pytest.mark.parametrize("fault", ["503", "short", "shifted"])
def test_a_bad_connection_is_asked_again(s3: Door, tiny: TinyRun, tmp_path: Path, fault: str) -> None:
    """Every third read fails, each in its way; the files are the same."""
    ts.merge(ts.plan_merge(tiny.adapters["final"], tmp_path / "local", base=str(tiny.base)), certificate=False)
    plan = ts.plan_merge(ADAPTER, tmp_path / "far", base=BASE)
    s3.fault = lambda count, environ: fault if count % 3 == 1 and "bytes=0-" not in environ["HTTP_RANGE"] else None
    ts.merge(plan, certificate=False)
    assert files_of(tmp_path / "far") == files_of(tmp_path / "local")


@pytest.mark.parametrize("fault", ["503", "short", "shifted"])
def test_a_connection_that_stays_bad_is_an_error(
    s3: Door, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left, and no secret is told."""
    monkeypatch.setattr("tunesmith.checkpoint.storage._TRIES", 2)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    plan = ts.plan_merge(ADAPTER, tmp_path / "far", base=BASE)
    s3.fault = lambda _count, environ: fault if "bytes=0-" not in environ["HTTP_RANGE"] else None
    with pytest.raises(CheckpointError, match="storage") as caught:
        ts.merge(plan, certificate=False)
    assert "a-secret" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("s3")
def test_what_is_not_there_is_told() -> None:
    """No such key, no such bucket."""
    for url in ("s3://models/nothing", "s3://no-such-bucket/base"):
        with pytest.raises(CheckpointError, match="The model directory is not there"):
            Checkpoint(url)


@pytest.mark.usefixtures("s3")
def test_no_credentials_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to set."""
    import s3fs

    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(key)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(TunesmithError, match="no credentials") as caught:
        Checkpoint(BASE)
    assert "AWS_PROFILE" in str(caught.value)


def test_a_refusal_is_told(s3: Door) -> None:
    """403 is not repeated."""
    app = s3.app

    def refusing(_environ: Any, start_response: Any) -> Any:
        start_response("403 Forbidden", [("Content-Length", "0")])
        return [b""]

    s3.app = refusing
    try:
        with pytest.raises(CheckpointError, match="refuses access"):
            Checkpoint(BASE)
        assert len(s3.calls) < 5
    finally:
        s3.app = app


OUT = "s3://models/merged"


@pytest.fixture
def target(s3: Door) -> Iterator[str]:
    """An address without objects, before and after."""
    import s3fs

    def clear() -> None:
        s3.fault = lambda _count, _environ: None
        fs = s3fs.S3FileSystem(use_listings_cache=False)
        for key in fs.find("models/merged"):
            fs.rm_file(key)

    clear()
    yield OUT
    clear()


def objects(url: str = OUT) -> dict[str, bytes]:
    """All objects below an address, by their names relative to it."""
    import s3fs

    fs, key = s3fs.S3FileSystem(use_listings_cache=False), url.removeprefix("s3://")
    return {name.removeprefix(f"{key}/"): fs.cat_file(name) for name in fs.find(key)}


@pytest.mark.parametrize(
    "executor",
    [
        "local",
        "processes:2",
        pytest.param("ray", marks=pytest.mark.cluster),
        pytest.param("dask", marks=pytest.mark.cluster),
    ],
)
def test_a_merge_from_s3_to_s3_has_the_bytes_of_a_local_one(
    target: str, tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: str
) -> None:
    """Wherever its units run; and verify finds it there."""
    monkeypatch.setenv("RAY_ADDRESS", "local")  # the workers of one that runs already have no credentials
    options = {"shard_size": "150KB"}
    local = ts.plan_merge(tiny.adapters["final"], tmp_path / "local", base=str(tiny.base), **options)
    ts.merge(local, certificate=False)
    levels = ("structure", "assets", "weights")
    with ts.executor_of(executor) as pool:
        ts.merge(ts.plan_merge(ADAPTER, target, base=BASE, **options), executor=pool, certificate=False)
        verdict = ts.verify(ADAPTER, target, base=BASE, levels=levels, executor=pool)
    assert objects() == files_of(tmp_path / "local")
    assert verdict.answer in ("identical", "equal_within_rounding")


def test_a_merge_that_s3_refuses_is_told_and_goes_on(s3: Door, target: str, tiny: TinyRun, tmp_path: Path) -> None:
    """The second shard is refused; the first stays, and is not made again."""
    options = {"base": BASE, "shard_size": "150KB"}
    app, last = s3.app, "model-00003"

    def refusing(environ: Any, start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] in ("PUT", "POST") and last in environ["PATH_INFO"]:
            start_response("403 Forbidden", [("Content-Length", "0")])
            return [b""]
        return app(environ, start_response)

    s3.app = refusing
    try:
        with pytest.raises(TunesmithError, match="refuses access") as caught:
            ts.merge(ts.plan_merge(ADAPTER, target, **options), certificate=False)
    finally:
        s3.app = app
    assert "repeat the same command" in str(caught.value)
    assert "a-secret" not in str(caught.value)
    left = objects()
    assert "config.json" not in left
    assert not any(name.startswith(last) for name in left)
    merged = ts.merge(ts.plan_merge(ADAPTER, target, **options), certificate=False)
    assert merged.resumed_bytes > 0
    local = ts.plan_merge(tiny.adapters["final"], tmp_path / "local", base=str(tiny.base), shard_size="150KB")
    ts.merge(local, certificate=False)
    assert objects() == files_of(tmp_path / "local")


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_is_not_there_is_told(tmp_path: Path) -> None:
    """Before any weight is read."""
    plan = ts.plan_merge(ADAPTER, "s3://no-such-bucket/out", base=BASE)
    with pytest.raises(TunesmithError, match="no such bucket"):
        ts.merge(plan, certificate=False)
    assert not list(tmp_path.iterdir())


def test_an_upload_that_is_called_off_leaves_no_parts(target: str) -> None:
    """Parts that were sent would be paid for, though nobody sees them."""
    import s3fs

    from tunesmith.checkpoint import Upload, storage_path

    def interrupted() -> None:
        with Upload(storage_path(f"{target}/large")) as upload:  # type: ignore[arg-type]
            for place in range(3):
                upload.write(bytes(17 << 20), place * (17 << 20))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    fs = s3fs.S3FileSystem(use_listings_cache=False)
    assert not fs.exists("models/merged/large")
    assert not fs.call_s3("list_multipart_uploads", Bucket="models").get("Uploads")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(s3: Door, target: str, tmp_path: Path) -> None:
    """A model of 600 MB passes in a process that holds some units of it (300 MiB, and 270 for half of that model)."""
    import subprocess
    import sys

    from tests.storage.large import write_large

    base, adapter = write_large(tmp_path, megabytes=600)
    upload(base, "s3://models/large/base")
    upload(adapter, "s3://models/large/adapter")
    s3.read_bytes = 0
    command = [
        sys.executable,
        "-m",
        "tests.storage.large",
        "s3://models/large/adapter",
        "s3://models/large/base",
        target,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    planned, before, peak = map(int, done.stdout.split())
    assert s3.read_bytes <= 1.05 * planned + 500_000
    assert peak - before < 420 << 20


def run(*words: str, code: int = 0) -> str:
    """The command line, in a process of its own; returns what it said."""
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-m", "tunesmith", *words], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "a-secret" not in done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.usefixtures("s3")
def test_the_command_line_takes_addresses(target: str) -> None:
    """A ``Path`` of typer's takes a slash away, which is known."""
    said = run("merge", ADAPTER, "--base", BASE, "--out", target)
    assert target in said
    assert "config.json" in objects()
    said = run(
        "verify", ADAPTER, target, "--base", BASE, "--level", "structure", "--level", "assets", "--level", "weights"
    )
    assert "dentical" in said or "rounding" in said


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize(
    ("base", "sentence"),
    [
        ("s3://no-such-bucket/a", "The model directory is not there."),
        ("s3://key:a-secret@models/base", "must not hold credentials"),
    ],
)
def test_the_command_line_says_what_is_wrong(base: str, sentence: str, tmp_path: Path) -> None:
    """One sentence, exit 2, and no secret."""
    assert sentence in run("merge", ADAPTER, "--base", base, "--out", str(tmp_path / "out"), code=2)

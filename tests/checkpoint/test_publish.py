"""Publishing: a directory appears whole or not at all, and never over something that is needed."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tunesmith.checkpoint import (
    check_free_space,
    check_out_dir,
    copy_range,
    publish,
    sha256_of,
    staged_directory,
    weights_sha256,
    write_at,
    write_error,
)
from tunesmith.errors import Cancelled, OutputError


def listing(folder: Path) -> list[str]:
    """Every path below a folder, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def fill(folder: Path, text: str = "new") -> None:
    """Two files, one of them in a folder."""
    (folder / "sub").mkdir()
    (folder / "a").write_text(text)
    (folder / "sub" / "b").write_text(text)


def fill_and_fail(out: Path, error: BaseException, *, force: bool = False) -> None:
    """Begin to fill a directory, and fail."""
    with staged_directory(out, force=force) as stage:
        fill(stage)
        raise error


def test_a_staged_directory_appears_whole_at_the_end(tmp_path: Path) -> None:
    """Not before the end, with its parents, and nothing beside it."""
    out = tmp_path / "x" / "y" / "out"
    with staged_directory(out) as stage:
        fill(stage)
        assert not out.exists()
        assert stage.parent == out.parent  # so that the last step is one rename
    assert listing(tmp_path) == ["x", "x/y", "x/y/out", "x/y/out/a", "x/y/out/sub", "x/y/out/sub/b"]


def test_a_staged_directory_has_the_mode_that_mkdir_would_give(tmp_path: Path) -> None:
    """A temporary directory is private; a published one follows the umask."""
    before = os.umask(0o027)
    try:
        with staged_directory(tmp_path / "out") as stage:
            (stage / "a").write_text("x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "out" / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, Cancelled, GeneratorExit])
def test_nothing_is_left_when_the_filling_fails(tmp_path: Path, error: type[BaseException]) -> None:
    """The stage goes, and so do the parents that were made for it; those that were there stay."""
    (tmp_path / "there").mkdir()
    with pytest.raises(error):
        fill_and_fail(tmp_path / "there" / "x" / "y" / "out", error())
    assert listing(tmp_path) == ["there"]


def test_an_empty_target_is_filled_and_left_empty_on_failure(tmp_path: Path) -> None:
    """A directory that the user made is theirs."""
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ValueError, match="no"), staged_directory(out):
        raise ValueError("no")
    assert listing(tmp_path) == ["out"]
    with staged_directory(out) as stage:
        fill(stage)
    assert (out / "a").read_text() == "new"


def test_a_target_that_became_full_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """Without force the last step itself refuses."""
    out = tmp_path / "out"
    with ExitStack() as stack:
        stage = stack.enter_context(staged_directory(out))
        fill(stage)
        out.mkdir()
        (out / "theirs").write_text("x")
        with pytest.raises(OutputError):
            stack.close()
    assert listing(tmp_path) == ["out", "out/theirs"]


def test_force_swaps_the_whole_directory(tmp_path: Path) -> None:
    """No file of the old one survives among the new ones."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with staged_directory(out, force=True) as stage:
        fill(stage)
        assert listing(out) == ["old"]
    assert listing(tmp_path) == ["out", "out/a", "out/sub", "out/sub/b"]


def test_force_keeps_the_old_directory_when_the_filling_fails(tmp_path: Path) -> None:
    """It stays whole until the new one is."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        fill_and_fail(out, KeyboardInterrupt(), force=True)
    assert listing(tmp_path) == ["out", "out/old"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "gone")])
@pytest.mark.parametrize("failing", [1, 2])
def test_the_old_directory_comes_back_when_the_swap_itself_is_broken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, failing: int
) -> None:
    """Whichever of its two renames fails, and be it by Ctrl-C."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    calls = []

    def rename(self: Path, target: Path, real: Callable[..., Any] = Path.rename) -> Any:
        calls.append(self)
        if len(calls) == failing:
            raise error
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected), staged_directory(out, force=True) as stage:
        fill(stage)
    assert listing(tmp_path) == ["out", "out/old"]


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    """In the words of the user's problem, with nothing left behind."""
    with pytest.raises(OutputError, match="disk is full") as caught, staged_directory(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.where == str(tmp_path / "out")
    assert listing(tmp_path) == []


def test_a_write_beyond_the_real_limit_leaves_nothing(tmp_path: Path) -> None:
    """A process of its own whose files may not grow beyond 4 KiB, as the system itself enforces it."""
    code = (
        "import resource, signal, sys, pathlib\n"
        "from tunesmith.checkpoint import staged_directory\n"
        "from tunesmith.errors import OutputError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    with staged_directory(pathlib.Path(sys.argv[1])) as stage:\n"
        "        (stage / 'a').write_bytes(bytes(1 << 20))\n"
        "except OutputError:\n"
        "    sys.exit(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "p" / "out")], check=False)
    assert done.returncode == 7
    assert listing(tmp_path) == []


def test_a_parent_that_is_a_file_is_an_output_error(tmp_path: Path) -> None:
    """Not a traceback."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError), staged_directory(tmp_path / "file" / "out"):
        pytest.fail("the body must not run")


def test_write_errors_keep_the_systems_own_words() -> None:
    """For all but a full disk."""
    found = write_error(PermissionError(errno.EACCES, "Permission denied"), Path("out"))
    assert found.found == "Permission denied"
    assert "full" in write_error(OSError(errno.EDQUOT, "Quota"), Path("out")).what


@pytest.fixture
def house(tmp_path: Path) -> dict[str, Path]:
    """A base and a run, as inputs."""
    inputs = {"base model": tmp_path / "base", "run": tmp_path / "work" / "run"}
    for folder in inputs.values():
        folder.mkdir(parents=True)
    return inputs


@pytest.mark.parametrize(
    ("out", "role"),
    [
        ("base", "base model"),
        ("base/merged", "base model"),
        ("base/../base", "base model"),
        ("work", "run"),
        ("work/run", "run"),
        ("work/run/merged", "run"),
        ("link", "base model"),
        ("link/x/y", "base model"),
        (".", "base model"),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_a_target_that_overlaps_an_input_is_refused(
    tmp_path: Path, house: dict[str, Path], out: str, role: str, *, force: bool
) -> None:
    """The same directory, inside, above, or through a link; force does not help."""
    (tmp_path / "link").symlink_to(tmp_path / "base")
    with pytest.raises(OutputError, match=f"overlaps the {role}"):
        check_out_dir(tmp_path / out, force=force, inputs=house)


def test_a_target_beside_the_inputs_is_allowed(tmp_path: Path, house: dict[str, Path]) -> None:
    """Also where one name begins with the other, where parents are missing, and where it is there but empty."""
    (tmp_path / "empty").mkdir()
    for out in ("base-merged", "work/run2", "new/deep/out", "empty"):
        check_out_dir(tmp_path / out, force=False, inputs=house)
    assert not (tmp_path / "new").exists()


def test_a_full_target_needs_force(tmp_path: Path, house: dict[str, Path]) -> None:
    """And the message says so."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").write_text("x")
    with pytest.raises(OutputError, match="not empty") as caught:
        check_out_dir(tmp_path / "out", force=False, inputs=house)
    assert "--force" in str(caught.value.next_step)
    check_out_dir(tmp_path / "out", force=True, inputs=house)


@pytest.mark.parametrize("force", [False, True])
def test_a_target_that_is_a_file_is_refused(tmp_path: Path, house: dict[str, Path], *, force: bool) -> None:
    """Also below one; force never removes a file."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        check_out_dir(tmp_path / "file", force=force, inputs=house)
    with pytest.raises(OutputError, match="cannot be written"):
        check_out_dir(tmp_path / "file" / "out", force=force, inputs=house)


def test_a_parent_without_write_permission_is_refused(
    tmp_path: Path, house: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the work, not after it."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="parent directory cannot be written"):
        check_out_dir(tmp_path / "out", force=False, inputs=house)


def test_too_little_space_is_refused_before_the_work(tmp_path: Path) -> None:
    """With both figures; the target need not be there yet."""
    check_free_space(tmp_path / "no" / "such", 1)
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(OutputError, match="not enough disk space") as caught:
        check_free_space(tmp_path / "no" / "such", free * 2)
    assert "MiB free" in str(caught.value.expected)
    assert "MiB free" in str(caught.value.found)


@pytest.mark.parametrize("way", ["kernel", "refused", "absent"])
def test_copy_range_copies_exactly_its_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """By the kernel, or by hand where the kernel will not or cannot; the bytes around it stay."""
    if way == "absent":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    if way == "refused":

        def refuse(*_: object) -> int:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    monkeypatch.setattr(publish, "_CHUNK_BYTES", 1000)
    data = os.urandom(5000)
    (tmp_path / "source").write_bytes(data)
    (tmp_path / "target").write_bytes(bytes(5000))
    with (tmp_path / "source").open("rb") as source, (tmp_path / "target").open("rb+") as target:
        copy_range(source.fileno(), target.fileno(), 17, 4321)
        copy_range(source.fileno(), target.fileno(), 3, 0)
    assert (tmp_path / "target").read_bytes() == bytes(17) + data[17 : 17 + 4321] + bytes(5000 - 17 - 4321)


@pytest.mark.parametrize("way", ["kernel", "absent"])
def test_copy_range_notices_a_source_that_became_shorter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Rather than loop, or leave zeros."""
    if way == "absent":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    (tmp_path / "source").write_bytes(b"short")
    with (
        (tmp_path / "source").open("rb") as source,
        (tmp_path / "target").open("wb") as target,
        pytest.raises(OSError, match="shorter"),
    ):
        copy_range(source.fileno(), target.fileno(), 0, 100)


def test_copy_range_hands_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no reason to try another way."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full, raising=False)
    (tmp_path / "source").write_bytes(b"x")
    with (
        (tmp_path / "source").open("rb") as source,
        (tmp_path / "target").open("wb") as target,
        pytest.raises(OSError, match="No space"),
    ):
        copy_range(source.fileno(), target.fileno(), 0, 1)


def test_write_at_writes_all_even_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may take less than it is given."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: real(file, data[:7], offset))
    with (tmp_path / "x").open("wb") as file:
        assert write_at(file.fileno(), bytes(range(100)), 5) == 100
    assert (tmp_path / "x").read_bytes() == bytes(5) + bytes(range(100))


def test_sha256_is_the_systems_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without hashlib's file_digest, which Python 3.10 lacks."""
    data = os.urandom(100_000)
    (tmp_path / "x").write_bytes(data)
    expected = hashlib.sha256(data).hexdigest()
    assert sha256_of(tmp_path / "x") == expected
    monkeypatch.delattr(hashlib, "file_digest", raising=False)
    assert sha256_of(tmp_path / "x") == expected


def test_the_weights_hash_is_sha256sums_of_its_own_listing(tmp_path: Path) -> None:
    """So that anyone can check it with coreutils; other files do not count."""
    for name in ("b.safetensors", "a.safetensors", "config.json"):
        (tmp_path / name).write_bytes(name.encode() * 50)
    if shutil.which("sha256sum"):
        command = "LC_ALL=C sha256sum *.safetensors | sha256sum"
        shell = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert weights_sha256(tmp_path) == shell.stdout.split()[0]
    before = weights_sha256(tmp_path)
    (tmp_path / "config.json").write_text("changed")
    assert weights_sha256(tmp_path) == before
    (tmp_path / "a.safetensors").rename(tmp_path / "c.safetensors")
    assert weights_sha256(tmp_path) != before

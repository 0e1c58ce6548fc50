"""Pickles are scanned and never opened: what would run is named, and what trainers write is not."""

from __future__ import annotations

import argparse
import collections
import io
import operator
import os
import pickle
import random
import runpy
import struct
import subprocess
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.runs import pickles
from tunesmith.runs.files import list_files
from tunesmith.runs.pickles import UNREADABLE, scan_pickle, scan_run

COMMAND = "touch executed"  # in the working directory, which is the test's own


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def text(value: str) -> bytes:
    """The opcode that pushes a text."""
    raw = value.encode()
    return b"\x8c" + bytes([len(raw)]) + raw


def binary(function: Any, *arguments: Any, protocol: int = 2) -> bytes:
    """A pickle that calls a function."""
    return pickle.dumps(Call(function, *arguments), protocol)


def attribute(owner: Any, name: str) -> bytes:
    """A pickle that looks up an attribute, as Python 3.11.0 did for members of enumerations."""
    return binary(getattr, owner, name)


MALICIOUS: dict[str, tuple[bytes, str]] = {
    "os.system": (binary(os.system, COMMAND), "posix.system"),
    "subprocess": (binary(subprocess.Popen, ["touch", "executed"], protocol=4), "subprocess.Popen"),
    "eval, as Python 2 spelled it": (binary(eval, "open('executed', 'w')", protocol=0), "__builtin__.eval"),
    "exec": (binary(exec, "open('executed', 'w')", protocol=5), "builtins.exec"),
    "runpy": (binary(runpy.run_path, "executed.py"), "runpy.run_path"),
    "attrgetter": (binary(operator.attrgetter, "system", protocol=4), "operator.attrgetter"),
    "a memoised STACK_GLOBAL": (
        b"\x80\x04"
        + text("posix")
        + b"\x940"
        + text("system")
        + b"\x94K\x01h\x00h\x01\x93"
        + text(COMMAND)
        + b"\x85R.",
        "posix.system",
    ),
    "texts put by hand, of which others lie between": (
        b"\x80\x02X\x05\x00\x00\x00posixq\x05X\x06\x00\x00\x00systemq\x07N00h\x05h\x07\x93.",
        "posix.system",
    ),
    "INST": (b"(S'" + COMMAND.encode() + b"'\nios\nsystem\n.", "os.system"),
    "OBJ": (b"(cos\nsystem\nS'" + COMMAND.encode() + b"'\no.", "os.system"),
    "NEWOBJ": (b"\x80\x02csubprocess\nPopen\n" + b"X\x05\x00\x00\x00touch\x85\x81.", "subprocess.Popen"),
    "a pickle in a pickle": (
        b"\x80\x02ctorch.storage\n_load_from_bytes\n" + b"C\x03abc\x85R.",
        "torch.storage._load_from_bytes",
    ),
    "torch.load": (b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00x\x85R.", "torch.load"),
    "torch.hub": (b"\x80\x02ctorch.hub\nload\nX\x01\x00\x00\x00x\x85R.", "torch.hub.load"),
    "numpy.load": (b"\x80\x02cnumpy\nload\nX\x01\x00\x00\x00x\x85R.", "numpy.load"),
    "an allowed module with a name in it": (
        b"\x80\x04" + text("torch") + text("os.system") + b"\x93.",
        "torch.os.system",
    ),
    "from_pretrained of an allowed class": (
        b"\x80\x04" + text("transformers.training_args") + text("TrainingArguments.from_pretrained") + b"\x93.",
        "transformers.training_args.TrainingArguments.from_pretrained",
    ),
    "getattr of a class's own methods": (
        b"\x80\x02c__builtin__\ngetattr\nctransformers.trainer_utils\nIntervalStrategy\n"
        b"X\x08\x00\x00\x00__init__\x86R.",
        "__builtin__.getattr",
    ),
    "getattr handed on as a value": (
        b"\x80\x02ccollections\ndefaultdict\ncbuiltins\ngetattr\n\x85R.",
        "builtins.getattr",
    ),
    "a chain of calls": (b"\x80\x02ccollections\nOrderedDict\n)R)R.", "?"),
    "a name that is computed": (
        b"\x80\x04" + text("posix") + b"c_codecs\nencode\n" + text("system") + b"\x85R\x93.",
        "?",
    ),
    "an extension code": (b"\x80\x02\x82\x05)R.", "copyreg.extension(5)"),
    "a name before the damage": (b"\x80\x02cos\nsystem\nX\x05\x00\x00\x00toolong", "os.system"),
}


def archive(program: bytes, *, name: str = "run/data.pkl", packed: int = zipfile.ZIP_STORED) -> bytes:
    """A file as ``torch.save`` writes it, around a pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packed) as made:
        made.writestr(name, program)
        made.writestr("run/version", "3\n")
    return file.getvalue()


def legacy(program: bytes) -> bytes:
    """A file as ``torch.save`` wrote it until 1.6: five pickles, then numbers."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    numbers = random.Random(1).randbytes(4096)  # noqa: S311 - the same each time
    return b"".join(pickle.dumps(part, 2) for part in head) + program + pickle.dumps([], 2) + numbers


WRAPPINGS: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda program: program,
    "archive": archive,
    "packed archive": lambda program: archive(program, packed=zipfile.ZIP_DEFLATED),
    "archive with another name": lambda program: archive(program, name="run/DATA.PKL"),
    "legacy": legacy,
    "after a harmless pickle": lambda program: pickle.dumps({"a": 1}, 2) + program,
}


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every payload here makes a file in the working directory; none may exist after any test."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("attack", "wrapping"),
    [
        (attack, wrapping)
        for attack, (_, name) in MALICIOUS.items()
        for wrapping in WRAPPINGS
        # What follows a plain pickle may be numbers, which seem to compute names.
        if not (wrapping == "after a harmless pickle" and name == "?")
    ],
)
def test_what_a_pickle_would_run_is_named_and_not_run(tmp_path: Path, attack: str, wrapping: str) -> None:
    """However it is spelled, and in whatever file."""
    program, name = MALICIOUS[attack]
    path = tmp_path / "optimizer.pt"
    path.write_bytes(WRAPPINGS[wrapping](program))
    assert name in scan_pickle(path)


def states() -> dict[str, Any]:
    """What trainers save, of each kind."""
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    numbers = [torch.zeros(2, dtype=kind) for kind in (torch.float16, torch.bfloat16, torch.int64, torch.bool)]
    return {
        "optimizer": optimizer.state_dict(),
        "scheduler": schedule.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "rng": {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()},
        "tensors": [*numbers, torch.nn.Parameter(torch.zeros(2))],
        "settings": argparse.Namespace(device=torch.device("cpu"), dtype=torch.bfloat16, size=torch.Size([1])),
        "numpy": {"a": np.float64(1.0), "b": np.arange(3), "c": {1, 2}, "d": b"x", "e": 1j},
        "model": collections.OrderedDict(model.state_dict()),
    }


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("kind", list(states()))
def test_what_trainers_save_is_not_suspicious(tmp_path: Path, kind: str, new: bool) -> None:
    """A warning on every run would be read by nobody; both formats of ``torch.save``."""
    torch.save(states()[kind], tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    assert scan_pickle(tmp_path / "x.pt") == ()


def test_new_number_formats_are_not_suspicious(tmp_path: Path) -> None:
    """PyTorch pickles formats that have no storage of their own in another way."""
    torch.save([torch.zeros(2, dtype=torch.float8_e4m3fn), torch.zeros(2, dtype=torch.uint16)], tmp_path / "x.pt")
    assert scan_pickle(tmp_path / "x.pt") == ()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    """Accelerate and others write plain pickles, in whatever protocol."""
    content = {"python": random.getstate(), "numpy": np.random.get_state(), "set": {1, 2}, "text": "é" * 300}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol))
    assert scan_pickle(tmp_path / "x.pkl") == ()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of Transformers, about settings that TRL passes on
@pytest.mark.parametrize("name", ["SFTConfig", "DPOConfig", "GRPOConfig", "RewardConfig"])
def test_the_settings_of_trl_are_not_suspicious(tmp_path: Path, name: str) -> None:
    """``training_args.bin`` holds the settings' class, its enumerations and Accelerate's state."""
    trl = pytest.importorskip("trl")
    torch.save(getattr(trl, name)(output_dir=str(tmp_path), report_to=[], use_cpu=True), tmp_path / "training_args.bin")
    assert scan_pickle(tmp_path / "training_args.bin") == ()


def test_members_of_enumerations_may_be_looked_up(tmp_path: Path) -> None:
    """Python 3.11.0 pickled enumerations by name, through ``getattr``."""
    program = (
        b"\x80\x02c__builtin__\ngetattr\nctransformers.trainer_utils\nIntervalStrategy\nX\x05\x00\x00\x00STEPS\x86R."
    )
    (tmp_path / "training_args.bin").write_bytes(program)
    assert scan_pickle(tmp_path / "training_args.bin") == ()


def test_the_metadata_of_a_distributed_checkpoint_is_not_suspicious(tmp_path: Path) -> None:
    """FSDP's ``.metadata`` is a plain pickle, which PyTorch opens."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

    content = Metadata({"a": BytesStorageMetadata()}, storage_data={MetadataIndex("a"): Path("x")})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(content))
    assert scan_pickle(tmp_path / ".metadata") == ()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        b"\x80\x02",
        b"\x80\x02}q\x00(X\xff\xff\xff\x7f",
        b"PK\x03\x04",
        b"PK\x03\x04" + os.urandom(200),
        archive(b"\x80\x02N.")[:-9],
        archive(b"N", name="run/other"),
        b"h\x05.",
        b"S'\\('\n",
        b"R.",
        b"(" * 5000,
    ],
)
def test_a_damaged_pickle_is_unreadable_and_no_error(tmp_path: Path, content: bytes) -> None:
    """A copy that broke off is no attack, but was not checked either."""
    (tmp_path / "x.pt").write_bytes(content)
    assert scan_pickle(tmp_path / "x.pt")[-1] == UNREADABLE


def test_an_old_file_that_breaks_off_in_its_object_is_unreadable(tmp_path: Path) -> None:
    """Its first three pickles are whole and say nothing; the fourth is what matters."""
    whole = legacy(pickle.dumps({"a": [1] * 50}, 2))
    (tmp_path / "x.pt").write_bytes(whole[: whole.index(b"K\x01K\x01") + 20])
    assert scan_pickle(tmp_path / "x.pt") == (UNREADABLE,)


def test_what_is_no_file_is_unreadable(tmp_path: Path) -> None:
    """A pipe would wait for ever."""
    os.mkfifo(tmp_path / "x.pt")
    assert scan_pickle(tmp_path / "x.pt") == (UNREADABLE,)
    assert scan_pickle(tmp_path / "none.pt") == (UNREADABLE,)


@pytest.mark.parametrize("hidden", ["checksum", "encrypted", "local name"])
def test_archives_that_zipfile_refuses_are_read(tmp_path: Path, hidden: str) -> None:
    """PyTorch reads them; a scanner that relies on ``zipfile`` sees nothing."""
    raw = bytearray(archive(MALICIOUS["os.system"][0]))
    directory = raw.index(b"PK\x01\x02")
    if hidden == "checksum":
        raw[directory + 16 : directory + 20] = b"\0\0\0\0"
    elif hidden == "encrypted":
        raw[directory + 8] |= 1
    else:
        raw[30] ^= 1
    (tmp_path / "x.pt").write_bytes(raw)
    with pytest.raises((zipfile.BadZipFile, RuntimeError)), zipfile.ZipFile(tmp_path / "x.pt") as file:
        file.read("run/data.pkl")
    assert scan_pickle(tmp_path / "x.pt") == ("posix.system",)


def test_a_bomb_does_not_expand(tmp_path: Path) -> None:
    """A quarter of a megabyte that unpacks to 256 MiB, and a directory that claims to be endless."""
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("a/data.pkl", "w") as member:
        for _ in range(256):
            member.write(b"N" * 2**20)
    tracemalloc.start()
    began = time.monotonic()
    result = scan_pickle(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result == (UNREADABLE,)
    assert peak < 64 * 2**20
    assert time.monotonic() - began < 10


def test_a_directory_that_claims_to_be_endless_is_unreadable(tmp_path: Path) -> None:
    """The length is the file's own word."""
    raw = bytearray(archive(b"\x80\x02N."))
    end = raw.index(b"PK\x05\x06")
    struct.pack_into("<I", raw, end + 12, 0xFFFFFFF0)
    (tmp_path / "x.pt").write_bytes(raw)
    assert scan_pickle(tmp_path / "x.pt") == (UNREADABLE,)


def test_no_damage_raises(tmp_path: Path) -> None:
    """A thousand files with bytes changed, cut or put in."""
    chance = random.Random(5)  # noqa: S311 - damage need not be secret
    torch.save(states()["optimizer"], tmp_path / "sound.pt")
    sound = [(tmp_path / "sound.pt").read_bytes(), *(legacy(program) for program, _ in MALICIOUS.values())]
    for _ in range(1000):
        raw = bytearray(chance.choice(sound))
        for _ in range(chance.randint(1, 8)):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        (tmp_path / "x.pt").write_bytes(raw[: chance.randint(0, len(raw))])
        assert isinstance(scan_pickle(tmp_path / "x.pt"), tuple)


def test_names_are_few_and_short(tmp_path: Path) -> None:
    """What a stranger's file says is shown to people."""
    lines = b"".join(b"cmodule%d\n%s\n" % (number, b"x" * 5000) for number in range(1000))
    (tmp_path / "x.pt").write_bytes(b"\x80\x02" + lines + b".")
    names = scan_pickle(tmp_path / "x.pt")
    assert 0 < len(names) < 20
    assert max(map(len, names)) < 100


def test_a_run_says_which_pickles_are_suspicious(tmp_path: Path) -> None:
    """The same code in several files is one finding; files that are no pickles by their kind are not looked at."""
    program, name = MALICIOUS["os.system"]
    for folder in ("checkpoint-10", "checkpoint-20"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "optimizer.pt").write_bytes(archive(program))
    (tmp_path / "training_args.bin").write_bytes(b"x")
    (tmp_path / "notes.txt").write_bytes(program)
    suspicious, unreadable = sorted(scan_run(tmp_path, list_files(tmp_path)[0]), key=lambda finding: finding.code)
    assert (suspicious.code, suspicious.severity) == ("pickle_suspicious", "error")
    assert suspicious.params == {"file": "checkpoint-20/optimizer.pt", "count": 2, "names": name}
    assert (unreadable.code, unreadable.params) == ("pickle_unreadable", {"file": "training_args.bin", "count": 1})


def test_the_root_and_the_last_checkpoint_are_scanned_whatever_else_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two hundred checkpoints not all can be looked at; the one that would be resumed from is."""
    monkeypatch.setattr(pickles, "_FURTHER_SECONDS", 0)
    program, _ = MALICIOUS["os.system"]
    for step in (9, 100, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "rng_state.pth").write_bytes(b"\x80\x02N.")
    (tmp_path / "checkpoint-1000" / "optimizer.pt").write_bytes(program)
    (tmp_path / "checkpoint-9" / "optimizer.pt").write_bytes(MALICIOUS["subprocess"][0])
    (tmp_path / "training_args.bin").write_bytes(MALICIOUS["eval, as Python 2 spelled it"][0])
    findings = scan_run(tmp_path, list_files(tmp_path)[0])
    assert {finding.params["names"] for finding in findings} == {"posix.system", "__builtin__.eval"}


def test_time_for_a_run_is_bounded(tmp_path: Path) -> None:
    """Sixty pickles at the root that would each take seconds: what there was no time for counts as unread."""
    for number in range(60):
        (tmp_path / f"f{number}.pkl").write_bytes(b"\x80\x02" + b"N0" * 10**6 + str(number).encode())
    began = time.monotonic()
    findings = scan_run(tmp_path, list_files(tmp_path)[0])
    assert time.monotonic() - began < 5
    assert [finding.params["count"] for finding in findings] == [60]

"""Run directories of the corpus, damaged in ways that are drawn from a seed; and what must be true of opening them.

A case is made from its seed alone, so that a bad one can be made again.  Whatever a directory holds, opening it ends
with a record or with an error of ours, soon, in little memory, and leaves it as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import stat
import time
import traceback
import unicodedata
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from typer.testing import CliRunner

import tunesmith as ts
from tunesmith.cli.app import app
from tunesmith.errors import TunesmithError
from tunesmith.runs import open_run

CORPUS = Path(__file__).parent / "corpus"
HUB = (
    "hub-cache/models--org--capitals-lora/snapshots/"
    + (CORPUS / "hub-cache/models--org--capitals-lora/refs/main").read_text()
)
SOURCES = [
    "axolotl", "llamafactory-aborted", "llamafactory-cli", "llamafactory-predict", "llamafactory-resumed",
    "llamafactory-webui", "mlx-lm", "ms-swift", "ms-swift/v0-20261126-003800", "peft", "trainer", "trl",
    "trl/checkpoint-8", "unsloth", "unsloth-saved", HUB,
]  # fmt: skip

NUMBERS = [
    "-1", "0", "-0.0", "1e-400", "1e400", "-1e400", "NaN", "Infinity", "-Infinity", "9007199254740993", "1" + "0" * 99,
    "1" + "0" * 5000, "18446744073709551616", "0.1e1", "3.0000000000000001", "2147483648",
]  # fmt: skip
TEXTS = [
    "", "1e-4", "12", "0/0", "7/", "nan", "\\u0000", "\\ud800", "\\udfff\\ud800", "\\u001b[31mred\\u001b[0m",
    "\\u202eevil", "\\u0007\\b\\r\\n", "[bold]x[/bold]", "[/]", "[link=x]", "<script>alert(1)</script>", "%s%n{}",
    "../../../etc/passwd", "/dev/zero", "checkpoint-4/../../..", "checkpoint-99999999999999999999", "~", "~root",
    "org/name", "-rf", "é" * 9, "𝕳", "x" * 200_000, "1" * 10_000, "9" * 4_000 + ":59",
    "| a | b |", "C:\\\\out\\\\checkpoint-12\\\\",
]  # fmt: skip
VALUES = [
    *NUMBERS, *(f'"{text}"' for text in TEXTS), "true", "false", "null", "[]", "{}", "[[]]", "[null]",
    '[1,"a",null,{}]', '{"a":{"b":[]}}', '[{"step":{}}]', "[" * 200 + "]" * 200, "[" * 100_000 + "]" * 100_000,
    '{"a":' * 100_000, "[" * 100_000, "[" + "0," * 50_000 + "0]", '{"step":1,' * 300 + '"a":1' + "}" * 300,
    "'single'", "undefined",
]  # fmt: skip
YAML_VALUES = [
    "2e-4", ".nan", ".inf", "-.inf", "0x" + "f" * 4000, "1" * 5000, "1:30:30", "9" * 3000 + ":59", "2026-13-45",
    "2026-02-30 25:61:61", "!!python/object/apply:os.system ['true']", "!!binary '?'", "!!int x", "!!float ''",
    "!!bool maybe", "!!timestamp 9", "!!null x", "!!set {a, b}", "!!omap [a]", "!<tag:yaml.org,2002:int> 0b", "&a [*a]",
    "&a {b: *a}", "*missing", "{a: {b: [1, 2]}}", "[" * 3000, "[" * 300 + "]" * 300, "{" * 300, "? x", "|\n  a\n b",
    "'open", '"\\x"', "\t- x", "\n--- \n...\n--- x", "%YAML 9.9", "@x", "`x", "1_000_", "0o9", "0b12", "=", "<<",
    "!!float 1e", "{<<: [1, 2]}", "{? [a, b] : c}", "\x00", "\ufeff", "\ud7ff", "- " * 400, "a: " * 200, "'" * 999,
]  # fmt: skip
NAMES = [
    b"new\nline.txt", b"\x1b[31mred\x1b[0m.json", b"\xe2\x80\xae\xe2\x80\xaegnp.exe", b"\xff\xfe\x80.bin", b"a" * 255,
    b"--help", b"-rf", b"$(id)", b"; rm -rf x", b"[bold]x.pt", b"[red on blue].json", b"<b>.md", b"%s%n", b" ", b"\t",
    b"\x07\x08\r", b"con", b"caf\xe9.json", b"\xed\xa0\x80.json", b"*", b"~", b"...", b"{}", b"'\"`", b"\\", b"|a|",
    b"\xf0\x9f\x98\x80" * 63, b"adapter_config.json\xff", b"README.md ", b"optimizer.pt\n", b"\x7f", b"\xc2\x85",
]  # fmt: skip
CHECKPOINTS = [
    b"checkpoint-0", b"checkpoint-007", b"checkpoint--1", b"checkpoint-" + b"9" * 200, b"checkpoint-\xd9\xa3",
    b"checkpoint-1e9", b"checkpoint-12 ", b"checkpoint-12\n", b"checkpoint-12\xff", b"Checkpoint-12", b"checkpoint-",
    b"checkpoint-1.5", b"checkpoint-2147483648", b"checkpoint-0x10", b"checkpoint-\x1b[31m1",
]  # fmt: skip
GOOD = ("a record", "refused")
LONGEST_ERROR = 20_000
# What no record may hold: settings of every kind of document.
SECRET = json.dumps(dict.fromkeys(("loss", "learning_rate", "max_steps", "base_sha256", "template"), "the secret"))
DOCUMENTS = ("*.json", "*.jsonl", "*.yaml", "*.md", "*.txt", "*.log")


@dataclass(frozen=True)
class Verdict:
    """What came of a case.

    Attributes:
        outcome: one of ``GOOD``, or what must not be.
        reason: the error's text.
        seconds: from opening it to its record as JSON.
        extra_bytes: of memory, at the most.
    """

    outcome: str
    reason: str
    seconds: float
    extra_bytes: int


@dataclass
class Case:
    """A damaged run.

    Attributes:
        seed: what it was made from.
        kind: how it was damaged.
        source: what was damaged.
        root: the directory.
        outside: a folder beside it, to which links lead; nothing in it may be opened.
        steps: what was done.
    """

    seed: int
    kind: str
    source: str
    root: Path
    outside: Path
    steps: list[str] = field(default_factory=list)

    def files(self, *patterns: str) -> list[Path]:
        """Regular files of these names, in an order that does not depend on the file system."""
        found = (Path(folder, name) for folder, _, names in os.walk(self.root) for name in names)
        return sorted(
            path
            for path in found
            if stat.S_ISREG(path.lstat().st_mode) and any(path.match(pattern) for pattern in patterns or ("*",))
        )

    def folders(self) -> list[Path]:
        """The root and every folder below it."""
        return sorted(Path(folder) for folder, _, _ in os.walk(self.root))


Damage = Callable[[Random, Case], None]


def truncated(random: Random, case: Case) -> None:
    """Some file ends early, or is empty."""
    for path in some(random, case.files(), 4):
        raw = held(path)
        rewrite(path, raw[: random.choice((0, random.randint(0, len(raw)), max(0, len(raw) - random.randint(1, 9))))])
        case.steps.append(f"truncated {path.name}")


def flipped(random: Random, case: Case) -> None:
    """Some bytes are others."""
    for path in some(random, case.files(), 3):
        raw = bytearray(held(path))
        for _ in range(random.choice((1, 4, 64)) if raw else 0):
            raw[random.randrange(len(raw))] = random.choice((0, 10, 34, 91, 92, 123, 255, random.randrange(256)))
        rewrite(path, bytes(raw))
        case.steps.append(f"flipped {path.name}")


def retyped(random: Random, case: Case) -> None:
    """Some value of a JSON file or a JSON line is of another type, or beyond all bounds."""
    for path in some(random, case.files("*.json", "*.jsonl"), 3):
        text = held(path).decode("utf-8", "replace")
        lines = text.split("\n") if path.suffix == ".jsonl" else [text]
        place = random.randrange(len(lines))
        with suppress(ValueError, RecursionError):
            lines[place] = replaced(random, json.loads(lines[place]), case)
        rewrite(path, "\n".join(lines).encode("utf-8", "surrogatepass"))


def replaced(random: Random, document: Any, case: Case) -> str:
    """A document as JSON, with another value, or another key, at one of its places."""
    value = random.choice(VALUES)
    places: list[tuple[Any, Any]] = []
    pending = [document]
    while pending:
        node = pending.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        places += [(node, key) for key in keys]
        pending += [node[key] for key in keys]
    case.steps.append(f"value {value[:40]}")
    if not places or random.random() < 0.05:
        return value
    node, key = random.choice(places[: random.choice((12, len(places)))])
    if isinstance(node, dict) and random.random() < 0.1:
        node["@@key@@"] = node.pop(key)
        return json.dumps(document).replace("@@key@@", random.choice(TEXTS))
    node[key] = "@@value@@"
    return json.dumps(document).replace('"@@value@@"', value)


def retyped_yaml(random: Random, case: Case) -> None:
    """Some value of a YAML file is of another type, a tag, an anchor or no YAML at all; also in a model card."""
    for path in some(random, case.files("*.yaml", "README.md"), 3):
        lines = held(path).decode("utf-8", "replace").split("\n")
        keyed = [place for place, line in enumerate(lines) if re.match(r"[\s-]*[\w.]+: ", line)]
        for place in some(random, keyed, 2):
            value = random.choice(YAML_VALUES)
            lines[place] = lines[place].split(": ")[0] + ": " + value
            case.steps.append(f"yaml {value[:40]!r}")
        rewrite(path, "\n".join(lines).encode("utf-8", "surrogatepass"))


def shuffled(random: Random, case: Case) -> None:
    """Lines out of order, twice, missing or half-written; other line ends, other encodings."""
    for path in some(random, case.files(*DOCUMENTS), 3):
        lines = held(path).split(b"\n")
        how = random.randrange(9)
        if how == 0:
            random.shuffle(lines)
        elif how == 1:
            lines += random.choices(lines, k=min(len(lines), 50))
        elif how == 2:
            lines = [line for line in lines if random.random() < 0.7]
        elif how == 3:
            lines = [line[: random.randint(0, len(line))] if random.random() < 0.3 else line for line in lines]
        elif how == 4:
            lines.append(lines[0][: random.randint(0, len(lines[0]))])
        raw = (b"\r\n" if how == 5 else b"\r" if how == 6 else b"\n").join(lines)
        if how > 6:
            raw = raw.decode("utf-8", "replace").encode(random.choice(("utf-16", "utf-32", "utf-8-sig", "utf-7")))
        rewrite(path, raw)
        case.steps.append(f"lines {how} of {path.name}")


def named(random: Random, case: Case) -> None:
    """Hostile names: of files, folders, checkpoints, and of the run itself."""
    for folder in some(random, case.folders(), 3):
        name = random.choice(NAMES)
        place = below(folder, name)
        with suppress(OSError):
            if random.random() < 0.5:
                place.write_bytes(b"x" * random.randrange(99))
            else:
                place.mkdir()
        case.steps.append(f"name {name!r}")
    adapters = [path for path in case.folders() if (path / "adapter_config.json").exists()]
    if adapters and random.random() < 0.5:
        name = random.choice(CHECKPOINTS)
        with suppress(OSError):
            shutil.copytree(random.choice(adapters), below(case.root, name), symlinks=True)
        case.steps.append(f"checkpoint {name!r}")
    if random.random() < 0.3:
        case.root = case.root.rename(below(case.root.parent, random.choice(NAMES)))


def linked(random: Random, case: Case) -> None:
    """Links out of the run, to nothing, in circles, to devices, in place of files and beside them."""
    (case.outside / "deep").mkdir(exist_ok=True)
    targets = [case.outside / "secret.json", case.outside, case.outside / "gone", "/dev/zero", "/dev/null", "/dev/tty",
               "/", "/proc/self/mem", ".", "..", "loop", case.root, "../" * 40 + "etc/passwd", "x" * 4000]  # fmt: skip
    for path in some(random, [*case.files(), *case.folders()[1:]], 4):
        target = random.choice(targets)
        gone(path)
        with suppress(OSError):  # the folder that it was in may be gone
            path.symlink_to(path.name if target == "loop" else target)
        case.steps.append(f"{path.name} -> {str(target)[:40]}")
    for folder in some(random, case.folders(), 2):
        name = random.choice(("checkpoint-99", "latest", "adapter_model.bin", "README.md", "trainer_log.jsonl"))
        with suppress(OSError):
            (folder / name).symlink_to(random.choice(targets))


def special(random: Random, case: Case) -> None:
    """Pipes, sockets and devices in place of files."""
    for path in some(random, case.files(), 4):
        gone(path)
        how = random.choice(("pipe", "socket", "zero", "full", "tty"))
        if how == "pipe":
            os.mkfifo(path)
        elif how == "socket":
            with suppress(OSError), socket.socket(socket.AF_UNIX) as server:  # its name may be too long
                server.bind(str(path))
        else:
            with suppress(OSError):  # only a machine's owner may make devices
                os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(*{"zero": (1, 5), "full": (1, 7), "tty": (5, 0)}[how]))
        case.steps.append(f"{how} {path.name}")


def swapped(random: Random, case: Case) -> None:
    """Folders in place of files and files in place of folders; missing files; files that may not be read."""
    for path in some(random, [*case.files(), *case.folders()[1:]], 5):
        how = random.randrange(4)
        if not path.exists():
            continue
        if how == 3:
            path.chmod(0)
        else:
            raw = held(path) or b"{}"
            gone(path)
            if how == 1:
                path.mkdir()
                (path / "inside").write_bytes(raw)
            elif how == 2:
                path.write_bytes(random.choice((b"", b"{}", b"[]", b"null", b"\x00" * 4096)))
        case.steps.append(f"{('gone', 'folder', 'file', 'sealed')[how]} {path.name}")


def pickled(random: Random, case: Case) -> None:
    """Pickles that would do harm, never end or unfold to gigabytes: nothing may run them."""
    names = ("training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt", "adapter_model.bin", "x.pkl")
    for folder in some(random, case.folders(), 3):
        path = folder / random.choice(names)
        gone(path)
        how = random.randrange(6)
        bomb = b"cposix\nsystem\n(V touch " + os.fsencode(case.outside / "ran") + b"\ntR."
        if how == 0:
            path.write_bytes(bomb)
        elif how == 1:
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("x/data.pkl", bomb + b"N" * random.choice((0, 50_000_000)))
        elif how == 2:
            path.write_bytes(b"\x80\x04" + b"(" * 300_000 + b"\x8e" + b"\xff" * 8)
        elif how == 3:
            path.write_bytes(b"\x80\x02" + bytes(random.randrange(256) for _ in range(3000)))
        elif how == 4:
            path.write_bytes(b"I" + b"9" * 3_000_000 + b"\n.")
        else:
            with zipfile.ZipFile(path, "w") as archive:
                for number in range(3000):
                    archive.writestr(f"{number}/data.pkl", b"N.")
        case.steps.append(f"pickle {how} {path.name}")


def bombed(random: Random, case: Case) -> None:
    """A file whose size or shape is the attack."""
    path = case.root / random.choice(
        ("adapter_config.json", "trainer_state.json", "trainer_log.jsonl", "logging.jsonl", "args.json", "README.md",
         "training_args.yaml", "llamaboard_config.yaml", "running_log.txt", "all_results.json", "tunesmith_run.json")
    )  # fmt: skip
    gone(path)
    name = random.choice(list(BOMBS))
    BOMBS[name](path)
    case.steps.append(f"{name} in {path.name}")


def crowded(random: Random, case: Case) -> None:
    """More files, folders or checkpoints than any run has."""
    name = random.choice(list(CROWDS))
    CROWDS[name](case.root)
    case.steps.append(name)


def mixed(random: Random, case: Case) -> None:
    """Several of the others at once."""
    for damage in random.sample([truncated, flipped, retyped, retyped_yaml, shuffled, named, linked, swapped], 3):
        damage(random, case)


def _laughs(path: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefghij", "bcdefghijk", strict=True)]
    path.write_text("\n".join(lines))


def _merges(path: Path) -> None:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}], y{n}: 1}}" for n in range(1, 40)]
    path.write_text("\n".join(lines))


def _sparse_line(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b'{"step": 1, "loss": "')
        file.truncate(2**30)


def _files(root: Path) -> None:
    folder = root / "many"
    folder.mkdir()
    for number in range(20_500):
        (folder / f"{number}.x").touch()


def _folders(root: Path) -> None:
    place = os.open(root, os.O_DIRECTORY)
    for _ in range(450):  # a path of more than 4,096 bytes
        os.mkdir("d" * 9, dir_fd=place)
        deeper = os.open("d" * 9, os.O_DIRECTORY, dir_fd=place)
        os.close(place)
        place = deeper
    os.close(place)


def _checkpoints(root: Path) -> None:
    for step in range(300):
        folder = root / f"checkpoint-{step}"
        folder.mkdir(exist_ok=True)
        for file in ("adapter_config.json", "trainer_state.json", "training_args.bin", "optimizer.pt"):
            (folder / file).write_bytes((CORPUS / "trl" / "checkpoint-8" / file).read_bytes())


def _rows(root: Path) -> None:
    row = '{"current_steps": %d, "total_steps": 9, "loss": 1.5, "lr": 1e-4, "epoch": 0.5}\n'
    rewrite(root / "trainer_log.jsonl", "".join(row % step for step in range(20_000)).encode())


# Each fills a run.
CROWDS: dict[str, Callable[[Path], None]] = {
    "20,500 files": _files,
    "450 folders, one in the other": _folders,
    "300 checkpoints": _checkpoints,
    "20,000 rows": _rows,
}

# Each writes one file.
BOMBS: dict[str, Callable[[Path], Any]] = {
    "64 MB of [": lambda path: path.write_bytes(b"[" * 64_000_000),
    "30 MB of [": lambda path: path.write_bytes(b"[" * 30_000_000),
    "one text of 50 MB": lambda path: path.write_bytes(b'{"a": "' + b"x" * 50_000_000 + b'"}'),
    "one text of 30 MB": lambda path: path.write_bytes(b'{"a": "' + b"x" * 30_000_000 + b'"}'),
    "a million keys, all the same": lambda path: path.write_bytes(b"{" + b'"a":1,' * 1_000_000 + b'"a":2}'),
    "a million keys": lambda path: path.write_text("{" + ",".join(f'"{n}":{n}' for n in range(1_000_000)) + "}"),
    "ten million numbers": lambda path: path.write_bytes(b'{"log_history": [' + b"1," * 10_000_000 + b"1]}"),
    "five million empty rows": lambda path: path.write_bytes(b'{"log_history": [' + b"{}," * 5_000_000 + b"{}]}"),
    "five million empty lines": lambda path: path.write_bytes(b"{}\n" * 5_000_000),
    "a number of a million digits": lambda path: path.write_bytes(b'{"step": ' + b"9" * 1_000_000 + b"}"),
    "a line of a gigabyte": _sparse_line,
    "a billion laughs": _laughs,
    "merge keys that double": _merges,
    "ten megabytes of YAML anchors": lambda path: path.write_text(
        "".join(f"k{n}: &k{n} {n}\n" for n in range(500_000))
    ),
    "deep YAML": lambda path: path.write_text("a: " + "[" * 30_000),
    "deep YAML blocks": lambda path: path.write_text("".join(" " * n + "a:\n" for n in range(350))),
    "a card of nothing but dashes": lambda path: path.write_text("- a" * 100_000 + "\n" + "- a: \n" * 100_000),
    "a card that opens its recipe a thousand times": lambda path: path.write_text(
        "See axolotl config\n```yaml\n" * 30_000
    ),
    "digits in a printed log": lambda path: path.write_text("Num examples = " + "9" * 100_000 + "\n" + "1," * 50_000),
    "errors in a printed log": lambda path: path.write_text("Traceback (most recent call last)\n" + "aError" * 40_000),
    "words in a printed log": lambda path: path.write_text("Traceback (most recent call last)\n" + "a.b" * 80_000),
}

KINDS: dict[str, tuple[int, Damage]] = {
    "truncated": (14, truncated),
    "bytes flipped": (14, flipped),
    "JSON retyped": (18, retyped),
    "YAML retyped": (10, retyped_yaml),
    "lines shuffled": (10, shuffled),
    "hostile names": (10, named),
    "links": (10, linked),
    "pipes, devices": (6, special),
    "swapped, gone": (8, swapped),
    "pickles": (4, pickled),
    "bombs": (2, bombed),
    "crowds": (1, crowded),
    "several": (10, mixed),
}


def drawn_kind(random: Random) -> str:
    """How a case is damaged; the first thing that is drawn."""
    return random.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]


def damaged(seed: int, work: Path, *, kind: str | None = None) -> Case:
    """Make a case.

    Args:
        seed: decides everything.
        work: an empty folder for it.
        kind: one of ``KINDS``; drawn where it is None.
    """
    random = Random(seed)  # noqa: S311 - not for secrets
    drawn = drawn_kind(random)
    source = random.choice(SOURCES)
    outside = work / "outside"
    outside.mkdir(parents=True)
    (outside / "secret.json").write_text(SECRET)
    if source == HUB:
        shutil.copytree(CORPUS / "hub-cache", work / "hub-cache", symlinks=True)
        root = work / source
    else:
        root = work / Path(source).name
        shutil.copytree(CORPUS / source, root, symlinks=True)
    case = Case(seed, kind or drawn, source, root, outside)
    KINDS[case.kind][1](random, case)
    return case


def judged(case: Case, surface: str = "run") -> Verdict:
    """Open a case through one of ``SURFACES``, and say what came of it.

    Args:
        case: the case.
        surface: what is made of it.
    """
    before = fingerprint(case.root)
    at_first, started = reset_peak(), time.perf_counter()
    try:
        document = SURFACES[surface](case)
        outcome = "a record"
    except TunesmithError as error:
        document = str(error)
        outcome = "refused" if len(document) < LONGEST_ERROR else "an endless error"
    except Exception as error:  # noqa: BLE001 - a crash is what is looked for
        trace = traceback.extract_tb(error.__traceback__)[::-1][:4]
        document = f"{error!r:.200} at " + " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in trace)
        outcome = "crash"
    seconds, extra = time.perf_counter() - started, peak_bytes() - at_first
    if outcome == "a record":
        outcome = faulty(surface, document) or outcome
    if (case.outside / "ran").exists():
        outcome = "a pickle was run"
    elif fingerprint(case.root) != before:
        outcome = "the directory is another"
    return Verdict(outcome, "" if outcome == "a record" else document[:400], seconds, extra)


def faulty(surface: str, document: str) -> str | None:
    """What is wrong with a document that was made of a case; None where nothing is."""
    if "the secret" in document:
        return "left the run"
    if surface == "screen":
        unfit = [mark for mark in document if mark != "\n" and unicodedata.category(mark) in ("Cc", "Cf", "Cs")]
        return f"the screen is sent {unfit[0]!r}" if unfit else None
    if surface == "page":
        return "a script is in the page" if "<script>alert(1)" in document else None
    json.loads(document)
    return None


def _screen(case: Case) -> str:
    result = CliRunner().invoke(app, ["inspect", str(case.root)])
    if result.exception is not None and not (isinstance(result.exception, SystemExit) and result.exit_code == 0):
        raise result.exception
    return result.stdout


def _page(case: Case) -> str:
    page = case.outside / "page.html"
    ts.write_inspection(ts.inspect(case.root), page)
    return page.read_text("utf-8")


# What is made of a case, as text.
SURFACES: dict[str, Callable[[Case], str]] = {
    "run": lambda case: open_run(case.root).to_json(),
    "inspect": lambda case: ts.inspect(case.root).to_json(),
    "screen": _screen,
    "page": _page,
}


def reset_peak() -> int:
    """Begin to measure memory anew; what is resident now, in bytes."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """The most memory that was resident since, in bytes; 0 where the system does not tell."""
    with suppress(OSError):
        match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return 1024 * int(match[1]) if match else 0
    return 0


def fingerprint(root: Path, *, times: bool = True) -> str:
    """Everything below a directory: names, kinds, sizes, times of change, links, and the bytes of small files.

    Args:
        root: the directory.
        times: whether times of change count; they differ from one making of a case to the next.
    """
    digest = hashlib.sha256()
    pending = [os.fsencode(root)]
    while pending:
        place = pending.pop()
        try:
            status = os.lstat(place)
        except OSError:  # deeper than a path may be long
            continue
        changed = (status.st_mtime_ns, status.st_ctime_ns) if times else ()
        digest.update(repr((place, status.st_mode, status.st_size, *changed)).encode())
        if stat.S_ISLNK(status.st_mode):
            digest.update(os.readlink(place))  # noqa: PTH115 - a name that is not UTF-8
        elif stat.S_ISREG(status.st_mode) and status.st_size < 2**20:
            digest.update(held(Path(os.fsdecode(place))))
        elif stat.S_ISDIR(status.st_mode):
            with suppress(OSError):
                pending += sorted(entry.path for entry in os.scandir(place))
    return digest.hexdigest()


def some(random: Random, things: list[Any], most: int) -> list[Any]:
    """A few of these."""
    return random.sample(things, min(len(things), random.randint(1, most)))


def below(folder: Path, name: bytes) -> Path:
    """A path whose last part may be no UTF-8."""
    return folder / os.fsdecode(name)


def cleared(folder: Path) -> None:
    """Remove a case's folder, whatever its files are called and whoever may not read them."""
    for place, _, _ in os.walk(os.fsencode(folder)):
        with suppress(OSError):
            os.chmod(place, 0o700)  # noqa: PTH101 - a name that is not UTF-8
    shutil.rmtree(os.fsencode(folder), ignore_errors=True)


def held(path: Path) -> bytes:
    """A file's bytes; none where it is no file, or sealed by a damage before this one."""
    with suppress(OSError):
        return path.read_bytes()
    return b""


def rewrite(path: Path, raw: bytes) -> None:
    """Replace a file's bytes; a damage before this one may have sealed it."""
    with suppress(OSError):
        path.write_bytes(raw)


def gone(path: Path) -> None:
    """Remove a file, a link or a folder."""
    with suppress(OSError):  # what it was in may be gone
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()

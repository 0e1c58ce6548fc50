"""Damaged run directories: a record or an error of ours, soon, and the directory as it was.

The long form, with 10,000 of them, is ``benchmarks/fuzz_runs.py``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.runs.damage import (
    BOMBS,
    CORPUS,
    CROWDS,
    GOOD,
    HUB,
    KINDS,
    SECRET,
    SOURCES,
    SURFACES,
    VALUES,
    YAML_VALUES,
    Case,
    Verdict,
    cleared,
    damaged,
    faulty,
    fingerprint,
    judged,
    replaced,
)
from tunesmith.runs import open_run

PER_KIND = 9
# Of one case on a machine that does other things too; the benchmark holds each to a second.
SECONDS = 5.0
EXTRA_BYTES = 300 * 10**6
# Each where it does the most; the benchmark puts all of them everywhere.
OBJECTS = ("adapter_config.json", "trainer_state.json")
TEXTS = ("README.md", "running_log.txt")
ATTACKS = [
    (bomb, file)
    for files, bombs in (
        (OBJECTS, ("30 MB of [", "one text of 50 MB", "one text of 30 MB", "a number of a million digits")),
        (OBJECTS, ("a million keys", "five million empty rows", "a line of a gigabyte")),
        (("all_results.json",), ("a million keys",)),
        (("trainer_log.jsonl",), ("five million empty lines", "a line of a gigabyte", "30 MB of [")),
        (("training_args.yaml", "README.md"), ("a billion laughs", "merge keys that double", "deep YAML")),
        (("training_args.yaml",), ("deep YAML blocks", "ten megabytes of YAML anchors", "a line of a gigabyte")),
        (TEXTS, ("a card of nothing but dashes", "a card that opens its recipe a thousand times")),
        (TEXTS, ("digits in a printed log", "errors in a printed log", "words in a printed log")),
        (TEXTS, ("a line of a gigabyte",)),
    )
    for bomb in bombs
    for file in files
]


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """A folder that is cleared away whatever its files are called."""
    yield tmp_path / "work"
    cleared(tmp_path)


def good(verdict: Verdict) -> bool:
    """Whether a case ended as it must."""
    return verdict.outcome in GOOD and verdict.seconds < SECONDS and verdict.extra_bytes < EXTRA_BYTES


def judged_at(seed: int, work: Path, *, kind: str, surface: str) -> Verdict:
    """Make a case in an empty folder, and judge it."""
    cleared(work)
    return judged(damaged(seed, work, kind=kind), surface)


def sound(source: str, work: Path) -> Case:
    """A run of the corpus as it is."""
    (work / "outside").mkdir(parents=True)
    (work / "outside" / "secret.json").write_text(SECRET)
    shutil.copytree(CORPUS / source, work / source, symlinks=True)
    return Case(0, "none", source, work / source, work / "outside")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("bombs", "crowds")])
def test_a_damaged_run_ends_with_a_record_or_our_error(kind: str, work: Path) -> None:
    """Opened, inspected and shown on a screen; never a traceback."""
    surfaces = ("run", "inspect", "screen")
    cases = {
        (seed, surface): judged_at(seed, work, kind=kind, surface=surface)
        for seed in range(PER_KIND)
        for surface in (surfaces[seed % 3],)
    }
    assert {case: verdict for case, verdict in cases.items() if not good(verdict)} == {}


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_run_makes_a_page_without_its_scripts(seed: int, work: Path) -> None:
    """Names and values of a stranger's run stand in the page as text."""
    verdict = judged_at(seed, work, kind="several", surface="page")
    assert verdict.outcome in GOOD, verdict


@pytest.mark.parametrize(("bomb", "file"), ATTACKS)
def test_a_file_whose_size_or_shape_is_the_attack_takes_no_time(bomb: str, file: str, work: Path) -> None:
    """A gigabyte in a line, a hundred thousand brackets, anchors that double: all are read in part or not at all."""
    case = sound("llamafactory-webui", work)
    (case.root / file).unlink(missing_ok=True)
    BOMBS[bomb](case.root / file)
    verdict = judged(case)
    assert good(verdict), verdict


@pytest.mark.parametrize("crowd", [crowd for crowd in CROWDS if "files" not in crowd])
def test_a_crowd_takes_no_time(crowd: str, work: Path) -> None:
    """A listing ends somewhere, and no path is too long to be passed by."""
    case = sound("llamafactory-cli", work)
    CROWDS[crowd](case.root)
    verdict = judged(case)
    assert good(verdict), verdict


PLACES = {
    "trl/checkpoint-8/trainer_state.json": [
        ("log_history",),
        ("log_history", 0),
        ("log_history", 0, "step"),
        ("log_history", 0, "loss"),
        ("log_history", 2, "eval_loss"),
        ("global_step",),
        ("max_steps",),
        ("best_model_checkpoint",),
        ("train_batch_size",),
    ],
    "peft/adapter_config.json": [
        ("base_model_name_or_path",),
        ("r",),
        ("lora_alpha",),
        ("target_modules",),
        ("rank_pattern",),
        ("modules_to_save",),
        ("auto_mapping",),
    ],
    "trainer/all_results.json": [("eval_loss",), ("epoch",)],
}


@pytest.mark.parametrize(("file", "place"), [(file, place) for file, places in PLACES.items() for place in places])
def test_a_value_of_any_type_in_any_place_is_no_crash(file: str, place: tuple[str | int, ...], work: Path) -> None:
    """Each of the hostile values in each of the places that are read, and inspected."""
    source, _, name = file.rpartition("/")
    case = sound(source, work)
    target = case.root / name
    document = json.loads(target.read_bytes())
    node = document
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = "@@value@@"
    verdicts = {}
    for value in VALUES:
        target.write_text(json.dumps(document).replace('"@@value@@"', value), "utf-8", "surrogatepass")
        verdicts[value[:60]] = judged(case, "inspect" if name == "adapter_config.json" else "run")
    assert {value: verdict for value, verdict in verdicts.items() if not good(verdict)} == {}


@pytest.mark.parametrize(("source", "file"), [("llamafactory-webui", "training_args.yaml"), ("axolotl", "README.md")])
def test_a_yaml_value_of_any_kind_is_no_crash(source: str, file: str, work: Path) -> None:
    """Tags, anchors, dates that are none: the parser's own errors are of many kinds."""
    case = sound(source, work)
    text = (case.root / file).read_text()
    verdicts = {}
    for value in YAML_VALUES:
        changed = re.sub(r"(?m)^(lora_dropout|warmup_steps): .*$", lambda match: f"{match[1]}: {value}", text)  # noqa: B023 - called at once
        assert changed != text
        (case.root / file).write_text(changed, "utf-8", "surrogatepass")
        verdicts[value[:60]] = judged(case)
    assert {value: verdict for value, verdict in verdicts.items() if not good(verdict)} == {}


@pytest.mark.parametrize(
    "file",
    ["trainer_state.json", "all_results.json", "trainer_log.jsonl", "training_args.yaml", "args.json",
     "tunesmith_run.json", "logging.jsonl", "llamaboard_config.yaml", "README.md"],
)  # fmt: skip
def test_what_a_link_out_of_the_run_leads_to_is_not_read(file: str, work: Path) -> None:
    """Else a stranger's run would show, in a page that is passed on, what else is on the disk."""
    case = sound("llamafactory-webui", work)
    (case.root / file).unlink(missing_ok=True)
    (case.root / file).symlink_to(case.outside / "secret.json")
    verdict = judged(case)
    assert verdict.outcome == "a record", verdict


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("trl", "adapter_config.json"),
        ("trl", "trainer_state.json"),
        ("trl", "scheduler.pt"),
        ("trl", "checkpoint-8"),
        ("trl/checkpoint-8", "adapter_model.safetensors"),
        ("mlx-lm", "adapters.safetensors"),
    ],
)
def test_a_link_that_no_system_can_follow_is_a_link(source: str, file: str, work: Path) -> None:
    """Its target is longer than a path may be, which is another error than that of a target that is not there."""
    case = sound(source, work)
    place = case.root / file
    shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    place.symlink_to("x" * 4000)
    verdicts = {surface: judged(case, surface) for surface in ("run", "inspect", "screen")}
    assert {surface: verdict for surface, verdict in verdicts.items() if not good(verdict)} == {}


@pytest.mark.parametrize("surface", SURFACES)
def test_names_that_are_no_text_are_shown_as_some(surface: str, work: Path) -> None:
    """Bytes that are no UTF-8, and marks that would turn a terminal's line round or its letters red."""
    case = sound("trl", work)
    case.root = case.root.rename(case.root.with_name(os.fsdecode(b"caf\xe9\x1b[31m\n")))
    for name in (b"\xff\xfe.bin", b"\x1b[31mred.json", b"\xe2\x80\xaetxt.exe", b"<script>alert(1)<", b"[bold]x"):
        (case.root / os.fsdecode(name)).touch()
    verdict = judged(case, surface)
    # JSON is UTF-8, and cannot hold the run's own name.
    assert verdict.outcome == ("refused" if surface in ("run", "inspect") else "a record"), verdict


def test_every_kind_of_damage_reaches_a_record_and_a_refusal(work: Path) -> None:
    """A fuzzer that is always refused, or never, tests nothing; and a seed makes the same case again."""
    outcomes = Counter(judged_at(seed, work, kind="several", surface="run").outcome for seed in range(30))
    assert min(outcomes[outcome] for outcome in GOOD) >= 2
    cleared(work)
    first = damaged(5, work, kind="bytes flipped")
    before, steps = fingerprint(first.root, times=False), first.steps
    cleared(work)
    again = damaged(5, work, kind="bytes flipped")
    assert (fingerprint(again.root, times=False), again.steps) == (before, steps)


def test_the_judge_sees_what_must_not_be(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be of no use if it passed a crash, a changed directory, or what a link led to."""
    case = damaged(0, work, kind="swapped, gone")

    def crash(_: Case) -> str:
        raise KeyError("loss")

    def meddle(spoilt: Case) -> str:
        (spoilt.root / "touched").touch()
        return "{}"

    def leak(spoilt: Case) -> str:
        return (spoilt.outside / "secret.json").read_text()

    outcomes = []
    for surface in (crash, meddle, leak):
        monkeypatch.setitem(SURFACES, "run", surface)
        outcomes.append(judged(case).outcome)
    assert outcomes == ["crash", "the directory is another", "left the run"]
    assert faulty("screen", "a\x1b[31mb") == "the screen is sent '\\x1b'"
    assert faulty("page", "<p><script>alert(1)</script>")


def test_damage_is_done_to_every_tools_run() -> None:
    """Sources are those of the corpus, and a value is really replaced."""
    assert {Path(source).parts[0] for source in SOURCES} == {path.name for path in CORPUS.iterdir() if path.is_dir()}
    assert open_run(CORPUS / HUB).kind == "adapter"
    case = Case(0, "", "", CORPUS, CORPUS)
    drawn = {replaced(Random(seed), {"a": [1, {"b": 2}]}, case) for seed in range(60)}  # noqa: S311 - not for secrets
    assert len(drawn) > 30


def test_the_long_form_runs(tmp_path: Path) -> None:
    """Its short form, in a process of its own: no bad outcome."""
    script = Path(__file__).parents[2] / "benchmarks" / "fuzz_runs.py"
    options = ["--count", "60", "--processes", "1", "--kind", "lines shuffled", "--surface", "run"]
    result = subprocess.run(
        [sys.executable, str(script), *options], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 that must not be" in result.stdout

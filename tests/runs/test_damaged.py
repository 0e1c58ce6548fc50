"""Damaged run directories: a record or an error of ours, soon, and the directory as it was.

The long form, with 10,000 of them, is ``benchmarks/fuzz_runs.py``.
"""

from __future__ import annotations

import os
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
    GOOD,
    HUB,
    KINDS,
    SOURCES,
    SURFACES,
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
# The larger ones take long to write; the benchmark has them.
ATTACKS = [
    (bomb, file)
    for bomb in BOMBS
    if "million" not in bomb or "digits" in bomb
    for file in (
        ("training_args.yaml", "README.md")
        if "YAML" in bomb or bomb in ("a billion laughs", "merge keys that double")
        else ("README.md", "running_log.txt")
        if "card" in bomb or "log" in bomb
        else ("adapter_config.json", "trainer_state.json")
    )
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
    case = damaged(0, work, kind="truncated")
    shutil.rmtree(case.root)
    shutil.copytree(Path(__file__).parent / "corpus" / "llamafactory-webui", case.root)
    (case.root / file).unlink(missing_ok=True)
    BOMBS[bomb](case.root / file)
    verdict = judged(case)
    assert good(verdict), verdict


@pytest.mark.parametrize("file", ["adapter_config.json", "trainer_state.json", "scheduler.pt", "checkpoint-8"])
def test_a_link_that_no_system_can_follow_is_a_link(file: str, work: Path) -> None:
    """Its target is longer than a path may be, which is another error than that of a target that is not there."""
    case = damaged(0, work, kind="truncated")
    shutil.rmtree(case.root)
    shutil.copytree(Path(__file__).parent / "corpus" / "trl", case.root)
    place = case.root / file
    shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    place.symlink_to("x" * 4000)
    verdicts = {surface: judged(case, surface) for surface in ("run", "inspect", "screen")}
    assert {surface: verdict for surface, verdict in verdicts.items() if not good(verdict)} == {}


@pytest.mark.parametrize("surface", SURFACES)
def test_names_that_are_no_text_are_shown_as_some(surface: str, work: Path) -> None:
    """Bytes that are no UTF-8, and marks that would turn a terminal's line round or its letters red."""
    case = damaged(0, work, kind="truncated")
    shutil.rmtree(case.root)
    case.root = case.root.with_name(os.fsdecode(b"caf\xe9\x1b[31m\n"))
    shutil.copytree(Path(__file__).parent / "corpus" / "trl", case.root)
    for name in (b"\xff\xfe.bin", b"\x1b[31mred.json", b"\xe2\x80\xaetxt.exe", b"<script>alert(1)<", b"[bold]x"):
        (case.root / os.fsdecode(name)).touch()
    verdict = judged(case, surface)
    assert verdict.outcome == "a record", verdict


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
    corpus = Path(__file__).parent / "corpus"
    assert {Path(source).parts[0] for source in SOURCES} == {path.name for path in corpus.iterdir() if path.is_dir()}
    assert open_run(corpus / HUB).kind == "adapter"
    case = Case(0, "", "", corpus, corpus)
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

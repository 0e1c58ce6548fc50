"""``tunesmith verify`` with a certificate, and the other ways to name what is verified."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import tunesmith as ts
from tests.cli.conftest import Cli, tree
from tests.tiny_models import TinyRun

CERTIFICATE = "tunesmith-certificate.json"
WEIGHTS = ("--level", "weights")


@pytest.fixture(scope="module")
def merged(cli: Cli, run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, merged by the command line."""
    out = tmp_path_factory.mktemp("certificate") / "merged"
    done = cli("merge", run_dir, "--out", out)
    assert done.code == 0, done.err
    return out


@pytest.fixture
def own(merged: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(merged, tmp_path / "own"))


def test_a_merge_is_certified_verified_and_looked_at_again(cli: Cli, run_dir: Path, own: Path) -> None:
    """Not verified, then identical, and different after one byte; each with its exit code and the names of files."""
    before = cli("verify", own)
    assert before.code == 2
    assert "Nobody has verified them yet." in before.out
    assert f"Next: tunesmith verify RUN {own}, where RUN is the directory of {run_dir.name}" in before.out
    proof = cli("verify", run_dir, own, *WEIGHTS)
    assert proof.code == 0, proof.err
    assert f"`{CERTIFICATE}` was written" in proof.out
    after = cli("verify", own)
    assert (after.code, after.err) == (0, "verify files ...\n")
    assert after.out.startswith("Identical  own against its certificate\n")
    config = own / "config.json"
    config.write_text(config.read_text() + " ")
    (own / "README.md").write_text("x")
    changed = cli("verify", own)
    assert changed.code == 3
    assert changed.out.startswith("Different  own against its certificate\n")
    assert "  changed: config.json\n" in changed.out
    assert "read by no loader: README.md" in changed.out


def test_recheck_in_json_and_in_one_line(cli: Cli, own: Path, tmp_path: Path) -> None:
    """For a machine, and for the eye in a log; nothing else on either stream."""
    out = tmp_path / "recheck.json"
    done = cli("verify", own, "--json", "--out", out)
    found = ts.Recheck.model_validate_json(done.out)
    assert (done.code, found.answer, found.directory) == (2, "not_verified", "own")
    assert ts.Recheck.read(out) == found
    quiet = cli("verify", own, "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (2, "Not verified  own against its certificate\n", "")


def test_quiet_prints_the_verdicts_line_alone(cli: Cli, run_dir: Path, own: Path) -> None:
    """The exit code says the same."""
    done = cli("verify", run_dir, own, *WEIGHTS, "--quiet")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"Identical  own against final of {run_dir.name}\n"
    document = json.loads(cli("verify", run_dir, own, *WEIGHTS, "--quiet", "--json").out)
    assert (document["answer"], document["certificate"]["code"]) == ("identical", "certificate_written")


def test_no_certificate_is_written_where_none_is_wanted(cli: Cli, run_dir: Path, own: Path, tmp_path: Path) -> None:
    """By either verb; and the directory then has none to be held against."""
    out = tmp_path / "out"
    assert cli("merge", run_dir, "--out", out, "--no-certificate").code == 0
    assert not (out / CERTIFICATE).exists()
    before = tree(own)
    assert cli("verify", run_dir, own, *WEIGHTS, "--no-certificate").code == 0
    assert tree(own) == before
    done = cli("verify", out)
    assert done.code == 2
    assert "no certificate" in done.err
    assert f"tunesmith verify RUN {out}" in done.err


def test_base_adapter_and_merged_may_be_named(cli: Cli, tiny: TinyRun, run_dir: Path, own: Path) -> None:
    """The same proof as by position."""
    options = ("--base", tiny.base, *WEIGHTS, "--json")
    named = cli("verify", "--adapter", run_dir, "--merged", own, *options)
    placed = cli("verify", run_dir, own, *options)
    mixed = cli("verify", run_dir, "--merged", own, *options)
    assert named.code == placed.code == mixed.code == 0, named.err
    ours = [ts.Verdict.model_validate_json(done.out) for done in (named, placed, mixed)]
    assert ours[0].tensors == ours[1].tensors == ours[2].tensors
    assert {verdict.run for verdict in ours} == {run_dir.name}


def test_further_adapters_keep_their_place_and_weight(cli: Cli, run_dir: Path, tmp_path: Path) -> None:
    """The first that is named is the run; by position all are further ones."""
    other, out = run_dir / "checkpoint-10", tmp_path / "sum"
    assert cli("merge", f"{run_dir}:0.5", "--adapter", f"{other}:-0.25", "--out", out).code == 0
    both = ("--adapter", f"{run_dir}:0.5", "--adapter", f"{other}:-0.25")
    assert cli("verify", *both, "--merged", out, *WEIGHTS).code == 0
    assert cli("verify", f"{run_dir}:0.5", out, *both[2:], *WEIGHTS).code == 0
    assert cli("verify", *both[:2], "--merged", out, *WEIGHTS).code == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "It takes a run and a merged model."),
        (["--merged", "DIR"], "It takes a run and a merged model."),
        (["DIR", "--adapter", "RUN"], "It takes a run and a merged model."),
        (["RUN", "DIR", "--merged", "DIR"], "named twice"),
        (["DIR", "--base", "BASE"], "without further options"),
        (["DIR", "--level", "weights"], "without further options"),
        (["nowhere"], "not there"),
    ],
)
def test_names_that_do_not_make_a_proof_are_refused(
    cli: Cli, tiny: TinyRun, run_dir: Path, merged: Path, arguments: list[str], words: str
) -> None:
    """What is missing is never guessed, least of all by a hash in the place of a proof."""
    places = {"RUN": str(run_dir), "DIR": str(merged), "BASE": str(tiny.base)}
    before = tree(merged)
    done = cli("verify", *(places.get(argument, argument) for argument in arguments))
    assert done.code == 2
    assert words in done.err
    assert "Traceback" not in done.err
    assert tree(merged) == before


def test_a_foreign_certificate_is_an_error_in_json_too(cli: Cli, own: Path) -> None:
    """Exit 2, and one document."""
    (own / CERTIFICATE).write_text('{"_type": "https://in-toto.io/Statement/v1"}')
    done = cli("verify", own, "--json")
    assert done.code == 2
    assert json.loads(done.out)["error"] == "CheckpointError"

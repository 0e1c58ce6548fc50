"""The verbs' own decisions: what is checked before work begins, and where a verb finds what it was not given."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

import tunesmith as ts
from tests.tiny_models import TinyRun, edit_json
from tunesmith.api.places import base_of
from tunesmith.compare import Comparison, VariantInfo
from tunesmith.errors import BaseModelError, DataError, OutputError
from tunesmith.runs import held_out_rows


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    """A comparison of nothing with nothing."""
    return Comparison(
        run="run",
        settings=ts.GenerationSettings(greedy=True, max_new_tokens=8),
        engine=ts.Capabilities(kind="local", where="cpu", dtype="float32"),
        variants=(VariantInfo(name="base", kind="base", path="x"),),
        prompts=(),
        replies=(),
        scores=(),
    )


def test_base_is_the_one_that_the_adapter_names(tiny: TinyRun) -> None:
    """Unless another one is asked for."""
    run = ts.open_run(tiny.adapters["final"])
    assert base_of(run, run.checkpoints[-1], None) == (str(tiny.base), tiny.base)
    assert base_of(run, run.checkpoints[-1], str(tiny.merged))[1] == tiny.merged


def test_relative_base_is_also_looked_for_beside_the_run(tiny: TinyRun, tmp_path: Path) -> None:
    """A run directory and its base may be moved together."""
    for source in (tiny.base, tiny.adapters["final"]):
        (tmp_path / source.name).mkdir()
        for file in source.iterdir():
            (tmp_path / source.name / file.name).write_bytes(file.read_bytes())
    edit_json(tmp_path / "final" / "adapter_config.json", base_model_name_or_path="base")
    assert ts.inspect(tmp_path / "final").base == str((tmp_path / "base").resolve())


def test_inspect_works_without_the_base_but_not_without_the_one_asked_for(tiny: TinyRun, tmp_path: Path) -> None:
    """What the adapter names may be elsewhere; what a person names must be there."""
    run = tmp_path / "run"
    run.mkdir()
    for file in tiny.adapters["final"].iterdir():
        (run / file.name).write_bytes(file.read_bytes())
    edit_json(run / "adapter_config.json", base_model_name_or_path="/elsewhere/base")
    inspection = ts.inspect(run)
    assert inspection.base is None
    assert inspection.adapter.relative_update is None
    with pytest.raises(BaseModelError):
        ts.inspect(run, base="/elsewhere/base")


def test_adapter_that_names_no_base_needs_one(tiny: TinyRun, tmp_path: Path) -> None:
    """The error says which option gives it."""
    for file in tiny.adapters["final"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit_json(tmp_path / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(BaseModelError, match="names no base model") as caught:
        ts.load_engine(tmp_path)
    assert "--base" in str(caught.value)


def test_no_variant_is_an_error(tiny: TinyRun) -> None:
    """An empty list would compare nothing with nothing."""
    with pytest.raises(DataError, match="No variant"):
        ts.load_engine(tiny.adapters["final"], ())


def test_verify_takes_what_merge_returned(tiny: TinyRun, tmp_path: Path) -> None:
    """The record names the directory, and the merge is proven."""
    merged = ts.merge(ts.plan_merge(tiny.adapters["final"], tmp_path / "out"))
    verdict = ts.verify(tiny.adapters["final"], merged, levels=("structure", "weights"))
    assert verdict.good
    assert verdict.dtype is None  # nothing was computed
    assert "`out`" in ts.verdict_sentence(verdict)


def test_report_reads_its_files_before_it_works(tiny: TinyRun, tmp_path: Path, comparison: Comparison) -> None:
    """A wrong verdict file is found at once, not after the comparison."""
    stages: list[str] = []
    with pytest.raises(DataError, match="Verdict record"):
        ts.report(
            tiny.adapters["final"],
            tmp_path / "r.html",
            merged=tiny.merged,
            verdict=comparison.write(tmp_path / "c.json"),
            progress=lambda event: stages.append(event.stage),
        )
    assert not stages
    assert not (tmp_path / "r.html").exists()


def test_report_of_an_adapter_that_cannot_be_read_still_tells_the_rest(
    tiny: TinyRun, tmp_path: Path, comparison: Comparison
) -> None:
    """The facts are left out, and the page is written."""
    for file in tiny.adapters["final"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    run = ts.open_run(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    report = ts.report(run, tmp_path / "r.html", comparison=comparison)
    assert report.adapter is None
    assert (tmp_path / "r.html").is_file()


@pytest.mark.parametrize("suffix", [".json", ".md", ".html"])
def test_comparison_is_written_as_its_name_says(
    tiny: TinyRun, tmp_path: Path, comparison: Comparison, suffix: str
) -> None:
    """JSON reads back; the others are for people."""
    out = ts.write_comparison(comparison, tiny.adapters["final"], tmp_path / f"c{suffix}")
    assert os.listdir(tmp_path) == [out.name]  # noqa: PTH208 - hidden files count
    if suffix == ".json":
        assert Comparison.read(out) == comparison


def test_comparison_that_cannot_be_written_leaves_the_old_file(
    tiny: TinyRun, tmp_path: Path, comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is an error that the user can mend, and costs nothing that was there."""
    out = tmp_path / "c.md"
    out.write_text("precious")

    def full(path: Path, *_: object, **__: object) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match="disk is full"):
        ts.write_comparison(comparison, tiny.adapters["final"], out)
    assert [path.name for path in tmp_path.iterdir()] == ["c.md"]
    assert out.read_text() == "precious"


def test_output_file_is_checked_before_any_work(tmp_path: Path) -> None:
    """A wrong suffix, a directory, or a folder that is not there."""
    (tmp_path / "folder.json").mkdir()
    for out in (tmp_path / "x.txt", tmp_path / "folder.json", tmp_path / "no" / "x.json"):
        with pytest.raises(OutputError):
            ts.output_file(out, suffixes=(".json",))
    assert ts.output_file(tmp_path / "x.txt") == tmp_path / "x.txt"


def test_held_out_rows_are_the_runs_own(tiny: TinyRun, tmp_path: Path) -> None:
    """Comparison and verification use them unless given others; a run that keeps none has none."""
    assert held_out_rows(ts.open_run(tiny.adapters["final"])) == []
    for file in tiny.adapters["final"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"instruction": "Q", "output": "A"}) + "\n")
    assert [row.answer for row in held_out_rows(ts.open_run(tmp_path))] == ["A"]

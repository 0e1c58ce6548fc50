"""drift and compare_schemes: a run's exports beside its live adapter, and schemes that leave nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tunesmith as ts
from tests.tiny_models import TinyRun, edit_json, row
from tunesmith.errors import Cancelled, DataError, OutputError, RunError, TunesmithError

ROWS = [row(i, f"question {i}", f"the answer {i * i}") for i in range(6)]
FEW: dict[str, Any] = {"data": ROWS, "max_rows": 3}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def run(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint and a final adapter."""
    root = Path(shutil.copytree(tiny.adapters["final"], tmp_path_factory.mktemp("drifting") / "run"))
    shutil.copytree(tiny.adapters["checkpoint-10"], root / "checkpoint-10")
    return root


@pytest.fixture(scope="module")
def found(run: Path, tiny: TinyRun) -> ts.Drift:
    """The merged model, and the base as if it were an export."""
    return ts.drift(run, [tiny.merged, f"untuned={tiny.base}"], data=ROWS, max_rows=3)


def test_the_merged_model_is_the_adapter_and_the_base_is_the_base(found: ts.Drift) -> None:
    """0 nats and the same first choices; and exactly as far as the yardstick."""
    assert [row.name for row in found.rows] == ["base", "merged", "untuned"]
    merged, untuned = found.row("merged"), found.row("untuned")
    assert merged is not None
    assert untuned is not None
    for departure in (merged.in_domain, merged.general):
        assert departure is not None
        assert departure.kl.value < 1e-9
        assert departure.top1.value == 1
    for ours, bases in ((untuned.in_domain, found.base.in_domain), (untuned.general, found.base.general)):
        assert ours is not None
        assert bases is not None
        assert ours.kl == bases.kl
        assert bases.kl.value > 0.1
    assert (found.rows_from, found.in_domain_rows, found.general_rows) == ("given", 3, 3)
    assert (found.checkpoint, found.dtype, found.base_model) == ("final", "float32", found.base.model.path)
    assert {row.model.scheme for row in found.rows} == {"fp32"}
    assert "drift_beyond_base" in {finding.code for finding in found.findings}


def test_losses_are_those_that_evaluate_tells(found: ts.Drift, run: Path) -> None:
    """Two ways through the same rows."""
    engine, _ = ts.load_engine(run, ["base", "final"], dtype="fp32")
    rows = [ROWS[i] for i in sorted(np.random.default_rng(0).permutation(len(ROWS))[:3])]
    scores = engine.score(["base", "final"], rows)
    loss = {name: sum(one.nll for one in each) / sum(one.tokens for one in each) for name, each in scores.items()}
    assert found.adapter_loss is not None
    assert found.gain is not None
    assert found.base.loss is not None
    assert found.adapter_loss.value == pytest.approx(loss["final"], abs=1e-5)
    assert found.base.loss.value == pytest.approx(loss["base"], abs=1e-5)
    assert found.gain.value == pytest.approx(loss["base"] - loss["final"], abs=2e-5)


def test_the_other_checkpoint_is_the_reference_where_that_is_asked(run: Path, tiny: TinyRun) -> None:
    """The merged model is of the final one, so it is far from that."""
    found = ts.drift(run, [tiny.merged], checkpoint=10, **FEW)
    merged = found.row("merged")
    assert merged is not None
    assert merged.in_domain is not None
    assert merged.in_domain.kl.value > 0.05


def test_a_run_without_held_out_rows_is_measured_on_general_texts(run: Path, tiny: TinyRun) -> None:
    """And it is said what is not known."""
    found = ts.drift(run, [tiny.merged], max_rows=2)
    assert (found.rows_from, found.in_domain_rows, found.gain) == ("none", 0, None)
    assert found.recommended == "merged"
    assert "drift_no_rows" in {finding.code for finding in found.findings}


@pytest.mark.parametrize(
    ("ask", "error", "said"),
    [
        (lambda run, _: ts.drift(run, []), DataError, "No model is named"),
        (lambda run, _: ts.drift(run, [run / "checkpoint-10"], **FEW), DataError, "Only complete models"),
        (lambda run, tiny: ts.drift(run, [tiny.merged, tiny.merged], **FEW), DataError, "NAME=DIR"),
        (lambda run, _: ts.drift(run, [run / "nothing"], **FEW), RunError, "nothing"),
        (lambda run, _: ts.compare_schemes(run, [], **FEW), DataError, "one or more"),
        (lambda run, _: ts.compare_schemes(run, ["int8", "int8"], **FEW), DataError, "once each"),
        (
            lambda run, _: ts.compare_schemes(run, ["int8"], work_dir=run / "nowhere", **FEW),
            OutputError,
            "nowhere",
        ),
    ],
    ids=["none", "adapter", "twice", "absent", "no scheme", "scheme twice", "no folder"],
)
def test_what_cannot_be_held_beside_the_adapter_is_refused(
    ask: Callable[[Path, TinyRun], ts.Drift], error: type[TunesmithError], said: str, run: Path, tiny: TinyRun
) -> None:
    """Before anything is computed."""
    with pytest.raises(error) as caught:
        ask(run, tiny)
    assert said in str(caught.value)


def test_all_models_with_other_tokens_are_named_at_once(run: Path, tiny: TinyRun, tmp_path: Path) -> None:
    """Not one after the other, after minutes of work each."""
    for name in ("one", "two"):
        other = shutil.copytree(tiny.merged, tmp_path / name)
        template = (other / "chat_template.jinja").read_text()
        (other / "chat_template.jinja").write_text(template.replace("<|im_end|>", "<|im_end|> "))
    with pytest.raises(DataError, match=r"(?s)other tokens.*one: .*two: .*chat template"):
        ts.drift(run, [tmp_path / "one", tmp_path / "two", tiny.merged], **FEW)


def test_one_export_at_a_time_is_in_memory(
    run: Path, tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside base and adapter."""
    from tunesmith.models.full import FullModels

    most = []
    original = FullModels.get

    def get(self: FullModels, path: str | Path, **how: str) -> tuple[object, object]:
        answer = original(self, path, **how)
        most.append(len(self._loaded))
        return answer

    monkeypatch.setattr(FullModels, "get", get)
    shutil.copytree(tiny.merged, tmp_path / "twin")
    ts.drift(run, [tiny.merged, tmp_path / "twin"], **FEW)
    assert set(most) == {1}


@pytest.mark.parametrize("suffix", [".json", ".md", ".html"])
def test_a_drift_is_written_as_its_name_says(suffix: str, found: ts.Drift, run: Path, tmp_path: Path) -> None:
    """Whole, in each form."""
    target = ts.write_drift(found, run, tmp_path / f"drift{suffix}")
    text = target.read_text()
    assert "merged" in text
    if suffix == ".json":
        assert ts.Drift.read(target) == found
    if suffix == ".md":
        assert "| merged" in text
        assert text.count("\n| ") == 1 + 1 + 3
    with pytest.raises(OutputError):
        ts.write_drift(found, run, tmp_path / "drift.csv")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("drift")] == [target.name]


def test_schemes_are_made_measured_and_gone(run: Path, tmp_path: Path) -> None:
    """More bits are nearer; sizes shrink; the folder is empty afterwards."""
    at_once: list[int] = []
    found = ts.compare_schemes(
        run,
        ["int8", "int4:32"],
        roundings=("nearest",),
        work_dir=tmp_path,
        progress=lambda event: (
            at_once.append(len(list(tmp_path.glob("tunesmith-drift-*/*/config.json"))))
            if event.stage == "drift"
            else None
        ),
        **FEW,
    )
    assert set(at_once) == {0, 1}, "one model at a time is on the disk, and none while the base is measured"
    assert [row.name for row in found.rows] == ["base", "int8", "int4:32"]
    assert [(row.model.scheme, row.model.rounding, row.model.path) for row in found.exports] == [
        ("int8", "nearest", ""),
        ("int4:32", "nearest", ""),
    ]
    eight, four = (row.in_domain for row in found.exports)
    assert eight is not None
    assert four is not None
    assert 0 < eight.kl.value < four.kl.value
    assert found.exports[0].model.size_bytes > found.exports[1].model.size_bytes
    assert all(row.model.made_seconds is not None and row.model.made_seconds > 0 for row in found.exports)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


def test_each_scheme_is_made_by_each_rounding(run: Path, tmp_path: Path) -> None:
    """And has a name that says by which."""
    found = ts.compare_schemes(run, ["int8"], roundings=("nearest", "faithful"), work_dir=tmp_path, **FEW)
    assert [row.name for row in found.exports] == ["int8 nearest", "int8 faithful"]
    assert [row.model.rounding for row in found.exports] == ["nearest", "faithful"]


def test_a_scheme_that_does_not_fit_costs_no_work(run: Path, tmp_path: Path) -> None:
    """It is refused before the first one is made, and nothing is left."""
    seen: list[str] = []
    with pytest.raises(TunesmithError):
        ts.compare_schemes(
            run,
            ["int8", "int4:48"],
            work_dir=tmp_path,
            progress=lambda event: seen.append(event.stage),
            **FEW,
        )
    assert "drift" not in seen
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


def test_stopping_leaves_no_folder(run: Path, tmp_path: Path) -> None:
    """In the middle of measuring a quantized model, which lies on the disk then."""
    cancellation = ts.Cancellation()
    there: list[int] = []

    def progress(event: ts.Progress) -> None:
        if event.stage == "drift" and event.detail == "int8":
            there.append(len(list(tmp_path.glob("tunesmith-drift-*/*/*.safetensors"))))
            cancellation.cancel()

    with pytest.raises(Cancelled):
        ts.compare_schemes(
            run,
            ["int8", "int4:32"],
            roundings=("nearest",),
            work_dir=tmp_path,
            progress=progress,
            cancellation=cancellation,
            **FEW,
        )
    assert there[0] > 0, "it was there"
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


def test_a_models_scheme_is_named_whoever_made_it(tiny: TinyRun, tmp_path: Path) -> None:
    """Another method's by its own name; whether it can be loaded is not asked for that."""
    from tunesmith.api.drifting import _scheme
    from tunesmith.checkpoint import Checkpoint

    other = shutil.copytree(tiny.merged, tmp_path / "other")
    assert _scheme(Checkpoint(other)) == "fp32"
    edit_json(other / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert _scheme(Checkpoint(other)) == "bitsandbytes"
    assert json.loads((other / "config.json").read_text())["quantization_config"]

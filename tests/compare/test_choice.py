"""choice: a run's checkpoints scored one at a time, and one of them named with its reason."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

import pytest
from safetensors.numpy import load_file, save_file

from tests.tiny_models import TinyRun, edit_json, row
from tunesmith.compare import CheckpointChoice, choose_checkpoint, choose_from_record, saved_adapters
from tunesmith.compare.choice import RowsFrom, SavedAdapters, _reason, _with_figures
from tunesmith.compare.intervals import ratio_estimate
from tunesmith.compare.selection import select
from tunesmith.conversations import Conversation
from tunesmith.errors import AdapterError, Cancelled
from tunesmith.models import GenerationSettings, LocalEngine, Request, RowScore, VariantSet, generate, score
from tunesmith.progress import Cancellation, Progress
from tunesmith.record import Finding
from tunesmith.report import LANGUAGES, finding_text, text
from tunesmith.runs import Run, RunCheckpoint

ROWS = [row(i, f"question {i}", f"the answer {i * i}") for i in range(6)]


def saved_run(root: Path, adapters: dict[str, Path], **fields: object) -> Run:
    """A run with these adapters, copied to where a trainer would have put them."""
    checkpoints = []
    for name, source in adapters.items():
        path = Path(shutil.copytree(source, root if name == "final" else root / name, dirs_exist_ok=True))
        step = None if name == "final" else int(name.removeprefix("checkpoint-"))
        checkpoints.append(RunCheckpoint(name=name, step=step, path=str(path)))
    values = {"path": str(root), "kind": "run", "writer": "trainer", "base_model": None, "files": ()}
    return Run.model_validate({**values, "checkpoints": tuple(checkpoints), **fields})


@pytest.fixture
def run(tiny: TinyRun, tmp_path: Path) -> Run:
    """Two checkpoints, and a final adapter that is the second one's copy, as trainers leave them."""
    first, second = tiny.adapters["checkpoint-10"], tiny.adapters["final"]
    return saved_run(tmp_path / "run", {"checkpoint-10": first, "checkpoint-20": second, "final": second})


@pytest.fixture
def base(tiny: TinyRun) -> VariantSet:
    """The base alone."""
    return VariantSet.load(tiny.base, adapters={}, tokenizer_dir=tiny.base)


def choose(
    variants: VariantSet,
    run: Run,
    rows: list[Conversation] = ROWS,
    *,
    rows_from: RowsFrom = "held_out",
    answers: int = 0,
    progress: Callable[[Progress], None] = lambda _: None,
    cancellation: Cancellation | None = None,
) -> CheckpointChoice:
    """Choose among all of a run's checkpoints."""
    return choose_checkpoint(
        LocalEngine(variants),
        variants,
        saved_adapters(run.checkpoints),
        rows,
        run=run,
        rows_from=rows_from,
        answers=answers,
        max_new_tokens=8,
        progress=progress,
        cancellation=cancellation,
    )


def test_every_candidate_has_the_loss_of_its_own_weights(base: VariantSet, variants: VariantSet, run: Run) -> None:
    """The same as with all adapters loaded beside each other, base first, then in order of step."""
    choice = choose(base, run)
    assert [one.name for one in choice.candidates] == ["base", "checkpoint-10", "checkpoint-20", "final"]
    for name, loaded in (("base", "base"), ("checkpoint-10", "checkpoint-10"), ("checkpoint-20", "final")):
        rows = score(variants, [loaded], ROWS)[loaded]
        expected = ratio_estimate([one.nll for one in rows], [one.tokens for one in rows])
        found = choice.candidate(name).loss
        assert found is not None
        assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))
    assert choice.tokens == sum(one.tokens for one in score(variants, ["base"], ROWS)["base"])
    with pytest.raises(KeyError):
        choice.candidate("checkpoint-30")


def test_differences_are_to_the_best_and_to_the_base(base: VariantSet, run: Run) -> None:
    """What stands in the record is the selection's."""
    choice = choose(base, run)
    losses = {one.name: one.loss.value for one in choice.candidates if one.loss}
    best = min(("checkpoint-10", "checkpoint-20"), key=lambda name: losses[name])
    assert choice.best == best
    assert choice.candidate(best).to_best is None
    assert choice.candidate("base").to_base is None
    for one in choice.candidates:
        assert one.to_best is None or one.to_best.value == pytest.approx(losses[one.name] - losses[best])
        assert one.to_base is None or one.to_base.value == pytest.approx(losses[one.name] - losses["base"])
    assert choice.comparisons == 2


def test_a_copy_is_scored_once_and_has_its_originals_figures(base: VariantSet, run: Run) -> None:
    """The final adapter is the last checkpoint's bytes; three models are scored, not four."""
    seen: list[Progress] = []
    choice = choose(base, run, progress=seen.append)
    assert {step.total for step in seen if step.stage == "score"} == {3 * len(ROWS)}
    assert [step.done for step in seen] == sorted(step.done for step in seen)
    final, original = choice.candidate("final"), choice.candidate("checkpoint-20")
    assert (final.same_as, original.same_as) == ("checkpoint-20", None)
    assert (final.loss, final.to_best, final.to_base) == (original.loss, original.to_best, original.to_base)
    assert choice.last == "checkpoint-20"
    assert choice.recommended != "final"


def test_one_byte_or_another_scaling_is_no_copy(run: Run) -> None:
    """Neither the last number nor the configuration may differ."""
    weights = Path(run.path) / "adapter_model.safetensors"
    original = weights.read_bytes()
    for place in (-1, len(original) // 2):
        changed = bytearray(original)
        changed[place] ^= 1
        weights.write_bytes(changed)
        assert saved_adapters(run.checkpoints).candidates[-1].same_as is None
    weights.write_bytes(original)
    assert saved_adapters(run.checkpoints).candidates[-1].same_as == "checkpoint-20"
    edit_json(Path(run.path) / "adapter_config.json", lora_alpha=9)
    assert saved_adapters(run.checkpoints).candidates[-1].same_as is None


def test_a_final_adapter_may_be_the_copy_of_any_checkpoint(tiny: TinyRun, tmp_path: Path) -> None:
    """A trainer that loads the best one at its end saves that one as final."""
    first, second = tiny.adapters["checkpoint-10"], tiny.adapters["final"]
    run = saved_run(tmp_path / "run", {"checkpoint-10": first, "checkpoint-20": second, "final": first})
    saved = saved_adapters(run.checkpoints)
    assert [one.same_as for one in saved.candidates] == [None, None, "checkpoint-10"]
    assert [one.name for one in saved.different] == ["checkpoint-10", "checkpoint-20"]


def test_distances_are_to_the_one_before_and_to_the_last(tiny: TinyRun, tmp_path: Path) -> None:
    """Of an update and its double: half of the double is new, and a copy is at no distance."""
    double = Path(shutil.copytree(tiny.adapters["final"], tmp_path / "double"))
    tensors = load_file(double / "adapter_model.safetensors")
    save_file(
        {name: x * 2 if "lora_B" in name else x for name, x in tensors.items()}, double / "adapter_model.safetensors"
    )
    run = saved_run(
        tmp_path / "run", {"checkpoint-10": tiny.adapters["final"], "checkpoint-20": double, "final": double}
    )
    first, second, final = saved_adapters(run.checkpoints).candidates
    assert (first.to_previous, second.to_previous, final.to_previous) == (None, pytest.approx(0.5), 0)
    assert (first.to_last, second.to_last, final.to_last) == (pytest.approx(0.5), 0, 0)


def test_one_adapter_at_a_time_is_in_memory_and_none_remains(base: VariantSet, run: Run) -> None:
    """However many checkpoints a run has; also where the work is stopped in its midst."""
    together: list[int] = []
    choose(base, run, answers=2, progress=lambda _: together.append(len(base.variants)))
    assert max(together) == 2
    assert base.names == ("base",)
    for stage in ("score", "generate"):
        cancellation = Cancellation()

        def stop(step: Progress, stage: str = stage, flag: Cancellation = cancellation) -> None:
            if step.stage == stage and len(base.variants) == 2:
                flag.cancel()

        with pytest.raises(Cancelled):
            choose(base, run, answers=2, progress=stop, cancellation=cancellation)
        assert base.names == ("base",)


def test_answers_are_those_of_the_recommended_the_best_and_the_last(
    base: VariantSet, variants: VariantSet, run: Run
) -> None:
    """Greedy, to the first rows; the base and checkpoints that nobody asks about write nothing."""
    choice = choose(base, run, answers=2)
    named = {choice.recommended, choice.best, choice.last}
    settings = GenerationSettings(greedy=True, max_new_tokens=8)
    for one in choice.candidates:
        if (one.same_as or one.name) not in named:
            assert one.answer_tokens is None
            continue
        loaded = "final" if one.name in ("final", "checkpoint-20") else one.name
        expected = generate(variants, [Request(loaded, item.prompt) for item in ROWS[:2]], settings)
        assert one.answer_tokens == sum(len(answer.token_ids) for answer in expected) / 2
        assert one.answers_cut == sum(answer.stop_reason == "length" for answer in expected)
    assert (choice.answered, choice.max_new_tokens) == (2, 8)
    silent = choose(base, run)
    assert (silent.answered, silent.max_new_tokens) == (0, None)
    assert {one.answer_tokens for one in silent.candidates} == {None}


def test_the_record_survives_json(base: VariantSet, run: Run, tmp_path: Path) -> None:
    """With a loss that is no number among its figures, too."""
    choice = choose(base, run, answers=1)
    assert CheckpointChoice.read(choice.write(tmp_path / "choice.json")) == choice
    assert json.loads(choice.to_json())["schema_version"] == 1
    broken = choice.candidate("final").model_copy(update={"logged_loss": math.inf})
    changed = choice.model_copy(update={"candidates": (broken,)})
    assert CheckpointChoice.read(changed.write(tmp_path / "broken.json")) == changed


def test_one_row_recommends_nothing(base: VariantSet, run: Run) -> None:
    """Nor does it write answers for nobody."""
    choice = choose(base, run, ROWS[:1], answers=1)
    assert (choice.recommended, choice.reason.code, choice.answered) == (None, "choice_too_few_rows", 0)
    assert {one.like_best for one in choice.candidates} == {None}


def test_an_adapter_that_cannot_be_read_is_left_out_and_named(base: VariantSet, run: Run) -> None:
    """A run that was killed while it saved still has its other checkpoints; with none left it is an error."""
    (Path(run.path) / "checkpoint-20" / "adapter_model.safetensors").write_bytes(b"cut")
    choice = choose(base, run)
    assert [one.name for one in choice.candidates] == ["base", "checkpoint-10", "final"]
    assert [(one.code, one.params["name"]) for one in choice.findings] == [("choice_unreadable", "checkpoint-20")]
    for name in ("checkpoint-10", "."):
        (Path(run.path) / name / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError):
        saved_adapters(run.checkpoints)


def test_rows_that_training_saw_are_not_scored_in_silence(base: VariantSet, tiny: TinyRun, tmp_path: Path) -> None:
    """Where its data is at hand, rows of it are found; where it is not, that is said."""
    data = tmp_path / "train.jsonl"
    data.write_text(
        "".join(json.dumps({"instruction": f"question {i}", "output": f"the answer {i * i}"}) + "\n" for i in range(3))
    )
    adapters = {"final": tiny.adapters["final"]}

    def about(rows: list[Conversation], dataset: str | None) -> Finding:
        settings = [{"name": "dataset", "value": dataset, "source": "training_args.yaml"}] if dataset else []
        run = saved_run(tmp_path / "run", adapters, settings=settings)
        return choose(base, run, rows, rows_from="given").findings[0]

    seen = about(ROWS, "../train.jsonl")
    assert (seen.code, seen.severity) == ("choice_rows_trained_on", "warning")
    assert (seen.params["count"], seen.params["rows"], seen.params["file"]) == (3, 6, "train.jsonl")
    assert about(ROWS[3:], str(data)).code == "choice_rows_unseen"
    for unknown in (None, "a_registered_name", "../run/adapter_model.safetensors"):
        assert about(ROWS, unknown).code == "choice_rows_unchecked"
    run = saved_run(tmp_path / "run", adapters)
    assert choose(base, run, rows_from="held_out").findings == ()


def record(run: Run, **changes: dict[str, object]) -> CheckpointChoice:
    """Choose from the record, with changes to checkpoints by the number in their names."""
    known = [one.model_copy(update=changes.get(one.name.replace("-", "_"), {})) for one in run.checkpoints]
    return choose_from_record(saved_adapters(known), run=run)


def test_without_rows_the_trainers_record_is_all_there_is(run: Run) -> None:
    """Its best, else the lowest loss that it logged, else nothing; never a guess."""
    logged = record(run, checkpoint_10={"eval_loss": 1.5}, checkpoint_20={"eval_loss": 1.6})
    assert (logged.recommended, logged.reason.code) == ("checkpoint-10", "choice_recorded")
    assert "1.500" in finding_text(logged.reason)
    marked = record(run, checkpoint_10={"eval_loss": 1.5}, checkpoint_20={"eval_loss": 1.6, "is_best": True})
    assert (marked.recommended, marked.trainers_best) == ("checkpoint-20", "checkpoint-20")
    assert (marked.reason.code, "`checkpoint-20`" in finding_text(marked.reason)) == ("choice_marked", True)
    nothing = record(run, checkpoint_10={"eval_loss": math.nan})
    assert (nothing.recommended, nothing.reason.code, nothing.reason.severity) == (None, "choice_unknown", "warning")
    assert (logged.rows, logged.rows_from, logged.dtype, logged.comparisons) == (0, "none", None, 1)
    assert {one.loss for one in logged.candidates} == {None}
    assert logged.candidates[1].to_last == 0


def test_one_checkpoint_without_rows_is_no_choice(tiny: TinyRun, tmp_path: Path) -> None:
    """Nor is one with its copy."""
    adapter = tiny.adapters["final"]
    run = saved_run(tmp_path / "run", {"checkpoint-10": adapter, "final": adapter})
    choice = choose_from_record(saved_adapters(run.checkpoints), run=run)
    assert (choice.recommended, choice.reason.code) == ("checkpoint-10", "choice_sole")


def test_the_trainers_own_best_is_held_against_ours(base: VariantSet, run: Run) -> None:
    """The same one, also under the name of its copy; or another, with the reason."""
    plain = choose(base, run)
    other = next(one.name for one in plain.candidates[1:3] if one.name != plain.recommended)
    for name, codes in (
        (plain.recommended, {"choice_trainer_agrees"}),
        (other, {"choice_trainer_worse", "choice_trainer_within_noise"}),
    ):
        best = [one.model_copy(update={"is_best": one.name == name}) for one in run.checkpoints]
        found = choose(base, run.model_copy(update={"checkpoints": tuple(best)}))
        assert (found.recommended, found.trainers_best) == (plain.recommended, name)
        (remark,) = found.findings
        assert remark.code in codes
        assert "–" not in finding_text(remark)


def test_a_trainers_best_that_is_a_copy_of_ours_is_ours(base: VariantSet, tiny: TinyRun, tmp_path: Path) -> None:
    """Two names of one adapter are no disagreement."""
    adapter = tiny.adapters["final"]
    run = saved_run(tmp_path / "run", {"checkpoint-10": adapter, "checkpoint-20": adapter})
    best = [one.model_copy(update={"is_best": one.step == 20}) for one in run.checkpoints]
    found = choose(base, run.model_copy(update={"checkpoints": tuple(best)}))
    assert (found.recommended, found.trainers_best) == ("checkpoint-10", "checkpoint-20")
    assert [one.code for one in found.findings] == ["choice_trainer_agrees"]


CASES: dict[str, dict[str, list[float]]] = {
    "clear": {"base": [40, 41, 43], "checkpoint-10": [32, 33.1, 35], "checkpoint-20": [30, 31, 33]},
    "earliest": {
        "base": [90, 91, 93],
        "checkpoint-10": [50, 51, 53.1],
        "checkpoint-20": [30, 32, 33],
        "checkpoint-30": [31, 30, 33.5],
    },
    "best_early": {
        "base": [90, 91, 93],
        "checkpoint-10": [50, 51, 53.1],
        "checkpoint-20": [30, 31, 33],
        "checkpoint-30": [31, 30.5, 33],
    },
    "all_alike": {"base": [40, 41, 43], "checkpoint-10": [30, 31, 33.1], "checkpoint-20": [30, 31, 33]},
    "overfit": {"base": [40, 41, 43], "checkpoint-10": [30, 31, 33], "checkpoint-20": [32, 33, 35.1]},
    "overfit_earliest": {
        "base": [90, 91, 93],
        "checkpoint-10": [31, 30.5, 33],
        "checkpoint-20": [30, 31, 33],
        "checkpoint-30": [50, 51, 53.1],
    },
    "only_one": {"base": [40, 41, 43], "checkpoint-10": [30, 31, 33.1]},
    "base_alike": {"base": [30, 32, 33], "checkpoint-10": [31, 31, 33], "checkpoint-20": [31, 30.5, 33]},
    "base_better": {"base": [30, 31, 33], "checkpoint-10": [40, 41, 43.1]},
    "too_few_rows": {"base": [30], "checkpoint-10": [31]},
    "not_finite": {"base": [30, 31], "checkpoint-10": [math.nan, 1]},
}


@pytest.mark.parametrize("verdict", CASES)
def test_every_reason_has_a_sentence_with_all_its_figures(verdict: str, tiny: TinyRun) -> None:
    """In both languages, and without a hole."""
    scores = {
        name: [RowScore(str(i), (-nll / 10,) * 10) for i, nll in enumerate(rows)]
        for name, rows in CASES[verdict].items()
    }
    selection = select(scores)
    assert selection.verdict == verdict
    checkpoints = [
        RunCheckpoint(name=name, step=1, path=str(tiny.adapters["final"])) for name in scores if name != "base"
    ]
    saved = saved_adapters(checkpoints)
    apart = SavedAdapters(tuple(one.model_copy(update={"same_as": None}) for one in saved.candidates), ())
    reason = _reason(selection, _with_figures(apart, selection, {}), len(scores["base"]))
    for lang in LANGUAGES:
        assert "–" not in finding_text(reason, lang)
        assert (selection.recommended or selection.best or "") in finding_text(
            reason, lang
        ) or verdict == "too_few_rows"


def test_every_origin_of_rows_is_spoken_of() -> None:
    """The closed list of origins has its texts."""
    origins = get_type_hints(CheckpointChoice)["rows_from"].__args__
    assert set(origins) == {"held_out", "given", "none"}
    for lang in LANGUAGES:
        assert all(text(f"choice.rows.{origin}", lang, rows=1, tokens=1, dtype="float32") for origin in origins)

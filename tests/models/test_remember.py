"""The remembering engine: nothing is asked twice, nothing is taken for what it is not, and a kill costs one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import TinyRun, chat, edit_json, row
from tunesmith.models import GenerationSettings, LocalEngine, RememberingEngine, Request, VariantSet
from tunesmith.models.engine import Generation, RowScore
from tunesmith.progress import Cancellation, Progress

GREEDY = GenerationSettings(greedy=True, max_new_tokens=6)
HOT = GenerationSettings(temperature=1.5, top_p=1.0, max_new_tokens=6)
ROWS = [row(i, f"question {i}", f"the answer {i * i}") for i in range(4)]
REQUESTS = [Request(name, chat(text)) for text in ("hi", "hello", "猫") for name in ("base", "final")]


class Counting(LocalEngine):
    """The local engine, which counts what it is really asked."""

    def __init__(self, variants: VariantSet) -> None:
        super().__init__(variants)
        self.asked: list[str] = []
        self.scored: list[tuple[tuple[str, ...], int]] = []

    def generate(self, requests: Sequence[Request], *args: Any, **kwargs: Any) -> list[Generation]:
        """Count, and answer."""
        self.asked += [request.variant for request in requests]
        return super().generate(requests, *args, **kwargs)

    def score(self, names: Sequence[str], rows: Sequence[Any], **kwargs: Any) -> dict[str, list[RowScore]]:
        """Count, and score."""
        self.scored.append((tuple(names), len(rows)))
        return super().score(names, rows, **kwargs)


def engine(variants: VariantSet, directory: Path, **how: bool) -> tuple[RememberingEngine, Counting]:
    """A remembering engine over one that counts."""
    counting = Counting(variants)
    return RememberingEngine(counting, directory, **how), counting


def said(generations: Sequence[Generation]) -> list[tuple[Any, ...]]:
    """What an answer is, without its times."""
    return [(one.text, one.token_ids, one.tokens, one.prompt_tokens, one.stop_reason) for one in generations]


def test_the_second_time_nothing_is_computed(variants: VariantSet, tmp_path: Path) -> None:
    """Answers and scores come back whole, per-token figures included."""
    first, _ = engine(variants, tmp_path)
    answers, scores = first.generate(REQUESTS, GREEDY), first.score(["base", "final"], ROWS)
    again, counting = engine(variants, tmp_path)
    assert (
        said(again.generate(REQUESTS, GREEDY))
        == said(answers)
        == said(LocalEngine(variants).generate(REQUESTS, GREEDY))
    )
    assert again.score(["base", "final"], ROWS) == scores == LocalEngine(variants).score(["base", "final"], ROWS)
    assert (counting.asked, counting.scored) == ([], [])
    assert again.remembered == len(REQUESTS) + 2 * len(ROWS)
    assert first.written == again.remembered
    assert again.written == 0


def test_only_what_is_new_is_asked_and_callbacks_name_the_right_request(variants: VariantSet, tmp_path: Path) -> None:
    """Old and new ones mixed: texts, answers and progress belong to the requests as they were given."""
    engine(variants, tmp_path)[0].generate(REQUESTS[1:3], GREEDY)
    again, counting = engine(variants, tmp_path)
    pieces = [""] * len(REQUESTS)
    done: dict[int, Generation] = {}
    seen: list[Progress] = []

    def take(index: int, text: str) -> None:
        pieces[index] += text

    answers = again.generate(REQUESTS, GREEDY, on_text=take, on_done=done.__setitem__, progress=seen.append)
    assert counting.asked == [REQUESTS[i].variant for i in (0, 3, 4, 5)]
    assert pieces == [one.text for one in answers]
    assert [done[i] for i in range(len(REQUESTS))] == answers
    assert {step.total for step in seen} == {len(REQUESTS)}
    assert seen[-1].done == len(REQUESTS)


@pytest.mark.parametrize(
    "change",
    [{"max_new_tokens": 5}, {"repetition_penalty": 1.3}, {"stop": ("a",)}, {"greedy": False}],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_are_another_question(variants: VariantSet, tmp_path: Path, change: dict[str, Any]) -> None:
    """Whatever changes an answer is part of what was asked."""
    engine(variants, tmp_path)[0].generate(REQUESTS[:1], GREEDY)
    again, counting = engine(variants, tmp_path)
    again.generate(REQUESTS[:1], GREEDY.model_copy(update=change))
    assert counting.asked == ["base"]


def test_a_seed_matters_to_sampled_answers_only(variants: VariantSet, tmp_path: Path) -> None:
    """Greedy ones have none, nor a temperature."""
    first, _ = engine(variants, tmp_path)
    first.generate(REQUESTS[:1], HOT)
    first.generate(REQUESTS[:1], GREEDY)
    again, counting = engine(variants, tmp_path)
    again.generate(REQUESTS[:1], GREEDY.model_copy(update={"seed": 9, "temperature": 0.1}))
    assert counting.asked == []
    again.generate(REQUESTS[:1], HOT.model_copy(update={"seed": 9}))
    assert counting.asked == ["base"]


def test_one_prompt_several_times_is_as_many_questions(variants: VariantSet, tmp_path: Path) -> None:
    """Sampled answers to the same prompt differ, and each is remembered as its own."""
    many = [Request("base", chat("hi"))] * 5
    answers = engine(variants, tmp_path)[0].generate(many, HOT)
    assert len({one.token_ids for one in answers}) > 1
    again, counting = engine(variants, tmp_path)
    assert said(again.generate(many, HOT)) == said(answers)
    assert counting.asked == []


def test_changed_weights_template_or_dtype_are_another_variant(tiny: TinyRun, tmp_path: Path) -> None:
    """Nothing that has changed is taken for what it was."""

    def identities(**changes: Any) -> tuple[str, str]:
        given = {"base_dir": tiny.base, "adapters": {"a": tiny.adapters["final"]}, "tokenizer_dir": tiny.base}
        found = LocalEngine(VariantSet.load(**{**given, **changes}))
        return found.identity("base"), found.identity("a")

    base, final = identities()
    assert base != final
    assert identities() == (base, final)
    other_base, other = identities(adapters={"a": tiny.adapters["checkpoint-10"]})
    assert (other_base, other != final) == (base, True)
    assert not set(identities(dtype="bf16")) & {base, final}
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    for file in tiny.base.iterdir():
        (tokens / file.name).write_bytes(file.read_bytes())
    template = tokens / "chat_template.jinja"
    template.write_text(template.read_text() + "!")
    assert not set(identities(tokenizer_dir=tokens)) & {base, final}
    scaled = tmp_path / "scaled"
    scaled.mkdir()
    for file in tiny.adapters["final"].iterdir():
        (scaled / file.name).write_bytes(file.read_bytes())
    edit_json(scaled / "adapter_config.json", lora_alpha=9)
    assert identities(adapters={"a": scaled})[1] not in (base, final)


def test_lines_that_were_cut_or_are_none_of_ours_are_passed_over(variants: VariantSet, tmp_path: Path) -> None:
    """As a kill in the middle of a line leaves them; the others count."""
    engine(variants, tmp_path)[0].generate(REQUESTS, GREEDY)
    files = sorted(tmp_path.glob("*.jsonl"))
    assert len(files) == 2
    lines = files[0].read_bytes().splitlines(keepends=True)
    files[0].write_bytes(b"\xff\xfe\n[]\nnull\n" + lines[0] + b"{}\n" + lines[1] + lines[2][:40])
    again, counting = engine(variants, tmp_path)
    again.generate(REQUESTS, GREEDY)
    assert len(counting.asked) == 1
    third, counting = engine(variants, tmp_path)
    third.generate(REQUESTS, GREEDY)
    assert len(counting.asked) == 0, "the line after a torn one is read"


def test_a_line_whose_answer_is_not_one_is_asked_again(variants: VariantSet, tmp_path: Path) -> None:
    """Another version may have written other fields."""
    engine(variants, tmp_path)[0].generate(REQUESTS[:1], GREEDY)
    (file,) = tmp_path.glob("*.jsonl")
    line = json.loads(file.read_text())
    file.write_text(json.dumps({**line, "answer": {"text": "?"}}) + "\n")
    again, counting = engine(variants, tmp_path)
    assert said(again.generate(REQUESTS[:1], GREEDY)) == said(LocalEngine(variants).generate(REQUESTS[:1], GREEDY))
    assert counting.asked == ["base"]


def test_fresh_asks_again_and_keeps_the_new(variants: VariantSet, tmp_path: Path) -> None:
    """The later line wins."""
    engine(variants, tmp_path)[0].generate(REQUESTS[:1], GREEDY)
    again, counting = engine(variants, tmp_path, fresh=True)
    again.generate(REQUESTS[:1], GREEDY)
    assert counting.asked == ["base"]
    assert again.written == 1


def test_what_was_done_before_a_cancellation_is_kept(variants: VariantSet, tmp_path: Path) -> None:
    """Answers that were cut by it are not answers."""
    cancellation = Cancellation()
    first, counting = engine(variants, tmp_path)
    short = GREEDY.model_copy(update={"max_new_tokens": 40})

    def stop(step: Progress) -> None:
        if step.done >= 1:
            cancellation.cancel()

    requests = [Request("base", chat("hi")), *[Request("base", chat("x" * n)) for n in range(1, 60)]]
    answers = first.generate(requests, short, progress=stop, cancellation=cancellation)
    whole = [one for one in answers if one.stop_reason != "cancelled"]
    assert 0 < first.written == len(whole) < len(requests)
    again, counting = engine(variants, tmp_path)
    again.generate(requests, short)
    assert len(counting.asked) == len(requests) - len(whole)


def test_scores_against_a_reference_are_others_than_without(variants: VariantSet, tmp_path: Path) -> None:
    """Only they have a divergence, and it is of that reference."""
    first, _ = engine(variants, tmp_path)
    plain = first.score(["base", "final"], ROWS)
    compared = first.score(["base", "final"], ROWS, reference="base")
    assert all(one.kl is None for one in plain["final"])
    assert all(one.kl is not None for one in compared["final"])
    again, counting = engine(variants, tmp_path)
    assert again.score(["base", "final"], ROWS, reference="base") == compared
    assert counting.scored == []


def test_the_base_is_scored_once_for_all_runs(tiny: TinyRun, tmp_path: Path) -> None:
    """Another run of the same base finds it there."""
    for name, asked in (("final", ("base", "a")), ("checkpoint-10", ("a",))):
        loaded = VariantSet.load(tiny.base, adapters={"a": tiny.adapters[name]}, tokenizer_dir=tiny.base)
        remembering, counting = engine(loaded, tmp_path)
        remembering.score(["base", "a"], ROWS)
        assert counting.scored == [(asked, len(ROWS))]


def test_more_rows_are_scored_and_the_old_ones_are_not(variants: VariantSet, tmp_path: Path) -> None:
    """Ids may have changed: what a row says is what counts."""
    engine(variants, tmp_path)[0].score(["final"], ROWS[:2])
    moved = [one.model_copy(update={"id": f"moved-{one.id}"}) for one in ROWS[::-1]]
    again, counting = engine(variants, tmp_path)
    scores = again.score(["final"], moved)["final"]
    assert counting.scored == [(("final",), 2)]
    assert [one.id for one in scores] == [one.id for one in moved]
    expected = LocalEngine(variants).score(["final"], moved)["final"]
    assert [one.log_probs for one in scores] == [pytest.approx(one.log_probs, abs=1e-5) for one in expected]


def test_a_directory_that_cannot_be_written_costs_nothing_else(variants: VariantSet, tmp_path: Path) -> None:
    """Remembering is a convenience."""
    (tmp_path / "file").write_text("")
    remembering, _ = engine(variants, tmp_path / "file" / "answers")
    assert said(remembering.generate(REQUESTS[:1], GREEDY)) == said(
        LocalEngine(variants).generate(REQUESTS[:1], GREEDY)
    )
    assert remembering.written == 0

"""A verdict as a person sees it in a terminal and in a pipe."""

from __future__ import annotations

import re

import pytest

from tunesmith.cli.output import console
from tunesmith.cli.verify import _render
from tunesmith.record import Finding
from tunesmith.verify import BehaviourRow, Divergence, Level, TensorVerdict, Verdict

TEMPLATE = Finding(code="cause_chat_template", severity="error")
DAMAGE = Finding(code="cause_one_element", severity="error", params={"tensor": "model.w4.weight", "count": 9})


def tensor(number: int, outside: int) -> TensorVerdict:
    """A tensor of a thousand numbers."""
    return TensorVerdict(
        name=f"model.w{number}.weight", module=None, elements=1000, exact=1000 - outside, faithful=0, twice_rounded=0,
        outside=outside, unchanged=0,
    )  # fmt: skip


def parted(name: str, *, tie: bool) -> BehaviourRow:
    """A prompt whose texts part at the third token."""
    divergence = Divergence(
        adapter_choice=" cat", merged_choice="\n", adapter_probabilities=(0.41, 0.4), merged_probabilities=(0.39, 0.42),
        margin=0.02, noise=0.05 if tie else 0.01, tie=tie,
    )  # fmt: skip
    return BehaviourRow(
        prompt_id=name, question="q", tokens=9, mean_kl=1e-4, base_kl=1.0, max_logit_difference=0.1,
        top1_agreement=0.9, same_text=False, first_difference=2, adapter_text="a", merged_text="b",
        divergence=divergence,
    )  # fmt: skip


def verdict(answer: str = "different", causes: tuple[Finding, ...] = (DAMAGE, TEMPLATE)) -> Verdict:
    """A verdict with something to show on every level."""
    wrong = Finding(code="weights_outside", severity="error", params={"elements": 5000, "outside": 15, "exact": 4985})
    template = Finding(code="chat_template_differs", severity="error")
    passed = Finding(code="structure_ok", severity="ok", params={"tensors": 5, "shards": 1})
    return Verdict.model_validate(
        {
            "run": "run",
            "merged": "merged",
            "checkpoint": "final",
            "base_model": "base",
            "answer": answer,
            "levels": (
                Level(name="structure", status="pass", findings=(passed,), seconds=0.1),
                Level(name="assets", status="fail", findings=(template,), seconds=0.2),
                Level(name="weights", status="fail", findings=(wrong,), seconds=1.5),
                Level(name="behaviour", status="skipped", findings=(), seconds=0.0),
            ),
            "causes": causes,
            "tensors": tuple(tensor(number, number + 1) for number in range(5)),
            "behaviour": (parted("row-1", tie=True), parted("row-2", tie=False)),
        }
    )


def shown(capsys: pytest.CaptureFixture[str], of: Verdict) -> str:
    """What is printed."""
    _render(console(), of)
    return capsys.readouterr().out


def test_the_verdict_comes_first_then_why_then_the_levels_then_the_causes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads one line knows the answer; who reads two knows what to do."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    lines = shown(capsys, verdict()).splitlines()
    assert lines[0] == "Different  merged against final of run"
    assert lines[1].startswith("The merge is right but for single numbers (9, in `model.w4.weight`)")
    headings = [line.split("  ")[:2] for line in lines if line and not line.startswith(" ")][2:]
    assert headings == [
        ["structure", "pass"],
        ["assets", "FAIL"],
        ["weights", "FAIL"],
        ["behaviour", "skipped"],
        ["Why, and how to mend it"],
    ]
    assert lines[-2].startswith("  1. The merge is right but")
    assert lines[-1].startswith("  2. ")


def test_a_finding_is_marked_by_how_grave_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A glance at the margin tells what to read."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    text = shown(capsys, verdict())
    assert "\n  ✓ All 5 tensors" in text
    assert "\n  ✗ Of 5,000 numbers, 15 are" in text


def test_the_worst_tensors_stand_under_the_weights_and_the_parted_texts_under_the_behaviour(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those with the most first, and those that part at no tie first; few of them."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    text = shown(capsys, verdict())
    weights = text.split("\nweights")[1].split("\nbehaviour")[0].splitlines()[2:]
    assert [line.strip() for line in weights if line.strip()] == [
        "`model.w4.weight`: 5 of 1,000 unexplained",
        "`model.w3.weight`: 4 of 1,000 unexplained",
        "`model.w2.weight`: 3 of 1,000 unexplained",
        "... and 2 more",
    ]
    first, second = text.split("\nbehaviour")[1].splitlines()[1:3]
    assert first.strip() == (
        r"row-2, token 3: ' cat' or '\n'? Adapter 41.0% to 40.0%, merged 39.0% to 42.0%: not a tie"
    )
    assert second.endswith(": a tie")


def test_a_sound_merge_has_no_causes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing to mend."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert "mend" not in shown(capsys, verdict("equal_within_rounding", ()))


def test_on_a_terminal_lines_keep_within_it_and_to_the_right_of_their_mark(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paragraphs wrap under their own text; quoted names are coloured instead of quoted."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = shown(capsys, verdict())
    assert "`" not in coloured
    plain = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert max(len(line) for line in plain.splitlines()) <= 60
    after = plain.split("✗ Of 5,000 numbers")[1].splitlines()[1]
    assert after.startswith("    ")

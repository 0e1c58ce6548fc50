"""The report: complete, self-contained, and safe whatever a model wrote."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tunesmith.compare import CheckpointChoice
from tunesmith.conversations import Conversation, Message
from tunesmith.merge import Forecast, Kept
from tunesmith.record import Finding
from tunesmith.report import render_report, text, write_report
from tunesmith.report.escaping import prose, visible
from tunesmith.report.view import effect
from tunesmith.runs import Overruled, RunFile, Setting
from tunesmith.verify import BehaviourRow, Divergence, Verdict

from .conftest import Parts

HOSTILE = '<script>alert("x")</script>\x1b[31m\u202egnp.exe\u2066\x00</div>{{ 7*7 }}'
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Shape(HTMLParser):
    """Counts elements, and checks that every one that is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        assert not any(name.startswith("on") for name, _ in attrs)
        self.seen[tag] = self.seen.get(tag, 0) + 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element that closes itself, as SVG's do."""

    def handle_endtag(self, tag: str) -> None:
        """Match an end with its beginning."""
        assert self.open.pop() == tag


def shape_of(document: str) -> Shape:
    """The shape of a document whose tags are all matched."""
    shape = Shape()
    shape.feed(document)
    assert shape.open == []
    return shape


def parted(row: BehaviourRow, *, tie: bool, choice: str = " sweet") -> BehaviourRow:
    """A row whose texts part at the seventh token."""
    divergence = Divergence(
        adapter_choice=choice,
        merged_choice="\n",
        adapter_probabilities=(0.412, 0.409),
        merged_probabilities=(0.401, 0.423),
        margin=0.0073,
        noise=0.065 if tie else 0.0065,
        tie=tie,
    )
    changes = {"same_text": False, "first_difference": 6, "divergence": divergence, "rounding_kl": 6.1e-4}
    return row.model_copy(update=changes)


def hostile(parts: Parts) -> Parts:
    """The same report, with the hostile text wherever somebody else chooses the text."""
    run, comparison, merged, verdict = parts["run"], parts["comparison"], parts["merged"], parts["verdict"]
    adapter = parts["adapter"]
    assert comparison is not None
    assert merged is not None
    assert verdict is not None
    assert adapter is not None
    asked = Conversation(
        id=HOSTILE,
        messages=tuple(
            Message(role=role, content=HOSTILE) for role in ("system", "user", "assistant", "user", "assistant")
        ),
    )
    replies = tuple(reply.model_copy(update={"text": HOSTILE + reply.variant}) for reply in comparison.replies[:2])
    rows = tuple(
        parted(row, tie=False, choice=HOSTILE).model_copy(update={"question": HOSTILE, "adapter_text": HOSTILE})
        for row in verdict.behaviour
    )
    bad_file = RunFile(path=f"{HOSTILE}/{HOSTILE}", size_bytes=1, kind="unknown", needed_for="unknown")
    modules = tuple(
        module.model_copy(update={"module": f"layers.{index}.{HOSTILE}"})
        for index, module in enumerate(adapter.modules)
    )
    tensors = tuple(
        tensor.model_copy(update={"name": HOSTILE, "module": f"layers.{index}.{HOSTILE}"})
        for index, tensor in enumerate(verdict.tensors)
    )
    cause = Finding(code="cause_other_checkpoint", severity="error", params={"checkpoint": f"`{HOSTILE}`"})
    return {
        "run": run.model_copy(
            update={
                "path": f"/tmp/{HOSTILE}",  # noqa: S108 - a name, not a file
                "base_model": HOSTILE,
                "files": (*run.files, bad_file),
                "settings": tuple(
                    Setting(
                        name=name, value=HOSTILE, source=HOSTILE, overruled=(Overruled(value=HOSTILE, source=HOSTILE),)
                    )
                    for name in (HOSTILE, f"version_{HOSTILE}", "dataset")
                ),
                "findings": (Finding(code="file_unreadable", severity="warning", params={"file": HOSTILE}),),
            }
        ),
        "adapter": adapter.model_copy(update={"refusal": HOSTILE, "modules": modules, "target_modules": (HOSTILE,)}),
        "comparison": comparison.model_copy(
            update={
                "prompts": (asked,),
                "replies": tuple(reply.model_copy(update={"prompt_id": HOSTILE}) for reply in replies),
            }
        ),
        "merged": merged.model_copy(update={"plan": merged.plan.model_copy(update={"out": HOSTILE})}),
        "verdict": verdict.model_copy(
            update={"behaviour": rows, "tensors": tensors, "merged": HOSTILE, "answer": "different", "causes": (cause,)}
        ),
    }


def test_a_complete_report_shows_every_part(parts: Parts) -> None:
    """Each section is there, with figures from the records."""
    document = render_report(**parts)
    sections = re.findall(r'<section[^>]* id="([a-z]+)"', document)
    assert sections == [
        "verdict",
        "effect",
        "outputs",
        "run",
        "adapter",
        "loss",
        "checkpoints",
        "files",
        "merge",
        "verification",
    ]
    for piece in ("39.2%", "40 of 40", "e2d1b4b7a1c0f7c4", "checkpoint-40", "4.88 M", "有差异但可接受", "Passed"):
        assert piece in document
    assert shape_of(document).seen["script"] == 1


def test_a_failed_verification_leads_with_its_cause_and_the_next_command(parts: Parts, bad_verdict: Verdict) -> None:
    """Who reads only the banner knows what is wrong and what to type."""
    document = render_report(**{**parts, "verdict": bad_verdict})
    banner = document.split('id="verdict"')[1].split("</section>")[0]
    assert "Different" in banner
    assert "94 adapted modules were left out" in banner
    assert "tunesmith verify /data/models/security007 /data/save/" in banner
    assert "chat_template.jinja" in banner


@pytest.mark.parametrize("missing", ["adapter", "comparison", "merged", "verdict"])
def test_a_missing_part_becomes_a_hint_with_its_command(parts: Parts, missing: str) -> None:
    """The report says what would add the part, instead of failing or staying silent."""
    document = render_report(**{**parts, missing: None})  # type: ignore[arg-type]
    verb = {"adapter": "report", "comparison": "report", "merged": "report", "verdict": "verify"}[missing]
    assert f"tunesmith {verb} /data/models/security007" in document
    shape_of(document)


def test_what_nearest_would_have_kept_is_shown_where_it_was_not_taken(parts: Parts) -> None:
    """A row each for what was chosen and for the nearest; of a merge to nearest there is nothing to compare."""
    merged = parts["merged"]
    assert merged is not None
    document = render_report(**parts)
    for shown in ("99.7%", "94.3%", "52.4%", "56.1%", text("merge.kept"), text("merge.nearest")):
        assert shown in document, shown
    plan = merged.plan.model_copy(update={"rounding": "nearest", "warnings": ()})
    nearest = merged.model_copy(update={"plan": plan, "kept": merged.nearest})
    document = render_report(**{**parts, "merged": nearest})
    assert text("merge.nearest") not in document


def test_a_report_of_a_run_alone_renders(parts: Parts) -> None:
    """A run without log, checkpoints or files is still a report."""
    bare = parts["run"].model_copy(
        update={"log": (), "checkpoints": (), "files": (), "settings": (), "metrics": {}, "base_model": None}
    )
    document = render_report(run=bare, adapter=None)
    assert text("health.look") in document
    assert "tunesmith compare /data/models/security007" in document
    shape_of(document)


def test_a_report_of_a_run_alone_is_about_its_health(parts: Parts) -> None:
    """The gravest finding is its headline; what has not been done yet has no section."""
    for severity, key in (("info", "health.well"), ("warning", "health.look"), ("error", "health.ill")):
        finding = Finding(code="tokenizer_missing", severity=severity)
        document = render_report(run=parts["run"], adapter=parts["adapter"], health=[finding])
        banner = document.split('id="verdict"')[1].split("</section>")[0]
        assert text(key) in banner
        assert text(key, "zh") in banner
        assert "holds no tokenizer" in banner
        sections = re.findall(r'<section[^>]* id="([a-z]+)"', document)
        assert sections == ["verdict", "run", "adapter", "loss", "checkpoints", "files"]
    assert text("health.nothing") in render_report(run=parts["run"], adapter=None, health=[])


def test_what_another_file_says_of_a_setting_is_shown_beside_it(parts: Parts) -> None:
    """With both files."""
    document = render_report(run=parts["run"], adapter=None)
    shown = re.sub(r"<[^>]+>", "", document.split(text("run.settings", count=17))[1])
    assert "learning_rate" in shown
    assert "0.0005 tunesmith_run.json" in shown
    assert "training_args.yaml says 0.0001" in shown


def test_every_kind_of_module_is_a_row_and_those_that_never_moved_are_marked(parts: Parts) -> None:
    """Sizes, effective rank, and how many stayed where they began."""
    adapter = parts["adapter"]
    assert adapter is not None
    still = adapter.modules[3].model_copy(update={"moved": False})
    adapter = adapter.model_copy(update={"modules": (*adapter.modules[:3], still, *adapter.modules[4:])})
    table = render_report(run=parts["run"], adapter=adapter).split('id="adapter"')[1].split("</section>")[0]
    assert len(re.findall(r"<tr[ >]", table)) == 8
    assert table.count('class="bad"') == 1
    assert re.search(r"[4-6]\.\d of 8", table)


def test_the_choice_of_a_checkpoint_is_shown_with_its_curve(parts: Parts, choice: CheckpointChoice) -> None:
    """The reason, a chart in both languages, every candidate but copies, and the recommended one marked."""
    section = render_report(run=parts["run"], adapter=None, choice=choice).split('id="checkpoints"')[1]
    section = section.split("</section>")[0]
    assert section.count("<svg") == section.count("</svg>") >= 2
    assert "no final adapter" in section
    rows = re.findall(r"<tr>.*?</tr>", section, re.DOTALL)
    assert len(rows) == 5
    (taken,) = (row for row in rows if text("choice.recommended") in row)
    assert "checkpoint-40" in taken
    assert "1.100 ± 0.050" in taken
    assert "final" not in "".join(rows)
    shape_of(render_report(**parts, choice=choice))


def test_a_comparison_without_scores_or_base_renders(parts: Parts) -> None:
    """One variant alone has replies, no difference, and no judgement."""
    comparison = parts["comparison"]
    assert comparison is not None
    unscored = comparison.model_copy(update={"scores": ()})
    assert "tunesmith compare /data/models/security007 --data FILE" in render_report(
        **{**parts, "comparison": unscored}
    )
    alone = comparison.model_copy(
        update={
            "variants": comparison.variants[1:],
            "scores": (comparison.scores[2].model_copy(update={"difference": None, "better_rows": None}),),
        }
    )
    assert "No base to compare with" in render_report(**{**parts, "comparison": alone})


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(-1.3, -1.1, "Yes"), (-0.1, 0.2, "Cannot tell"), (0.1, 0.3, "No, it got worse"), (None, None, "Cannot tell")],
)
def test_the_effect_is_judged_by_its_whole_interval(
    parts: Parts, low: float | None, high: float | None, word: str
) -> None:
    """Only an interval on one side of zero is an answer."""
    comparison = parts["comparison"]
    assert comparison is not None
    score = comparison.scores[2].model_copy(update={"difference_low": low, "difference_high": high})
    document = render_report(
        **{**parts, "comparison": comparison.model_copy(update={"scores": (comparison.scores[0], score)})}
    )
    assert f'<span lang="en">{word}</span>' in document


def test_differing_words_are_marked_on_their_own_side(parts: Parts) -> None:
    """What only the base said is struck through; what only the fine-tune said is underlined."""
    document = render_report(**parts)
    assert "<del>You should</del> remove the links" in document
    assert "<ins>Do now:</ins> remove the links" in document


def test_a_tie_and_a_flip_are_told_apart_with_both_candidates(parts: Parts) -> None:
    """Flips first, as a remark; a tie is good.  Both show what either model gives to the two tokens."""
    verdict = parts["verdict"]
    assert verdict is not None
    rows = (parted(verdict.behaviour[0], tie=True), parted(verdict.behaviour[1], tie=False), *verdict.behaviour[2:])
    document = render_report(**{**parts, "verdict": verdict.model_copy(update={"behaviour": rows})})
    table = document.split('<table class="behaviour">')[1].split("</table>")[0].split("<tr")[2:]
    assert table[0].startswith(' class="differs"')
    assert text("verify.text_differs", place=7) in table[0]
    assert table[1].startswith(">")
    assert text("verify.text_tie", place=7) in table[1]
    for shown in ("41.2%", "40.9%", "40.1%", "42.3%", ">⏎</code>", text("verify.rounding_kl"), "6.1×10⁻⁴"):
        assert shown in document, shown
    for lang in ("en", "zh"):
        for kind, noise in (("tie", 0.065), ("flip", 0.0065)):
            assert prose(text(f"verify.divergence.{kind}", lang, margin=0.0073, noise=noise)) in document


def test_the_map_of_the_weights_is_shown_whether_all_is_well_or_not(parts: Parts, bad_verdict: Verdict) -> None:
    """In both languages; crosses only where something is wrong."""
    for verdict, crossed in ((parts["verdict"], False), (bad_verdict, True)):
        document = render_report(**{**parts, "verdict": verdict})
        drawings = document.split('<figure class="chart card map">')[1].split("</figure>")[0]
        assert drawings.count("<svg") == 2
        assert (">×</text>" in drawings) == crossed
    without = bad_verdict.model_copy(update={"tensors": ()})
    assert "card map" not in render_report(**{**parts, "verdict": without})


def test_a_cut_reply_is_marked_and_its_remedy_named(parts: Parts) -> None:
    """The difference to a reply that the limit cut is not the model's."""
    document = render_report(**parts)
    assert document.count("stop-length") > 1
    assert "--max-new-tokens 256" in document


def articles(document: str) -> list[str]:
    """The questions of a page, each with its replies."""
    outputs = document.split('<section id="outputs">')[1].split('<section id="run">')[0]
    return outputs.split("<article")[1:]


def test_a_reply_that_was_cut_bears_a_bar_and_nothing_after_its_end_is_marked(parts: Parts) -> None:
    """What the other side says after that is no difference: nobody knows how the cut one would have gone on."""
    comparison = parts["comparison"]
    assert comparison is not None
    texts = {"base": "Close the form now and then", "final": "Close the form now and keep it closed."}
    replies = tuple(
        reply.model_copy(update={"text": texts[reply.variant], "stop_reason": "eos"})
        for reply in comparison.replies[:2]
    )
    cut = (replies[0].model_copy(update={"stop_reason": "length"}), replies[1])
    for shown, barred in ((replies, False), (cut, True)):
        document = render_report(**{**parts, "comparison": comparison.model_copy(update={"replies": shown})})
        first = articles(document)[0]
        assert ("column-cut" in first) == barred
        assert ("<ins>" in first) != barred
        assert (prose(text("outputs.cut", "zh", twice=256)) in first) == barred


def test_a_reply_that_a_stop_text_ended_is_no_warning(parts: Parts) -> None:
    """It ended where it was told to; only what was cut or stopped by hand is amber."""
    comparison = parts["comparison"]
    assert comparison is not None
    replies = tuple(reply.model_copy(update={"stop_reason": "stop"}) for reply in comparison.replies)
    first = articles(render_report(**{**parts, "comparison": comparison.model_copy(update={"replies": replies})}))[0]
    assert "ended by a stop text" in first
    assert "遇到停止文本而结束" in first
    assert "#i-warn" not in first


def test_replies_bear_their_marks_and_filters_count_the_questions(parts: Parts) -> None:
    """The same text is not different, a reply further from the expected answer is worse, and all can be picked out."""
    comparison = parts["comparison"]
    assert comparison is not None
    expected = [
        prompt.model_copy(update={"messages": (*prompt.prompt, Message(role="assistant", content=reply.text))})
        for prompt, reply in zip(comparison.prompts, comparison.replies[::2], strict=True)
    ]
    same_as_base = comparison.model_copy(update={"prompts": tuple(expected)})
    document = render_report(**{**parts, "comparison": same_as_base})
    marks = [re.findall(r'data-marks="([^"]*)"', article) for article in articles(document)]
    assert marks[0] == ["different regressed"]
    assert marks[2] == ["different truncated regressed"]
    assert marks[3] == []
    assert text("mark.regressed") in articles(document)[0]
    bar = document.split('<div class="filters"')[1].split("</div>")[0]
    assert bar.startswith(' role="group" hidden>')
    for shown in ("all (5)", "different (4)", "cut off (1)", "worse (4)", "被截断（1）"):
        assert shown in bar, shown
    alike = tuple(reply.model_copy(update={"text": "Yes.", "stop_reason": "eos"}) for reply in comparison.replies)
    calm = render_report(**{**parts, "comparison": comparison.model_copy(update={"replies": alike})})
    assert '<div class="filters"' not in calm


def test_hostile_text_is_shown_and_never_obeyed(parts: Parts) -> None:
    """Markup, terminal escapes, bidirectional overrides and NULs lose their power wherever they come from."""
    document = render_report(**hostile(parts))
    assert shape_of(document).seen["script"] == 1
    assert "<script>alert" not in document
    assert "&lt;script&gt;alert" in document
    assert not set("\x00\x1b\u202e\u2066") & set(document)
    for shown in ("␛[31m", "⟨U+202E⟩", "⟨U+2066⟩", "␀", "{{ 7*7 }}"):
        assert shown in document


def test_only_the_reports_own_script_may_run(parts: Parts) -> None:
    """The content security policy names the script by its hash and forbids everything else."""
    document = render_report(**parts)
    script = document.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in document


def test_the_report_refers_to_no_other_origin(parts: Parts) -> None:
    """Nothing but SVG's name spaces looks like an address."""
    document = render_report(**parts)
    assert set(re.findall(r"https?://[^\s\"'<)]+", document)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not re.search(r"<link|@import|<img|<iframe|url\((?!#)", document)


def test_joiners_that_scripts_need_are_kept() -> None:
    """Emoji, Persian and Indic text rely on joiners; ordinary text is untouched."""
    for kept in ("👩‍🔧", "می\u200cخواهم", "中文，全角\u3000空格", "a\tb\nc", "naïve é"):
        assert visible(kept) == kept
    assert visible("a\r\nb\rc") == "a\nb␍c"
    assert visible("\ud800\ufeff") == "⟨U+D800⟩⟨U+FEFF⟩"


def test_the_report_is_written_whole_and_leaves_nothing_beside(parts: Parts, tmp_path: Path) -> None:
    """The file appears under its name only when it is complete."""
    written = write_report(tmp_path / "report.html", **parts)
    assert written.read_text("utf-8").endswith("</html>")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_report_of_the_same_records_is_the_same_file(parts: Parts) -> None:
    """No clock and no chance goes into it, so two reports can be compared."""
    assert render_report(**parts) == render_report(**parts)


def test_importing_the_room_loads_neither_jinja_nor_the_chart_engine() -> None:
    """The command line starts fast: what only a report needs is loaded by the report."""
    program = "import sys, tunesmith.report; print([n for n in ('jinja2', 'vl_convert', 'torch') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("rounding", "shown"), [("faithful", ("99.9%", "61.0%")), ("nearest", ("61.0%",))])
def test_what_a_merge_would_keep_is_among_the_adapters_facts(
    parts: Parts, rounding: str, shown: tuple[str, ...]
) -> None:
    """With the way of rounding that keeps more, where there is one."""
    kept, nearest = (Kept(share_unchanged=0.5, relative_error=0.1, gain=gain) for gain in (0.999, 0.61))
    foretold = Forecast(dtype="BF16", rounding=rounding, tensors=4, elements=9, kept=kept, nearest=nearest)
    document = render_report(run=parts["run"], adapter=parts["adapter"], forecast=foretold)
    about = document.split(text("fact.forecast"))[1][:900]
    assert all(figure in about for figure in shown)
    assert ("99.9%" in about) is (rounding == "faithful")


def test_without_a_base_no_variant_is_taken_for_it(parts: Parts) -> None:
    """Two scores that nothing was measured against say nothing of each other."""
    comparison = parts["comparison"]
    bare = {"difference": None, "difference_low": None, "difference_high": None, "better_rows": None}
    score = next(one for one in comparison.scores if one.difference is not None).model_copy(update=bare)
    two = (score, score.model_copy(update={"variant": "other"}))
    tuned = tuple(one for one in comparison.variants if one.kind != "base")
    found = effect(comparison.model_copy(update={"variants": tuned, "scores": two}))
    assert found is not None
    assert found.answer == "alone"

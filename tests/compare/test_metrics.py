"""metrics: sacrebleu's and rouge-score's own figures, differences whose truth is known, and scorers that fail."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from tests.compare.pairing import paired
from tunesmith.compare.metrics import (
    METRICS,
    difference,
    estimate,
    load_scorer,
    normalized,
    rouge_l,
    scorer_metric,
    words,
)
from tunesmith.errors import DataError

EN = ["The quick brown fox jumps over the lazy dog.", "It costs $3.50, doesn't it?", "Yes.", "Two of them, at most."]
EN_REPLIES = ["A quick brown fox jumped over the lazy dog.", "It costs $3.50.", "Yes.", "No idea."]
ZH = ["压缩机每年要换一次机油。", "请先断开 220 V 电源,再打开外壳。", "可以。", "“小心”的意思是:注意安全!"]
ZH_REPLIES = ["压缩机的机油每两年换一次。", "请先断开电源,再打开外壳。", "可以。", "不知道。"]
TEXT = st.text(alphabet="ab cd.电源,机 1", max_size=30)


def value(name: str, replies: Sequence[str], expected: Sequence[str]) -> float:
    """A metric's corpus value, from sums."""
    metric = METRICS[name]
    return float(metric.value(metric.rows(replies, expected).sum(axis=0)))


class OurWords:
    """rouge-score's place for a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        """Our words."""
        return words(text)


@pytest.mark.parametrize(
    ("replies", "expected", "tokenizer"), [(EN_REPLIES, EN, "13a"), (ZH_REPLIES, ZH, "zh")], ids=["en", "zh"]
)
def test_bleu_is_sacrebleus(replies: list[str], expected: list[str], tokenizer: str) -> None:
    """Chinese answers are cut into characters, all others as the mteval script does."""
    theirs = sacrebleu.corpus_bleu(replies, [expected], tokenize=tokenizer).score
    assert 0 < theirs < 100
    assert value("bleu", replies, expected) == pytest.approx(theirs, abs=1e-9)
    other = sacrebleu.corpus_bleu(replies, [expected], tokenize="zh" if tokenizer == "13a" else "13a").score
    assert tokenizer == "13a" or abs(other - theirs) > 5


def test_bleu_of_two_languages_cuts_every_row_in_its_own_way() -> None:
    """As sacrebleu gives it for rows that were cut before."""
    cut = {tokenizer: sacrebleu.BLEU(tokenize=tokenizer).tokenizer for tokenizer in ("13a", "zh")}
    theirs = sacrebleu.corpus_bleu(
        [*map(cut["13a"], EN_REPLIES), *map(cut["zh"], ZH_REPLIES)],
        [[*map(cut["13a"], EN), *map(cut["zh"], ZH)]],
        tokenize="none",
        force=True,
    ).score
    assert value("bleu", EN_REPLIES + ZH_REPLIES, EN + ZH) == pytest.approx(theirs, abs=1e-9)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_values_are_sacrebleus_whatever_the_texts(rows: list[tuple[str, str]]) -> None:
    """Empty replies and answers, texts shorter than an n-gram, nothing in common."""
    replies, expected = map(list, zip(*rows, strict=True))
    assert value("chrf", replies, expected) == pytest.approx(sacrebleu.corpus_chrf(replies, [expected]).score, abs=1e-9)
    latin = [[text.translate(str.maketrans("电源机", "xyz")) for text in texts] for texts in (replies, expected)]
    theirs = sacrebleu.corpus_bleu(latin[0], [latin[1]]).score
    assert value("bleu", latin[0], latin[1]) == pytest.approx(theirs, abs=1e-9)


@given(TEXT, TEXT)
@settings(max_examples=200, deadline=None)
def test_rouge_l_is_rouge_scores(reply: str, expected: str) -> None:
    """With its own words where all is ASCII, and with ours for the rest, as it drops Chinese."""
    theirs = RougeScorer(["rougeL"], tokenizer=OurWords()).score(expected, reply)["rougeL"].fmeasure
    assert rouge_l(reply, expected) == pytest.approx(theirs)
    ascii_only = [text.encode("ascii", "ignore").decode() for text in (reply, expected)]
    theirs = RougeScorer(["rougeL"]).score(ascii_only[1], ascii_only[0])["rougeL"].fmeasure
    assert rouge_l(*ascii_only) == pytest.approx(theirs)


def test_words_are_cut_as_each_script_is_read() -> None:
    """Punctuation of either width is no word, and neither is an underscore."""
    assert words("Don't 断开「电源」、220V_x。") == ["don", "t", "断", "开", "电", "源", "220v", "x"]


def test_rouge_l_by_hand() -> None:
    """Words in English and characters in Chinese; order counts, punctuation and case do not."""
    assert rouge_l("The cat sat.", "the cat, it sat_down") == pytest.approx(2 * 3 / (3 + 5))
    assert rouge_l("电源断开", "断开电源") == pytest.approx(2 * 2 / 8)
    assert rouge_l("断开 220V 电源", "请断开 220v 电源!") == pytest.approx(2 * 5 / (5 + 6))
    assert rouge_l("", "断开") == rouge_l("。", "断开") == 0


@pytest.mark.parametrize(
    ("reply", "expected", "same"),
    [
        ("Yes.", "yes.", True),
        ("  two\n words ", "two words", True),
        ("ＡＢＣ　１２３", "abc 123", True),
        ("Straße", "STRASSE", True),
        ("ﬁne", "fine", True),
        ("Yes", "Yes.", False),
        ("twowords", "two words", False),
        ("", "", True),
    ],
)
def test_exact_match_forgives_form_and_no_more(reply: str, expected: str, same: bool) -> None:
    """Width, case and white space, which nobody means; not punctuation."""
    assert (normalized(reply) == normalized(expected)) is same
    assert value("exact_match", [reply], [expected]) == same


def test_length_is_a_ratio_of_all_words() -> None:
    """A reply of twice the length does not hide one that is empty."""
    assert value("length", ["a b c d", ""], ["a b", "c d"]) == 1
    assert value("length", ["断开 电源"], ["断开"]) == 2
    assert math.isnan(estimate(METRICS["length"], METRICS["length"].rows([""], [""])).value)


def test_all_metrics_are_there_and_know_their_own_best() -> None:
    """A reply that is the answer has the highest value, a foreign one the lowest."""
    assert set(METRICS) == {"bleu", "chrf", "rouge_l", "exact_match", "length"}
    for name, metric in METRICS.items():
        best = value(name, EN, EN)
        assert best == pytest.approx(100 if metric.unit == "points" else 1)
        if metric.bounds is not None:
            assert metric.bounds[1] == pytest.approx(best)
            assert value(name, ["ξ"] * 4, EN) == metric.bounds[0]


@pytest.mark.parametrize("name", METRICS)
def test_a_variant_that_answers_as_the_base_shows_exactly_no_difference(name: str) -> None:
    """And not a width of nothing where rows could differ that were not drawn."""
    found = paired(METRICS[name], EN_REPLIES, base_replies=EN_REPLIES, expected=EN)
    assert found.value == found.base
    assert found.difference.value == 0
    assert found.verdict == "no_difference"
    assert (found.difference.half or 0) > 0 or name == "length"


def answers(rng: np.random.Generator, *, rows: int, right: float) -> tuple[list[str], list[str]]:
    """Expected answers of 3 to 30 words, and replies that have a share of their words right, row by row another."""
    expected, replies = [], []
    for _ in range(rows):
        answer = rng.integers(0, 30, rng.integers(3, 31))
        kept = rng.random(len(answer)) < np.clip(right + rng.normal(0, 0.1), 0, 1)
        expected.append(" ".join(f"w{word}" for word in answer))
        replies.append(" ".join(f"w{word}" for word in np.where(kept, answer, 40 + answer)))
    return expected, replies


@pytest.mark.parametrize("name", ["bleu", "chrf", "rouge_l"])
def test_a_better_variant_is_told_and_one_as_good_is_not(name: str) -> None:
    """Fifty rows, pairs kept; swapped, the difference turns round."""
    rng = np.random.default_rng(1)
    expected, poor = answers(rng, rows=50, right=0.5)
    good = [
        " ".join(w if rng.random() < 0.3 else r for w, r in zip(e.split(), p.split(), strict=True))
        for e, p in zip(expected, poor, strict=True)
    ]
    up = paired(METRICS[name], good, base_replies=poor, expected=expected)
    down = paired(METRICS[name], poor, base_replies=good, expected=expected)
    assert (up.verdict, down.verdict, up.rows) == ("better", "worse", 50)
    assert up.difference.value == pytest.approx(up.value.value - up.base.value) == pytest.approx(-down.difference.value)
    assert (up.difference.low, up.difference.high) == pytest.approx(
        (-(down.difference.high or 0), -(down.difference.low or 0))
    )
    metric = METRICS[name]
    ours, base = metric.rows(good, expected), metric.rows(poor, expected)
    unpaired = difference(metric, ours, base_numbers=base[::-1])
    assert (up.difference.half or 0) < 0.9 * (unpaired.half or 0)


def test_intervals_of_corpus_metrics_hold_the_truth() -> None:
    """Of 400 draws of 50 rows from 600 whose BLEU and chrF are known; the band is three standard errors wider."""
    rng = np.random.default_rng(3)
    expected, one = answers(rng, rows=600, right=0.5)
    two = [
        " ".join(w if rng.random() < 0.1 else r for w, r in zip(e.split(), p.split(), strict=True))
        for e, p in zip(expected, one, strict=True)
    ]
    slack = 3 * math.sqrt(0.05 * 0.95 / 400)
    for name in ("bleu", "chrf"):
        metric = METRICS[name]
        base, ours = metric.rows(one, expected), metric.rows(two, expected)
        truth = float(metric.value(ours.sum(axis=0)) - metric.value(base.sum(axis=0)))
        held = 0
        for _ in range(400):
            drawn = rng.integers(0, 600, 50)
            found = difference(metric, ours[drawn], base_numbers=base[drawn])
            held += (found.low or 0) <= truth <= (found.high or 0)
        assert 0.93 - slack <= held / 400 <= 0.97 + slack


def test_rates_and_scorers_of_0_and_1_have_a_rates_interval() -> None:
    """None of ten right is 0 to 28 %; one row that changed is not a certainty."""
    expected = [f"w{i}" for i in range(10)]
    right_once = ["w0", *["no"] * 9]
    wrong = ["no"] * 10
    exact = paired(METRICS["exact_match"], right_once, base_replies=wrong, expected=expected)
    assert (exact.base.low, exact.base.high) == (0, pytest.approx(0.2775, abs=1e-4))
    assert exact.verdict == "no_difference"
    many = [*expected[:8], "no", "no"]
    gained = paired(METRICS["exact_match"], many, base_replies=wrong, expected=expected)
    lost = paired(METRICS["exact_match"], wrong, base_replies=many, expected=expected)
    assert (gained.difference.value, lost.difference.value) == pytest.approx((0.8, -0.8))
    assert (gained.verdict, lost.verdict) == ("better", "worse")
    same = scorer_metric("mine:same", lambda _, reply, answer: reply == answer, prompts=wrong)
    scored = paired(same, right_once, base_replies=wrong, expected=expected)
    assert scored == exact


def test_comparisons_widen_the_difference_alone() -> None:
    """Bonferroni is for what is compared."""
    rng = np.random.default_rng(1)
    (expected, base), (_, ours) = answers(rng, rows=50, right=0.5), answers(rng, rows=50, right=0.5)
    one, ten = (
        paired(METRICS["chrf"], ours, base_replies=base, expected=expected, comparisons=comparisons)
        for comparisons in (1, 10)
    )
    assert (ten.difference.half or 0) > (one.difference.half or 0)
    assert (ten.value, ten.base) == (one.value, one.base)


def test_a_row_without_an_answer_is_refused_by_name() -> None:
    """Where an answer is needed."""
    with pytest.raises(DataError, match="no expected answer") as error:
        METRICS["bleu"].rows(["a", "b"], ["a", None])
    assert error.value.where == "row 2"


def test_the_record_survives_json() -> None:
    """NaN and missing ends included."""
    found = paired(METRICS["length"], [""], base_replies=[""], expected=[""])
    assert found.verdict == "unknown"
    assert found.difference.half is None


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory; modules that are imported from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    known = set(sys.modules)
    yield tmp_path  # type: ignore[misc]
    for name in set(sys.modules) - known:
        del sys.modules[name]


def test_a_scorer_in_the_current_directory_is_found(here: Path) -> None:
    """With the modules beside it; and the path is as it was."""
    (here / "my_words.py").write_text("GOOD = 'yes'\n")
    (here / "my_scorer.py").write_text(
        "import my_words\n"
        "class Polite:\n"
        "    @staticmethod\n"
        "    def score(prompt, reply, expected):\n"
        "        return len(prompt) + (reply == my_words.GOOD) + (expected is None) / 2\n"
    )
    before = list(sys.path)
    scorer = load_scorer("my_scorer:Polite.score")
    assert sys.path == before
    metric = scorer_metric("my_scorer:Polite.score", scorer, prompts=["a", "bc"])
    assert metric.rows(["yes", "no"], [None, "x"])[:, 0].tolist() == [2.5, 2]
    found = paired(metric, ["yes", "yes"], base_replies=["no", "no"], expected=[None, "x"])
    assert found.difference.value == 1


@pytest.mark.parametrize(
    ("spec", "source", "what", "found"),
    [
        ("my_scorer", "", "is a function in a module", "my_scorer"),
        (":score", "", "is a function in a module", ":score"),
        ("my_scorer:", "", "is a function in a module", "my_scorer:"),
        ("no_such_module:score", "", "cannot be imported", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("my_scorer:score", "import no_such_thing", "cannot be imported", "No module named 'no_such_thing'"),
        ("my_scorer:score", "def score(:", "cannot be imported", "SyntaxError"),
        ("my_scorer:score", "1 / 0", "cannot be imported", "ZeroDivisionError: division by zero"),
        ("my_scorer:score", "raise SystemExit(3)", "cannot be imported", "SystemExit: 3"),
        ("..:score", "", "cannot be imported", "TypeError"),
        ("my_scorer:score", "x = 1", "no such function", None),
        ("my_scorer:x", "x = 1", "not a function", "int"),
    ],
)
def test_a_scorer_that_is_not_there_is_said_so(
    here: Path, spec: str, source: str, what: str, found: str | None
) -> None:
    """Never a traceback: what is wrong, and with which."""
    (here / "my_scorer.py").write_text(source)
    with pytest.raises(DataError, match=what) as error:
        load_scorer(spec)
    assert (found or "") in (error.value.found or "")
    assert spec in str(error.value)


def _raise(error: BaseException) -> float:
    raise error


@pytest.mark.parametrize(
    ("result", "found"),
    [
        (lambda: _raise(KeyError("x")), "KeyError: 'x'"),
        (lambda: _raise(SystemExit(1)), "SystemExit: 1"),
        (lambda: None, "None"),
        (lambda: "0.5", "'0.5'"),
        (lambda: math.nan, "nan"),
        (lambda: math.inf, "inf"),
        (lambda: np.array([1.0, 2.0]), "TypeError"),
    ],
)
def test_a_scorer_that_fails_names_the_row(result: object, found: str) -> None:
    """By the name that the prompts file gave it, or by its place."""

    def scorer(prompt: str, reply: str, expected: str | None) -> float:
        del reply, expected
        return 1.0 if prompt == "fine" else result()  # type: ignore[operator, no-any-return]

    metric = scorer_metric("my:scorer", scorer, prompts=["fine", "bad"], row_names=["faq-1", "faq-2"])
    with pytest.raises(DataError, match="my:scorer") as error:
        metric.rows(["a", "b"], [None, None])
    assert error.value.where == "faq-2"
    assert found in (error.value.found or "")
    unnamed = scorer_metric("my:scorer", scorer, prompts=["fine", "bad"])
    with pytest.raises(DataError, match="my:scorer") as error:
        unnamed.rows(["a", "b"], [None, None])
    assert error.value.where == "row 2"


@pytest.mark.parametrize("number", [1, True, 0.25, np.float32(0.25), np.int64(3), np.array(0.5)])
def test_whatever_is_a_number_is_taken(number: object) -> None:
    """NumPy's as well."""
    metric = scorer_metric("my:scorer", lambda *_: number, prompts=["a"])  # type: ignore[arg-type, return-value]
    assert metric.rows(["x"], [None])[0, 0] == float(number)  # type: ignore[arg-type]

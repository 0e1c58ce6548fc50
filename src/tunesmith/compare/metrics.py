"""How near a reply is to the answer that was expected, with what a corpus value and its interval are computed from.

A metric turns every row into a few numbers whose sums say all; so that a value, its difference to another variant's,
and what leaving out a row does to either are sums and one function of them.  BLEU's and chrF's counts and formulas are
sacrebleu's.
"""

from __future__ import annotations

import importlib
import operator
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, SupportsFloat

import numpy as np
from numpy.typing import NDArray

from tunesmith.compare.diff import CJK, longest_common_subsequence
from tunesmith.compare.intervals import (
    Bounds,
    Estimate,
    jackknife_estimate,
    mean_estimate,
    paired_proportions,
    proportion,
)
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from sacrebleu import BLEU, CHRF

Numbers = NDArray[np.float64]
Scorer = Callable[[str, str, str | None], float]

# Letters and digits between all else, as ROUGE has it; where no spaces part words, a character is one.
_WORD = re.compile(rf"[{CJK}]|[^\W_{CJK}]+")
_CHARACTER = re.compile(rf"[{CJK}]")
_BLEU_ORDERS = 4


@dataclass(frozen=True)
class Metric:
    """One way to measure replies.

    Attributes:
        name: its key, such as ``bleu``.
        higher_is_better: None where neither direction is.
        unit: ``points`` (0 to 100), ``share`` (0 to 1), ``ratio``, or ``score``, a scorer's own.
        kind: ``rate`` (a row counts or does not), ``mean`` (of one figure a row), or ``corpus`` (one function of sums).
        rows: numbers of shape ``(rows, k)`` for replies and the answers that were expected, row by row.
        value: maps sums of these numbers, of shape ``(..., k)``, to values of shape ``(...)``; for a ``rate`` and a
            ``mean`` the numbers are the figure and 1.
        bounds: what the value can be at all; None where that is not known.
    """

    name: str
    higher_is_better: bool | None
    unit: Literal["points", "share", "ratio", "score"]
    kind: Literal["rate", "mean", "corpus"]
    rows: Callable[[Sequence[str], Sequence[str | None]], Numbers]
    value: Callable[[Numbers], Numbers]
    bounds: Bounds | None = None


def estimate(metric: Metric, numbers: Numbers, *, comparisons: int = 1) -> Estimate:
    """A metric's value over all rows.

    Args:
        metric: whose numbers they are.
        numbers: what its ``rows`` gave.
        comparisons: among how many intervals the 5 % are shared (Bonferroni).
    """
    if _counts(metric, numbers):
        return proportion(int(numbers[:, 0].sum()), len(numbers), comparisons=comparisons)
    if metric.kind == "mean":
        return mean_estimate(numbers[:, 0], bounds=metric.bounds, comparisons=comparisons)
    return jackknife_estimate(metric.value, numbers, bounds=metric.bounds, comparisons=comparisons)


def difference(metric: Metric, numbers: Numbers, *, base_numbers: Numbers, comparisons: int = 1) -> Estimate:
    """How much a metric's value is above the base's, paired by row; exactly 0 for the same replies.

    Args:
        metric: whose numbers they are.
        numbers: what its ``rows`` gave for the variant's replies.
        base_numbers: the same for the base's replies to the same rows.
        comparisons: among how many intervals the 5 % are shared (Bonferroni).
    """
    bounds = (
        None if metric.bounds is None else (metric.bounds[0] - metric.bounds[1], metric.bounds[1] - metric.bounds[0])
    )
    if _counts(metric, numbers, base_numbers):
        ours, theirs = numbers[:, 0] == 1, base_numbers[:, 0] == 1
        gained, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
        return paired_proportions(gained, lost, rows=len(numbers), comparisons=comparisons)
    if metric.kind == "mean":
        return mean_estimate(numbers[:, 0] - base_numbers[:, 0], bounds=bounds, comparisons=comparisons)
    k = numbers.shape[1]
    return jackknife_estimate(
        lambda sums: metric.value(sums[..., :k]) - metric.value(sums[..., k:]),
        np.hstack([numbers, base_numbers]),
        bounds=bounds,
        comparisons=comparisons,
    )


def _counts(metric: Metric, *numbers: Numbers) -> bool:
    """Whether every row counts or does not; a scorer does not say which kind it is, its figures do."""
    return metric.kind == "rate" or (
        metric.kind == "mean" and all(np.isin(figures[:, 0], (0.0, 1.0)).all() for figures in numbers)
    )


def load_scorer(spec: str) -> Scorer:
    """Find a scorer, which may lie in a module in the current directory.

    Args:
        spec: ``module:function``.

    Returns:
        The function.  It is called as ``scorer(prompt, reply, expected)`` and gives one finite number; ``expected`` is
        None in rows without an answer.  Where all its numbers are 0 or 1, they are taken as a rate.

    Raises:
        DataError: it is not so written, the module cannot be imported, or it has no such function.
    """
    name, colon, attribute = spec.partition(":")
    if not (name and colon and attribute):
        raise DataError("A scorer is a function in a module.", expected="module:function", found=spec)
    try:
        with _current_directory_first():
            module = importlib.import_module(name)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise DataError(
            "The scorer's module cannot be imported.",
            where=spec,
            found=_said(error),
            next_step=f'python -c "import {name}" in the directory of {name.partition(".")[0]}.py shows where it fails',
        ) from error
    try:
        scorer = operator.attrgetter(attribute)(module)
    except AttributeError as error:
        raise DataError("The scorer's module has no such function.", where=spec, expected=attribute) from error
    if not callable(scorer):
        raise DataError("The scorer is not a function.", where=spec, found=type(scorer).__name__)
    found: Scorer = scorer
    return found


def scorer_metric(
    name: str,
    scorer: Scorer,
    *,
    prompts: Sequence[str],
    row_names: Sequence[str] | None = None,
    higher_is_better: bool | None = True,
) -> Metric:
    """A metric of what a scorer says of every row.

    Args:
        name: what the metric is called, such as the ``module:function`` that was asked for.
        scorer: what :func:`load_scorer` gave.
        prompts: of the rows, in their order.
        row_names: what errors call the rows; None calls them ``row 1`` and so on.
        higher_is_better: what its numbers mean; None where neither direction is better.

    Returns:
        The metric.  Its ``rows`` raises DataError, which names the row, where the scorer raises or gives no finite
        number.
    """
    names = row_names or [f"row {place}" for place in range(1, len(prompts) + 1)]

    def rows(replies: Sequence[str], expected: Sequence[str | None]) -> Numbers:
        given = zip(prompts, replies, expected, strict=True)
        return _with_ones(
            [_scored(name, row, partial(scorer, *texts)) for row, texts in zip(names, given, strict=True)]
        )

    return Metric(name, higher_is_better, "score", "mean", rows, _first_by_second)


def _scored(scorer: str, row: str, call: Callable[[], object]) -> float:
    try:
        result = call()
        number = float(result) if isinstance(result, SupportsFloat) else None
    except (Exception, SystemExit) as error:
        raise DataError(f"The scorer {scorer} failed.", where=row, found=_said(error)) from error
    if number is None or not np.isfinite(number):
        raise DataError(
            f"The scorer {scorer} gave no number.", where=row, expected="a finite number", found=repr(result)[:200]
        )
    return number


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


@contextmanager
def _current_directory_first() -> Iterator[None]:
    importlib.invalidate_caches()  # it may have been written a moment ago
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation; a character is a word in Chinese, Japanese and Korean."""
    return [word for word in _WORD.findall(text.lower()) if word.isalnum()]


def normalized(text: str) -> str:
    """A text as exact match compares it: in Unicode's form NFKC, case folded, white space as single spaces."""
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def _pairs(replies: Sequence[str], expected: Sequence[str | None]) -> Iterator[tuple[str, str]]:
    for place, (reply, answer) in enumerate(zip(replies, expected, strict=True), 1):
        if answer is None:
            raise DataError("A row has no expected answer to compare with.", where=f"row {place}")
        yield reply, answer


def _with_ones(figures: Sequence[float]) -> Numbers:
    return np.column_stack([np.asarray(figures, np.float64), np.ones(len(figures))])


def _first_by_second(sums: Numbers) -> Numbers:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])


def _exact_match_rows(replies: Sequence[str], expected: Sequence[str | None]) -> Numbers:
    return _with_ones([float(normalized(reply) == normalized(answer)) for reply, answer in _pairs(replies, expected)])


def _length_rows(replies: Sequence[str], expected: Sequence[str | None]) -> Numbers:
    lengths = [(len(words(reply)), len(words(answer))) for reply, answer in _pairs(replies, expected)]
    return np.array(lengths, np.float64).reshape(-1, 2)


def _rouge_l_rows(replies: Sequence[str], expected: Sequence[str | None]) -> Numbers:
    return _with_ones([rouge_l(reply, answer) for reply, answer in _pairs(replies, expected)])


def rouge_l(reply: str, expected: str) -> float:
    """ROUGE-L, F1: twice the longest common subsequence of words over the words of both texts, 0 to 1.

    For ASCII it equals rouge-score's without stemming; so it does for all other texts when that is given :func:`words`,
    for its own words are ASCII only.  rouge-score takes a quarter of a second for two texts of 1,000 words, and drags
    in nltk; so it is what this is tested against.

    Source: C.-Y. Lin, ROUGE: a package for automatic evaluation of summaries, 2004, section 3.1.
    """
    ours, theirs = words(reply), words(expected)
    if not ours or not theirs:
        return 0.0
    return 2 * len(longest_common_subsequence(ours, theirs)) / (len(ours) + len(theirs))


def _bleu_rows(replies: Sequence[str], expected: Sequence[str | None]) -> Numbers:
    """Lengths of reply and answer in tokens, then matching and all n-grams of the reply, for n from 1 to 4."""
    numbers = []
    for reply, answer in _pairs(replies, expected):
        score = _bleu("zh" if _mostly_cjk(answer) else "13a").sentence_score(reply, [answer])
        numbers.append([score.sys_len, score.ref_len, *score.counts, *score.totals])
    return np.array(numbers, np.float64).reshape(-1, 2 + 2 * _BLEU_ORDERS)


def _bleu_value(sums: Numbers) -> Numbers:
    def value(row: Numbers) -> float:
        lengths, counts, totals = np.split(row.astype(np.int64), [2, 2 + _BLEU_ORDERS])
        return (
            _bleu("13a")
            .compute_bleu(list(counts), list(totals), int(lengths[0]), int(lengths[1]), smooth_method="exp")
            .score
        )

    return np.apply_along_axis(value, -1, sums)


@cache
def _bleu(tokenizer: str) -> BLEU:
    from sacrebleu import BLEU

    return BLEU(tokenize=tokenizer, effective_order=True)  # only counts are taken of single rows; False would warn


def _mostly_cjk(text: str) -> bool:
    characters: list[str] = _CHARACTER.findall(text)
    return 2 * sum(map(str.isalpha, characters)) > sum(map(str.isalpha, text))


def _chrf_rows(replies: Sequence[str], expected: Sequence[str | None]) -> Numbers:
    """N-grams of characters: of the reply, of the answer, and matching, for n from 1 to 6."""
    pairs = list(_pairs(replies, expected))
    chrf = _chrf()
    if not pairs:
        return np.zeros((0, 3 * chrf.order))
    ours, theirs = zip(*pairs, strict=True)
    return np.array(chrf._extract_corpus_statistics(ours, [theirs]), np.float64)


def _chrf_value(sums: Numbers) -> Numbers:
    return np.apply_along_axis(lambda row: _chrf()._compute_f_score(list(row)), -1, sums)


@cache
def _chrf() -> CHRF:
    from sacrebleu import CHRF

    return CHRF()


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("bleu", True, "points", "corpus", _bleu_rows, _bleu_value, (0.0, 100.0)),
        Metric("chrf", True, "points", "corpus", _chrf_rows, _chrf_value, (0.0, 100.0)),
        Metric("rouge_l", True, "share", "mean", _rouge_l_rows, _first_by_second, (0.0, 1.0)),
        Metric("exact_match", True, "share", "rate", _exact_match_rows, _first_by_second, (0.0, 1.0)),
        Metric("length", None, "ratio", "corpus", _length_rows, _first_by_second),
    )
}

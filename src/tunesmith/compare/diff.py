"""What two answers share, word by word, where every CJK character is a word."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import Literal

from tunesmith.record import Part

# Han, kana, hangul and their marks are written without spaces between words.
CJK = "\u2e80-\u30ff\u3100-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
_WORD = re.compile(rf"(\s*)([{CJK}]|[^\W{CJK}]+|[^\w\s])")
# difflib finds the blocks that people see, but takes a step for every pair of equal words, again for every block.
# Below these limits that is some tens of milliseconds at worst.
_DIFFLIB_PAIRS = 20_000
_DIFFLIB_WORDS = 2_000


class Segment(Part):
    """A piece of two compared texts.

    Attributes:
        kind: whether both texts have it, or only the left or the right one.
        text: the piece, whitespace included.
    """

    kind: Literal["same", "left", "right"]
    text: str


def word_diff(left: str, right: str) -> list[Segment]:
    """Compare two texts word by word.

    ``same`` and ``left`` segments joined are exactly ``left``, ``same`` and ``right`` ones exactly ``right``.  Between
    two ``same`` segments ``left`` comes before ``right``.  The time is bounded: two texts of 8,000 words of any kind
    take well below a second (difflib alone would take minutes for two that repeat one word).

    Args:
        left: one text.
        right: the other.

    Returns:
        Segments in reading order, none empty, no two neighbours of one kind.
    """
    left_words, left_rest = _split(left)
    right_words, right_rest = _split(right)
    segments = _Segments()
    l = r = 0  # noqa: E741
    for i, j in _pairs([word for _, word in left_words], [word for _, word in right_words]):
        for space, word in left_words[l:i]:
            segments.left += space + word
        for space, word in right_words[r:j]:
            segments.right += space + word
        segments.both(left_words[i][0], right_words[j][0])
        segments.both(left_words[i][1], left_words[i][1])
        l, r = i + 1, j + 1  # noqa: E741
    segments.left += "".join(space + word for space, word in left_words[l:])
    segments.right += "".join(space + word for space, word in right_words[r:])
    segments.both(left_rest, right_rest)
    return segments.finish()


def similarity(left: str, right: str) -> float:
    """The share of characters that two texts have in common, 0 to 1; two empty texts are the same."""
    if left == right:
        return 1.0
    same = sum(len(segment.text) for segment in word_diff(left, right) if segment.kind == "same")
    return 2 * same / (len(left) + len(right))


def _split(text: str) -> tuple[list[tuple[str, str]], str]:
    """Words, each with the whitespace before it, and the whitespace after the last."""
    words = [(match[1], match[2]) for match in _WORD.finditer(text)]
    return words, text[sum(len(space) + len(word) for space, word in words) :]


class _Segments:
    """Gathers what only one text has until both have something again."""

    def __init__(self) -> None:
        self.left = self.right = ""
        self._done: list[Segment] = []
        self._same = ""

    def both(self, left: str, right: str) -> None:
        """Take a piece from each text: shared where they are equal."""
        if left != right:
            self.left += left
            self.right += right
        elif left:
            if self.left or self.right:
                self._flush()
            self._same += left

    def finish(self) -> list[Segment]:
        """All segments."""
        self._flush()
        return self._done

    def _flush(self) -> None:
        for kind, text in (("same", self._same), ("left", self.left), ("right", self.right)):
            if text:
                self._done.append(Segment.model_validate({"kind": kind, "text": text}))
        self._same = self.left = self.right = ""


def _pairs(left: Sequence[str], right: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Index pairs of shared words, growing on both sides."""
    counts = Counter(right)
    if len(left) + len(right) <= _DIFFLIB_WORDS and sum(counts[word] for word in left) <= _DIFFLIB_PAIRS:
        for block in SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks():
            yield from ((block.a + k, block.b + k) for k in range(block.size))
    else:
        yield from longest_common_subsequence(left, right)


def longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> list[tuple[int, int]]:
    """The most word pairs that two texts can share in order.

    Bit-parallel: row i's bit j is clear where one more word is shared once ``right[j]`` may be used, so a row is four
    operations on one long integer, whatever the words are.

    Source: H. Hyyrö, "Bit-parallel LCS-length computation revisited", AWOCA 2004.
    """
    places: dict[str, int] = {}
    for j, word in enumerate(right):
        places[word] = places.get(word, 0) | 1 << j
    every = (1 << len(right)) - 1
    row, rows = every, [every]
    for word in left:
        used = row & places.get(word, 0)
        row = ((row + used) | (row - used)) & every
        rows.append(row)
    pairs = []
    i, j = len(left), len(right) - 1
    while i > 0 and j >= 0:
        if rows[i] >> j & 1:
            j -= 1  # right[j] adds nothing
        elif not rows[i - 1] >> j & 1:
            i -= 1  # left[i - 1] was not needed for it
        else:
            pairs.append((i - 1, j))
            i, j = i - 1, j - 1
    return pairs[::-1]

"""word_diff and similarity: exact pieces, words that people see, bounded time."""

from __future__ import annotations

import random
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.compare import diff, similarity, word_diff

# Few letters and words, so that texts share much; spaces of all kinds; CJK and marks.
TEXT = st.one_of(
    st.text(st.sampled_from("ab猫。 \n\u3000\u00a0_é́-"), max_size=60),
    st.lists(st.sampled_from(["the ", "cat ", "sat", ", ", "猫", " on\n"]), max_size=30).map("".join),
    st.text(max_size=30),
)


def pairs(left: str, right: str) -> list[tuple[str, str]]:
    """The difference as tuples."""
    return [(segment.kind, segment.text) for segment in word_diff(left, right)]


def sides(left: str, right: str) -> tuple[str, str]:
    """What the segments join to, on both sides."""
    segments = word_diff(left, right)
    return (
        "".join(segment.text for segment in segments if segment.kind != "right"),
        "".join(segment.text for segment in segments if segment.kind != "left"),
    )


def longest(left: list[str], right: list[str]) -> int:
    """The oracle: length of the longest common subsequence by the textbook's table."""
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(left=TEXT, right=TEXT)
@settings(max_examples=300, deadline=None)
def test_segments_join_to_both_texts_exactly(left: str, right: str) -> None:
    """Whitespace included; no segment is empty, and no two neighbours are of one kind."""
    assert sides(left, right) == (left, right)
    found = pairs(left, right)
    assert all(text for _, text in found)
    assert all(a[0] != b[0] for a, b in pairwise(found))
    assert ("right", "left") not in [(a[0], b[0]) for a, b in pairwise(found)]


@given(left=TEXT, right=TEXT)
@settings(max_examples=200, deadline=None)
def test_segments_join_to_both_texts_also_for_long_texts(left: str, right: str) -> None:
    """The other way of pairing words, forced by a limit of nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diff, "_DIFFLIB_WORDS", -1)
        assert sides(left, right) == (left, right)


@given(st.lists(st.sampled_from("abc"), max_size=25), st.lists(st.sampled_from("abc"), max_size=25))
@settings(max_examples=300, deadline=None)
def test_long_texts_share_as_many_words_as_can_be(left: list[str], right: list[str]) -> None:
    """Against the textbook's table; pairs grow on both sides and are of equal words."""
    found = diff.longest_common_subsequence(left, right)
    assert len(found) == longest(left, right)
    assert all(left[i] == right[j] for i, j in found)
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(found))


def test_words_are_compared_whole() -> None:
    """Letters that two words share are no match."""
    assert pairs("The cat sat.", "A cat sat down.") == [
        ("left", "The"),
        ("right", "A"),
        ("same", " cat sat"),
        ("right", " down"),
        ("same", "."),
    ]


def test_every_cjk_character_is_a_word() -> None:
    """There are no spaces to go by."""
    assert pairs("今天天气很好", "今天的天气好") == [
        ("same", "今天"),
        ("right", "的"),
        ("same", "天气"),
        ("left", "很"),
        ("same", "好"),
    ]


def test_spaces_alone_hold_no_texts_together() -> None:
    """Two texts without a common word are one piece each."""
    assert pairs("one two three", "uno dos tres") == [("left", "one two three"), ("right", "uno dos tres")]


def test_changed_whitespace_shows() -> None:
    """A line break for a space is a difference, and the words around it are not."""
    assert pairs("a b", "a\nb") == [("same", "a"), ("left", " "), ("right", "\n"), ("same", "b")]


def test_equal_and_empty_texts() -> None:
    """One segment, or none."""
    assert pairs("a b\n", "a b\n") == [("same", "a b\n")]
    assert pairs("", "") == []
    assert pairs("", "x") == [("right", "x")]


def test_similarity_is_the_share_of_common_characters() -> None:
    """0 for nothing, 1 for all, the same both ways."""
    assert similarity("", "") == similarity("a b", "a b") == 1
    assert similarity("one", "two") == similarity("", "x") == 0
    assert similarity("aaaa bb", "aaaa cc") == pytest.approx(8 / 14)
    assert similarity("今天好", "今天") == similarity("今天", "今天好") == pytest.approx(4 / 5)


@pytest.mark.parametrize("kind", ["random", "repeated", "alternating", "short repeated"])
def test_time_is_bounded_on_long_texts(kind: str) -> None:
    """8,000 words of any kind; difflib alone takes minutes for the second.  2 s is forty times what it takes."""
    rng = random.Random(0)  # noqa: S311
    words = [f"w{index}" for index in range(500)]
    left, right = {
        "random": (" ".join(rng.choices(words, k=8000)), " ".join(rng.choices(words, k=8000))),
        "repeated": ("the " * 8000, "the " * 7999),
        "alternating": ("a b " * 4000, "b a " * 4000),
        "short repeated": ("the " * 140, "the the a " * 70),
    }[kind]
    started = time.perf_counter()
    assert sides(left, right) == (left, right)
    assert time.perf_counter() - started < 2

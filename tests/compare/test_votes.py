"""Blind votes: what is asked, what is kept, and what may be said of it."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest

from tests.tiny_models import row
from tunesmith.compare import Comparison, Reply, VariantInfo
from tunesmith.compare.intervals import proportion
from tunesmith.compare.votes import (
    Ballot,
    BlindVote,
    Choice,
    Preference,
    Tally,
    Vote,
    VoteFile,
    Voting,
    count_votes,
    tally,
)
from tunesmith.errors import DataError, OutputError
from tunesmith.models import Capabilities, GenerationSettings
from tunesmith.report import LANGUAGES, finding_text

NAMES = ("base", "final", "checkpoint-10")


def comparison(prompts: int, *names: str, **texts: str) -> Comparison:
    """Every variant answers every prompt in its own way, but where ``texts`` say another: ``final_3="same"``."""
    names = names or NAMES[:2]
    asked = tuple(row(i, f"question {i}") for i in range(prompts))
    replies = [
        Reply(
            prompt_id=prompt.id,
            variant=name,
            text=texts.get(f"{name}_{i}", f"{name} says {i}"),
            tokens=3,
            stop_reason="eos",
        )
        for i, prompt in enumerate(asked)
        for name in names
    ]
    return Comparison(
        run="run",
        variants=tuple(VariantInfo(name=name, kind="adapter", path="p") for name in names),
        prompts=asked,
        replies=tuple(replies),
        settings=GenerationSettings(),
        engine=Capabilities(kind="local", where="cpu"),
    )


def votes_for(ballot: Ballot, *winners: str) -> list[Vote]:
    """One vote a pair, in the ballot's order: for a variant, or another choice by its name."""
    votes = []
    for pair, winner in zip(ballot.pairs, winners, strict=False):
        choice = {pair.left: "left", pair.right: "right"}.get(winner, winner)
        votes.append(Vote.model_validate({**pair.model_dump(), "choice": choice}))
    return votes


def voted(wins: int, losses: int) -> Tally:
    """The tally of so many votes for ``final`` and for ``base``."""
    shown = comparison(wins + losses + 1)
    return tally(shown, votes_for(Ballot.of(shown), *["final"] * wins, *["base"] * losses))[0]


def test_every_two_differing_replies_are_asked_once() -> None:
    """Prompts × pairs of variants; equal texts, and such as differ by space around them, need no vote."""
    shown = comparison(5, *NAMES, final_1="base says 1", **{"checkpoint-10_2": "base says 2\n"})
    asked = Counter((pair.prompt_id, frozenset((pair.left, pair.right))) for pair in Ballot.of(shown).pairs)
    assert set(asked.values()) == {1}
    assert len(asked) == 5 * 3 - 2
    assert ("row-1", frozenset(("base", "final"))) not in asked
    assert ("row-2", frozenset(("base", "checkpoint-10"))) not in asked
    assert [one.alike for one in tally(shown, [])] == [1, 1, 0]


def test_replies_that_were_stopped_by_hand_are_not_asked() -> None:
    """Half an answer is no answer."""
    shown = comparison(2)
    stopped = shown.replies[0].model_copy(update={"stop_reason": "cancelled"})
    shown = shown.model_copy(update={"replies": (stopped, *shown.replies[1:])})
    assert [pair.prompt_id for pair in Ballot.of(shown).pairs] == ["row-1"]


@pytest.mark.parametrize("prompts", [1, 2, 9, 40])
@pytest.mark.parametrize("seed", range(4))
def test_each_of_two_stands_first_in_half_of_their_pairs(prompts: int, seed: int) -> None:
    """A voter who always takes the first reply favours nobody; one pair more where they are odd."""
    pairs = Ballot.of(comparison(prompts, *NAMES), seed=seed).pairs
    for two in ({"base", "final"}, {"base", "checkpoint-10"}, {"final", "checkpoint-10"}):
        first = Counter(pair.left for pair in pairs if {pair.left, pair.right} == two)
        assert abs(first.total() - 2 * max(first.values())) == prompts % 2


def test_a_ballot_is_the_same_for_the_same_seed_and_in_no_order_that_tells() -> None:
    """A vote can be gone on with; and sides neither alternate nor are they those of another seed or comparison."""
    shown = comparison(40)
    one = Ballot.of(shown)
    assert one == Ballot.of(shown)
    sides = [pair.left for pair in one.pairs]
    others = [Ballot.of(shown, seed=1), Ballot.of(comparison(40, final_0="other"))]
    assert all([pair.left for pair in other.pairs] != sides for other in others)
    changes = sum(a != b for a, b in pairwise(sides))
    assert 8 < changes < 32
    first = {pair.prompt_id: pair.left for pair in one.pairs}
    assert 8 < sum(first[a.id] != first[b.id] for a, b in pairwise(shown.prompts)) < 32
    ids = [pair.prompt_id for pair in one.pairs]
    assert ids != [prompt.id for prompt in shown.prompts]


def test_votes_add_up_whoever_was_shown_first() -> None:
    """Of nine votes and one that is not cast."""
    shown = comparison(11, final_10="base says 10")
    winners = ["final"] * 4 + ["base"] * 2 + ["tie"] * 2 + ["skip"]
    (found,) = tally(shown, votes_for(Ballot.of(shown), *winners))
    assert (found.variant, found.other) == ("final", "base")
    assert (found.wins, found.losses, found.ties, found.skipped, found.alike, found.open) == (4, 2, 2, 1, 1, 1)
    assert found.win_rate == proportion(4, 6)


def test_the_base_is_the_one_that_others_are_held_against() -> None:
    """In whichever order variants were named; the rest in theirs."""
    found = tally(comparison(1, "final", "checkpoint-10", "base"), [])
    assert [(one.variant, one.other) for one in found] == [
        ("final", "base"), ("checkpoint-10", "base"), ("checkpoint-10", "final"),
    ]  # fmt: skip


def test_intervals_of_several_pairs_of_variants_hold_together() -> None:
    """What is a preference between two is none where three are compared: one of three would show it by chance."""
    assert voted(8, 1).preference == "preferred"
    shown = comparison(9, *NAMES)
    ballot = Ballot.of(shown)
    ours = [pair for pair in ballot.pairs if {pair.left, pair.right} == {"base", "final"}]
    votes = votes_for(Ballot(seed=0, pairs=tuple(ours)), *["final"] * 8, "base")
    found = tally(shown, votes)[0]
    assert found.win_rate == proportion(8, 9, comparisons=3)
    assert found.preference == "no_preference"


@pytest.mark.parametrize(
    ("wins", "losses", "preference"),
    [
        (14, 4, "preferred"),
        (4, 14, "not_preferred"),
        (12, 6, "no_preference"),
        (9, 9, "no_preference"),
        (6, 0, "preferred"),
        (5, 0, "too_few"),
        (0, 4, "too_few"),
        (0, 0, "no_votes"),
    ],
)
def test_a_preference_is_told_where_a_coin_is_outside_the_interval(
    wins: int, losses: int, preference: Preference
) -> None:
    """And there are so many votes that not even all of them would fall on one side by chance."""
    assert voted(wins, losses).preference == preference


def test_a_coin_is_seldom_preferred() -> None:
    """Every number of votes up to 60, worked out exactly: 8 of 100 at most, and 5 or 6 on the whole."""
    mistaken = []
    for n in range(1, 61):
        found = [voted(wins, n - wins).preference for wins in range(n + 1)]
        mistaken.append(
            sum(math.comb(n, k) for k, one in enumerate(found) if one in ("preferred", "not_preferred")) / 2**n
        )
    assert max(mistaken) < 0.08
    assert 0.03 < sum(mistaken[5:]) / len(mistaken[5:]) < 0.055


def test_how_many_more_votes_would_tell() -> None:
    """With so many, four of five voters who prefer one at that rate would see it; worked out here from the binomial."""
    found = voted(12, 6)
    assert found.more is not None
    n, rate = 18 + found.more, 12 / 18
    told = [k for k in range(n + 1) if (proportion(k, n).low or 0) > 0.5]
    power = sum(math.comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in told)
    assert 0.75 < power < 0.87
    assert voted(14, 4).more is None
    assert voted(10, 10).more is None
    assert voted(101, 100).more is None


def test_all_alike_is_said() -> None:
    """Nothing to vote on is no lack of votes."""
    (found,) = tally(comparison(1, final_0="base says 0"), [])
    assert (found.preference, found.alike, found.open) == ("alike", 1, 0)


def test_a_voter_who_takes_the_first_reply_is_seen() -> None:
    """The share of first replies, and a finding where it is no coin's; so with the second ones."""
    shown = comparison(20)
    pairs = Ballot.of(shown).pairs
    for choice, code in (("left", "vote_first_liked"), ("right", "vote_second_liked")):
        votes = [Vote(**pair.model_dump(), choice=choice) for pair in pairs]
        found = count_votes(shown, votes)
        assert [finding.code for finding in found.findings] == [code]
        assert found.first_chosen == proportion(20 if choice == "left" else 0, 20)
        assert found.tallies[0].wins == found.tallies[0].losses == 10
    fair = count_votes(shown, votes_for(Ballot.of(shown), *["final"] * 20))
    assert fair.first_chosen.value == 0.5
    assert fair.findings == ()
    few = count_votes(shown, [Vote(**pair.model_dump(), choice="left") for pair in pairs[:4]])
    assert few.findings == ()


def test_votes_for_other_texts_do_not_count() -> None:
    """A changed reply, a changed question, and two variants that changed texts are other pairs, and are said to be."""
    shown = comparison(3)
    votes = votes_for(Ballot.of(shown), "final", "final", "final")
    assert tally(shown, votes)[0].wins == 3
    for other in (
        comparison(3, final_1="anything else"),
        comparison(3, final_1="base says 1", base_1="final says 1"),
        shown.model_copy(update={"prompts": (shown.prompts[0], row(1, "another question"), shown.prompts[2])}),
    ):
        found = count_votes(other, votes)
        assert (found.tallies[0].wins, found.other_votes, found.open) == (2, 1, 1)
        assert [finding.code for finding in found.findings] == ["vote_other_texts"]


def test_votes_hold_when_sides_or_variants_are_asked_in_another_order() -> None:
    """They name whom they are for."""
    votes = votes_for(Ballot.of(comparison(8), seed=0), *["final"] * 8)
    assert tally(comparison(8, "final", "base"), votes)[0].wins == 8


def test_the_last_of_several_votes_counts(tmp_path: Path) -> None:
    """A vote that is taken back leaves its pair open, and can be cast anew."""
    voting = Voting(comparison(3), tmp_path / "votes.jsonl")
    first = voting.current
    voting.choose("left")
    second = voting.current
    assert second != first
    voting.choose("tie")
    assert voting.done == 2
    assert voting.undo()
    assert voting.current == second
    assert voting.undo()
    assert (voting.current, voting.done) == (first, 0)
    assert not voting.undo()
    voting.choose("right")
    assert voting.result().decided == 1
    assert voting.result().first_chosen.value == 0
    assert [json.loads(line)["choice"] for line in (tmp_path / "votes.jsonl").read_text().splitlines()] == [
        "left", "tie", "undone", "undone", "right",
    ]  # fmt: skip


def test_what_is_taken_back_is_what_was_cast_last(tmp_path: Path) -> None:
    """Also where a pair was voted on again, after another one: as two people at one file do."""
    shown, file = comparison(2), VoteFile(tmp_path / "votes.jsonl")
    one, other = votes_for(Ballot.of(shown), "final", "final")
    for vote in (one, other, one.model_copy(update={"choice": "tie"})):
        file.add(vote)
    voting = Voting(shown, tmp_path / "votes.jsonl")
    assert voting.undo()
    assert voting.current is not None
    assert voting.current.texts == one.texts
    assert voting.done == 1


def test_taking_back_reaches_into_an_earlier_sitting_and_not_into_other_comparisons(tmp_path: Path) -> None:
    """The file may serve several comparisons."""
    file = tmp_path / "votes.jsonl"
    mine = Voting(comparison(2), file)
    mine.choose("left")
    other = Voting(comparison(2, final_0="x", final_1="y"), file)
    other.choose("left")
    again = Voting(comparison(2), file)
    assert again.undo()
    assert again.done == 0
    other = Voting(comparison(2, final_0="x", final_1="y"), file)
    assert (other.done, other.result().other_votes) == (1, 0)


def test_voting_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Every vote is on the disk when it is cast; skipped pairs are not asked again; then nothing is left to ask."""
    shown = comparison(4)
    for choice in get_args(Choice)[:4]:
        voting = Voting(shown, tmp_path / "votes.jsonl")  # as after a kill: nothing was closed
        voting.choose(choice)
    voting = Voting(shown, tmp_path / "votes.jsonl")
    assert voting.current is None
    found = voting.result()
    assert found.open == 0
    assert (found.tallies[0].ties, found.tallies[0].skipped, found.decided) == (1, 1, 2)
    with pytest.raises(DataError, match="no pair left"):
        voting.choose("left")


def test_a_torn_last_line_is_passed_over_and_the_next_vote_stands_on_its_own(tmp_path: Path) -> None:
    """Wherever the kill came."""
    shown, file = comparison(3), tmp_path / "votes.jsonl"
    Voting(shown, file).choose("left")
    whole = file.read_bytes()
    for kept in (1, 5, len(whole) // 2, len(whole) - 2):
        file.write_bytes(whole + whole[:kept])
        voting = Voting(shown, file)
        assert voting.done == 1
        voting.choose("right")
        assert Voting(shown, file).done == 2
    file.write_bytes(whole[:-1])  # only the line's end is lacking
    Voting(shown, file).choose("right")
    assert Voting(shown, file).done == 2


@pytest.mark.parametrize(
    "content", [b'{"instruction": "x"}\n', b"a question\n", b"\x00\xff" * 50, b'{"prompt_id": "row-0", "answer": 1}\n']
)
def test_a_file_of_another_kind_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    """A data set that was named by mistake gets no votes."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match="no vote"):
        VoteFile(file)
    assert file.read_bytes() == content


def test_a_place_that_cannot_hold_votes_is_refused(tmp_path: Path) -> None:
    """Before anybody has voted; and nothing is made by looking."""
    for place in (tmp_path, tmp_path / "absent" / "votes.jsonl", Path("/dev/null")):
        with pytest.raises(OutputError):
            VoteFile(place)
    VoteFile(tmp_path / "votes.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_vote_that_cannot_be_written_is_an_error_and_no_vote(tmp_path: Path) -> None:
    """The directory has gone meanwhile."""
    folder = tmp_path / "votes"
    folder.mkdir()
    voting = Voting(comparison(2), folder / "votes.jsonl")
    folder.rmdir()
    with pytest.raises(OutputError, match="those before it are kept"):
        voting.choose("left")
    assert voting.done == 0


def test_a_pair_is_shown_in_its_own_order(tmp_path: Path) -> None:
    """What stands left is the left variant's."""
    voting = Voting(comparison(4), tmp_path / "votes.jsonl")
    for pair in voting.ballot.pairs:
        prompt, left, right = voting.shown(pair)
        assert (left.variant, right.variant) == (pair.left, pair.right)
        assert prompt.id == left.prompt_id == right.prompt_id == pair.prompt_id


def test_the_result_survives_json(tmp_path: Path) -> None:
    """With no vote, whose share is no number; and with some."""
    shown = comparison(8)
    for votes in ([], votes_for(Ballot.of(shown), *["final"] * 8)):
        found = count_votes(shown, votes)
        again = BlindVote.read(found.write(tmp_path / "result.json"))
        assert again.to_json() == found.to_json()
        assert again.tallies[0].preference == found.tallies[0].preference


@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_outcome_has_a_sentence(lang: str) -> None:
    """With its figures and names in it, and no dash where a figure should stand."""
    one = voted(12, 6)
    for preference in get_args(Preference):
        said = finding_text(one.model_copy(update={"preference": preference}).finding, lang)
        assert "`final`" in said
        assert "`base`" in said
        assert "–" not in said
    assert "66.7%" in finding_text(one.finding, lang)
    assert "43.7%" in finding_text(one.finding, lang)
    assert "50" in finding_text(one.finding, lang)
    assert finding_text(voted(9, 9).finding, lang)
    shown = comparison(20)
    for choice in ("left", "right"):
        votes = [Vote.model_validate({**pair.model_dump(), "choice": choice}) for pair in Ballot.of(shown).pairs]
        for finding in count_votes(comparison(20, final_0="x"), votes).findings:
            assert "–" not in finding_text(finding, lang)

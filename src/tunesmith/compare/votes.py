"""Blind votes: which of two replies a person prefers who is not told whose they are, and what the votes add up to.

A :class:`Ballot` sets pairs and sides, a :class:`VoteFile` keeps what was chosen, a :class:`Voting` leads through the
one with the other, and :func:`tally` counts.  A vote is bound to its question, both variants and both texts by a hash:
when a model answers differently the next time, the votes for what it said before do not count.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from tunesmith.compare.intervals import CONFIDENCE, Estimate, proportion
from tunesmith.compare.marks import reference_of
from tunesmith.compare.records import Comparison, Reply
from tunesmith.conversations import Conversation
from tunesmith.errors import DataError, OutputError
from tunesmith.record import Finding, Part, Record

Choice = Literal["left", "right", "tie", "skip", "undone"]
Preference = Literal["preferred", "not_preferred", "no_preference", "too_few", "no_votes", "alike"]

_BEGIN = b'{"prompt_id":'  # of every line that is ours, a torn one included
_POWER = 0.8
_OUT_OF_REACH = 1_000  # votes more than anybody will cast


class BallotPair(Part):
    """Two replies to one prompt, and who stands where.

    Attributes:
        prompt_id: the conversation's id.
        left: the variant that is shown first.
        right: the other.
        texts: a hash of the prompt, both variants and both texts; the same whichever of them is shown first.
    """

    prompt_id: str
    left: str
    right: str
    texts: str


class Vote(Part):
    """What was chosen at one pair.

    Attributes:
        prompt_id: the conversation's id.
        left: the variant that was shown first.
        right: the other.
        texts: the pair's hash.
        choice: the better one, ``tie``, ``skip`` (no opinion; it is not asked again), or ``undone``: the vote before
            it at this pair is taken back.
    """

    prompt_id: str
    left: str
    right: str
    texts: str
    choice: Choice

    @property
    def winner(self) -> str | None:
        """The variant that was chosen; None where neither was."""
        return {"left": self.left, "right": self.right}.get(self.choice)


class Ballot(Part):
    """What is to be voted on, in a shuffled order.

    Attributes:
        seed: of order and sides.
        pairs: every prompt × every two variants that answered it differently.  Each of two variants is shown first in
            half of their pairs, so that a voter's liking for one side favours neither.
    """

    seed: int
    pairs: tuple[BallotPair, ...]

    @classmethod
    def of(cls, comparison: Comparison, *, seed: int = 0) -> Ballot:
        """The ballot of a comparison: the same seed and the same replies, the same ballot.

        Args:
            comparison: the replies.  Those that were stopped by hand are left out, and so are pairs that differ by
                surrounding space only: nobody could tell them apart.
            seed: of order and sides, which depend on the replies too: from one comparison's sides nothing can be
                learnt of another's.
        """
        found = {two: list(_differing(comparison, *two)) for two in _twos(comparison)}
        everything = "".join(pair.texts for pairs in found.values() for pair in pairs)
        chance = random.Random(f"{seed} {everything}")  # noqa: S311 - it must be repeatable, not secret
        pairs = [pair for ours in found.values() for pair in _on_both_sides(ours, chance)]
        chance.shuffle(pairs)
        return cls(seed=seed, pairs=tuple(pairs))


class Tally(Part):
    """The votes between two variants.

    Attributes:
        variant: the one that the figures are for.
        other: the one it is held against: the base, where that is one of the two.
        wins: votes for ``variant``.
        losses: votes for ``other``.
        ties: votes for neither.
        skipped: pairs that the voter had no opinion on.
        alike: prompts that both answered with the same text.
        open: pairs that are not voted on yet.
        win_rate: wins of wins and losses, 0 to 1; where several pairs of variants are compared, all intervals hold
            together with 95 % (Bonferroni).
        preference: what that says of ``variant``: ``preferred`` or ``not_preferred`` where 0.5 is outside the interval,
            ``no_preference`` where it is inside, ``too_few`` where even a unanimous vote could be chance.
        needed: the fewest decided votes that can say anything at all.
        more: about how many more would show the preference with a chance of 80 %, were it as large as it now looks;
            None where it shows already, or where that is out of reach.
    """

    variant: str
    other: str
    wins: int
    losses: int
    ties: int
    skipped: int
    alike: int
    open: int
    win_rate: Estimate
    preference: Preference
    needed: int
    more: int | None = None

    @property
    def decided(self) -> int:
        """Votes for either."""
        return self.wins + self.losses

    @property
    def finding(self) -> Finding:
        """What the votes say, as a sentence."""
        code = f"vote_{self.preference}"
        if self.preference == "no_preference" and self.more is None:
            code = "vote_close"
        return Finding(
            code=code,
            severity="ok" if self.preference in ("preferred", "not_preferred", "alike") else "info",
            params={
                "variant": self.variant,
                "other": self.other,
                "wins": self.wins,
                "decided": self.decided,
                "alike": self.alike,
                "share": self.win_rate.value,
                "low": self.win_rate.low,
                "high": self.win_rate.high,
                "needed": self.needed,
                "more": self.more,
            },
        )


class BlindVote(Record):
    """All that the votes on a comparison say.

    Attributes:
        run: the run's directory name.
        tallies: one for every two variants.
        first_chosen: of the decided votes, the share for the reply that was shown first, 0 to 1.
        decided: how many these are.
        open: pairs that are not voted on yet.
        other_votes: votes in the file that are for other texts, and do not count.
        findings: what is to be known of the voting itself: a liking for one side, votes that do not count.
    """

    run: str
    tallies: tuple[Tally, ...]
    first_chosen: Estimate
    decided: int
    open: int
    other_votes: int = 0
    findings: tuple[Finding, ...] = ()


class VoteFile:
    """Votes as lines of JSON, each written when it is cast; what is there is never changed.

    Args:
        path: the file; it is made with the first vote.

    Attributes:
        path: the same.
        votes: all lines, in the file's order.

    Raises:
        DataError: there is such a file, and it holds something else.
        OutputError: votes cannot be written there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        folder = self.path.parent
        if self.path.exists() and not self.path.is_file():
            raise OutputError("Votes can be kept in a file only.", where=self.path)
        if not folder.is_dir() or not os.access(self.path if self.path.exists() else folder, os.W_OK):
            raise OutputError("The file's directory is not there, or it cannot be written.", where=self.path)
        self.votes, self._torn = _read(self.path)

    def add(self, vote: Vote) -> None:
        """Keep one vote: when this returns, a kill does not lose it.

        Raises:
            OutputError: it cannot be written.
        """
        line = ("\n" if self._torn else "") + vote.model_dump_json() + "\n"
        data = line.encode()
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
            finally:
                os.close(descriptor)
        except OSError as error:
            raise OutputError(
                "The vote cannot be written; those before it are kept.",
                where=self.path,
                found=error.strerror or error,
                next_step="mend that and repeat the same command, which goes on from there",
            ) from error
        self._torn = False
        self.votes.append(vote)


class Voting:
    """A ballot that is being voted on: what comes next, and what has been chosen.

    Args:
        comparison: the replies.
        file: where votes are kept; those that it holds for these replies count.
        seed: of order and sides.

    Attributes:
        comparison: the same.
        ballot: all pairs.
        file: the same.
    """

    def __init__(self, comparison: Comparison, file: VoteFile | str | os.PathLike[str], *, seed: int = 0) -> None:
        self.comparison = comparison
        self.ballot = Ballot.of(comparison, seed=seed)
        self.file = file if isinstance(file, VoteFile) else VoteFile(file)
        self._replies = _replies(comparison)
        self._prompts = {prompt.id: prompt for prompt in comparison.prompts}

    @property
    def current(self) -> BallotPair | None:
        """The first pair that is not voted on; None where all are."""
        done = _counted(self.ballot, self.file.votes)
        return next((pair for pair in self.ballot.pairs if pair.texts not in done), None)

    @property
    def done(self) -> int:
        """How many pairs are voted on."""
        return len(_counted(self.ballot, self.file.votes))

    def shown(self, pair: BallotPair) -> tuple[Conversation, Reply, Reply]:
        """The question, and the two replies in the order in which they are shown."""
        left, right = (self._replies[pair.prompt_id, name] for name in (pair.left, pair.right))
        return self._prompts[pair.prompt_id], left, right

    def choose(self, choice: Choice) -> None:
        """Vote on the current pair.

        Raises:
            OutputError: the vote cannot be written.
            DataError: there is no pair left.
        """
        pair = self.current
        if pair is None:
            raise DataError("There is no pair left to vote on.", where=self.file.path)
        self.file.add(Vote(**pair.model_dump(), choice=choice))

    def undo(self) -> bool:
        """Take the last vote back, so that its pair is asked anew; False where there is none.

        Raises:
            OutputError: that cannot be written.
        """
        counted = list(_counted(self.ballot, self.file.votes).values())
        if counted:
            self.file.add(counted[-1].model_copy(update={"choice": "undone"}))
        return bool(counted)

    def result(self) -> BlindVote:
        """What all votes say so far."""
        return count_votes(self.comparison, self.file.votes)


def tally(comparison: Comparison, votes: Iterable[Vote]) -> tuple[Tally, ...]:
    """Count votes, for every two variants.

    The intervals are those of a number of votes that was fixed beforehand.  Who looks again and again, and stops when a
    preference shows, finds one more often than 5 times of 100 where there is none.

    Args:
        comparison: the replies; votes for other texts do not count.
        votes: in the order in which they were cast; of several at one pair the last counts.
    """
    ballot = Ballot.of(comparison)
    counted = _counted(ballot, votes)
    by_two: dict[frozenset[str], list[str]] = defaultdict(list)
    for pair in ballot.pairs:
        by_two[frozenset((pair.left, pair.right))].append(pair.texts)
    twos = _twos(comparison)
    result = []
    for other, variant in twos:
        asked = by_two[frozenset((other, variant))]
        cast = [counted[texts] for texts in asked if texts in counted]
        alike = sum(_alike(*two) for _, two in _answered(comparison, other, variant))
        result.append(_tally(variant, other, cast, alike=alike, asked=len(asked), comparisons=len(twos)))
    return tuple(result)


def count_votes(comparison: Comparison, votes: Sequence[Vote]) -> BlindVote:
    """Count votes, and see whether a place was voted for rather than a text.

    Args:
        comparison: the replies; votes for other texts do not count.
        votes: in the order in which they were cast; of several at one pair the last counts.
    """
    tallies = tally(comparison, votes)
    ballot = Ballot.of(comparison)
    counted = _counted(ballot, votes)
    choices = [vote.choice for vote in counted.values()]
    first, decided = choices.count("left"), choices.count("left") + choices.count("right")
    first_chosen = proportion(first, decided)
    others = sum(vote.choice != "undone" for vote in _latest(votes).values()) - len(counted)
    findings = []
    if _excludes_a_coin(first_chosen) and decided >= _fewest(1):
        shares = {"share": first_chosen.value, "low": first_chosen.low, "high": first_chosen.high}
        findings.append(
            Finding(
                code="vote_first_liked" if first_chosen.value > 0.5 else "vote_second_liked",
                severity="warning",
                params={"first": first, "second": decided - first, "decided": decided, **shares},
            )
        )
    if others:
        findings.append(Finding(code="vote_other_texts", severity="info", params={"count": others}))
    return BlindVote(
        run=comparison.run,
        tallies=tallies,
        first_chosen=first_chosen,
        decided=decided,
        open=len(ballot.pairs) - len(counted),
        other_votes=others,
        findings=tuple(findings),
    )


def _twos(comparison: Comparison) -> list[tuple[str, str]]:
    """Every two variants; the reference comes first, the others in their order."""
    reference = reference_of(comparison)
    names = [variant.name for variant in comparison.variants]
    return list(combinations([reference, *(name for name in names if name != reference)], 2))


def _replies(comparison: Comparison) -> dict[tuple[str, str], Reply]:
    return {(reply.prompt_id, reply.variant): reply for reply in comparison.replies}


def _answered(comparison: Comparison, one: str, other: str) -> Iterator[tuple[Conversation, tuple[Reply, Reply]]]:
    """Prompts that two variants answered, and what."""
    replies = _replies(comparison)
    for prompt in comparison.prompts:
        a, b = replies.get((prompt.id, one)), replies.get((prompt.id, other))
        if a is not None and b is not None and "cancelled" not in (a.stop_reason, b.stop_reason):
            yield prompt, (a, b)


def _alike(one: Reply, other: Reply) -> bool:
    return one.text.strip() == other.text.strip()


def _differing(comparison: Comparison, one: str, other: str) -> Iterator[BallotPair]:
    for prompt, two in _answered(comparison, one, other):
        if not _alike(*two):
            yield BallotPair(prompt_id=prompt.id, left=one, right=other, texts=_hash(prompt, two))


def _hash(prompt: Conversation, replies: Iterable[Reply]) -> str:
    """What a vote is about.  Which text is whose is part of it: two variants may well change texts."""
    asked = [[turn.role, turn.content] for turn in prompt.prompt]
    document = json.dumps([prompt.id, asked, sorted([reply.variant, reply.text] for reply in replies)])
    return hashlib.sha256(document.encode()).hexdigest()[:32]


def _on_both_sides(pairs: Sequence[BallotPair], chance: random.Random) -> list[BallotPair]:
    """Pairs of two variants, half of them turned, at random which; an odd one by the toss of a coin."""
    turned = [place % 2 == 1 for place in range(len(pairs))]
    if len(pairs) % 2:
        turned[-1] = chance.random() < 0.5
    chance.shuffle(turned)
    return [
        pair.model_copy(update={"left": pair.right, "right": pair.left}) if turn else pair
        for pair, turn in zip(pairs, turned, strict=True)
    ]


def _latest(votes: Iterable[Vote]) -> dict[str, Vote]:
    """The last vote of every pair, by its hash, in the order in which these were cast."""
    found: dict[str, Vote] = {}
    for vote in votes:
        found.pop(vote.texts, None)
        found[vote.texts] = vote
    return found


def _counted(ballot: Ballot, votes: Iterable[Vote]) -> Mapping[str, Vote]:
    """The votes that count, by their pairs' hashes, in the order in which they were cast."""
    ours = {pair.texts for pair in ballot.pairs}
    return {texts: vote for texts, vote in _latest(votes).items() if texts in ours and vote.choice != "undone"}


def _tally(variant: str, other: str, cast: Sequence[Vote], *, alike: int, asked: int, comparisons: int) -> Tally:
    wins, losses = (sum(vote.winner == name for vote in cast) for name in (variant, other))
    decided, needed = wins + losses, _fewest(comparisons)
    rate = proportion(wins, decided, comparisons=comparisons)
    preference: Preference = "no_preference"
    if not asked and alike:
        preference = "alike"
    elif not decided:
        preference = "no_votes"
    elif decided < needed:
        preference = "too_few"
    elif _excludes_a_coin(rate):
        preference = "preferred" if rate.value > 0.5 else "not_preferred"
    return Tally(
        variant=variant,
        other=other,
        wins=wins,
        losses=losses,
        ties=sum(vote.choice == "tie" for vote in cast),
        skipped=sum(vote.choice == "skip" for vote in cast),
        alike=alike,
        open=asked - len(cast),
        win_rate=rate,
        preference=preference,
        needed=needed,
        more=_more(wins, decided, comparisons=comparisons) if preference == "no_preference" else None,
    )


def _excludes_a_coin(share: Estimate) -> bool:
    return share.low is not None and share.high is not None and not share.low <= 0.5 <= share.high


def _fewest(comparisons: int) -> int:
    """How many throws of a coin fall on one side less often than the intervals may miss: 6 for one interval."""
    return math.floor(math.log2(2 * comparisons / (1 - CONFIDENCE))) + 1


def _more(wins: int, decided: int, *, comparisons: int) -> int | None:
    """How many more votes would tell such a share from a coin, with a chance of 80 %.

    Source: J. L. Fleiss, B. Levin and M. C. Paik, Statistical Methods for Rates and Proportions, 3rd edition, section
    2.5: sample size for a single proportion.
    """
    from scipy.stats import norm

    share = wins / decided
    if share == 0.5:
        return None
    sure, often = float(norm.ppf(1 - (1 - CONFIDENCE) / (2 * comparisons))), float(norm.ppf(_POWER))
    total = ((sure / 2 + often * math.sqrt(share * (1 - share))) / (share - 0.5)) ** 2
    more = max(1, math.ceil(max(total, _fewest(comparisons))) - decided)
    if more > _OUT_OF_REACH:
        return None
    return more if more <= 20 else round(more, -1)


def _read(path: Path) -> tuple[list[Vote], bool]:
    """All votes of a file, and whether its last line was torn by a kill; torn lines are passed over."""
    if not path.exists():
        return [], False
    found, whole = [], True
    try:
        with path.open("rb") as file:
            _require_votes(file.read(len(_BEGIN)), path)
            file.seek(0)
            for number, line in enumerate(file, 1):
                whole = line.endswith(b"\n")
                if (vote := _vote(line, path, number)) is not None:
                    found.append(vote)
    except OSError as error:
        raise DataError("The votes cannot be read.", where=path, found=error.strerror or error) from error
    return found, not whole


def _vote(line: bytes, path: Path, number: int) -> Vote | None:
    """The vote of a line; None for a blank or a torn one."""
    try:
        document = json.loads(line) if line.strip() else None
    except (ValueError, RecursionError):
        return None
    if document is None:
        return None
    try:
        return Vote.model_validate(document)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"]) or "line"
        raise DataError(
            "A line of the file is no vote.",
            where=f"{path}, line {number}",
            found=f"{place}: {problem['msg']}",
            next_step="name another file; votes are added to it, and nothing is taken out",
        ) from error


def _require_votes(head: bytes, path: Path) -> None:
    """Refuse a file of another kind before a vote is written into it."""
    if head.strip() and not _BEGIN.startswith(head):
        raise DataError(
            "This file holds no votes.",
            where=path,
            expected="lines that begin with " + _BEGIN.decode(),
            found=ascii(head.decode(errors="replace")),
            next_step="name another file, or one that is not there yet",
        )

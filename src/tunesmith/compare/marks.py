"""Which cells of a comparison deserve a look: those that differ, were cut, or became worse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from tunesmith.compare.metrics import METRICS, estimate
from tunesmith.compare.records import Comparison
from tunesmith.errors import DataError
from tunesmith.models import BASE
from tunesmith.record import Part

Mark = Literal["different", "truncated", "regressed"]
MARKS: tuple[Mark, ...] = ("different", "truncated", "regressed")


class Marks(Part):
    """What is to be seen at one reply, against the reference: the base, or the first variant where that is not there.

    Attributes:
        different: its text is another.
        truncated: its limit of tokens cut it; what it shares with others says little then.
        regressed: the variant finds the expected answer less likely than the reference does; where rows were not
            scored, its reply is further from the expected answer, by chrF.  False where no answer is expected.
    """

    different: bool = False
    truncated: bool = False
    regressed: bool = False


def reference_of(comparison: Comparison) -> str:
    """The variant that the others are held against."""
    names = [variant.name for variant in comparison.variants]
    return BASE if BASE in names else names[0]


def marks_of(comparison: Comparison) -> dict[tuple[str, str], Marks]:
    """What is to be seen at every reply, by prompt and variant."""
    reference = reference_of(comparison)
    losses = {(row.row_id, row.variant): (row.nll / row.tokens, row.tokens) for row in comparison.row_losses}
    result = {}
    for prompt in comparison.prompts:
        theirs = comparison.reply(prompt.id, reference)
        for variant in comparison.variants:
            ours = comparison.reply(prompt.id, variant.name)
            worse = False
            if variant.name != reference and prompt.answer is not None:
                own, other = losses.get((prompt.id, variant.name)), losses.get((prompt.id, reference))
                if own and other and own[1] == other[1]:
                    worse = own[0] > other[0]
                else:
                    worse = _chrf(ours.text, prompt.answer) < _chrf(theirs.text, prompt.answer)
            result[prompt.id, variant.name] = Marks(
                different=ours.text != theirs.text, truncated=ours.stop_reason == "length", regressed=worse
            )
    return result


def filtered(comparison: Comparison, wanted: Sequence[str]) -> Comparison:
    """The comparison with only those prompts at which a reply bears one of these marks.

    Raises:
        DataError: there is no such mark.
    """
    unknown = [name for name in wanted if name not in MARKS]
    if unknown:
        raise DataError("There is no such filter.", expected=", ".join(MARKS), found=", ".join(unknown))
    kept = [
        prompt for (prompt, _), marks in marks_of(comparison).items() if any(getattr(marks, name) for name in wanted)
    ]
    return comparison.of_prompts(kept)


def _chrf(reply: str, expected: str) -> float:
    metric = METRICS["chrf"]
    return estimate(metric, metric.rows([reply], [expected])).value

"""A comparison as CSV, one line a reply, for a spreadsheet."""

from __future__ import annotations

import csv
import io

from tunesmith.compare.marks import marks_of
from tunesmith.compare.records import Comparison

_COLUMNS = (
    "prompt_id",
    "question",
    "expected",
    "variant",
    "reply",
    "stop_reason",
    "tokens",
    "tokens_per_s",
    "loss",
    "different",
    "truncated",
    "regressed",
)


def to_csv(comparison: Comparison) -> str:
    """Write a comparison as CSV (RFC 4180), a header line first.

    Args:
        comparison: the record.

    Returns:
        The document.  ``loss`` is the variant's loss on the expected answer, nats a token, where it was scored.
    """
    losses = {(row.row_id, row.variant): row.nll / row.tokens for row in comparison.row_losses}
    marks = marks_of(comparison)
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(_COLUMNS)
    for prompt in comparison.prompts:
        for variant in comparison.variants:
            reply, seen = comparison.reply(prompt.id, variant.name), marks[prompt.id, variant.name]
            writer.writerow(
                [
                    prompt.id,
                    prompt.question,
                    prompt.answer or "",
                    variant.name,
                    reply.text,
                    reply.stop_reason,
                    reply.tokens,
                    "" if reply.tokens_per_s is None else f"{reply.tokens_per_s:.1f}",
                    losses.get((prompt.id, variant.name), ""),
                    *(int(flag) for flag in (seen.different, seen.truncated, seen.regressed)),
                ]
            )
    return out.getvalue()

"""A comparison as Markdown, to be pasted into a pull request or a model card."""

from __future__ import annotations

import re

from tunesmith.compare.records import Comparison, Reply, Score
from tunesmith.conversations import Conversation

_STOPPED = {"eos": "ended by itself", "length": "cut at the limit", "cancelled": "cancelled"}
_MEANS_SOMETHING = re.compile(r"([\\`*_{}\[\]<>#|~$&])")


def to_markdown(comparison: Comparison) -> str:
    """Write a comparison as GitHub-flavoured Markdown: the scores as a table, then the replies prompt by prompt.

    Replies stand in fenced blocks, so nothing that a model writes is taken as Markdown or HTML.

    Args:
        comparison: the record.

    Returns:
        The document, with one final newline.
    """
    how = "greedy" if comparison.greedy else "sampled"
    parts = [
        f"# {_escape(comparison.run)}: {', '.join(_escape(info.name) for info in comparison.variants)}",
        f"Replies: {how}, at most {comparison.max_new_tokens} tokens, computed in {comparison.dtype}.",
    ]
    if comparison.scores:
        parts += ["## Held-out answers", *_scores(comparison.scores)]
    if comparison.replies:
        parts.append("## Replies")
        parts += [part for prompt in comparison.prompts for part in _prompt(comparison, prompt)]
    return "\n\n".join(parts) + "\n"


def _scores(scores: tuple[Score, ...]) -> list[str]:
    lines = [
        "| variant | rows | answer tokens | loss (nats/token) | difference to base | 95 % interval | better rows |",
        "| --- | ---: | ---: | ---: | ---: | :---: | ---: |",
        *(_score_line(score) for score in scores),
    ]
    note = "Less is better. The difference is the mean over rows, paired with the base; the interval is Student's t."
    return ["\n".join(lines), note]


def _score_line(score: Score) -> str:
    interval = "–"
    if score.difference_low is not None and score.difference_high is not None:
        interval = f"{score.difference_low:+.4f} … {score.difference_high:+.4f}"
    cells = [
        _escape(score.variant),
        str(score.rows),
        str(score.tokens),
        f"{score.loss:.4f}",
        "–" if score.difference is None else f"{score.difference:+.4f}",
        interval,
        "–" if score.better_rows is None else f"{score.better_rows} of {score.rows}",
    ]
    return f"| {' | '.join(cells)} |"


def _prompt(comparison: Comparison, prompt: Conversation) -> list[str]:
    parts = [f"### {_escape(prompt.id)}"]
    for turn in prompt.prompt:
        parts += [f"**{_escape(turn.role)}**", _fence(turn.content)]
    if prompt.answer is not None:
        parts += ["**expected**", _fence(prompt.answer)]
    for info in comparison.variants:
        reply = comparison.reply(prompt.id, info.name)
        parts += [f"**{_escape(info.name)}** ({_ending(reply)})", _fence(reply.text)]
    return parts


def _ending(reply: Reply) -> str:
    return f"{reply.tokens} token{'' if reply.tokens == 1 else 's'}, {_STOPPED[reply.stop_reason]}"


def _fence(text: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _escape(text: str) -> str:
    """Text for a heading or a table cell: one line, no character with a meaning."""
    return _MEANS_SOMETHING.sub(r"\\\1", " ".join(text.split()))

"""A comparison as Markdown, to be pasted into a pull request or a model card."""

from __future__ import annotations

import re

from tunesmith.compare.records import Comparison, Reply, Score
from tunesmith.conversations import Conversation

_STOPPED = {
    "eos": "ended by itself",
    "length": "cut at the limit",
    "stop": "ended by a stop text",
    "cancelled": "cancelled",
}
_MEANS_SOMETHING = re.compile(r"([\\`*_{}\[\]<>#|~$&])")


def to_markdown(comparison: Comparison) -> str:
    """Write a comparison as GitHub-flavoured Markdown: the scores as a table, then the replies prompt by prompt.

    Replies stand in fenced blocks, so nothing that a model writes is taken as Markdown or HTML.

    Args:
        comparison: the record.

    Returns:
        The document, with one final newline.
    """
    how = "sampled" if comparison.settings.samples else "greedy"
    where = f"computed in {comparison.engine.dtype}" if comparison.engine.dtype else f"by {comparison.engine.where}"
    parts = [
        f"# {escaped(comparison.run)}: {', '.join(escaped(info.name) for info in comparison.variants)}",
        f"Replies: {how}, at most {comparison.settings.max_new_tokens} tokens, {where}.",
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
    note = "Less is better. The difference is paired with the base; rows are what was drawn, so the interval is theirs."
    return ["\n".join(lines), note]


def _score_line(score: Score) -> str:
    interval = "–"
    if score.difference_low is not None and score.difference_high is not None:
        interval = f"{score.difference_low:+.4f} … {score.difference_high:+.4f}"
    cells = [
        escaped(score.variant),
        str(score.rows),
        str(score.tokens),
        f"{score.loss:.4f}",
        "–" if score.difference is None else f"{score.difference:+.4f}",
        interval,
        "–" if score.better_rows is None else f"{score.better_rows} of {score.rows}",
    ]
    return f"| {' | '.join(cells)} |"


def _prompt(comparison: Comparison, prompt: Conversation) -> list[str]:
    parts = [f"### {escaped(prompt.id)}"]
    for turn in prompt.prompt:
        parts += [f"**{escaped(turn.role)}**", _fence(turn.content)]
    if prompt.answer is not None:
        parts += ["**expected**", _fence(prompt.answer)]
    for info in comparison.variants:
        reply = comparison.reply(prompt.id, info.name)
        parts += [f"**{escaped(info.name)}** ({_ending(reply)})", _fence(reply.text)]
    return parts


def _ending(reply: Reply) -> str:
    return f"{reply.tokens} token{'' if reply.tokens == 1 else 's'}, {_STOPPED[reply.stop_reason]}"


def _fence(text: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def escaped(text: str, *, one_line: bool = True) -> str:
    """Text in which no character has a meaning in Markdown.

    Args:
        text: it may come from outside.
        one_line: as a heading or a table cell needs it.
    """
    return _MEANS_SOMETHING.sub(r"\\\1", " ".join(text.split()) if one_line else text)

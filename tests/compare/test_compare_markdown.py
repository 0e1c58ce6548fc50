"""to_markdown: readable, and nothing in a text breaks out of its place."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.compare import Comparison, Reply, Score, VariantInfo, to_markdown
from tunesmith.conversations import Conversation, Message
from tunesmith.models import Capabilities, GenerationSettings


def comparison(
    *, reply: str = "fine", question: str = "hi", expected: str | None = None, variant: str = "final"
) -> Comparison:
    """One prompt, two variants, scores."""
    messages = [Message(role="user", content=question)]
    if expected is not None:
        messages.append(Message(role="assistant", content=expected))
    return Comparison(
        run="my_run",
        variants=(
            VariantInfo(name="base", kind="base", path="/b"),
            VariantInfo(name=variant, kind="adapter", path="/a"),
        ),
        prompts=(Conversation(id="row-0", messages=tuple(messages)),),
        replies=(
            Reply(prompt_id="row-0", variant="base", text="no", tokens=1, stop_reason="length"),
            Reply(prompt_id="row-0", variant=variant, text=reply, tokens=7, stop_reason="eos"),
        ),
        scores=(
            Score(variant="base", rows=5, tokens=50, loss=2.0),
            Score(
                variant=variant,
                rows=5,
                tokens=50,
                loss=1.25,
                difference=-0.75,
                difference_low=-1.0,
                difference_high=-0.5,
                better_rows=5,
            ),
        ),
        settings=GenerationSettings(greedy=True, max_new_tokens=64),
        engine=Capabilities(kind="local", where="cpu", dtype="float32"),
    )


def test_scores_stand_in_a_table() -> None:
    """With the interval, and a dash where there is no figure."""
    text = to_markdown(comparison())
    assert "| base | 5 | 50 | 2.0000 | – | – | – |" in text
    assert "| final | 5 | 50 | 1.2500 | -0.7500 | -1.0000 … -0.5000 | 5 of 5 |" in text


def test_replies_stand_with_their_lengths_and_stop_reasons() -> None:
    """Question, expected answer, and one reply a variant, in their order."""
    text = to_markdown(comparison(expected="good"))
    parts = [
        "### row-0",
        "**user**",
        "hi",
        "**expected**",
        "good",
        "**base** (1 token, cut at the limit)",
        "**final** (7",
    ]
    assert [text.index(part) for part in parts] == sorted(text.index(part) for part in parts)
    assert "7 tokens, ended by itself" in text
    assert "greedy, at most 64 tokens, computed in float32" in text
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


def test_without_scores_or_replies_their_headings_are_left_out() -> None:
    """No empty table."""
    bare = comparison().model_copy(update={"scores": (), "replies": (), "prompts": ()})
    assert "##" not in to_markdown(bare)


def test_pipes_and_backticks_in_names_are_escaped() -> None:
    """A cell stays a cell."""
    text = to_markdown(comparison(variant="a|b`c\n<d>"))
    (line,) = [line for line in text.splitlines() if line.startswith("| a")]
    assert line.startswith(r"| a\|b\`c \<d\> | 5 |")
    assert len(re.findall(r"(?<!\\)\|", line)) == 8


@given(reply=st.text(st.sampled_from("`~# |\n<a>"), max_size=30))
@settings(max_examples=200, deadline=None)
def test_no_reply_closes_its_fence(reply: str) -> None:
    """The block of the reply ends where its own fence says."""
    text = to_markdown(comparison(reply=reply))
    body = text[text.index("ended by itself)") :].split("\n\n", 1)[1]
    fence = body[: len(body) - len(body.lstrip("`"))]
    assert len(fence) >= 3
    assert fence not in reply
    assert body == f"{fence}text\n{reply}\n{fence}\n"

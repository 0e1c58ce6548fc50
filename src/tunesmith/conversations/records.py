"""What a row is: a message, a conversation, a passage of text."""

from __future__ import annotations

from tunesmith.record import Part


class Message(Part):
    """One turn of a conversation.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        content: the text of the turn.
    """

    role: str
    content: str


class Conversation(Part):
    """A prompt, and the answer where there is one.

    Attributes:
        id: stable within its file: ``row-3`` is the fourth row.
        messages: the turns in order; the last is the answer where it is an assistant's.
    """

    id: str
    messages: tuple[Message, ...]

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The turns before the last answer."""
        return self.messages[:-1] if self.answer is not None else self.messages

    @property
    def answer(self) -> str | None:
        """The text of the last turn where that is the assistant's, else None."""
        last = self.messages[-1]
        return last.content if last.role == "assistant" else None

    @property
    def question(self) -> str:
        """The last user turn: what a person recognises the row by."""
        return next((turn.content for turn in reversed(self.messages) if turn.role == "user"), "")


class Text(Part):
    """A passage of plain text, all of which is scored: no question, no answer.

    Attributes:
        id: stable within its file.
        text: the passage.
    """

    id: str
    text: str


def with_system(conversation: Conversation, text: str) -> Conversation:
    """The conversation, begun by the system's ``text`` where it has no system text of its own."""
    first, *rest = conversation.messages
    if first.role != "system":
        return conversation.model_copy(update={"messages": (Message(role="system", content=text), first, *rest)})
    if first.content:
        return conversation
    return conversation.model_copy(update={"messages": (Message(role="system", content=text), *rest)})

"""What people read in a terminal or a pipe.  Loaded when something is printed: it imports rich at its top."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

_UNBOUNDED = 1 << 14  # columns: in a pipe every row is one line, for grep and awk


class Screen(Console):
    """A rich console that takes every text literally and wraps on a terminal only; it honours ``NO_COLOR``.

    Args:
        stderr: write to standard error instead of standard output.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, emoji=False, markup=False)
        if not self.is_terminal:
            self.soft_wrap = True
            self.width = _UNBOUNDED

    def say(self, text: str = "", *, style: str = "", indent: int = 0) -> None:
        """Print one paragraph of plain text, cleaned.

        Args:
            text: it may come from outside.
            style: of all of it.
            indent: columns that all its lines are moved to the right by.
        """
        paragraph = Text(clean(text), style=style)
        if self.is_terminal and indent:
            self.print(Padding(paragraph, (0, 0, 0, indent)))
        else:
            self.print(Text(" " * indent) + paragraph)

    def on_broken_pipe(self) -> None:
        """Whoever read our output has gone: the program decides what that means, not rich."""
        raise BrokenPipeError


def clean(text: str) -> str:
    """Text from outside, without the control characters that could move a terminal's cursor or change its state."""
    return "".join(character if character in "\n\t" or character.isprintable() else "\ufffd" for character in text)

"""The error tree: what each message holds, and that the drawn tree is the real one."""

from __future__ import annotations

import inspect
import json
import re

import pytest

from tunesmith import errors
from tunesmith.errors import Cancelled, MissingExtraError, TunesmithError
from tunesmith.progress import Cancellation


def test_the_drawn_tree_is_the_real_one() -> None:
    """Every class is in the docstring, at the depth of its inheritance."""
    lines = re.findall(r"^    ([ │├└─]*)(\w+Error|Cancelled)\b", str(errors.__doc__), re.MULTILINE)
    drawn = {name: len(bars) // 4 for bars, name in lines}
    real = {
        name: kind.__mro__.index(TunesmithError) if issubclass(kind, TunesmithError) else 0
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, Exception)
    }
    assert drawn == real


def test_a_message_shows_all_that_it_was_given() -> None:
    """In order: what, details, where, expected, found, next."""
    error = TunesmithError(
        "It broke.", where="a/b", expected=3, found="4", details=["one", "two"], next_step="tunesmith doctor"
    )
    assert str(error).splitlines() == [
        "It broke.",
        "  - one",
        "  - two",
        "  where:    a/b",
        "  expected: 3",
        "  found:    4",
        "  next:     tunesmith doctor",
    ]
    assert str(TunesmithError("It broke.")) == "It broke."


def test_an_error_is_json_ready() -> None:
    """For ``--json``: strings and lists only, whatever was given."""
    document = json.loads(json.dumps(MissingExtraError("train", "train", "trl").as_dict()))
    assert document["error"] == "MissingExtraError"
    assert document["next"] == 'pip install "tunesmith[train]"'
    assert document["details"] == []
    assert json.loads(json.dumps(TunesmithError("x", where=ValueError("y"), found=1.5).as_dict()))["where"] == "y"


def test_exit_codes_are_those_of_the_command_line() -> None:
    """2 for what the user can mend, 130 for stopping."""
    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, TunesmithError)]
    assert {kind.exit_code for kind in kinds} == {2}
    assert Cancelled.exit_code == 130
    assert not issubclass(Cancelled, TunesmithError)


def test_a_cancellation_stops_at_the_next_check() -> None:
    """Not before it was asked for."""
    cancellation = Cancellation()
    cancellation.check()
    assert not cancellation.requested
    cancellation.cancel()
    assert cancellation.requested
    with pytest.raises(Cancelled):
        cancellation.check()

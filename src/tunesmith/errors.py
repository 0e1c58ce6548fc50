"""Every error that Tunesmith raises on purpose, and the exit code that the command line gives it.

    TunesmithError                 exit 2: the user can mend it, and the message says how
    ├── RunError                   a run directory that is absent, unreadable or not one
    ├── BaseModelError             a base model that cannot be found or had
    ├── CheckpointError            a model directory or safetensors file that breaks its format
    ├── AdapterError               an adapter that cannot be read
    │   ├── UnsupportedAdapterError    it can be read, but this version cannot merge it truly
    │   └── AdapterMismatchError       it does not fit the base model
    ├── OutputError                a place that must not, or cannot, be written
    ├── DataError                  a prompts or training file that cannot be read
    ├── RecipeError                a recipe with unknown, wrong or missing keys
    ├── PromptError                a prompt that does not fit the model's context
    └── MissingExtraError          an optional dependency that is not installed
    Cancelled                      exit 130: the user stopped the work

A failed verification is a record (exit 3), not an error.  Anything else that escapes is our bug (exit 1).
"""

from __future__ import annotations

from collections.abc import Iterable


class TunesmithError(Exception):
    """An error that the user can mend.

    Args:
        what: one sentence that says what is wrong.
        where: the file, key or option it is about.
        expected: what should have been there.
        found: what was there instead.
        details: further lines, one a mismatch; all of them are shown.
        next_step: the command to type, or the thing to do, next.
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        details: Iterable[str] = (),
        next_step: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.expected = None if expected is None else str(expected)
        self.found = None if found is None else str(found)
        self.details = tuple(details)
        self.next_step = next_step

    def __str__(self) -> str:
        labelled = (
            ("where", self.where),
            ("expected", self.expected),
            ("found", self.found),
            ("next", self.next_step),
        )
        lines = [self.what, *(f"  - {line}" for line in self.details)]
        lines += [f"  {label + ':':<10}{value}" for label, value in labelled if value is not None]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """The same facts as a JSON-ready mapping, for ``--json``."""
        return {
            "error": type(self).__name__,
            "what": self.what,
            "where": self.where,
            "expected": self.expected,
            "found": self.found,
            "details": list(self.details),
            "next": self.next_step,
        }


class RunError(TunesmithError):
    """A run directory that is absent, unreadable or not a run directory."""


class BaseModelError(TunesmithError):
    """A base model that cannot be found or had."""


class CheckpointError(TunesmithError):
    """A model directory or a safetensors file that breaks its format."""


class AdapterError(TunesmithError):
    """An adapter that cannot be read."""


class UnsupportedAdapterError(AdapterError):
    """An adapter that this version cannot merge truly; refused rather than guessed."""


class AdapterMismatchError(AdapterError):
    """An adapter whose tensors do not fit the base model's."""


class OutputError(TunesmithError):
    """A place that must not, or cannot, be written."""


class DataError(TunesmithError):
    """A prompts or training file that cannot be read as one."""


class RecipeError(TunesmithError):
    """A training recipe with unknown, wrong or missing keys."""


class PromptError(TunesmithError):
    """A prompt that does not fit the model's context window."""


class MissingExtraError(TunesmithError):
    """An optional dependency that a verb needs and that is not installed.

    Args:
        verb: the verb that needs it.
        extra: the name of the extra, as in ``pip install "tunesmith[train]"``.
        package: the import that failed.
    """

    def __init__(self, verb: str, extra: str, package: str) -> None:
        super().__init__(
            f"{verb} needs the package {package!r}, which is not installed.",
            next_step=f'pip install "tunesmith[{extra}]"',
        )


class Cancelled(Exception):  # noqa: N818 - stopping on request is no error
    """The user stopped the work; nothing half-made is left behind."""

    exit_code = 130

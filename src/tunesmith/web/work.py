"""What a kind of job is made of: parameters, the work, and the command line that does the same."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

import tunesmith as ts
from tunesmith.web.answers import RequestError
from tunesmith.web.places import Places

Text = Annotated[str, Field(min_length=1, max_length=4096)]
Count = Annotated[int, Field(ge=0, le=1_000_000)]


class Reporter(Protocol):
    """Where work says how far it is, and reads whether it shall stop."""

    cancellation: ts.Cancellation

    def progress(self, step: ts.Progress) -> None:
        """Say how far a stage is."""

    def log(self, line: str) -> None:
        """Say a line to the user."""


@dataclass(frozen=True)
class Work:
    """What a job will do, once its turn has come.

    Attributes:
        command: the equal command, as it would be typed in the root.
        call: does it, and returns the record.
        needs_model: whether it loads a model.
        stop_saves: whether stopping keeps what there is.
        result: the record as the page is given it.
    """

    command: str
    call: Callable[[Reporter], Any]
    needs_model: bool = True
    stop_saves: bool = False
    result: Callable[[Any], Any] = lambda record: record


@dataclass(frozen=True)
class Desk:
    """What the server lends to every job.

    Attributes:
        record_of: what an ended job returned.
        dtype: of the arithmetic.
    """

    record_of: Callable[[str], Any]
    dtype: str = "auto"


class Params(BaseModel):
    """Parameters of a job; what is None is left to the library."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class OfRun(Params):
    """Of a run.

    Attributes:
        run: its path.
        base: its base model; None for the one that it names.
    """

    run: Text
    base: Text | None = None


@dataclass(frozen=True)
class Verb:
    """One kind of job.

    Attributes:
        params: its parameters.
        prepare: checks them, paths above all, and says what will be done.
    """

    params: type[Params]
    prepare: Callable[[Any, Places, Desk], Work]


def defaults_of(function: Callable[..., object]) -> dict[str, Any]:
    """A library function's own defaults, by parameter."""
    parameters = inspect.signature(function).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}


def command(*words: object, **options: object) -> str:
    """A command line: ``None`` and ``False`` leave an option out, ``True`` is the bare option, a tuple repeats it."""
    line = ["tunesmith", *(str(word) for word in words)]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            line.append(flag)
        elif value is not None and value is not False:
            for one in value if isinstance(value, tuple) else (value,):
                line += [flag, str(one)]
    return shlex.join(line)


def given(function: Callable[..., object], **asked: Any) -> dict[str, Any]:
    """What was asked for and is not the library's default anyway."""
    defaults = defaults_of(function)
    return {name: value for name, value in asked.items() if value is not None and value != defaults.get(name)}


def run_and_base(params: OfRun, places: Places) -> tuple[str, str | None]:
    """A run's place and its base's."""
    run = places.run(params.run)
    return run, places.base(params.base, run=run)


def record_from(desk: Desk, job: str, kind: type) -> Any:
    """What an ended job returned.

    Raises:
        RequestError: it is something else.
    """
    record = desk.record_of(job)
    if not isinstance(record, kind):
        raise RequestError(
            "This job's result is something else.", where=job, expected=kind.__name__, found=type(record).__name__
        )
    return record


def maybe(places: Places, path: str | None) -> str | None:
    """A path that may be left out, resolved."""
    return None if path is None else str(places.resolve(path))


def shown(places: Places, path: str | None) -> str | None:
    """A path that may be left out, as a person would type it."""
    return None if path is None else places.shown(path)


def bytes_of(model: Path) -> int:
    """Of a model's weights."""
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))


def is_occupied(folder: Path) -> bool:
    """Whether a folder is there and holds something."""
    try:
        return folder.is_dir() and any(folder.iterdir())
    except OSError:
        return False

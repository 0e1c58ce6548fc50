"""What crosses a room's door: frozen records that can be written to JSON and read back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticSerializationError

from tunesmith.errors import DataError, OutputError

SCHEMA_VERSION = 1

RecordT = TypeVar("RecordT", bound="Record")


class Part(BaseModel):
    """A frozen piece of a record.  Non-finite floats travel as the strings ``"NaN"`` and ``"Infinity"``."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Record(Part):
    """A frozen document with a schema version, the same in Python, in JSON, in the page and in the report."""

    schema_version: int = SCHEMA_VERSION

    def to_json(self, *, indent: int | None = 2) -> str:
        """The record as a JSON document (UTF-8 text, one final newline).

        Args:
            indent: spaces a level; None puts it on one line.

        Raises:
            DataError: it names a file whose name is not UTF-8.
        """
        try:
            return self.model_dump_json(indent=indent) + "\n"
        except PydanticSerializationError as error:  # the file system hands such names on as lone surrogates
            raise DataError(
                "A file's name is not UTF-8, so JSON cannot hold it.", next_step="rename the file, or leave JSON out"
            ) from error

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the record to ``path`` whole or not at all.

        Raises:
            OutputError: the place cannot be written; nothing is left behind.
        """
        target = Path(path)
        beside = target.with_name(f".{target.name}.partial")
        try:
            beside.write_text(self.to_json(), encoding="utf-8")
            beside.replace(target)
        except BaseException as error:
            with suppress(OSError):
                beside.unlink()
            if isinstance(error, OSError):
                raise OutputError(
                    f"The {type(self).__name__} record cannot be written.", where=path, found=error.strerror or error
                ) from error
            raise
        return target

    @classmethod
    def read(cls: type[RecordT], path: str | os.PathLike[str]) -> RecordT:
        """Read a record that :meth:`write` wrote.

        Raises:
            DataError: the file is absent, is not JSON, or is not this kind of record.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise DataError(f"The {cls.__name__} record cannot be read.", where=path, found=error) from error
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(str(part) for part in problem["loc"]) or "document"
            raise DataError(
                f"This file is not a {cls.__name__} record.", where=path, found=f"{place}: {problem['msg']}"
            ) from error


Severity = Literal["ok", "info", "warning", "error"]
Value = str | int | float | bool | None


_GRAVEST: tuple[Severity, ...] = ("error", "warning", "info", "ok")


class Finding(Part):
    """One observation, as a code and parameters; the prose is looked up where a person reads it.

    Attributes:
        code: the key of its text in every interface language.
        severity: ``ok`` (checked and good), ``info``, ``warning`` or ``error``.
        params: what the text names: figures, file names, module names.
    """

    code: str
    severity: Severity
    params: Mapping[str, Value] = {}


def gravest_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Findings by severity, those of one severity in their order."""
    return tuple(sorted(findings, key=lambda finding: _GRAVEST.index(finding.severity)))

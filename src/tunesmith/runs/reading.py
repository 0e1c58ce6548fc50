"""The small files of a run, read as what they may be: damaged, cut off, endless, or set to lead elsewhere.

Time and memory are bounded, and what is wrong with a file becomes a finding.  A run is still a run without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pydantic_core import from_json

from tunesmith.checkpoint import is_file, is_there, open_regular
from tunesmith.errors import CheckpointError
from tunesmith.record import Finding, Severity, Value

_JSON_BYTES = 4 * 2**20
_HISTORY_BYTES = 16 * 2**20  # of a file that holds a log: 70,000 rows
_MOST_CONTAINERS = 200_000  # an empty one takes two bytes in a file and dozens in memory
_MOST_VALUES = 2_000_000
_LOG_BYTES = 16 * 2**20  # of the beginning of a log, and of its end
_LINE_BYTES = 2**20
_MOST_LINES = 50_000  # of either part
_YAML_BYTES = 2**18
_YAML_DEPTH = 32
_TEXT_BYTES = 2**17
_TEXT_CHARACTERS = 500
_LIST_ITEMS = 200


class Documents:
    """The documents of one run directory.

    Args:
        root: the directory.

    Attributes:
        findings: what was wrong with those that were asked for, each file once.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.findings: list[Finding] = []
        self._told: set[str] = set()
        self._parsed: dict[str, dict[str, Any]] = {}

    def has(self, name: str) -> bool:
        """Whether there is a regular file of that name that does not lead out of the run."""
        path = self.root / name
        return is_file(path) and not leads_out(self.root, path)

    def json(self, name: str, *, history: bool = False, follow: bool = False) -> dict[str, Any]:
        """A JSON object; of one that was cut off, what is whole.

        Args:
            name: the file, relative to the run.
            history: it holds a log, and may be long.
            follow: read it also where it is a link that leads out of the run.

        Returns:
            The object; empty where there is none, or nothing of it can be read.
        """
        if name not in self._parsed:
            most = _HISTORY_BYTES if history else _JSON_BYTES
            raw = self._bytes(name, most) if follow or self.has(name) else None
            self._parsed[name] = {} if raw is None else self._object(name, raw)
        return self._parsed[name]

    def _object(self, name: str, raw: bytes) -> dict[str, Any]:
        if raw.count(b"{") + raw.count(b"[") > _MOST_CONTAINERS or raw.count(b",") > _MOST_VALUES:
            self._tell("file_too_long", name)
            return {}
        try:
            document = _parsed(raw)
        except ValueError as error:
            document = _whole_part(raw) if str(error).startswith("EOF") else None
            if isinstance(document, dict) and document:
                self._tell("file_cut_off", name)
                return document
            document = None
        if isinstance(document, dict):
            return document
        self._tell("file_unreadable", name)
        return {}

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The objects of a JSON-lines file, in order.

        Lines that are no object are left out and counted in a finding: the last is often half-written, because the
        training is still running or was killed.  Of a file beyond 32 MiB the middle is left out.
        """
        if not self._here(name):
            return []
        rows, damaged = [], 0
        try:
            with self._open(name) as file:
                for line in _lines(file):
                    if not line.strip():
                        continue
                    row = None if len(line) > _LINE_BYTES else _row(line)
                    if row is None:
                        damaged += 1
                    else:
                        rows.append(row)
                cut = os.fstat(file.fileno()).st_size > 2 * _LOG_BYTES
        except (OSError, CheckpointError):
            self._tell("file_unreadable", name)
            return []
        if damaged:
            self._tell("log_lines_damaged", name, count=damaged)
        if cut:
            self._tell("log_too_long", name, read_bytes=2 * _LOG_BYTES)
        return rows

    def yaml(self, name: str) -> dict[str, Value]:
        """The plain values at the top of a YAML mapping; lists of plain values as one text, deeper ones left out."""
        raw = self._bytes(name, _YAML_BYTES) if self.has(name) else None
        if raw is None:
            return {}
        values = plain_yaml(raw.decode("utf-8", "replace"))
        if values is None:
            self._tell("file_unreadable", name)
        return values or {}

    def text(self, name: str) -> str:
        """A text; of one beyond 256 KiB its beginning and its end.  Empty where there is none."""
        if not self._here(name):
            return ""
        try:
            with self._open(name) as file:
                raw = file.read(_TEXT_BYTES)
                if (size := os.fstat(file.fileno()).st_size) > _TEXT_BYTES:
                    file.seek(max(_TEXT_BYTES, size - _TEXT_BYTES))
                    raw += b"\n" + file.read(_TEXT_BYTES)
        except (OSError, CheckpointError):
            self._tell("file_unreadable", name)
            return ""
        return raw.decode("utf-8", "replace")

    def _here(self, name: str) -> bool:
        """Whether anything of that name is there that does not lead out of the run."""
        path = self.root / name
        return is_there(path) and not leads_out(self.root, path)

    def _open(self, name: str) -> BinaryIO:
        return open_regular(self.root / name)

    def _bytes(self, name: str, most: int) -> bytes | None:
        """A whole file; None, with a finding, where it cannot be read or is too long."""
        try:
            with self._open(name) as file:
                raw = file.read(most + 1)
        except (OSError, CheckpointError):
            raw = None
        if raw is not None and len(raw) <= most:
            return raw
        self._tell("file_unreadable" if raw is None else "file_too_long", name)
        return None

    def _tell(self, code: str, name: str, **params: Value) -> None:
        if name not in self._told:
            self._told.add(name)
            severity: Severity = "info" if code in ("log_lines_damaged", "log_too_long") else "warning"
            self.findings.append(Finding(code=code, severity=severity, params={"file": name, **params}))


def leads_out(root: Path, path: Path) -> bool:
    """Whether a link leads out of the run; the hub's cache, whose files are links to its blobs, counts as inside.

    Args:
        root: the run directory, resolved.
        path: a path below it.
    """
    real = Path(os.path.realpath(path))
    if real.is_relative_to(root):
        return False
    return not (root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs")


def plain_yaml(text: str) -> dict[str, Value] | None:
    """The plain values at the top of a YAML mapping; None where it is none.

    The document is parsed, and not constructed: anchors and merge keys can make gigabytes of a few lines.
    """
    import yaml

    values: dict[str, Value] = {}
    form = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        if _deep(yaml.parse(text, Loader=form)):
            return None
        loader = form(text)
        root = loader.get_single_node()
        for key, node in root.value if isinstance(root, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                continue
            if isinstance(node, yaml.ScalarNode):
                values[str(key.value)] = _scalar(loader, node)
            elif isinstance(node, yaml.SequenceNode) and all(isinstance(one, yaml.ScalarNode) for one in node.value):
                values[str(key.value)] = plain([one.value for one in node.value])
    except (ValueError, OverflowError, yaml.YAMLError):
        return None
    return values or None


def _scalar(loader: Any, node: Any) -> Value:
    """A scalar's value; None where its tag does not fit it, which PyYAML says by several exceptions."""
    from yaml import YAMLError

    try:
        return plain(loader.construct_object(node))
    except (ValueError, OverflowError, AttributeError, LookupError, TypeError, YAMLError):
        return None


def _deep(events: Iterator[Any]) -> bool:
    """Whether nesting goes beyond what settings need: the composer recurses, and takes longer the deeper it is."""
    from yaml import CollectionEndEvent, CollectionStartEvent

    depth = 0
    for event in events:
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > _YAML_DEPTH:
            return True
    return False


def plain(value: object) -> Value:
    """A setting's value as a record holds it: a list of plain values as one text, what is deeper as None."""
    if (
        isinstance(value, list)
        and len(value) <= _LIST_ITEMS
        and all(isinstance(one, str | int | float | bool) for one in value)
    ):
        return ", ".join(map(str, value))[:_TEXT_CHARACTERS] or None
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
        return str(value)[:_TEXT_CHARACTERS] if abs(value) < 10**100 else None
    if isinstance(value, str):
        return value[:_TEXT_CHARACTERS]
    return value if isinstance(value, int | float | bool) else None


def _parsed(raw: bytes) -> Any:
    """JSON as Python's own module reads it, and as others write it: NaN, a byte-order mark, bytes that are no UTF-8."""
    text = raw.decode("utf-8", "replace").removeprefix("\ufeff")
    return from_json(text, allow_inf_nan=True)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = _parsed(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _whole_part(raw: bytes) -> Any:
    """What is whole of a document that breaks off: a number at its very end may lack digits, so it goes too."""
    text = raw.decode("utf-8", "replace").removeprefix("\ufeff")
    try:
        return from_json(text[: max(0, text.rfind(","))], allow_inf_nan=True, allow_partial=True)
    except ValueError:
        return None


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines of the beginning and of the end of a file; of a line beyond 1 MiB only its beginning.

    Not ``splitlines``: JSON text may hold U+2028 and its like as they are.
    """
    size = os.fstat(file.fileno()).st_size
    ends = [size] if size <= 2 * _LOG_BYTES else [_LOG_BYTES, size]
    for end in ends:
        if end != ends[0]:
            file.seek(max(file.tell(), end - _LOG_BYTES))
            _rest_of_line(file, end)
        for _ in range(_MOST_LINES):
            line = file.readline(_LINE_BYTES + 1) if file.tell() < end else b""
            if not line:
                break
            if len(line) > _LINE_BYTES and not line.endswith(b"\n"):
                _rest_of_line(file, end)
            yield line


def _rest_of_line(file: BinaryIO, end: int) -> None:
    while file.tell() < end:
        part = file.readline(_LINE_BYTES)
        if not part or part.endswith(b"\n"):
            return

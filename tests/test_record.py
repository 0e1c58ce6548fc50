"""Records: frozen, strict, and the same before and after JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from tunesmith.errors import DataError, OutputError
from tunesmith.record import SCHEMA_VERSION, Finding, Record


class Sample(Record):
    """A record with a bit of everything."""

    name: str
    score: float | None = None
    findings: tuple[Finding, ...] = ()


FINDING = Finding(code="x", severity="info", params={"n": 3, "share": 0.5, "text": "中", "none": None, "yes": True})


@pytest.mark.parametrize("score", [None, 0.1, 1e308, -0.0, 5e-324])
def test_a_record_is_the_same_after_json(tmp_path: Path, score: float | None) -> None:
    """To the last digit, and with its schema's version."""
    record = Sample(name="中文 \u2028 ☃", score=score, findings=(FINDING,))
    path = record.write(tmp_path / "r.json")
    assert Sample.read(path) == record
    assert json.loads(path.read_text(encoding="utf-8"))["schema_version"] == SCHEMA_VERSION
    assert path.read_text(encoding="utf-8").endswith("}\n")
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_travel_as_strings(tmp_path: Path, score: float) -> None:
    """So that any JSON parser can read the document."""
    path = Sample(name="a", score=score).write(tmp_path / "r.json")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert isinstance(json.loads(path.read_text(), parse_constant=refuse)["score"], str)
    found = Sample.read(path).score
    assert found is not None
    assert math.isnan(found) if math.isnan(score) else found == score


def test_a_record_is_frozen_and_strict() -> None:
    """Neither changed nor given what it does not know."""
    record = Sample(name="a")
    with pytest.raises(ValidationError):
        record.name = "b"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Sample(name="a", nmae="b")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b"{}", b'{"name": 3}', b'{"name": "a", "other": 1}', b"null"]
)
def test_what_is_no_such_record_is_a_data_error(tmp_path: Path, content: bytes) -> None:
    """Naming the file and the place in it."""
    file = tmp_path / "r.json"
    file.write_bytes(content)
    with pytest.raises(DataError, match="not a Sample record") as caught:
        Sample.read(file)
    assert caught.value.where == str(file)
    assert caught.value.found


def test_a_missing_record_is_a_data_error(tmp_path: Path) -> None:
    """Not a traceback; a directory neither."""
    for place in (tmp_path / "none.json", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            Sample.read(place)


def test_a_record_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    """Nothing is left behind, and what was there stays."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "y").write_text("y")
    for place in (tmp_path / "none" / "r.json", tmp_path / "file" / "r.json", tmp_path / "folder"):
        with pytest.raises(OutputError, match="cannot be written"):
            Sample(name="a").write(place)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["file", "folder", "y"]


def test_a_record_replaces_an_older_one_whole(tmp_path: Path) -> None:
    """Whatever was there."""
    path = tmp_path / "r.json"
    path.write_text("x" * 10_000)
    Sample(name="a").write(path)
    assert Sample.read(path).name == "a"

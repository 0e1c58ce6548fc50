"""Documents: small files that may be damaged, cut off, endless, or lead elsewhere."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tunesmith.runs.reading import Documents, leads_out, plain, plain_yaml


def codes(documents: Documents) -> list[str]:
    """The findings' codes."""
    return [finding.code for finding in documents.findings]


@pytest.fixture
def documents(tmp_path: Path) -> Documents:
    """Of an empty run."""
    (tmp_path / "run").mkdir()
    return Documents(tmp_path / "run")


def test_json_is_read_as_trainers_write_it(documents: Documents) -> None:
    """NaN, a byte-order mark, and bytes that are no UTF-8."""
    (documents.root / "a.json").write_bytes(b'\xef\xbb\xbf{"loss": NaN, "name": "\xd6\xd0", "up": Infinity}')
    document = documents.json("a.json")
    assert document["loss"] != document["loss"]
    assert document["up"] == float("inf")
    assert document["name"] == "\ufffd\ufffd"
    assert documents.findings == []


def test_what_is_absent_is_empty_and_no_finding(documents: Documents) -> None:
    """Most runs lack most files."""
    assert documents.json("a.json") == documents.yaml("a.yaml") == {}
    assert documents.findings == []


@pytest.mark.parametrize(
    ("raw", "left"),
    [
        (b'{"step": 10, "loss": 2.1', {"step": 10}),
        (b'{"step": 10, "loss": 2.153, "name": "abc', {"step": 10, "loss": 2.153}),
        (b'{"rows": [{"a": 1, "b": 2}, {"a": 3', {"rows": [{"a": 1, "b": 2}]}),
        (b'{"rows": [{"a": 1, "b": 2}, {"a": 3, "b": 4', {"rows": [{"a": 1, "b": 2}, {"a": 3}]}),
    ],
)
def test_of_a_document_that_breaks_off_what_is_whole_is_read(
    documents: Documents, raw: bytes, left: dict[str, object]
) -> None:
    """A number at the very end may lack digits: 2.1 was 2.153."""
    (documents.root / "a.json").write_bytes(raw)
    assert documents.json("a.json") == left
    assert codes(documents) == ["file_cut_off"]


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b'"x"', b"null", b"[" * 10**5, b'{"a":' * 10**5, b'{"a": 1' + b"0" * 10**6 + b"}", b"\x00"],
)
def test_what_is_no_object_is_a_finding_at_once(documents: Documents, raw: bytes) -> None:
    """A hundred thousand brackets included."""
    (documents.root / "a.json").write_bytes(raw)
    started = time.monotonic()
    assert documents.json("a.json") == {}
    assert time.monotonic() - started < 5
    assert codes(documents) == ["file_unreadable"]


def test_a_file_far_too_long_is_not_read(documents: Documents) -> None:
    """A sparse one of 10 GB costs nothing."""
    with (documents.root / "a.json").open("wb") as file:
        file.truncate(10**10)
    assert documents.json("a.json") == {}
    assert codes(documents) == ["file_too_long"]


@pytest.mark.parametrize("raw", [b'{"a": [' + b"{}," * 10**6 + b"{}]}", b'{"a": [' + b"1," * 2_500_000 + b"1]}"])
def test_what_would_unfold_in_memory_is_not_read(documents: Documents, raw: bytes) -> None:
    """Millions of empty objects, or of numbers, in a few megabytes."""
    (documents.root / "a.json").write_bytes(raw)
    assert documents.json("a.json", history=True) == {}
    assert codes(documents) == ["file_too_long"]


def test_a_finding_is_told_once_a_file(documents: Documents) -> None:
    """However often it is asked for."""
    (documents.root / "a.json").write_bytes(b"{")
    documents.json("a.json")
    documents.json("a.json")
    documents.rows("a.json")
    assert codes(documents) == ["file_unreadable"]


# -- JSON lines


def test_lines_that_are_no_objects_are_counted(documents: Documents) -> None:
    """The last is often half-written; text separators inside of strings end no line."""
    lines = ['{"a": 1}', "", "nonsense", '{"b": "x\u2028y"}', "[3]", '{"c": 2.']
    (documents.root / "log.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert documents.rows("log.jsonl") == [{"a": 1}, {"b": "x\u2028y"}]
    (finding,) = documents.findings
    assert (finding.code, finding.severity, finding.params["count"]) == ("log_lines_damaged", "info", 3)


def test_a_line_without_end_costs_neither_memory_nor_the_rows_around_it(documents: Documents) -> None:
    """A sparse gigabyte in one line, between two rows."""
    path = documents.root / "log.jsonl"
    with path.open("wb") as file:
        file.write(b'{"a": 1}\n')
        file.truncate(10**9)
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"b": 2}\n')
    started = time.monotonic()
    assert documents.rows("log.jsonl") == [{"a": 1}, {"b": 2}]
    assert time.monotonic() - started < 5
    assert set(codes(documents)) <= {"log_lines_damaged", "log_too_long"}


def test_of_a_very_long_log_beginning_and_end_are_read(documents: Documents) -> None:
    """40 MB of rows: the middle is left out, and said so."""
    row = json.dumps({"step": 0, "pad": "x" * 1000}) + "\n"
    count = 40_000_000 // len(row)
    with (documents.root / "log.jsonl").open("w") as file:
        file.write('{"first": 1}\n' + row * count + '{"last": 1}\n')
    rows = documents.rows("log.jsonl")
    assert rows[0] == {"first": 1}
    assert rows[-1] == {"last": 1}
    assert len(rows) < count
    assert codes(documents) == ["log_too_long"]


def test_a_log_of_nothing_but_line_ends_is_soon_read(documents: Documents) -> None:
    """Millions of empty lines."""
    (documents.root / "log.jsonl").write_bytes(b"\n" * 30_000_000)
    started = time.monotonic()
    assert documents.rows("log.jsonl") == []
    assert time.monotonic() - started < 5


# -- YAML


def test_yaml_gives_its_plain_values(documents: Documents) -> None:
    """Lists of plain values as one text; what is deeper is left out."""
    text = "lr: 1.0e-4\nsteps: 3\non: true\nname: x\nlist: [a, 1]\ndeep: {a: 1}\ndeeper: [[1]]\nnone: null\n"
    (documents.root / "a.yaml").write_text(text)
    values = documents.yaml("a.yaml")
    assert values == {"lr": 1e-4, "steps": 3, "on": True, "name": "x", "list": "a, 1", "none": None}


def test_a_yaml_bomb_stays_small() -> None:
    """Nine levels of nine aliases and merge keys would be 400 million values."""
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}], y{n}: 1}}" for n in range(1, 10)]
    started = time.monotonic()
    assert plain_yaml("\n".join([*lines, "lr: 1"])) == {"lr": 1}
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("text", ["", "- a", "x", "{", "a: [", "\x00", "[" * 5000, "!!python/object:os.system {}"])
def test_what_is_no_yaml_mapping_is_none(text: str) -> None:
    """Python tags are not obeyed, and nesting does not overflow."""
    assert plain_yaml(text) is None


def test_dates_and_binaries_of_yaml_are_no_settings() -> None:
    """A record holds plain values only."""
    assert plain_yaml("when: 2026-01-01\nraw: !!binary aGk=\n") == {"when": None, "raw": None}


@pytest.mark.parametrize(
    "value",
    ["!!timestamp x", "!!bool x", "!!int x", "!!int ''", "!!float ''", "!!python/name:os.system x", "1:99999999999"],
)
def test_a_value_that_its_tag_does_not_fit_is_left_out(value: str) -> None:
    """And the others are read."""
    values = plain_yaml(f"odd: {value}\nlr: 1\n")
    assert values is not None
    assert values["lr"] == 1


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (1, 1),
        (True, True),
        (2**70, str(2**70)),
        (10**200, None),
        (["a", 2], "a, 2"),
        ([], None),
        ([[1]], None),
        ({}, None),
        ("x" * 1000, "x" * 500),
    ],
)
def test_a_setting_is_plain(value: object, kept: object) -> None:
    """Whatever JSON held."""
    assert plain(value) == kept


# -- where links lead


def test_a_link_out_of_the_run_is_not_read(documents: Documents, tmp_path: Path) -> None:
    """Nor one whose way leads through a folder."""
    (tmp_path / "secret.json").write_text('{"a": 1}')
    (documents.root / "a.json").symlink_to(tmp_path / "secret.json")
    (documents.root / "up").symlink_to(tmp_path)
    assert not documents.has("a.json")
    assert not documents.has("up/secret.json")
    assert documents.json("a.json") == documents.json("up/secret.json") == {}
    assert documents.json("a.json") == {}


def test_a_link_inside_the_run_is_read(documents: Documents) -> None:
    """As a trainer's ``latest`` is."""
    (documents.root / "a.json").write_text('{"a": 1}')
    (documents.root / "b.json").symlink_to("a.json")
    assert documents.json("b.json") == {"a": 1}


def test_the_hubs_cache_counts_as_inside(tmp_path: Path) -> None:
    """Its files are links to blobs beside the snapshots."""
    cache = tmp_path / "models--org--x"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "1234").write_text('{"a": 1}')
    (snapshot / "a.json").symlink_to("../../blobs/1234")
    (cache / "other").write_text("{}")
    (snapshot / "b.json").symlink_to("../../other")
    assert not leads_out(snapshot, snapshot / "a.json")
    assert leads_out(snapshot, snapshot / "b.json")
    assert Documents(snapshot).json("a.json") == {"a": 1}


def test_pipes_and_folders_are_not_opened(documents: Documents) -> None:
    """A pipe would keep the reader waiting for ever."""
    os.mkfifo(documents.root / "a.json")
    (documents.root / "b.json").mkdir()
    assert documents.json("a.json") == documents.json("b.json") == {}
    assert documents.rows("a.json") == []
    assert documents.text("b.json") == ""
    assert set(codes(documents)) == {"file_unreadable"}

"""Data sets by name: LLaMA-Factory's descriptions mean what they mean there, and nothing is mis-trained in silence.

The expected rows are those of LLaMA-Factory 0.9.5's own converters over the same files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from tunesmith.conversations import Conversation, Dataset, read_dataset
from tunesmith.errors import DataError, MissingExtraError

TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
WHOLE = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
ALPACA = [
    {"instruction": "a", "input": "b", "output": "c", "system": "S", "history": [["h1", "h2"], ["h3", "h4"]]},
    {"instruction": "a", "input": "", "output": "c", "system": "", "history": []},
    {"instruction": "", "input": "only", "output": "c", "system": None, "history": None},
    {"instruction": "x", "input": None, "output": None, "system": "S", "history": []},
    {"instruction": "", "input": "", "output": "text", "system": "", "history": []},
]


def shared(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    """A ShareGPT row."""
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **more}


def said(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    """A row of ``messages``."""
    return {"messages": [{"role": role, "content": text} for role, text in turns], **more}


HISTORY = [("user", "h1"), ("assistant", "h2"), ("user", "h3"), ("assistant", "h4")]
Q, A, HUMAN, GPT = ("user", "q"), ("assistant", "a"), ("human", "q"), ("gpt", "a")


def described(folder: Path, rows: list[Any], **description: Any) -> Dataset:
    """Write a registry of one data set, and read that."""
    write(folder / "rows.json", rows)
    (folder / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "rows.json", **description}}))
    return read_dataset("mine", dataset_dir=folder)


def write(file: Path, rows: list[Any]) -> Path:
    """Write rows as JSON."""
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def turns(rows: list[Conversation]) -> list[list[tuple[str, str]]]:
    """Roles and texts."""
    return [[(turn.role, turn.content) for turn in row.messages] for row in rows]


def test_alpaca_means_what_it_means_in_llama_factory(tmp_path: Path) -> None:
    """Instruction and input on lines of their own, rounds of history before; no answer, no row."""
    found = described(tmp_path, ALPACA, columns=WHOLE)
    assert turns(found.rows) == [
        [("system", "S"), *HISTORY, ("user", "a\nb"), ("assistant", "c")],
        [("user", "a"), ("assistant", "c")],
        [("user", "only"), ("assistant", "c")],
        [("user", ""), ("assistant", "text")],
    ]
    assert [row.id for row in found.rows] == ["row-0", "row-1", "row-2", "row-4"]
    assert (found.read, dict(found.left_out), found.findings) == (5, {"no_answer": ("row-3",)}, ())


def test_columns_that_a_description_does_not_map_are_not_read_and_named(tmp_path: Path) -> None:
    """LLaMA-Factory passes over a ``system`` column in silence where no ``columns`` name it."""
    found = described(tmp_path, ALPACA)
    assert turns(found.rows)[0] == [("user", "a\nb"), ("assistant", "c")]
    (finding,) = found.findings
    assert (finding.code, finding.params["columns"]) == ("dataset_columns_unused", "system, history")
    assert turns(described(tmp_path, ALPACA, columns={"prompt": "input", "response": "output"}).rows)[0] == [
        ("user", "b"),
        ("assistant", "c"),
    ]


SHARED = [
    (shared(("system", "S"), HUMAN, GPT, sys="other"), [("system", "S"), Q, A]),
    (shared(HUMAN, GPT, HUMAN, GPT, sys="column"), [("system", "column"), Q, A, Q, A]),
    (shared(GPT, HUMAN), "wrong_order"),
    (shared(HUMAN, HUMAN), "wrong_order"),
    (shared(HUMAN, GPT, HUMAN), "no_answer"),
    (shared(HUMAN, ("strange", "a")), "wrong_order"),
    (shared(HUMAN, GPT, ("system", "late"), GPT), "wrong_order"),
    (shared(), "no_answer"),
    (shared(HUMAN, ("gpt", " \n")), "no_answer"),
    (shared(HUMAN, ("gpt", ""), HUMAN, GPT), "no_answer"),
    (shared(HUMAN, ("function_call", "{}"), ("observation", "1"), GPT), "tools"),
    (shared(HUMAN, GPT, tools='[{"name": "f"}]'), "tools"),
    (shared(HUMAN, GPT, tools="[]"), [Q, A]),
    (shared(HUMAN, GPT, tools=None), [Q, A]),
    (shared(HUMAN, GPT, images=["1.jpg"]), "media"),
    (shared(HUMAN, GPT, images=[]), [Q, A]),
]
COLUMNS = {"messages": "conversations", "system": "sys", "tools": "tools", "images": "images"}


def test_sharegpt_rows_are_kept_or_left_out_for_a_reason(tmp_path: Path) -> None:
    """A first system turn wins over the column; roles take turns; tools and media are beyond text."""
    found = described(tmp_path, [row for row, _ in SHARED], formatting="sharegpt", columns=COLUMNS)
    assert turns(found.rows) == [expected for _, expected in SHARED if isinstance(expected, list)]
    reasons = {one: reason for reason, ids in found.left_out.items() for one in ids}
    assert reasons == {f"row-{place}": why for place, (_, why) in enumerate(SHARED) if isinstance(why, str)}


def test_messages_are_read_by_their_tags(tmp_path: Path) -> None:
    """Tags that are given leave the others unset: without ``system_tag`` a system turn is out of order, as there."""
    rows = [said(("system", "S"), Q, A), said(Q, A)]
    options: dict[str, Any] = {"formatting": "sharegpt", "columns": {"messages": "messages"}}
    assert turns(described(tmp_path, rows, **options, tags={**TAGS, "system_tag": "system"}).rows) == [
        [("system", "S"), Q, A],
        [Q, A],
    ]
    found = described(tmp_path, rows, **options, tags=TAGS)
    assert (turns(found.rows), dict(found.left_out)) == ([[Q, A]], {"wrong_order": ("row-0",)})


def test_the_openai_form_adds_nothing_to_the_system_text(tmp_path: Path) -> None:
    """LLaMA-Factory ends it with "detailed thinking off" for one model's sake; that is left out, and said."""
    rows = [said(("system", "S"), Q, A), said(Q, ("assistant", ""), tools=None)]
    rows[1]["messages"][1]["tool_calls"] = [{"function": {"name": "f", "arguments": "{}"}}]
    tags = {**TAGS, "system_tag": "system"}
    found = described(tmp_path, rows, formatting="openai", columns={"messages": "messages"}, tags=tags)
    assert turns(found.rows) == [[("system", "S"), Q, A]]
    assert dict(found.left_out) == {"tools": ("row-1",)}
    assert [finding.code for finding in found.findings] == ["dataset_system_untouched"]


def test_num_samples_draws_the_rows_that_llama_factory_draws(tmp_path: Path) -> None:
    """Without replacement while there are any, then with; ``max_samples`` takes the first of these."""
    rows = [{"instruction": f"q{number}", "output": "a"} for number in range(5)]
    drawn = [row.question for row in described(tmp_path, rows, num_samples=3).rows]
    assert drawn == ["q1", "q4", "q2"]
    described(tmp_path, rows, num_samples=9)
    over = read_dataset("mine", dataset_dir=tmp_path)
    assert (len(over.rows), {row.question for row in over.rows[:5]}) == (9, {f"q{number}" for number in range(5)})
    assert [row.question for row in read_dataset("mine", dataset_dir=tmp_path, max_samples=2).rows] == ["q1", "q4"]
    assert len(read_dataset("rows.json", dataset_dir=tmp_path, max_samples=2).rows) == 2


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    """All of one type."""
    (tmp_path / "many").mkdir()
    for name in ("2.json", "1.json"):
        write(tmp_path / "many" / name, [{"instruction": name, "output": "a"}])
    found = described(tmp_path, [], file_name="many")
    assert [row.question for row in found.rows] == ["1.json", "2.json"]
    assert [file.name for file in found.files] == ["1.json", "2.json"]
    (tmp_path / "many" / "3.csv").write_text("instruction,output\nq,a\n")
    with pytest.raises(DataError, match="several types"):
        read_dataset("mine", dataset_dir=tmp_path)


def test_a_file_needs_no_description(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked for as given, then in ``dataset_dir``; a described name wins over a file."""
    rows = [{"instruction": "q", "output": "a"}, said(Q), said(A, Q), said(Q, A, tools=[{"name": "f"}])]
    file = write(tmp_path / "own.json", rows)
    for name, folder in ((str(file), None), ("own.json", tmp_path)):
        found = read_dataset(name, dataset_dir=folder)
        assert (found.files, turns(found.rows)) == ((file,), [[Q, A]])
        assert dict(found.left_out) == {"no_answer": ("row-1",), "wrong_order": ("row-2",), "tools": ("row-3",)}
    monkeypatch.chdir(tmp_path)
    assert read_dataset("own.json").files == (Path("own.json"),)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"script_url": "code"}, "never run"),
    ({"ms_hub_url": "a/b"}, "ModelScope"),
    ({"om_hub_url": "a/b"}, "Openmind"),
    ({"cloud_file_name": "s3://a/b.json"}, "cloud store"),
    ({"ranking": True}, "preferences"),
    ({"columns": {"prompt": "instruction", "response": "output", "kto_tag": "label"}}, "preferences"),
    ({"columns": {"prompt": "instruction"}}, "columns.response"),
    ({"columns": {"promt": "instruction"}}, "did you mean prompt"),
    ({"formatting": "sharegpt", "columns": {"system": "system"}}, "columns.messages"),
    ({"formatting": "sharegpt", "tags": {"role_tag": "role"}}, "tags.content_tag"),
    ({"formatting": "sharegtp"}, "formatting"),
    ({"columns": {"prompt": "instruction", "response": "reply"}}, "No row has the column"),
    ({"num_samples": 0}, "num_samples"),
    ({"file_name": "gone.json"}, "not there"),
    ({"file_name": None}, "names no file"),
    ({"split": "train[:10%]"}, "files have no parts"),
]


@pytest.mark.parametrize(("description", "why"), REFUSED)
def test_a_data_set_that_cannot_be_learned_from_is_refused(tmp_path: Path, description: Any, why: str) -> None:
    """With what it is."""
    with pytest.raises(DataError) as caught:
        described(tmp_path, ALPACA, **description)
    assert why in str(caught.value)


def test_a_row_that_cannot_be_read_is_refused_with_its_number(tmp_path: Path) -> None:
    """Unlike one that can be read and not be trained on."""
    bad = [{"instruction": "q", "output": ["a", "b"]}, {"instruction": ["q"], "output": "a"}, 3]
    with pytest.raises(DataError, match="3 of 5 rows cannot be read") as caught:
        described(tmp_path, [*ALPACA[1:3], *bad])
    assert [line.partition(":")[0] for line in caught.value.details] == ["row 2", "row 3", "row 4"]
    strange = [said(Q, ("assistant", None)), {"messages": "q"}, said(Q, A)]
    with pytest.raises(DataError, match="2 of 3 rows cannot be read"):
        described(tmp_path, strange, formatting="sharegpt", columns={"messages": "messages"}, tags=TAGS)


def test_a_data_set_of_which_nothing_is_left_is_refused_with_the_reasons(tmp_path: Path) -> None:
    """All its rows call tools, or answer nothing."""
    with pytest.raises(DataError, match="None of 2 rows") as caught:
        described(
            tmp_path,
            [shared(HUMAN), shared(HUMAN, GPT, tools="[1]")],
            formatting="sharegpt",
            columns=COLUMNS | {"system": None, "images": None},
        )
    assert caught.value.details == ("1 have no answer, or an empty one: row-0", "1 call tools: row-1")


def test_an_unknown_name_is_refused_with_the_nearest(tmp_path: Path) -> None:
    """And with what there is."""
    described(tmp_path, ALPACA)
    with pytest.raises(DataError, match="no data set 'mien'") as caught:
        read_dataset("mien", dataset_dir=tmp_path)
    assert (caught.value.next_step, caught.value.expected) == ("did you mean mine?", "one of mine, or a file")
    with pytest.raises(DataError, match="no data set") as caught:
        read_dataset("mine", dataset_dir=tmp_path / "nowhere")
    assert "dataset_info.json" in str(caught.value.expected)


@pytest.mark.parametrize("text", ["{", "[1]", '{"mine": 3}', '{"mine": {"columns": 3}}', "[" * 99_999])
def test_a_broken_registry_is_refused(tmp_path: Path, text: str) -> None:
    """Whatever is wrong with it."""
    (tmp_path / "dataset_info.json").write_text(text)
    with pytest.raises(DataError):
        read_dataset("mine", dataset_dir=tmp_path)


def test_keys_that_mean_nothing_are_named(tmp_path: Path) -> None:
    """Old registries hold a ``file_sha1``."""
    (finding,) = described(tmp_path, ALPACA, columns=WHOLE, file_sha1="0" * 40).findings
    assert (finding.code, finding.params["keys"]) == ("dataset_keys_unknown", "file_sha1")


def test_a_data_set_of_the_hub_is_fetched_by_its_client_or_said_how_to_have(tmp_path: Path) -> None:
    """Offline, as these tests are, and where the hub may not be asked at all."""
    (tmp_path / "dataset_info.json").write_text('{"far": {"hf_hub_url": "org/far", "ms_hub_url": "org/far"}}')
    for hub in (True, False):
        with pytest.raises(DataError) as caught:
            read_dataset("far", dataset_dir=tmp_path, hub=hub)
        assert str(caught.value.next_step).startswith("hf download --repo-type dataset org/far")


def test_a_local_folder_stands_for_a_hub_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client reads it in the same way, with its split and folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "repo" / "part").mkdir(parents=True)
    write(tmp_path / "repo" / "part" / "train.json", [{"instruction": "q", "output": "a"}])
    entry = {"hf_hub_url": str(tmp_path / "repo"), "folder": "part", "split": "train"}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"far": entry}))
    found = read_dataset("far", dataset_dir=tmp_path)
    assert (turns(found.rows), found.files) == ([[Q, A]], ())


def test_what_is_lacking_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables need pyarrow, the hub needs datasets; both come with ``train``."""
    (tmp_path / "dataset_info.json").write_text('{"far": {"hf_hub_url": "org/far"}}')
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    for package, name in (("datasets", "far"), ("pyarrow", "rows.parquet")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingExtraError, match=package):
            read_dataset(name, dataset_dir=tmp_path)


def test_a_file_larger_than_is_wanted_is_refused(tmp_path: Path) -> None:
    """What a run names need not be small."""
    file = write(tmp_path / "own.json", [{"instruction": "q", "output": "a"}])
    assert read_dataset(str(file), largest_bytes=file.stat().st_size).read == 1
    with pytest.raises(DataError, match="too large"):
        read_dataset(str(file), largest_bytes=file.stat().st_size - 1)

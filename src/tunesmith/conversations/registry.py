"""Data sets by name, as LLaMA-Factory's ``dataset_info.json`` describes them, and what of them can be trained on.

Source: https://github.com/hiyouga/LLaMA-Factory/blob/v0.9.5/data/README.md for the meaning of every key.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ConfigDict, Field, ValidationError

from tunesmith.conversations.files import converted, earlier_rounds, joined, messages_of, rows_of_file, system_turn
from tunesmith.conversations.records import Conversation, Message
from tunesmith.errors import DataError, MissingExtraError
from tunesmith.record import Finding, Part

DATASET_INFO = "dataset_info.json"
"""The registry's file name."""

Reason = Literal["no_answer", "wrong_order", "tools", "media"]
"""Why a row is left out: it answers nothing, its roles do not take turns, it calls tools, it needs more than text."""

REASONS: tuple[Reason, ...] = get_args(Reason)

_REASON_WORDS: dict[Reason, str] = {
    "no_answer": "have no answer, or an empty one",
    "wrong_order": "have roles that do not take turns",
    "tools": "call tools",
    "media": "hold images, videos or audios",
}
_TURNS = ("user", "assistant")
# Roles of turns that no template of texts can show; they keep their row out of training.
_OTHER, _TOOLS, _MEDIA = "other", "tools", "media"
_MEDIA_COLUMNS = ("images", "videos", "audios")
_NOT_READ = {
    "script_url": ("its rows come from a script, and code that comes with data is never run", "save them as a file"),
    "ms_hub_url": ("ModelScope is not asked", "download it"),
    "om_hub_url": ("the Openmind hub is not asked", "download it"),
    "cloud_file_name": ("files of a cloud store are not read", "download it"),
}


@dataclass(frozen=True)
class Dataset:
    """A data set as it is trained on.

    Attributes:
        name: as it was asked for.
        files: those that it was read from, in order; none where it came from the hub.
        read: rows that were read, after ``num_samples`` and ``max_samples``.
        rows: those that can be trained on: a system text or none, then user and assistant in turn, an answer last.
        left_out: the ids of the others, by reason.
        findings: what of its description was passed over.
    """

    name: str
    files: tuple[Path, ...]
    read: int
    rows: list[Conversation]
    left_out: Mapping[Reason, tuple[str, ...]]
    findings: tuple[Finding, ...] = ()


class _Columns(Part):
    """Which column of a row holds what; None where none does."""

    prompt: str | None = None
    query: str | None = None
    response: str | None = None
    history: str | None = None
    messages: str | None = None
    system: str | None = None
    tools: str | None = None
    images: str | None = None
    videos: str | None = None
    audios: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    kto_tag: str | None = None


class _Tags(Part):
    """What the keys and the roles of a turn are called."""

    role_tag: str | None = None
    content_tag: str | None = None
    user_tag: str | None = None
    assistant_tag: str | None = None
    observation_tag: str | None = None
    function_tag: str | None = None
    system_tag: str | None = None


# What holds where a description has no `columns` or no `tags` at all; one that has them leaves the others unset.
_COLUMNS = _Columns(prompt="instruction", query="input", response="output", messages="conversations")
_TAGS = _Tags(
    role_tag="from",
    content_tag="value",
    user_tag="human",
    assistant_tag="gpt",
    observation_tag="observation",
    function_tag="function_call",
    system_tag="system",
)

_MORE_THAN_TEXT = _Columns(tools="tools", images="images", videos="videos", audios="audios")


class _Entry(Part):
    """One description of ``dataset_info.json``."""

    model_config = ConfigDict(extra="ignore")

    file_name: str | None = None
    hf_hub_url: str | None = None
    ms_hub_url: str | None = None
    om_hub_url: str | None = None
    script_url: str | None = None
    cloud_file_name: str | None = None
    formatting: Literal["alpaca", "sharegpt", "openai"] = "alpaca"
    ranking: bool = False
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: int | None = Field(default=None, ge=1)
    columns: _Columns = _COLUMNS
    tags: _Tags = _TAGS


def read_dataset(
    name: str,
    *,
    dataset_dir: Path | None = None,
    max_samples: int | None = None,
    seed: int = 42,
    hub: bool = True,
    largest_bytes: int | None = None,
) -> Dataset:
    """Read a data set, and part the rows that can be trained on from those that cannot.

    Args:
        name: a key of ``dataset_info.json``, or a file whose rows tell their form by their keys; the file is looked for
            as given, then in ``dataset_dir``.
        dataset_dir: the folder of ``dataset_info.json`` and of the files that it names.
        max_samples: read no more than the first so many rows.
        seed: which rows ``num_samples`` draws.
        hub: whether the Hugging Face hub may be asked.
        largest_bytes: refuse files that are larger; None reads any.

    Raises:
        DataError: there is no such data set, its description or a row cannot be read, it is not for supervised training
            on text, or no row of it can be trained on.
        MissingExtraError: it needs a library that is not installed.
    """
    described = _registry(dataset_dir)
    if name in described:
        found = _Described.of(name, described[name], dataset_dir=dataset_dir, hub=hub, largest_bytes=largest_bytes)
        rows = _sampled(found.rows, found.entry.num_samples, seed)[:max_samples]
        where: object = f"{name} in {DATASET_INFO}"
        kept = _read_described(rows, found.entry, where=where)
        findings = found.findings + _unmapped(rows, found.entry, name)
        return _dataset(name, found.files, kept, findings=findings, where=where)
    file = _file(name, dataset_dir, described)
    rows = _rows_of((file,), largest_bytes)[:max_samples]
    kept = converted(rows, _by_keys, where=file, expected="Alpaca, messages, conversations or prompt/completion rows")
    return _dataset(name, (file,), kept, where=file)


def _dataset(
    name: str,
    files: tuple[Path, ...],
    conversations: Sequence[Conversation],
    *,
    where: object,
    findings: tuple[Finding, ...] = (),
) -> Dataset:
    """Part what can be trained on from what cannot."""
    rows: list[Conversation] = []
    left_out: dict[Reason, list[str]] = {}
    for row in conversations:
        reason = _unfit(row)
        if reason is None:
            rows.append(row)
        else:
            left_out.setdefault(reason, []).append(row.id)
    if not rows:
        raise DataError(
            f"None of {len(conversations)} rows can be trained on.",
            where=where,
            expected="a system text or none, then user and assistant in turn, with an answer last",
            details=[f"{len(ids)} {_REASON_WORDS[reason]}: {', '.join(ids[:5])}" for reason, ids in left_out.items()],
        )
    counted = {reason: tuple(left_out[reason]) for reason in REASONS if reason in left_out}
    return Dataset(name, files, len(conversations), rows, counted, findings)


def _unfit(row: Conversation) -> Reason | None:
    """Why a row cannot be trained on; None where it can."""
    turns = row.messages[1:] if row.messages[0].role == "system" else row.messages
    roles = [turn.role for turn in turns]
    if _TOOLS in roles or _MEDIA in roles:
        return "tools" if _TOOLS in roles else "media"
    if any(role != _TURNS[place % 2] for place, role in enumerate(roles)):
        return "wrong_order"
    if len(turns) % 2 or not turns or not all(turn.content.strip() for turn in turns[1::2]):
        return "no_answer"
    return None


def _named(columns: _Columns, kinds: Iterable[str]) -> list[str]:
    return [column for kind in kinds if (column := getattr(columns, kind)) is not None]


def _registry(dataset_dir: Path | None) -> dict[str, object]:
    """``dataset_info.json``, or nothing where there is none."""
    place = dataset_dir / DATASET_INFO if dataset_dir is not None else None
    if place is None or not place.exists():
        return {}
    try:
        document = json.loads(place.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError("The data-set registry cannot be read.", where=place, found=error.strerror or error) from error
    except (ValueError, RecursionError) as error:
        raise DataError("The data-set registry is not valid JSON.", where=place, found=error) from error
    if not isinstance(document, dict):
        raise DataError(
            "The data-set registry is not a mapping of names.",
            where=place,
            expected='{"name": {"file_name": …}, …}',
            found=type(document).__name__,
        )
    return document


def _file(name: str, dataset_dir: Path | None, described: Mapping[str, object]) -> Path:
    """The file that ``name`` is, where it is no described data set."""
    places = [Path(name).expanduser(), *([dataset_dir / name] if dataset_dir is not None else [])]
    for place in places:
        if place.is_file():
            return place
    near = difflib.get_close_matches(name, described, n=1, cutoff=0.5)
    registry = dataset_dir / DATASET_INFO if dataset_dir is not None else None
    raise DataError(
        f"There is no data set {name!r}: no description and no file has that name.",
        where=registry if described else dataset_dir,
        expected=f"one of {', '.join(list(described)[:10])}{', …' if len(described) > 10 else ''}, or a file"
        if described
        else f"a file, or a folder with {DATASET_INFO} as dataset_dir",
        next_step=f"did you mean {near[0]}?" if near else None,
    )


@dataclass(frozen=True)
class _Described:
    """A description with the rows that it leads to."""

    entry: _Entry
    rows: list[object]
    files: tuple[Path, ...]
    findings: tuple[Finding, ...]

    @classmethod
    def of(
        cls, name: str, description: object, *, dataset_dir: Path | None, hub: bool, largest_bytes: int | None
    ) -> _Described:
        entry = _entry(name, description)
        findings = _passed_over(name, entry, description)
        if entry.hf_hub_url is not None:
            return cls(entry, _hub_rows(name, entry, hub=hub), (), findings)
        for key, (why, remedy) in _NOT_READ.items():
            if getattr(entry, key) is not None:
                raise DataError(
                    f"The data set {name!r} cannot be read: {why}.",
                    where=f"{key} of {name} in {DATASET_INFO}",
                    found=getattr(entry, key),
                    next_step=f"{remedy}, and name the file with file_name",
                )
        files = _files_of(name, entry, dataset_dir or Path())
        return cls(entry, _rows_of(files, largest_bytes), files, findings)


def _entry(name: str, description: object) -> _Entry:
    try:
        entry = _Entry.model_validate(description)
    except ValidationError as error:
        raise DataError(
            f"The description of the data set {name!r} cannot be read.",
            where=DATASET_INFO,
            details=[_sentence(problem) for problem in error.errors()],
        ) from error
    needed = "response" if entry.formatting == "alpaca" else "messages"
    lacking = [f"columns.{needed}"] if getattr(entry.columns, needed) is None else []
    if entry.formatting != "alpaca":
        tags = ("role_tag", "content_tag", "user_tag", "assistant_tag")
        lacking += [f"tags.{key}" for key in tags if getattr(entry.tags, key) is None]
    if entry.ranking or entry.columns.kto_tag is not None:
        raise DataError(
            f"The data set {name!r} holds preferences, which supervised training cannot learn from.",
            where=f"{name} in {DATASET_INFO}",
            expected="a prompt and one answer a row",
            next_step="name a data set for supervised training, or map its better answer as columns.response",
        )
    if lacking:
        raise DataError(
            f"The description of the data set {name!r} leaves out what its rows cannot be read without.",
            where=f"{name} in {DATASET_INFO}",
            details=[f"{key}: missing; columns or tags that are given at all must be given whole" for key in lacking],
        )
    return entry


def _passed_over(name: str, entry: _Entry, description: object) -> tuple[Finding, ...]:
    """What of a description is not followed."""
    found = []
    strange = sorted(set(description if isinstance(description, dict) else ()) - set(_Entry.model_fields))
    if strange:
        keys = ", ".join(map(str, strange))
        found.append(Finding(code="dataset_keys_unknown", severity="info", params={"name": name, "keys": keys}))
    if entry.formatting == "openai":
        # LLaMA-Factory ends every system text of this form with "detailed thinking off", for one model's sake.
        found.append(Finding(code="dataset_system_untouched", severity="info", params={"name": name}))
    return tuple(found)


def _sentence(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        model = _Columns if problem["loc"][0] == "columns" else _Tags
        near = difflib.get_close_matches(str(problem["loc"][-1]), model.model_fields, n=1)
        return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    return f"{key or 'description'}: {problem['msg']} (found {problem['input']!r})"


def _files_of(name: str, entry: _Entry, folder: Path) -> tuple[Path, ...]:
    where = f"file_name of {name} in {DATASET_INFO}"
    if entry.file_name is None:
        raise DataError(f"The data set {name!r} names no file.", where=where, expected="file_name or hf_hub_url")
    if entry.split != "train":
        raise DataError(
            f"A part of the data set {name!r} is asked for, and files have no parts.",
            where=f"split of {name} in {DATASET_INFO}",
            expected="train",
            found=entry.split,
            next_step="take the first rows by max_samples, or some by num_samples",
        )
    place = folder / entry.file_name
    files = tuple(sorted(place.iterdir())) if place.is_dir() else (place,)
    if not files or not all(file.is_file() for file in files):
        raise DataError(
            f"A file of the data set {name!r} is not there.",
            where=where,
            expected="a file, or a folder of files of one type",
            found=next((file for file in files if not file.is_file()), place),
        )
    kinds = {file.suffix.replace(".jsonl", ".json") for file in files}
    if len(kinds) > 1:
        raise DataError(
            f"The files of the data set {name!r} are of several types.", where=place, found=", ".join(sorted(kinds))
        )
    return files


def _rows_of(files: Sequence[Path], largest_bytes: int | None) -> list[object]:
    for file in files:
        if largest_bytes is not None and file.stat().st_size > largest_bytes:
            raise DataError("The file is too large to be read here.", where=file, expected=f"{largest_bytes} bytes")
    return [row for file in files for row in rows_of_file(file)]


def _hub_rows(name: str, entry: _Entry, *, hub: bool) -> list[object]:
    where = f"hf_hub_url of {name} in {DATASET_INFO}"
    save = f"hf download --repo-type dataset {entry.hf_hub_url}, and name its file with file_name"
    if not hub:
        raise DataError(f"The data set {name!r} is on the hub.", where=where, found=entry.hf_hub_url, next_step=save)
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("reading a data set of the hub", "train", "datasets") from error
    # Later versions have no such argument, and run no script either.
    no_code = {"trust_remote_code": False} if int(datasets.__version__.partition(".")[0]) < 4 else {}
    try:
        rows = datasets.load_dataset(
            entry.hf_hub_url, entry.subset, data_dir=entry.folder, split=entry.split, **no_code
        )
        return list(rows)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"The data set {name!r} cannot be had from the hub.",
            where=where,
            found=f"{entry.hf_hub_url}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            next_step=save,
        ) from error


def _sampled(rows: list[object], number: int | None, seed: int) -> list[object]:
    """``num_samples`` rows: drawn without replacement while there are any, and then with."""
    if number is None or not rows:
        return rows
    import numpy as np

    draw = np.random.RandomState(seed)  # what transformers.set_seed leaves LLaMA-Factory with
    chosen = list(draw.permutation(len(rows))[:number])
    if number > len(chosen):
        chosen += list(draw.choice(len(rows), number - len(chosen)))
    return [rows[place] for place in chosen]


def _unmapped(rows: Sequence[object], entry: _Entry, name: str) -> tuple[Finding, ...]:
    """Columns that mean something by their name, and that the description gives no meaning to."""
    known = ("system", "history") if entry.formatting == "alpaca" else ("system",)
    present = [key for key in known if any(isinstance(row, dict) and row.get(key) for row in rows)]
    passed_over = [key for key in present if key not in _named(entry.columns, _Columns.model_fields)]
    if not passed_over:
        return ()
    params = {"name": name, "columns": ", ".join(passed_over)}
    return (Finding(code="dataset_columns_unused", severity="warning", params=params),)


def _read_described(rows: list[object], entry: _Entry, *, where: object) -> list[Conversation]:
    columns = entry.columns
    used = ("prompt", "query", "response", "history") if entry.formatting == "alpaca" else ("messages",)
    wanted = _named(columns, (*used, "system", "tools", *_MEDIA_COLUMNS)) if columns is not _COLUMNS else []
    present = {key for row in rows if isinstance(row, dict) for key in row}
    absent = [column for column in wanted if column not in present]
    if absent and rows:
        raise DataError(
            f"No row has the column{'s' if len(absent) > 1 else ''} {', '.join(absent)}.",
            where=where,
            expected=", ".join(wanted),
            found=", ".join(sorted(map(str, present))[:20]),
        )
    convert = partial(_alpaca if entry.formatting == "alpaca" else _sharegpt, entry=entry)
    return converted(rows, convert, where=where, expected=f"{entry.formatting} rows")


def _alpaca(row: object, entry: _Entry) -> list[Message]:
    columns, fields = entry.columns, _object(row)
    cell = {kind: fields.get(column) if (column := getattr(columns, kind)) else None for kind in _Columns.model_fields}
    question = joined(cell["prompt"], cell["query"])
    if question is None:
        raise ValueError("the question is not text")
    if cell["response"] is not None and not isinstance(cell["response"], str):
        raise ValueError("the answer is not text")
    turns = [*system_turn(cell["system"]), *earlier_rounds(cell["history"]), Message(role="user", content=question)]
    if cell["response"]:
        turns.append(Message(role="assistant", content=cell["response"]))
    return [*turns, *_beyond_text(fields, columns)]


def _sharegpt(row: object, entry: _Entry) -> list[Message]:
    columns, tags, fields = entry.columns, entry.tags, _object(row)
    turns = fields.get(str(columns.messages))
    if not isinstance(turns, list):
        raise ValueError("the turns are not a list")
    roles = {
        tags.function_tag: _TOOLS,
        tags.observation_tag: _TOOLS,
        tags.system_tag: "system",
        tags.user_tag: "user",
        tags.assistant_tag: "assistant",
    }
    roles.pop(None, None)
    messages = [_turn(turn, tags, roles) for turn in turns] or [Message(role="user", content="")]
    system = fields.get(columns.system) if columns.system and messages[0].role != "system" else None
    return [*system_turn(system), *messages, *_beyond_text(fields, columns)]


def _turn(turn: object, tags: _Tags, roles: Mapping[str | None, str]) -> Message:
    fields = turn if isinstance(turn, dict) else {}
    if fields.get("tool_calls"):
        return Message(role=_TOOLS, content="")
    content, role = fields.get(tags.content_tag), fields.get(tags.role_tag)
    if not isinstance(content, str):
        raise ValueError(f"a turn has no text under {tags.content_tag!r}")
    return Message(role=roles.get(role, _OTHER) if isinstance(role, str) else _OTHER, content=content)


def _by_keys(row: object) -> list[Message]:
    """A row that no description speaks of; such rows may hold more than text too."""
    return [*messages_of(row), *(_beyond_text(row, _MORE_THAN_TEXT) if isinstance(row, dict) else ())]


def _beyond_text(fields: Mapping[str, Any], columns: _Columns) -> list[Message]:
    """What a row holds that no template of texts can show, as a turn that keeps the row out of training."""
    tools = fields.get(columns.tools) if columns.tools else None
    if tools and not (isinstance(tools, str) and tools.strip() in ("", "[]")):
        return [Message(role=_TOOLS, content="")]
    held = any(fields.get(column) for column in _named(columns, _MEDIA_COLUMNS))
    return [Message(role=_MEDIA, content="")] if held else []


def _object(row: object) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {type(row).__name__}")
    return row

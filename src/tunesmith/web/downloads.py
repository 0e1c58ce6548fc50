"""A job's result as a file, in the forms that the command line writes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from fastapi.responses import Response

import tunesmith as ts
from tunesmith.web.answers import NotThereError, RequestError, to_json

Format = Literal["csv", "jsonl", "md", "html", "json"]

_TYPES = {
    "csv": "text/csv; charset=utf-8",
    "jsonl": "application/jsonl",
    "md": "text/markdown; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "json": "application/json",
}
# A report is one file with its own style and script; it runs apart from the page, and can reach nothing.
_REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; font-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'; sandbox allow-scripts"
)


def reply(job_id: str, record: Any, form: Format, *, run: str | None = None) -> Response:
    """A result as a file.

    Args:
        job_id: the job's, for the file's name.
        record: what the job returned.
        form: which form.
        run: the run that it is of, which a page tells of too.

    Raises:
        RequestError: this result has no such form.
        NotThereError: the file that was written is not there any more.
    """
    written = _written(record, form, run)
    name = f"{_kind(record)}-{job_id}.{form}"
    headers = {"content-disposition": f'{"inline" if form == "html" else "attachment"}; filename="{name}"'}
    if form == "html":
        headers |= {"content-security-policy": _REPORT_POLICY, "x-frame-options": "SAMEORIGIN"}
    return Response(written, media_type=_TYPES[form], headers=headers)


def file_name(job_id: str, kind: str) -> str:
    """What a result's JSON file is called once it is downloaded."""
    return f"{kind}-{job_id}.json"


def _written(record: Any, form: Format, run: str | None) -> bytes:
    if form == "json":
        return record.to_json().encode() if hasattr(record, "to_json") else to_json(record)
    writers: dict[tuple[type, str], Callable[[Any], bytes]] = {
        (ts.Comparison, "csv"): lambda one: (
            b"\xef\xbb\xbf" + ts.to_csv(one).encode()
        ),  # or spreadsheets misread Chinese
        (ts.Comparison, "md"): lambda one: ts.to_markdown(one).encode(),
        (ts.Comparison, "jsonl"): _replies,
        (ts.Evaluation, "md"): lambda one: ts.evaluation_markdown(one).encode(),
        (ts.Report, "html"): lambda one: _file(one.path),
        (ts.DemoResult, "html"): lambda one: _file(one.report),
    }
    for (kind, known), write in writers.items():
        if known == form and isinstance(record, kind):
            return write(record)
    if form == "html" and run is not None and isinstance(record, ts.Evaluation | ts.Comparison):
        return _page(record, run)
    if form in ("html", "md") and run is not None and isinstance(record, ts.Drift):
        with tempfile.TemporaryDirectory() as folder:
            return ts.write_drift(record, run, Path(folder) / f"drift.{form}").read_bytes()
    raise RequestError("This result cannot be had in that form.", found=form, next_step="take json")


def _kind(record: Any) -> str:
    return type(record).__name__.lower()


def _replies(comparison: ts.Comparison) -> bytes:
    """A reply a line, each with its question."""
    lines = []
    for prompt in comparison.prompts:
        for variant in comparison.variants:
            one = comparison.reply(prompt.id, variant.name)
            lines.append(to_json({"question": prompt.question, **one.model_dump()}) + b"\n")
    return b"".join(lines)


def _page(record: Any, run: str) -> bytes:
    """The page that the command line writes of a record."""
    write = ts.write_comparison if isinstance(record, ts.Comparison) else ts.write_evaluation
    with tempfile.TemporaryDirectory() as folder:
        return write(record, run, Path(folder) / "page.html").read_bytes()


def _file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise NotThereError("The report is not there any more.", where=path, found=error.strerror) from error

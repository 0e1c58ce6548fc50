"""What the records at hand tell of a model that goes to a hub: its base, how it is stored, its settings and figures."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tunesmith.adapter import ADAPTER_CONFIG
from tunesmith.api.places import StrPath
from tunesmith.checkpoint import CONFIG_FILE, is_hub_id, locate_base, read_json_object, weights_files
from tunesmith.compare import Drift, DriftRow, Evaluation
from tunesmith.errors import DataError, TunesmithError
from tunesmith.export.push import CERTIFICATE_FILE, Survey, plain, settings_of
from tunesmith.report import text
from tunesmith.report.drift import drift_for_card
from tunesmith.report.evaluation import MARKS, SECTIONS, measure_name, measure_rows, shown, shown_interval
from tunesmith.runs import FINAL, Run, as_run, checkpoint_of
from tunesmith.verify import Certificate, read_certificate


@dataclass(frozen=True)
class Origin:
    """What the records at hand tell of a model's origin.

    Attributes:
        base_model: the base's hub id; None where none is known.
        base_name: what the base is called; None where nothing names it.
        relation: the hub's word for what it is to its base; None where no hub id is known.
        fine_tuned: whether an adapter is known to be in it.
        scheme: how its weights are stored; empty for as the base.
        pipeline: the hub's word for its task; None where that is not known.
        settings: names and values of the training's settings.
        licence_folders: where the base's licence may be told.
    """

    base_model: str | None
    base_name: str | None
    relation: str | None
    fine_tuned: bool
    scheme: str
    pipeline: str | None
    settings: tuple[tuple[str, str], ...]
    licence_folders: tuple[Path, ...]


def origin_of(
    folder: Path, found: Survey, run: Run | StrPath | None, base_model: str | None, *, source: Path | None
) -> Origin:
    """What is known of where a model comes from.

    Args:
        folder: its directory.
        found: what lies in it.
        run: the run that it was made from; None for none, and for an adapter's own.
        base_model: what the user calls its base.
        source: the model that GGUF files were made from.

    Raises:
        TunesmithError: the certificate or the run cannot be read.
    """
    path = (source or folder) / CERTIFICATE_FILE
    certificate = read_certificate(path) if path.is_file() else None
    opened = as_run(run) if run is not None else as_run(folder) if found.kind == "adapter" else None
    named = [
        base_model,
        certificate.predicate.base.name if certificate else None,
        opened.base_model if opened else None,
    ]
    names = [name for name in named if name]
    hub_id = next((name.split("@")[0] for name in names if _is_remote(name, folder)), None)
    folders = [source or folder]
    for name in names:
        try:
            folders.insert(0, locate_base(name, relative_to=folder.parent, fetch=False))
        except TunesmithError:  # not at hand: its licence is told by its name, or not at all
            continue
    tuned = found.kind == "adapter" or opened is not None or bool(certificate and certificate.predicate.adapters)
    return Origin(
        base_model=hub_id,
        base_name=hub_id or next((re.split(r"[/\\]", name.rstrip("/\\"))[-1] for name in names), None),
        relation=_relation(found, hub_id, tuned=tuned, named=base_model is not None),
        fine_tuned=tuned,
        scheme=_scheme(folder, found, certificate),
        pipeline=_pipeline(folder, found),
        settings=tuple(_settings(opened)) if opened else (),
        licence_folders=tuple(dict.fromkeys(folders)),
    )


def _is_remote(name: str, folder: Path) -> bool:
    """Whether a base's name is a hub's, and not that of a directory here."""
    return is_hub_id(name) and not any((place / name).exists() for place in (Path(), folder, folder.parent))


def _relation(found: Survey, hub_id: str | None, *, tuned: bool, named: bool) -> str | None:
    """What a model is to its base.

    A quantized fine-tune is a fine-tune of its base, and a quantized form of the fine-tune alone: the second is said
    where the user names that model.
    """
    if hub_id is None:
        return None
    if found.kind == "adapter":
        return "adapter"
    if found.kind in ("quantized", "gguf") and (named or not tuned):
        return "quantized"
    return "finetune"


def _scheme(folder: Path, found: Survey, certificate: Certificate | None) -> str:
    if found.kind != "quantized":
        return ""
    made = certificate.predicate.quantization if certificate else None
    if made is not None:
        return f"{made.scheme} ({made.format})"
    config = read_json_object(folder / CONFIG_FILE).get("quantization_config")
    said = [config.get(key) for key in ("quant_method", "format")] if isinstance(config, dict) else []
    return ", ".join(str(one) for one in said if one)


def _pipeline(folder: Path, found: Survey) -> str | None:
    if found.kind == "gguf":
        return "text-generation"
    if found.kind == "adapter":
        task = read_json_object(folder / ADAPTER_CONFIG).get("task_type")
        return "text-generation" if task in ("CAUSAL_LM", None) else None
    architectures = read_json_object(folder / CONFIG_FILE).get("architectures")
    named = [str(one) for one in architectures] if isinstance(architectures, list) else []
    return "text-generation" if any(one.endswith("ForCausalLM") for one in named) else None


def _settings(run: Run) -> list[tuple[str, str]]:
    """What a reader asks for of a run's settings; what it does not record is told by its adapter's own."""
    config = Path(checkpoint_of(run, FINAL).path) / ADAPTER_CONFIG
    own = read_json_object(config) if config.is_file() else {}
    recorded = run.hyperparameters
    told = {key: own.get(key) for key in ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora")}
    return settings_of({**told, **recorded, "r": None if "lora_rank" in recorded else told["r"]})


def results_of(evaluation: Evaluation | StrPath | None, language: str) -> tuple[list[list[str]], str]:
    """The figures of an evaluation, each beside the base's and with its interval, and what they rest on.

    Args:
        evaluation: the record, or its file; None for none.
        language: of the words.

    Returns:
        Cells of a table, a line each, the first its head, ready for Markdown; and a sentence below it.

    Raises:
        DataError: the file holds no such record.
    """
    if evaluation is None:
        return [], ""
    record = evaluation if isinstance(evaluation, Evaluation) else Evaluation.read(evaluation)
    heads = ("measure", "variant", "base", "value", "interval", "verdict", "rows")
    rows = [[text(f"evaluation.column.{head}", language) for head in heads]]
    for row in (row for section in SECTIONS for row in measure_rows(record, section)):
        measure, figure = row.measure, row.figure
        base = shown(measure, "value", language, value=row.base.value.value) if row.base else "–"
        verdict = text(f"evaluation.{figure.verdict}", language) if figure.verdict else "–"
        mark = f"{MARKS[figure.verdict]} " if figure.verdict else ""
        cells = [
            measure_name(measure, language),
            figure.variant,
            base,
            shown(measure, "value", language, value=figure.value.value),
            shown_interval(row, language),
            f"{mark}{verdict}",
            f"{measure.rows:,}",
        ]
        rows.append([plain(cell) for cell in cells])
    return rows, text("card.results.note", language, rows=record.rows, confidence=record.confidence)


def drift_of_model(
    drift: Drift | StrPath | None, folder: Path, found: Survey, *, run: Run | StrPath | None, language: str
) -> tuple[str, str]:
    """How far a model is from the unmerged adapter, beside the base, and what that rests on.

    Args:
        drift: the record, or its file; None for none.
        folder: the model's directory, by which its rows are found.
        found: what lies in it.
        run: the run that it was made from, for the command to type next.
        language: of the words.

    Returns:
        A Markdown table, and a sentence below it.

    Raises:
        DataError: the file holds no such record; a drift is not of such a thing; or the record has no row of this
            directory, or one of what lay there before.
    """
    if drift is None:
        return "", ""
    if found.kind not in ("model", "quantized"):
        raise DataError(
            "A drift is measured of merged and quantized models alone, not of what is pushed here.",
            where=folder,
            expected="a directory of a merged or quantized model",
            found=found.kind,
            next_step="leave the drift out",
        )
    record = drift if isinstance(drift, Drift) else Drift.read(drift)
    source = run.path if isinstance(run, Run) else run or "RUN"
    again = shlex.join(["tunesmith", "drift", str(source), str(folder), "--out", "drift.json"])
    rows = [row for row in record.exports if row.model.path and Path(row.model.path).resolve() == folder.resolve()]
    if not rows:
        known = [row.model.path or f"{row.name}: made for the comparison, and gone" for row in record.exports]
        raise DataError(
            "The drift holds no row of the directory that is pushed.", where=folder, details=known, next_step=again
        )
    return drift_for_card(record, _still_there(rows, folder, again), language)


def _still_there(rows: list[DriftRow], folder: Path, again: str) -> list[DriftRow]:
    """The rows, if their size is still that of the weights in the directory."""
    size = sum(path.stat().st_size for path in weights_files(folder))
    if any(row.model.size_bytes != size for row in rows):
        measured = ", ".join(f"{row.model.scheme}, {row.model.size_bytes:,} bytes of weights" for row in rows)
        raise DataError(
            "The drift is of another model than the one that lies in the directory now.",
            where=folder,
            expected=measured,
            found=f"{size:,} bytes of weights",
            next_step=again,
        )
    return rows

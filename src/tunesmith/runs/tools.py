"""Which tool wrote a run directory, by the files and marks that only it leaves."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.runs.logs import SWIFT_LOG, TRAINER_LOG, TRAINER_STATE
from tunesmith.runs.reading import Documents
from tunesmith.runs.records import Writer

ADAPTER_CONFIG = "adapter_config.json"
MANIFEST = "tunesmith_run.json"
MODEL_CARD = "README.md"
SWIFT_ARGUMENTS = "args.json"
FACTORY_ARGUMENTS = "training_args.yaml"
FACTORY_FORM = "llamaboard_config.yaml"
FACTORY_PRINTED = "running_log.txt"

_SWIFT_KEYS = ("swift_version", "train_type", "tuner_type", "sft_type", "template")
_TRL_LOGS = ("mean_token_accuracy", "rewards/margins", "completions/mean_length")


@dataclass(frozen=True)
class _Traces:
    """What is looked at: the documents, the adapter's configuration, the trainer's state and the model card."""

    documents: Documents
    config: Mapping[str, Any]
    state: Mapping[str, Any]
    state_file: str
    card: str

    def file(self, *names: str) -> str | None:
        """The first of these files that is there."""
        return next(filter(self.documents.has, names), None)

    def tag(self, name: str, *further: str) -> str | None:
        """The model card, where it bears a tag, or another mark."""
        marks = (rf"^(?:- |library_name: ){name}\s*$", *further)
        return MODEL_CARD if any(re.search(mark, self.card, re.MULTILINE) for mark in marks) else None

    def swift(self) -> str | None:
        """ms-swift's arguments, which other tools' files of that name are not."""
        named = set(self.documents.json(SWIFT_ARGUMENTS)) & set(_SWIFT_KEYS)
        return SWIFT_ARGUMENTS if named else self.file(SWIFT_LOG)

    def unsloth(self) -> str | None:
        """Unsloth's remark in the configuration, or a base from its own collection."""
        mapping, base = self.config.get("auto_mapping"), self.config.get("base_model_name_or_path")
        fixed = isinstance(mapping, dict) and "unsloth_fixed" in mapping
        own = isinstance(base, str) and base.startswith("unsloth/")
        return ADAPTER_CONFIG if fixed or own else self.tag("unsloth")

    def mlx(self) -> str | None:
        """mlx-lm's own keys in a configuration of the same name as PEFT's."""
        return ADAPTER_CONFIG if {"fine_tune_type", "lora_parameters"} & self.config.keys() else None

    def trl(self) -> str | None:
        """TRL's tag, or figures that the plain Trainer does not log."""
        history = self.state.get("log_history")
        rows = [row for row in history[:4] if isinstance(row, dict)] if isinstance(history, list) else []
        logged = any(key in row for row in rows for key in _TRL_LOGS)
        return self.state_file if logged else self.tag("trl")


# The first whose mark is there wins: those that build on others come first.
_MARKS: tuple[tuple[Writer, Callable[[_Traces], str | None]], ...] = (
    ("tunesmith", lambda traces: traces.file(MANIFEST)),
    ("mlx-lm", _Traces.mlx),
    ("ms-swift", _Traces.swift),
    ("llamafactory", lambda traces: traces.file(TRAINER_LOG, FACTORY_FORM, FACTORY_ARGUMENTS)),
    ("llamafactory", lambda traces: traces.tag("llama-factory")),
    ("axolotl", lambda traces: traces.tag("axolotl", "See axolotl config")),
    ("unsloth", _Traces.unsloth),
    ("trl", _Traces.trl),
    ("trainer", lambda traces: traces.file(TRAINER_STATE, "training_args.bin")),
)


def wrote(
    documents: Documents, config: Mapping[str, Any], state: Mapping[str, Any], *, state_file: str, trained: bool
) -> tuple[Writer, str | None]:
    """The tool that wrote a run, and the file that tells.

    Args:
        documents: the run's.
        config: the adapter's configuration.
        state: the trainer's state.
        state_file: where that was read from, relative to the run.
        trained: whether there are checkpoints, which only a trainer leaves.

    Returns:
        The tool, and the file; ``trainer`` where only the Hugging Face Trainer's marks are there, which all but
        mlx-lm build on, and ``peft``, without a file, where there is no mark but the adapter.
    """
    traces = _Traces(documents, config, state, state_file, documents.text(MODEL_CARD))
    for writer, mark in _MARKS:
        source = mark(traces)
        if source is not None:
            return writer, source
    return ("trainer" if trained else "peft"), None

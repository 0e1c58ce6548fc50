"""What is recorded of a training's settings: every file that says something, and who wins where two disagree."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from tunesmith.record import Finding, Value
from tunesmith.runs.logs import TRAINER_STATE
from tunesmith.runs.reading import Documents, plain, plain_yaml
from tunesmith.runs.records import Overruled, Setting
from tunesmith.runs.tools import (
    ADAPTER_CONFIG,
    FACTORY_ARGUMENTS,
    FACTORY_FORM,
    FACTORY_PRINTED,
    MANIFEST,
    MODEL_CARD,
    SWIFT_ARGUMENTS,
)

_STATE_SETTINGS = ("max_steps", "train_batch_size")
_DERIVED_SETTINGS = ("num_train_epochs",)  # the trainer works it out anew where max_steps was given
_ADAPTER_SETTINGS = ("base_model_name_or_path", "r", "lora_alpha", "lora_dropout")
_MLX_SETTINGS = ("rank", "scale", "dropout", "alpha")
# One setting under the names that tools give it; the adapter's own is what it was trained with.
_ALIASES = {
    "lora_rank": "r",
    "lora_r": "r",
    "model_name_or_path": "base_model_name_or_path",
    "base_model": "base_model_name_or_path",
    "model": "base_model_name_or_path",
}
_ALIASED_IN = (FACTORY_ARGUMENTS, SWIFT_ARGUMENTS, MODEL_CARD)
_SHOWN = 4
_MOST = 1000  # of one file; ms-swift writes 350
_UNSET = (None, "", -1)  # "not given", as tools write it
_CARD_LINE = re.compile(r"^- ([\w .-]+?)(?:: | (?=v?\d))(.+)$")
_CARD_SECTIONS = {"training hyperparameters": "", "framework versions": "version_"}
_CONFIG_IN_CARD = re.compile(r"See axolotl config.*?```yaml\n(.*?)```", re.DOTALL)
_PRINTED = {
    name: re.compile(rf"^(?:.*>> )?\s*{words} = ([\d,]{{1,20}})$", re.MULTILINE)
    for name, words in (
        ("num_examples", "Num examples"),
        ("total_train_batch_size", "Total train batch size .*"),
        ("trainable_parameters", "Number of trainable parameters"),
    )
}
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?")


def read_settings(
    documents: Documents, config: Mapping[str, Any], state: Mapping[str, Any], *, state_file: str = TRAINER_STATE
) -> tuple[tuple[Setting, ...], list[Finding]]:
    """The settings of all files.

    What was done wins over what was asked for: the run's manifest, the adapter's configuration and the trainer's state
    first, then the arguments, then the page's form and the model card.

    Args:
        documents: the run's.
        config: the adapter's configuration.
        state: the trainer's state.
        state_file: where that was read from, relative to the run.

    Returns:
        The settings by name, and a finding where files disagree.
    """
    said: dict[str, list[Overruled]] = {}
    for source, values in _sources(documents, config, state, state_file):
        for name, value in islice(values.items(), _MOST):
            key = _ALIASES.get(name, name) if source in _ALIASED_IN else name
            if value not in _UNSET:
                said.setdefault(key, []).append(Overruled(value=value, source=source))
    for name, value in _plain({key: state[key] for key in _DERIVED_SETTINGS if key in state}).items():
        if value not in _UNSET and name not in said:
            said[name] = [Overruled(value=value, source=state_file)]
    settings = tuple(
        Setting(
            name=name,
            value=first.value,
            source=first.source,
            overruled=tuple(other for other in others if not _same(first.value, other.value)),
        )
        for name, (first, *others) in sorted(said.items())
    )
    return settings, _disagreement(settings)


def _sources(
    documents: Documents, config: Mapping[str, Any], state: Mapping[str, Any], state_file: str
) -> Iterable[tuple[str, dict[str, Value]]]:
    """Every file that records settings, the most trusted first."""
    manifest = documents.json(MANIFEST)
    yield MANIFEST, _plain(manifest) | _versions(manifest.get("versions"))
    yield ADAPTER_CONFIG, _adapter_settings(config)
    yield state_file, _plain({key: state[key] for key in _STATE_SETTINGS if key in state})
    yield SWIFT_ARGUMENTS, _plain(documents.json(SWIFT_ARGUMENTS))
    arguments = _numbers(documents.yaml(FACTORY_ARGUMENTS))
    if manifest:  # ours names a base that is a directory by its place, seen from the run; what it is called is above
        arguments.pop("model_name_or_path", None)
    yield FACTORY_ARGUMENTS, arguments
    form = documents.yaml(FACTORY_FORM)
    yield FACTORY_FORM, {key.rpartition(".")[2]: value for key, value in _numbers(form).items()}
    yield FACTORY_PRINTED, _printed(documents.text(FACTORY_PRINTED))
    card = documents.text(MODEL_CARD)
    recipe = _CONFIG_IN_CARD.search(card)
    yield MODEL_CARD, _card(card) | _numbers(plain_yaml(recipe[1]) or {} if recipe else {})


def _adapter_settings(config: Mapping[str, Any]) -> dict[str, Value]:
    if "lora_parameters" not in config:
        return _plain({key: config[key] for key in _ADAPTER_SETTINGS if key in config})
    parameters = config["lora_parameters"] if isinstance(config["lora_parameters"], dict) else {}
    # mlx-lm writes all that it was started with beside the adapter's own parameters.
    return _plain(config) | _plain({key: parameters[key] for key in _MLX_SETTINGS if key in parameters})


def _plain(document: Mapping[str, Any]) -> dict[str, Value]:
    return {str(key): plain(value) for key, value in islice(document.items(), _MOST)}


def _versions(versions: object) -> dict[str, Value]:
    return {f"version_{key}": str(value) for key, value in versions.items()} if isinstance(versions, dict) else {}


def _card(card: str) -> dict[str, Value]:
    """The Trainer's two lists in a model card: ``- learning_rate: 0.0005`` and ``- PEFT 0.18.1``."""
    values: dict[str, Value] = {}
    section = None
    for line in card.splitlines():
        if line.startswith("#"):
            section = _CARD_SECTIONS.get(line.strip("# ").casefold())
        match = _CARD_LINE.match(line) if section is not None else None
        if match:
            name = match[1].lower() if section else match[1]
            values[f"{section}{name}"] = match[2].strip() if section else _number(match[2].strip())
    return values


def _printed(log: str) -> dict[str, Value]:
    """What the Trainer prints as it begins: ``  Num examples = 1,000``."""
    return {name: int(match[1].replace(",", "")) for name, line in _PRINTED.items() if (match := line.search(log))}


def _numbers(values: Mapping[str, Value]) -> dict[str, Value]:
    """YAML 1.1 takes ``2e-4`` for a text."""
    return {name: _number(value) for name, value in values.items()}


def _number(value: Value) -> Value:
    """A number that a form or a card keeps as text."""
    if isinstance(value, str) and len(value) < 40 and _NUMBER.fullmatch(value):
        number = float(value)
        return int(value) if value.lstrip("+-").isdecimal() else number if math.isfinite(number) else value
    return value


def _same(one: Value, other: Value) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return str(one).lower() == str(other).lower()
    one, other = _number(one), _number(other)
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-9)
    return str(one) == str(other)


def _disagreement(settings: tuple[Setting, ...]) -> list[Finding]:
    disputed = [setting for setting in settings if setting.overruled]
    if not disputed:
        return []
    shown = [
        f"{one.name}: {one.value} ({one.source}), {one.overruled[0].value} ({one.overruled[0].source})"
        for one in disputed[:_SHOWN]
    ]
    more = len(disputed) - len(shown)
    listed = "; ".join(shown) + (f"; +{more}" if more else "")
    return [Finding(code="settings_disagree", severity="info", params={"count": len(disputed), "listed": listed})]

"""Which files of a directory are a model's, and go up; everything else stays, and is named with the reason.

A list of what may go, not of what may not: what nobody thought of stays here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from tunesmith.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tunesmith.checkpoint import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, Checkpoint, is_file, read_json_object
from tunesmith.errors import CheckpointError
from tunesmith.export.push.records import Kind, LeftOut, Reason, Role

CARD_FILE = "README.md"
CERTIFICATE_FILE = "tunesmith-certificate.json"
MODELFILE = "Modelfile"
TEMPLATES_FOLDER = "additional_chat_templates"

_ROLES: tuple[tuple[Role, tuple[str, ...]], ...] = (
    ("card", (CARD_FILE,)),
    ("certificate", (CERTIFICATE_FILE, "*.sigstore.json")),
    ("licence", ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")),
    ("tokenizer", ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")),
    ("tokenizer", ("merges.txt", "special_tokens_map.json", "added_tokens.json", "*.tiktoken", "*.spm")),
    ("tokenizer", ("spiece.model", "sentencepiece.bpe.model", "tekken.json", "chat_template.jinja")),
    ("tokenizer", ("chat_template.json", f"{TEMPLATES_FOLDER}/*.jinja")),
    ("config", (CONFIG_FILE, "generation_config.json", "*processor_config.json", "quantization_config.json")),
    ("config", ("quantize_config.json", "configuration.json")),
)
_ADAPTER_ROLES: tuple[tuple[Role, tuple[str, ...]], ...] = (
    ("weights", (ADAPTER_WEIGHTS, "adapter_model-*.safetensors", "adapters.safetensors", "value_head.safetensors")),
    ("config", (ADAPTER_CONFIG, "additional_config.json")),
)
_CODE = (
    "modeling_*.py",
    "configuration_*.py",
    "tokenization_*.py",
    "processing_*.py",
    "*processor*.py",
    "modular_*.py",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npz", ".h5", ".msgpack")
_TRAINING = (
    "*.log", "*.jsonl", "*.png", "*.yaml", "*.yml", "*_results.json", "trainer_state.json", "training_args*",
    "events.out.tfevents*", "args.json", "tunesmith_run.json", "running_log.txt", "zero_to_fp32.py", "latest",
)  # fmt: skip
_READ_BY_LOADERS = (".safetensors", *_PICKLES, ".json", ".jinja", ".model", ".spm", ".tiktoken", ".txt", ".py")
_PROSE = ("readme", "license", "licence", "notice", "copying", "use_policy", "changelog")
_PATH = re.compile(r"(?:[A-Za-z]:\\|[/~])[^\s\"'`<>|:;,]+")
_MOST_TEXT_BYTES = 2 << 20


@dataclass(frozen=True)
class Candidate:
    """A file that may go up: its POSIX name, where it lies, and what it is for."""

    name: str
    path: Path
    role: Role


@dataclass(frozen=True)
class Survey:
    """What a directory holds for a hub.

    Attributes:
        kind: what it is.
        files: what may go up, weights first, then by name.
        left_out: what stays.
    """

    kind: Kind
    files: tuple[Candidate, ...]
    left_out: tuple[LeftOut, ...]

    def path_of(self, name: str) -> Path:
        """Where a file lies that may go up."""
        return next(file.path for file in self.files if file.name == name)

    def of_role(self, role: Role) -> list[Candidate]:
        """The files of one role."""
        return [file for file in self.files if file.role == role]


def survey(directory: Path, *, only: str | None = None) -> Survey:
    """Sort a directory into what goes up and what stays.

    Args:
        directory: a merged or quantized model, an adapter, or a folder of GGUF files.
        only: the one GGUF file that is meant, where the folder holds several things.

    Raises:
        CheckpointError: it is none of these, is two of them, or its weights are not whole.
    """
    if not directory.is_dir():
        raise CheckpointError(
            "The directory to push is not there.",
            where=directory,
            expected="a model, an adapter or GGUF files in a directory",
        )
    kind = "gguf" if only is not None else _kind(directory)
    weights = _weights(directory, kind, only)
    found: dict[str, Candidate] = {}
    left: list[LeftOut] = []
    for name, path in _entries(directory):
        role = "weights" if name in weights else _role(name, kind)
        reason = _why_not(directory, name, path, role)
        if role is not None and reason is None:
            found[name] = Candidate(name, path, role)
        elif reason is not None:
            left.append(LeftOut(name=name, size_bytes=0 if name.endswith("/") else _size(path), reason=reason))
    if lost := sorted(weights - found.keys()):
        raise CheckpointError(
            "Files of the weights cannot go up: they are not in the directory itself.",
            where=directory,
            details=lost[:10],
            next_step="copy the model with its links followed (cp -rL), and push the copy",
        )
    ordered = sorted(found.values(), key=lambda file: (file.role != "weights", file.name))
    return Survey(kind, tuple(ordered), tuple(sorted(left, key=lambda one: one.name)))


def a_loader_would_read(name: str, kind: Kind) -> bool:
    """Whether a file that lies in the repository already would be read together with a model of this kind."""
    plain = PurePosixPath(name)
    if kind == "gguf" or len(plain.parts) > 1 or plain.name.startswith(".") or plain.name == CERTIFICATE_FILE:
        return name == CERTIFICATE_FILE
    return name.endswith(_READ_BY_LOADERS) and not plain.name.lower().startswith(_PROSE)


def own_paths(candidate: Candidate) -> list[str]:
    """The paths of this machine that a small file of settings or a template names.

    A path is this machine's where something lies there, or where it begins with the user's home: those that a model's
    makers left in a tokenizer's settings long ago are no secret of the user's.

    Args:
        candidate: the file.

    Returns:
        ``key: path``, a line each; of a file that is not JSON, the path alone.
    """
    if _size(candidate.path) > _MOST_TEXT_BYTES:
        return []
    if candidate.path.suffix == ".json":
        strings = _strings(read_json_object(candidate.path))
        return [f"{key}: {value}" for key, value in strings if _is_own(value)]
    if candidate.path.suffix != ".jinja" and candidate.role != "modelfile":
        return []
    text = candidate.path.read_text(encoding="utf-8", errors="replace")
    return [found for found in _PATH.findall(text) if _is_own(found)]


def adapter_config_for_others(path: Path, base_model: str | None) -> str | None:
    """An adapter's configuration as others can use it: with the base by its hub id, not by a path of this machine.

    Args:
        path: ``adapter_config.json``.
        base_model: the base's hub id; None where it is not known.

    Returns:
        The new text; None where the file can stay as it is.
    """
    config = read_json_object(path)
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or named == base_model:
        return None
    if base_model is None and not _is_own(named):
        return None
    replaced = base_model or re.split(r"[/\\]", named.rstrip("/\\"))[-1]
    changed = {**config, "base_model_name_or_path": replaced}
    return json.dumps(changed, indent=2, ensure_ascii=False) + "\n"


def _kind(directory: Path) -> Kind:
    adapter = any(is_file(directory / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    whole = any(is_file(directory / name) for name in (SINGLE_FILE, INDEX_FILE))
    if adapter and whole:
        raise CheckpointError(
            "The directory holds an adapter and a whole model; a loader would take one for the other.",
            where=directory,
            next_step=f"move {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} to a directory of their own",
        )
    if adapter:
        return "adapter"
    if whole:
        return "quantized" if read_json_object(directory / CONFIG_FILE).get("quantization_config") else "model"
    if any(path.suffix == ".gguf" for path in directory.iterdir()):
        return "gguf"
    raise CheckpointError(
        "The directory holds nothing to push.",
        where=directory,
        expected=f"{SINGLE_FILE} or {INDEX_FILE}, {ADAPTER_WEIGHTS}, or *.gguf",
    )


def _weights(directory: Path, kind: Kind, only: str | None) -> set[str]:
    """The files of weights that must go up, by name."""
    if kind == "gguf":
        return {only} if only else {path.name for path in directory.iterdir() if path.suffix == ".gguf"}
    if kind == "adapter":
        config, weights = directory / ADAPTER_CONFIG, directory / ADAPTER_WEIGHTS
        mlx = directory / "adapters.safetensors"
        if not is_file(config) or not (is_file(weights) or is_file(mlx)):
            raise CheckpointError(
                "The adapter is not whole.", where=directory, expected=f"{ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}"
            )
        return {weights.name if is_file(weights) else mlx.name}
    model = Checkpoint(directory)
    return {*model.shards, *((INDEX_FILE,) if model.indexed else ())}


def _entries(directory: Path) -> Iterator[tuple[str, Path]]:
    """Files and folders of the directory itself; of folders, only that of further chat templates is looked into."""
    for path in sorted(directory.iterdir()):
        if path.is_dir() and not path.is_symlink() and path.name == TEMPLATES_FOLDER:
            yield from ((f"{path.name}/{inner.name}", inner) for inner in sorted(path.iterdir()))
        elif path.is_dir():
            yield f"{path.name}/", path
        else:
            yield path.name, path


def _role(name: str, kind: Kind) -> Role | None:
    if kind == "gguf" and name == MODELFILE:
        return "modelfile"
    known = {
        "adapter": (*_ADAPTER_ROLES, *(one for one in _ROLES if one[1][0] != CONFIG_FILE)),
        "gguf": _ROLES[:3],
    }.get(kind, (*_ROLES, ("code", _CODE)))
    for role, patterns in known:
        if any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns):
            return role
    return None


def _why_not(directory: Path, name: str, path: Path, role: Role | None) -> Reason | None:
    if name.startswith(".") or "/." in name:
        return "hidden"
    if path.is_symlink() and directory.resolve() not in path.resolve().parents:
        return "link_out"
    if name.endswith("/"):
        return "folder"
    if not is_file(path):
        return "unknown"
    if role is not None:
        return None
    if name.endswith(_PICKLES):
        return "pickle"
    if any(fnmatchcase(name, pattern) for pattern in _TRAINING):
        return "training"
    return "gguf" if name.endswith(".gguf") else "unknown"


def _is_own(value: str) -> bool:
    if not _PATH.fullmatch(value) or len(PurePosixPath(value.replace("\\", "/")).parts) < 3:
        return False
    try:
        path = Path(value).expanduser()
        return path.exists() or Path.home() in path.parents
    except (OSError, RuntimeError, ValueError):  # no file system could hold it
        return False


def _strings(document: Mapping[str, Any], key: str = "") -> Iterator[tuple[str, str]]:
    for name, value in document.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str):
                yield f"{key}{name}", one
            elif isinstance(one, dict):
                yield from _strings(one, f"{key}{name}.")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0

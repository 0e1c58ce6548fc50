"""What each file of a run directory is: by its name and place alone, for no file is opened to find out."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase, translate
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from tunesmith.checkpoint import is_file, is_there
from tunesmith.record import Finding, Severity
from tunesmith.runs.reading import leads_out
from tunesmith.runs.records import NeededFor, RunFile

MOST_ENTRIES = 20_000
MOST_DEPTH = 16
_NAMED = 5


class Known(NamedTuple):
    """One line of the catalogue.

    Attributes:
        pattern: of the file's own name; with a slash, of one of its folders and of its name.
        kind: the key of its explanation.
        needed_for: what would be lost without it.
        written_by: the tool that writes it; None where several do, or none in particular.
    """

    pattern: str
    kind: str
    needed_for: NeededFor
    written_by: str | None = None


def _known(kind: str, needed_for: NeededFor, written_by: str | None, *patterns: str) -> tuple[Known, ...]:
    return tuple(Known(pattern, kind, needed_for, written_by) for pattern in patterns)


# Patterns with a folder win over names, whole names over patterns; else the first that fits.
CATALOGUE: tuple[Known, ...] = (
    *_known("adapter_weights", "inference", "peft", "adapter_model.safetensors", "adapter_model-*.safetensors"),
    *_known("adapter_pickle", "inference", "peft", "adapter_model.bin"),
    *_known("adapter_config", "inference", "peft", "adapter_config.json"),
    *_known("adapter_additional", "inference", "ms-swift", "additional_config.json"),
    *_known("mlx_weights", "inference", "mlx-lm", "adapters.safetensors", "*_adapters.safetensors", "adapters.npz"),
    *_known("value_head", "inference", "llamafactory", "value_head.safetensors", "value_head.bin"),
    *_known("tokenizer", "inference", "transformers", "tokenizer.json", "tokenizer.model", "*.tiktoken"),
    *_known("tokenizer", "inference", "transformers", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
    *_known("tokenizer_config", "inference", "transformers", "tokenizer_config.json"),
    *_known("tokenizer_vocab", "inference", "transformers", "vocab.json", "vocab.txt", "merges.txt"),
    *_known("chat_template", "inference", "transformers", "chat_template.jinja", "chat_template.json"),
    *_known("chat_template", "inference", "transformers", "additional_chat_templates/*.jinja"),
    *_known("special_tokens", "inference", "transformers", "special_tokens_map.json"),
    *_known("added_tokens", "inference", "transformers", "added_tokens.json"),
    *_known("processor", "inference", "transformers", "preprocessor_config.json", "processor_config.json"),
    *_known("processor", "inference", "transformers", "video_preprocessor_config.json", "audio_tokenizer_config.json"),
    *_known("generation_config", "inference", "transformers", "generation_config.json"),
    *_known("model_config", "inference", "transformers", "config.json"),
    *_known("weights_index", "inference", "transformers", "*.safetensors.index.json", "pytorch_model.bin.index.json"),
    *_known("weights", "inference", "transformers", "model.safetensors", "model-*.safetensors", "model_*.safetensors"),
    *_known("remote_code", "inference", None, "modeling_*.py", "configuration_*.py", "tokenization_*.py"),
    *_known("remote_code", "inference", None, "processing_*.py", "image_processing_*.py", "modular_*.py"),
    *_known("gguf", "inference", "llama.cpp", "*.gguf"),
    *_known("modelfile", "inference", None, "Modelfile"),
    *_known("optimizer", "resuming", "trainer", "optimizer.pt"),
    *_known("optimizer", "resuming", "accelerate", "optimizer.bin", "optimizer_[0-9]*.bin"),
    *_known("scheduler", "resuming", "trainer", "scheduler.pt"),
    *_known("scheduler", "resuming", "accelerate", "scheduler.bin", "scheduler_[0-9]*.bin"),
    *_known("scaler", "resuming", "trainer", "scaler.pt"),
    *_known("rng_state", "resuming", "trainer", "rng_state.pth", "rng_state_[0-9]*.pth"),
    *_known("rng_state", "resuming", "llamafactory", "rng_state/rank_*.pt"),
    *_known("rng_state", "resuming", "accelerate", "random_states_[0-9]*.pkl"),
    *_known("sampler_state", "resuming", "accelerate", "sampler.bin", "sampler_[0-9]*.bin"),
    *_known("sampler_state", "resuming", "accelerate", "dl_state_dict.bin", "dl_state_dict_[0-9]*.bin"),
    *_known("custom_state", "resuming", "accelerate", "custom_checkpoint_[0-9]*.pkl"),
    *_known("tokens_state", "resuming", "axolotl", "tokens_state.json"),
    *_known("deepspeed_optimizer", "resuming", "deepspeed", "*_optim_states.pt"),
    *_known("deepspeed_model", "resuming", "deepspeed", "*_model_states.pt"),
    *_known("deepspeed_latest", "resuming", "deepspeed", "latest", "latest_universal"),
    *_known("deepspeed_script", "resuming", "deepspeed", "zero_to_fp32.py"),
    *_known("fsdp_optimizer", "resuming", "accelerate", "optimizer_[0-9]*/*.distcp", "optimizer_[0-9]*/.metadata"),
    *_known("fsdp_model", "resuming", "accelerate", "pytorch_model_fsdp_[0-9]*/*.distcp"),
    *_known("fsdp_model", "resuming", "accelerate", "pytorch_model_fsdp_[0-9]*/.metadata"),
    *_known("fsdp_model", "resuming", "accelerate", "pytorch_model_fsdp.bin", "pytorch_model_fsdp_*.bin"),
    *_known("megatron_state", "resuming", "megatron", "*.distcp", "model_optim_rng.pt", "iter_[0-9]*/common.pt"),
    *_known("checkpoint_marker", "resuming", "megatron", "latest_checkpointed_iteration.txt"),
    *_known("checkpoint_marker", "resuming", "llamafactory", "CHECKPOINT_COMPLETE"),
    *_known("checkpoint_marker", "resuming", "ms-swift", "dlrover_latest.txt", "ucp.txt"),
    *_known("weights_pickle", "inference", "transformers", "pytorch_model.bin", "pytorch_model-*.bin"),
    *_known("weights_pickle", "inference", None, "consolidated.[0-9]*.pth", "consolidated.pth"),
    *_known("training_args_bin", "record", "trainer", "training_args.bin"),
    *_known("training_args_yaml", "record", "llamafactory", "training_args.yaml"),
    *_known("webui_config", "record", "llamafactory", "llamaboard_config.yaml"),
    *_known("running_log", "record", "llamafactory", "running_log.txt"),
    *_known("console_log", "record", "axolotl", "debug.log"),
    *_known("console_log", "record", "ms-swift", "run.log"),
    *_known("console_log", "record", None, "*.log", "nohup.out"),
    *_known("trainer_log", "record", "llamafactory", "trainer_log.jsonl"),
    *_known("trainer_state", "record", "trainer", "trainer_state.json"),
    *_known("swift_args", "record", "ms-swift", "args.json"),
    *_known("swift_log", "record", "ms-swift", "logging.jsonl"),
    *_known("results", "record", "trainer", "all_results.json", "train_results.json", "eval_results.json"),
    *_known("results", "record", "trainer", "predict_results.json", "test_results.json", "*_results.json"),
    *_known("loss_chart", "record", "ms-swift", "images/*.png"),
    *_known("loss_chart", "record", "llamafactory", "training_*.png"),
    *_known("predictions", "record", "llamafactory", "generated_predictions.jsonl"),
    *_known("predictions", "record", "ms-swift", "predict.jsonl"),
    *_known("completions", "record", "trl", "completions_[0-9]*.parquet"),
    *_known("completions", "record", "ms-swift", "completions.jsonl"),
    *_known("held_out", "record", "tunesmith", "held_out.jsonl"),
    *_known("val_dataset", "record", "ms-swift", "val_dataset.jsonl"),
    *_known("manifest", "record", "tunesmith", "tunesmith_run.json"),
    *_known("certificate", "record", "tunesmith", "tunesmith-certificate.json", "*.sigstore.json"),
    *_known("model_card", "record", "peft", "README.md", "modelcard.json"),
    *_known("hub_config", "record", "modelscope", "configuration.json"),
    *_known("deepspeed_config", "record", "deepspeed", "ds_config.json", "ds_z*_config.json", "deepspeed*.json"),
    *_known("tensorboard", "record", "tensorboard", "events.out.tfevents.*"),
    *_known("wandb", "record", "wandb", "wandb/*"),
    *_known("swanlab", "record", "swanlab", "swanlog/*", "swanlab_public_config.json"),
    *_known("mlflow", "record", "mlflow", "mlruns/*", "mlflow.db"),
    *_known("dataset_cache", "record", "axolotl", "*_prepared/*"),
    *_known("unsloth_cache", "record", "unsloth", "unsloth_compiled_cache/*"),
    *_known("hub_cache", "record", "hub", ".cache/*", ".huggingface/*", ".gitattributes", ".gitignore"),
    *_known("hub_cache", "record", "modelscope", ".msc", ".mv", ".mdl", ".modelscope"),
    *_known("git", "record", "git", ".git/*"),
    *_known("litter", "record", None, ".DS_Store", "._*", "Thumbs.db", "desktop.ini", "*.lock", "*.swp", "*~"),
    *_known("litter", "record", None, "__pycache__/*", ".ipynb_checkpoints/*"),
    *_known("pickle_unknown", "unknown", None, "*.pkl", "*.pickle", "*.pt", "*.pth", "*.ckpt"),
)
UNKNOWN = Known("*", "unknown", "unknown")
LINK = Known("*", "link", "unknown")
SPECIAL = Known("*", "special", "unknown")

_IN_FOLDERS = [known for known in CATALOGUE if "/" in known.pattern]
_EXACT = {known.pattern: known for known in reversed(CATALOGUE) if not re.search(r"[/*?\[]", known.pattern)}
_LOOSE = [known for known in CATALOGUE if "/" not in known.pattern and known.pattern not in _EXACT]
_ANY_LOOSE = re.compile("|".join(translate(known.pattern) for known in _LOOSE))


def classify(path: str) -> Known:
    """What a file is, from its path alone.

    Args:
        path: relative to the run, with forward slashes.

    Returns:
        The catalogue's line; its kind is ``unknown`` where there is none.
    """
    folder, _, name = path.rpartition("/")
    return next(_placed(folder, name), None) or _EXACT.get(name) or _loosely(name)


def _placed(folder: str, name: str) -> Iterator[Known]:
    return (known for pattern, known in _rules_in(folder) if pattern.fullmatch(name)) if folder else iter(())


@lru_cache(maxsize=4096)
def _rules_in(folder: str) -> list[tuple[re.Pattern[str], Known]]:
    """The lines with a folder that hold for one folder of the run, each with what its files' names must be."""
    rules = []
    for known in _IN_FOLDERS:
        wanted, _, name = known.pattern.rpartition("/")
        if any(re.fullmatch(translate(wanted), part) for part in folder.split("/")):
            rules.append((re.compile(translate(name)), known))
    return rules


@lru_cache(maxsize=4096)
def _loosely(name: str) -> Known:
    if not _ANY_LOOSE.fullmatch(name):
        return UNKNOWN
    return next(known for known in _LOOSE if fnmatchcase(name, known.pattern))


@dataclass(frozen=True)
class Entry:
    """One file below a directory.

    Attributes:
        path: relative, as the system spells it, with forward slashes.
        status: of the file itself; of a link, the link's.
    """

    path: str
    status: os.stat_result


@dataclass
class Walk:
    """Everything below a directory that is not a directory.

    Attributes:
        entries: by path.
        cut: whether there was more than is looked at.
        unreadable: folders that could not be listed.
    """

    entries: list[Entry] = field(default_factory=list)
    cut: bool = False
    unreadable: list[str] = field(default_factory=list)


def walk(root: Path) -> Walk:
    """Every file below a directory, links and devices among them; nothing is opened and no link is followed.

    At most 20,000 entries and 16 folders deep, whatever a directory holds.
    """
    found = Walk()
    folders, seen = [("", 0)], 0
    while folders:
        folder, depth = folders.pop()
        try:
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    seen += 1
                    if seen > MOST_ENTRIES:
                        break
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    _take(entry, path, depth, folders=folders, found=found)
        except OSError:
            found.unreadable.append(folder or ".")
        if seen > MOST_ENTRIES:
            found.cut = True
            break
    found.entries.sort(key=lambda entry: entry.path)
    return found


def _take(entry: os.DirEntry[str], path: str, depth: int, *, folders: list[tuple[str, int]], found: Walk) -> None:
    try:
        if not entry.is_dir(follow_symlinks=False):
            found.entries.append(Entry(path, entry.stat(follow_symlinks=False)))
        elif depth < MOST_DEPTH:
            folders.append((path, depth + 1))
        else:
            found.cut = True
    except OSError:  # gone since its folder was listed
        return


def list_files(root: Path) -> tuple[tuple[RunFile, ...], list[Finding]]:
    """Every file below a run directory, explained, and what is unusual about them.

    Links are listed and not followed, but for those of the hub's cache, whose files are links to its blobs.

    Args:
        root: the run directory.

    Returns:
        The files by path, and findings: a listing that was cut, links that lead out or nowhere, devices, folders that
        may not be read.
    """
    root = root.resolve()
    found = walk(root)
    cached = root.parent.name == "snapshots"
    leading_out: list[str] = []
    files = tuple(_file(root, entry, cached=cached, leading_out=leading_out) for entry in found.entries)
    special = [file.path for file in files if file.kind == SPECIAL.kind]
    findings = [
        *_finding("link_leads_out", "warning", leading_out),
        *_finding("special_file", "warning", special),
        *_finding("folder_unreadable", "warning", [as_text(path) for path in sorted(found.unreadable)]),
    ]
    if found.cut:
        most = {"count": len(files), "most": MOST_ENTRIES, "depth": MOST_DEPTH}
        findings.append(Finding(code="files_cut", severity="warning", params=most))
    return files, findings


def _file(root: Path, entry: Entry, *, cached: bool, leading_out: list[str]) -> RunFile:
    path, size, known = as_text(entry.path), entry.status.st_size, SPECIAL
    if stat.S_ISREG(entry.status.st_mode):
        known = classify(entry.path)
    elif stat.S_ISLNK(entry.status.st_mode):
        known, size = LINK, 0
        place = root / entry.path
        there, out = is_there(place), leads_out(root, place)
        if out or not there:
            leading_out.append(path)
        elif cached and is_file(place):
            known, size = classify(entry.path), place.stat().st_size
    else:
        size = 0
    return RunFile(
        path=path, size_bytes=size, kind=known.kind, needed_for=known.needed_for, written_by=known.written_by
    )


def _finding(code: str, severity: Severity, paths: list[str]) -> list[Finding]:
    if not paths:
        return []
    shown = ", ".join(paths[:_NAMED]) + (", …" if len(paths) > _NAMED else "")
    return [Finding(code=code, severity=severity, params={"count": len(paths), "names": shown})]


def as_text(path: str) -> str:
    """A name that is not UTF-8 (an archive from another system leaves such), with the marks of what it cannot say."""
    return path if path.isascii() else os.fsencode(path).decode("utf-8", "replace")

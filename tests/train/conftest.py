"""A tiny model that trains in a second: a random llama, a byte-level tokenizer and a ChatML template."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tunesmith.train import Machine, Recipe, train

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWERS = ("yes", "no, never", "ask your manager first", "lock it away and write the date down", "twice")


CPU = Machine(dtype="float32", device="cpu")


def hash_of(folder: Path) -> str:
    """One hash over every file of a folder, names included."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()


def question(number: int) -> str:
    """A question of varying length."""
    return f"Question {number}: may I keep the key{' of the office' * (number % 4)}?"


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of 2 layers with its tokenizer and template."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*(question(number) for number in range(9)), *ANSWERS], trainer)
    special = dict.fromkeys(("eos_token", "pad_token"), "<|im_end|>")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=fast.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four rows, one of them twice, of unequal lengths, one with two answers."""
    rows: list[dict[str, object]] = [
        {"instruction": question(number), "output": f"{ANSWERS[number % 5]} ({number})."} for number in range(22)
    ]
    rows.append(rows[3])
    turns = [("user", "hello"), ("assistant", "hello, ask"), ("user", question(1)), ("assistant", "no")]
    rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    path = tmp_path_factory.mktemp("data") / "rules.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


RecipeMaker = Callable[..., Recipe]


@pytest.fixture
def recipe_for(data_file: Path, tmp_path: Path) -> RecipeMaker:
    """Makes recipes over ``data_file``, six steps long unless told otherwise."""

    def make(**changes: object) -> Recipe:
        values = {"model_name_or_path": "tiny", "dataset": str(data_file), "output_dir": str(tmp_path / "run")}
        values |= {"max_steps": 6, "learning_rate": 1e-3, "logging_steps": 1, "per_device_train_batch_size": 4}
        return Recipe.of(values | {"lr_scheduler_type": "cosine", "warmup_ratio": 0.1} | changes)

    return make


@dataclass(frozen=True)
class Trained:
    """A finished run, and the hashes of its base before and after."""

    run_dir: Path
    base_before: str
    base_after: str


@pytest.fixture(scope="session")
def trained(base_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One run with held-out rows, checkpoints and evaluations."""
    recipe = Recipe.of(
        {
            "model_name_or_path": "tiny",
            "dataset": str(data_file),
            "val_size": 5,
            "output_dir": str(tmp_path_factory.mktemp("out") / "run"),
            "per_device_train_batch_size": 4,
            "max_steps": 7,
            "save_steps": 3,
            "logging_steps": 2,
            "learning_rate": 1e-3,
            "cutoff_len": 64,
        }
    )
    before = hash_of(base_dir)
    run_dir = train(recipe, base_dir=base_dir, base_name="org/tiny", base_sha256="ab" * 32, machine=CPU)
    return Trained(run_dir, before, hash_of(base_dir))

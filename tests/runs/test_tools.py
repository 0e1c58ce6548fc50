"""Which tool wrote a run, and which file tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs.making import adapter, history, state
from tunesmith.runs import open_run


def card(root: Path, *tags: str, text: str = "") -> None:
    """A model card with these tags."""
    lines = ["---", "library_name: peft", "tags:", *(f"- {tag}" for tag in tags), "---", "", text]
    (root / "README.md").write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("file", "content", "writer"),
    [
        ("tunesmith_run.json", {"seed": 1}, "tunesmith"),
        ("args.json", {"swift_version": "4.6.0", "tuner_type": "lora"}, "ms-swift"),
        ("logging.jsonl", {"loss": 1.0, "global_step/max_steps": "1/2"}, "ms-swift"),
        ("trainer_log.jsonl", {"current_steps": 1, "loss": 1.0}, "llamafactory"),
        ("llamaboard_config.yaml", {"train.lora_rank": 8}, "llamafactory"),
        ("training_args.yaml", {"stage": "sft"}, "llamafactory"),
        ("trainer_state.json", {"global_step": 1}, "trainer"),
        ("training_args.bin", {}, "trainer"),
    ],
)
def test_a_file_that_only_one_tool_writes_tells(tmp_path: Path, file: str, content: Any, writer: str) -> None:
    """And is named."""
    root = adapter(tmp_path / "run")
    (root / file).write_text(json.dumps(content))
    run = open_run(root)
    assert (run.writer, run.writer_mark) == (writer, file)


@pytest.mark.parametrize(
    ("tags", "writer"),
    [
        (("llama-factory", "lora"), "llamafactory"),
        (("axolotl",), "axolotl"),
        (("trl", "sft"), "trl"),
        (("trl", "unsloth"), "unsloth"),
    ],
)
def test_the_model_cards_tags_tell(tmp_path: Path, tags: tuple[str, ...], writer: str) -> None:
    """Where there is no file: an adapter is often copied with nothing but its card."""
    root = adapter(tmp_path / "run")
    card(root, *tags)
    run = open_run(root)
    assert (run.writer, run.writer_mark) == (writer, "README.md")


def test_a_card_that_only_speaks_of_a_tool_is_no_mark(tmp_path: Path) -> None:
    """A sentence is no tag."""
    root = adapter(tmp_path / "run")
    card(root, "lora", text="Not trained with axolotl, nor trl, nor unsloth; llama-factory reads it.")
    assert open_run(root).writer == "peft"


def test_other_tools_have_an_args_file_too(tmp_path: Path) -> None:
    """Only ms-swift's keys make it ms-swift's."""
    root = adapter(tmp_path / "run")
    (root / "args.json").write_text('{"lr": 1}')
    assert open_run(root).writer == "peft"


@pytest.mark.parametrize(
    "config",
    [
        {"auto_mapping": {"unsloth_fixed": True}},
        {"base_model_name_or_path": "unsloth/Qwen2.5-7B-Instruct-bnb-4bit"},
    ],
)
def test_unsloth_is_known_by_its_configuration(tmp_path: Path, config: dict[str, Any]) -> None:
    """It writes TRL's files otherwise."""
    run = open_run(adapter(tmp_path / "run", **config))
    assert (run.writer, run.writer_mark) == ("unsloth", "adapter_config.json")


def test_trl_is_known_by_what_it_logs(tmp_path: Path) -> None:
    """The plain Trainer logs no token accuracy."""
    root = adapter(tmp_path / "run")
    state(root, history(2.0, 1.0, mean_token_accuracy=0.5))
    run = open_run(root)
    assert (run.writer, run.writer_mark) == ("trl", "trainer_state.json")


def test_trl_is_known_by_the_last_checkpoints_log_too(tmp_path: Path) -> None:
    """``save_model`` leaves no state at the root."""
    root = adapter(tmp_path / "run")
    state(adapter(root / "checkpoint-30"), history(2.0, 1.0, mean_token_accuracy=0.5))
    run = open_run(root)
    assert (run.writer, run.writer_mark) == ("trl", "checkpoint-30/trainer_state.json")


def test_ours_wins_over_what_it_imitates(tmp_path: Path) -> None:
    """Our runs hold LLaMA-Factory's files as well."""
    root = adapter(tmp_path / "run")
    (root / "tunesmith_run.json").write_text("{}")
    (root / "trainer_log.jsonl").write_text("")
    assert open_run(root).writer == "tunesmith"


# -- the base's full-precision sibling


@pytest.mark.parametrize(
    ("base", "sibling"),
    [
        ("unsloth/Qwen2.5-7B-Instruct-bnb-4bit", "unsloth/Qwen2.5-7B-Instruct"),
        ("unsloth/llama-3.2-3b-instruct-unsloth-bnb-4bit", "unsloth/llama-3.2-3b-instruct"),
        ("someone/Model-bnb-4bit", "someone/Model"),
    ],
)
def test_a_4_bit_base_is_named_with_its_sibling(tmp_path: Path, base: str, sibling: str) -> None:
    """The name says what it was made from."""
    run = open_run(adapter(tmp_path / "run", base_model_name_or_path=base))
    (finding,) = run.findings
    assert (finding.code, finding.params) == ("base_is_quantized", {"base": base, "sibling": sibling})


@pytest.mark.parametrize("base", ["org/Model", "org/Model-4bit", "bnb-4bit", "org/-bnb-4bit-x", "/models/x-bnb-4bit/"])
def test_other_names_say_nothing(tmp_path: Path, base: str) -> None:
    """Nothing is guessed."""
    assert open_run(adapter(tmp_path / "run", base_model_name_or_path=base)).findings == ()

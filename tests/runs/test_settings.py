"""Settings: every file that says something, and who wins where two disagree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs.making import adapter, state
from tunesmith.record import Value
from tunesmith.runs import Run, Setting, open_run


def setting(run: Run, name: str) -> Setting:
    """The setting of that name."""
    (found,) = (one for one in run.settings if one.name == name)
    return found


def said(found: Setting) -> list[tuple[Value, str]]:
    """What the files say of it, the winner first."""
    return [(found.value, found.source), *((other.value, other.source) for other in found.overruled)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run with nothing but its adapter."""
    return adapter(tmp_path / "run", r=8, lora_alpha=16)


def test_the_page_is_overruled_by_the_arguments(root: Path) -> None:
    """The page shows a form; the arguments are what ran."""
    (root / "training_args.yaml").write_text("learning_rate: 1.0e-4\nlora_rank: 8\n")
    (root / "llamaboard_config.yaml").write_text(
        "train.learning_rate: '5e-5'\ntrain.lora_rank: '8'\ntop.template: qwen\n"
    )
    run = open_run(root)
    assert said(setting(run, "learning_rate")) == [(1e-4, "training_args.yaml"), (5e-5, "llamaboard_config.yaml")]
    assert said(setting(run, "template")) == [("qwen", "llamaboard_config.yaml")]
    (finding,) = run.findings
    assert (finding.code, finding.severity, finding.params["count"]) == ("settings_disagree", "info", 1)
    assert finding.params["listed"] == ("learning_rate: 0.0001 (training_args.yaml), 5e-05 (llamaboard_config.yaml)")


def test_the_adapters_own_rank_wins_under_every_name(root: Path) -> None:
    """It is what was trained, whatever was asked for."""
    (root / "training_args.yaml").write_text("lora_rank: 64\nlora_alpha: 16\n")
    run = open_run(root)
    assert said(setting(run, "r")) == [(8, "adapter_config.json"), (64, "training_args.yaml")]
    assert said(setting(run, "lora_alpha")) == [(16, "adapter_config.json")]


def test_what_was_done_wins_over_what_was_asked(root: Path) -> None:
    """A run that was resumed with more steps."""
    state(root, [], global_step=60, max_steps=60)
    (root / "args.json").write_text(json.dumps({"swift_version": "4", "max_steps": 40, "num_train_epochs": 1}))
    run = open_run(root)
    assert said(setting(run, "max_steps")) == [(60, "trainer_state.json"), (40, "args.json")]
    # The trainer works the epochs out anew where steps are given.
    assert said(setting(run, "num_train_epochs")) == [(1, "args.json")]


@pytest.mark.parametrize("unset", [None, "", -1])
def test_what_a_tool_writes_for_not_given_is_absent(root: Path, unset: object) -> None:
    """``max_steps: -1`` says nothing."""
    (root / "args.json").write_text(json.dumps({"swift_version": "4", "max_steps": unset, "seed": 1}))
    run = open_run(root)
    assert "max_steps" not in run.hyperparameters
    assert run.hyperparameters["seed"] == 1


@pytest.mark.parametrize(("one", "other"), [("1.0e-4", "'0.0001'"), ("3", "3.0"), ("true", "'True'"), ("x", "x")])
def test_the_same_in_another_spelling_is_no_disagreement(root: Path, one: str, other: str) -> None:
    """Forms keep numbers as text."""
    (root / "training_args.yaml").write_text(f"key: {one}\n")
    (root / "llamaboard_config.yaml").write_text(f"train.key: {other}\n")
    run = open_run(root)
    assert setting(run, "key").overruled == ()
    assert run.findings == ()


CARD = """---
tags:
- llama-factory
---

# model

## Training procedure

### Training hyperparameters

The following hyperparameters were used during training:
- learning_rate: 0.0005
- train_batch_size: 4
- optimizer: Use adamw_torch with betas=(0.9,0.999)
- lr_scheduler_type: cosine

### Training results

- not_a_setting: 1

### Framework versions

- PEFT 0.18.1
- Transformers: 5.6.0
- Pytorch 2.13.0+cpu
"""


def test_the_model_card_tells_what_no_other_file_does(root: Path) -> None:
    """LLaMA-Factory's command line writes its arguments nowhere else in the open."""
    (root / "README.md").write_text(CARD)
    run = open_run(root)
    assert run.hyperparameters["learning_rate"] == 0.0005
    assert run.hyperparameters["lr_scheduler_type"] == "cosine"
    assert run.hyperparameters["version_peft"] == "0.18.1"
    assert run.hyperparameters["version_transformers"] == "5.6.0"
    assert run.hyperparameters["version_pytorch"] == "2.13.0+cpu"
    assert "not_a_setting" not in run.hyperparameters
    assert {one.source for one in run.settings} == {"README.md", "adapter_config.json"}


def test_axolotls_card_holds_the_whole_recipe(root: Path) -> None:
    """2e-4 is a text in YAML 1.1, and a number to everybody else."""
    recipe = "base_model: org/base\nlora_r: 8\nlearning_rate: 2e-4\ndatasets:\n  - path: x\n"
    summary = "<details><summary>See axolotl config</summary>"
    (root / "README.md").write_text(f"{summary}\n\naxolotl version: `0.19.0`\n```yaml\n{recipe}\n```\n</details>")
    run = open_run(root)
    assert (run.writer, run.hyperparameters["learning_rate"], run.findings) == ("axolotl", 2e-4, ())
    assert setting(run, "r").source == "adapter_config.json"


def test_the_printed_log_tells_how_much_was_trained_on(root: Path) -> None:
    """What the Trainer prints as it begins."""
    mark = "[INFO|trainer.py:1470] 2026-11-26 00:35:09,679 >>"
    (root / "running_log.txt").write_text(
        f"{mark} ***** Running training *****\n{mark}   Num examples = 1,032\n{mark}   Num Epochs = 3\n"
        f"{mark}   Total train batch size (w. parallel, distributed & accumulation) = 16\n"
        f"{mark}   Number of trainable parameters = 40,370,176\n"
    )
    found = open_run(root).hyperparameters
    assert (found["num_examples"], found["total_train_batch_size"], found["trainable_parameters"]) == (
        1032,
        16,
        40370176,
    )


@pytest.mark.parametrize(
    ("log", "crashed"),
    [
        ("Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA out of memory.\n", True),
        ("Traceback (most recent call last):\n  File x\nValueError: a\n***** Running training *****\n", False),
        ("Traceback (most recent call last):\n  File x\nValueError: a\nTraining completed.\n", False),
        ("all went well: no Error: here\n", False),
    ],
)
def test_a_crash_in_the_printed_log_is_told(root: Path, log: str, crashed: bool) -> None:
    """With its last line; one that the training survived is not."""
    (root / "running_log.txt").write_text(log)
    findings = {finding.code: finding.params for finding in open_run(root).findings}
    assert ("training_crashed" in findings) is crashed
    if crashed:
        assert findings["training_crashed"]["message"] == "torch.OutOfMemoryError: CUDA out of memory."


def test_mlx_writes_all_it_was_started_with_beside_the_adapter(tmp_path: Path) -> None:
    """One file is configuration and arguments."""
    root = tmp_path / "run"
    root.mkdir()
    config: dict[str, Any] = {
        "fine_tune_type": "lora",
        "model": "org/base",
        "iters": 30,
        "learning_rate": 1e-5,
        "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0, "keys": ["q_proj"]},
        "optimizer_config": {"adam": {}},
    }
    (root / "adapter_config.json").write_text(json.dumps(config))
    (root / "adapters.safetensors").write_bytes(b"never opened")
    run = open_run(root)
    assert (run.writer, run.base_model, run.kind) == ("mlx-lm", "org/base", "adapter")
    assert {name: run.hyperparameters[name] for name in ("iters", "rank", "scale")} == {
        "iters": 30,
        "rank": 8,
        "scale": 20.0,
    }
    assert "optimizer_config" not in run.hyperparameters
    assert [finding.code for finding in run.findings] == ["tokenizer_missing"]

"""What each tool's real run directory yields; ``corpus/README.md`` says how they were made.

The figures here are those that the tools printed to the terminal as they trained, or were told on their command lines.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from huggingface_hub import constants

from tunesmith.errors import RunError
from tunesmith.record import Value
from tunesmith.runs import Run, open_run

CORPUS = Path(__file__).parent / "corpus"
HUB = CORPUS / "hub-cache" / "models--org--capitals-lora"
SNAPSHOT = HUB / "snapshots" / (HUB / "refs" / "main").read_text()
SWIFT = CORPUS / "ms-swift" / "v0-20261126-003800"
STATE = "trainer_state.json"
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Expected:
    """What is known of a run.

    Attributes:
        writer: the tool.
        base: the base model's name in the adapter's configuration.
        kind: a run, or a bare adapter.
        steps: of the checkpoints in its folders.
        final: the step of the adapter at its root; 0 where the tool does not record it, None where there is none.
        best: the checkpoint that the trainer kept as the best.
        losses: logged steps with a training loss, and the first and the last loss.
        evals: logged steps with a held-out loss, and the last loss.
        sources: the files that the log is from.
        settings: some settings with their values and sources.
        findings: all of their codes.
    """

    writer: str
    base: str
    kind: str = "run"
    steps: tuple[int, ...] = ()
    final: int | None = 0
    best: str | None = None
    losses: tuple[list[int], float, float] | None = None
    evals: tuple[list[int], float] | None = None
    sources: frozenset[str] = frozenset()
    settings: dict[str, tuple[Value, str]] = field(default_factory=lambda: LORA)
    findings: frozenset[str] = frozenset()


def told(source: str, **values: Value) -> dict[str, tuple[Value, str]]:
    """Settings that one file tells."""
    return {name: (value, source) for name, value in values.items()}


def every(step: int, last: int) -> list[int]:
    """Steps at which a trainer logs."""
    return list(range(step, last + 1, step))


LORA = told(CONFIG, r=4, lora_alpha=8)
BOTH_LOGS = frozenset({STATE, "trainer_log.jsonl"})
QUANTIZED = "unsloth/Qwen2.5-0.5B-Instruct-unsloth-bnb-4bit"

EXPECTED: dict[str, Expected] = {
    "llamafactory-cli": Expected(
        writer="llamafactory",
        base="/data/models/tiny-qwen",
        steps=(4, 8, 12),
        final=12,
        best="checkpoint-12",
        losses=(every(2, 12), 5.6215, 5.5324),
        evals=(every(4, 12), 5.5310),
        sources=BOTH_LOGS,
        # Launched from the command line it keeps no arguments; its model card lists some.
        settings=LORA
        | told("README.md", learning_rate=0.01, seed=42, lr_scheduler_type="cosine")
        | told(STATE, max_steps=12, train_batch_size=4),
    ),
    "llamafactory-webui": Expected(
        writer="llamafactory",
        base="/data/models/tiny-qwen",
        steps=(5, 10, 16),
        final=16,
        losses=(every(2, 16), 5.6215, 5.4994),
        evals=([5, 10, 15, 16], 5.5043),
        sources=BOTH_LOGS,
        settings=LORA
        | told(
            "training_args.yaml",
            learning_rate=0.01,
            template="qwen",
            dataset="capitals",
            cutoff_len=128,
            stage="sft",
            num_train_epochs=2.0,
            val_size=0.2,
            warmup_steps=1,
            lr_scheduler_type="cosine",
            optim="adamw_torch",
        ),
    ),
    "llamafactory-aborted": Expected(
        writer="llamafactory",
        base="/data/models/tiny-qwen",
        steps=(8, 16),
        final=None,
        best="checkpoint-16",
        losses=(every(2, 22), 5.6215, 5.4308),
        evals=([8, 16], 5.4585),
        sources=frozenset({"checkpoint-16/trainer_state.json", "trainer_log.jsonl"}),
        findings=frozenset({"run_unfinished", "steps_missing"}),
    ),
    "llamafactory-resumed": Expected(
        writer="llamafactory",
        base="/data/models/tiny-qwen",
        steps=(16, 32, 40),
        final=40,
        best="checkpoint-40",
        losses=(every(2, 40), 5.6215, 5.3938),
        evals=(every(8, 40), 5.4089),
        sources=BOTH_LOGS,
        findings=frozenset({"log_restarted"}),
    ),
    "trl": Expected(
        writer="trl",
        base="/data/models/tiny-qwen-own",
        steps=(4, 8, 12),
        final=12,
        best="checkpoint-12",
        losses=(every(2, 12), 5.6253, 5.4500),
        evals=(every(4, 12), 5.4343),
        sources=frozenset({STATE}),
        settings=LORA | told(STATE, max_steps=12, train_batch_size=4),
    ),
    "trainer": Expected(
        writer="trainer",
        base="/data/models/tiny-qwen-own",
        steps=(16, 24),
        final=24,
        losses=(every(4, 24), 5.6027, 5.3925),
        sources=frozenset({"checkpoint-24/trainer_state.json"}),
    ),
    "peft": Expected(
        writer="peft",
        base="/data/models/tiny-qwen-own",
        kind="adapter",
        findings=frozenset({"tokenizer_missing"}),
    ),
    "ms-swift": Expected(
        writer="ms-swift",
        base="/data/models/tiny-qwen-swift",
        steps=(4, 8, 12),
        final=None,
        best="checkpoint-12",
        losses=([1, *every(2, 12)], 5.6404, 5.5318),
        evals=(every(4, 12), 5.5374),
        sources=frozenset({"checkpoint-12/trainer_state.json", "logging.jsonl"}),
        settings=LORA
        | told(
            "args.json",
            learning_rate=0.01,
            template="qwen",
            model_type="qwen2",
            dataset="data/train.jsonl",
            max_length=256,
            per_device_train_batch_size=4,
            lr_scheduler_type="cosine",
            seed=42,
        ),
        findings=frozenset({"run_inside", "tokenizer_missing"}),
    ),
    "axolotl": Expected(
        writer="axolotl",
        base="/data/models/tiny-qwen-axo",
        steps=(4, 16),
        final=16,
        losses=(every(2, 16), 5.6800, 5.5485),
        evals=([0, 4, 8, 12, 16], 5.5508),
        sources=frozenset({"checkpoint-16/trainer_state.json"}),
        # Its whole recipe stands in its model card, and nowhere else.
        settings=LORA
        | told("README.md", learning_rate=0.01, sequence_len=128, micro_batch_size=4, num_epochs=2, warmup_steps=2),
    ),
    "mlx-lm": Expected(
        writer="mlx-lm",
        base="/data/models/tiny-qwen",
        kind="adapter",
        settings=told(
            CONFIG, rank=4, scale=2.0, iters=30, learning_rate=0.01, num_layers=2, batch_size=2, fine_tune_type="lora"
        ),
        findings=frozenset({"tokenizer_missing"}),
    ),
    "unsloth": Expected(
        writer="unsloth",
        base=QUANTIZED,
        steps=(4, 12),
        final=None,
        losses=(every(2, 12), 5.6253, 5.4919),
        sources=frozenset({"checkpoint-12/trainer_state.json"}),
        findings=frozenset({"base_is_quantized"}),
    ),
    "unsloth-saved": Expected(
        writer="unsloth",
        base=QUANTIZED,
        kind="adapter",
        findings=frozenset({"base_is_quantized"}),
    ),
    "hub-cache": Expected(
        writer="peft",
        base="/data/models/tiny-qwen-own",
        kind="adapter",
    ),
}

# What each tool alone leaves, and the purpose that its explanation must name.
OWN_FILES = {
    "llamafactory-cli": {"trainer_log.jsonl": "llamafactory", "training_loss.png": "llamafactory"},
    "llamafactory-webui": dict.fromkeys(
        ("training_args.yaml", "llamaboard_config.yaml", "running_log.txt"), "llamafactory"
    ),
    "ms-swift": dict.fromkeys(
        ("args.json", "logging.jsonl", "images/train_loss.png", "checkpoint-12/additional_config.json"), "ms-swift"
    ),
    "axolotl": {"debug.log": "axolotl", "checkpoint-16/tokens_state.json": "axolotl"},
    "mlx-lm": {"adapters.safetensors": "mlx-lm", "0000010_adapters.safetensors": "mlx-lm"},
}


def opened(name: str) -> Run:
    """A run of the corpus."""
    return open_run(SNAPSHOT if name == "hub-cache" else CORPUS / name)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_writer_and_the_base_are_told(name: str) -> None:
    """By marks that only the tool leaves, and the name in the adapter's own configuration."""
    run, expected = opened(name), EXPECTED[name]
    assert (run.writer, run.kind, run.base_model) == (expected.writer, expected.kind, expected.base)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_checkpoints_and_the_best_are_found(name: str) -> None:
    """In order of step, the adapter at the root last; a link to a checkpoint is no second one."""
    run, expected = opened(name), EXPECTED[name]
    named: list[tuple[str, int | None]] = [(f"checkpoint-{step}", step) for step in expected.steps]
    if expected.final is not None:
        named.append(("final", expected.final or None))
    assert [(one.name, one.step) for one in run.checkpoints] == named
    assert [one.name for one in run.checkpoints if one.is_best] == ([expected.best] if expected.best else [])


@pytest.mark.parametrize("name", EXPECTED)
def test_the_log_is_one_series(name: str) -> None:
    """Each step once, whatever was appended after a restart, with the files that it is from."""
    run, expected = opened(name), EXPECTED[name]
    losses = [(row.step, row.loss) for row in run.log if row.loss is not None]
    evals = [(row.step, row.eval_loss) for row in run.log if row.eval_loss is not None]
    steps, first, last = expected.losses or ([], math.nan, math.nan)
    assert [step for step, _ in losses] == steps
    if steps:
        assert (losses[0][1], losses[-1][1]) == pytest.approx((first, last), abs=1e-4)
    eval_steps, last_eval = expected.evals or ([], math.nan)
    assert [step for step, _ in evals] == eval_steps
    if eval_steps:
        assert evals[-1][1] == pytest.approx(last_eval, abs=1e-4)
    assert {source for row in run.log for source in row.sources} == expected.sources


@pytest.mark.parametrize("name", EXPECTED)
def test_settings_name_the_file_that_says_so(name: str) -> None:
    """A value without its source could not be held against another's."""
    recorded = {one.name: (one.value, one.source) for one in opened(name).settings}
    assert {key: recorded.get(key) for key in EXPECTED[name].settings} == EXPECTED[name].settings


@pytest.mark.parametrize("name", EXPECTED)
def test_nothing_is_found_wrong_but_what_is(name: str) -> None:
    """All of these trainings were sound; a warning on a sound run teaches people to read none."""
    assert {finding.code for finding in opened(name).findings} == EXPECTED[name].findings


@pytest.mark.parametrize("name", EXPECTED)
def test_every_file_of_every_tool_is_known(name: str) -> None:
    """And those that one tool alone leaves are said to be its own."""
    files = {file.path: file for file in opened(name).files}
    assert [path for path, file in files.items() if file.kind == "unknown"] == []
    own = OWN_FILES.get(name, {})
    assert {path: files[path].written_by for path in own} == own


@pytest.mark.parametrize(
    "folder",
    sorted(path.parent for path in CORPUS.rglob("checkpoint-*/adapter_config.json")),
    ids=lambda path: path.name,
)
def test_a_checkpoint_opens_alone(folder: Path) -> None:
    """As what it is, with its own step and its own part of the log."""
    run = open_run(folder)
    step = int(folder.name.removeprefix("checkpoint-"))
    assert run.kind == "checkpoint"
    assert [(one.name, one.step) for one in run.checkpoints] == [("final", step)]
    assert max(row.step for row in run.log) == step
    assert not [file.path for file in run.files if file.kind == "unknown"]


def test_steps_after_a_restart_are_those_of_the_resumed_run() -> None:
    """The log has steps 18, 20 and 22 twice; the state has them once, and so has the series."""
    text = (CORPUS / "llamafactory-resumed" / "trainer_log.jsonl").read_text()
    appended = [row["current_steps"] for row in map(json.loads, text.splitlines()) if "loss" in row]
    assert appended[8:14] == [18, 20, 22, 18, 20, 22]
    (finding,) = opened("llamafactory-resumed").findings
    assert finding.params["steps"] == "18"


def test_the_folder_between_is_found_or_named_by_hand() -> None:
    """ms-swift's output holds a folder for each version of a run; both paths give the same run."""
    by_hand = open_run(SWIFT)
    assert by_hand.path == opened("ms-swift").path == str(SWIFT)
    assert "run_inside" not in {finding.code for finding in by_hand.findings}


def test_a_link_to_a_checkpoint_is_not_counted_twice() -> None:
    """ms-swift leaves ``last-checkpoint``, a link; its bytes are those of the checkpoint."""
    run = open_run(SWIFT)
    assert (SWIFT / "last-checkpoint").is_symlink()
    assert {file.path: file.size_bytes for file in run.files if file.path.startswith("last-checkpoint")} == {
        "last-checkpoint": 0
    }
    assert sum(file.size_bytes for file in run.files) == sum(
        path.stat().st_size for path in SWIFT.rglob("*") if path.is_file() and "last-checkpoint" not in path.parts
    )


def test_files_of_the_hubs_cache_are_read_through_their_links() -> None:
    """They lead out of the snapshot, to the blobs beside it, and are as large as these."""
    sizes = {file.path: file.size_bytes for file in open_run(SNAPSHOT).files}
    assert sizes == {path.name: path.stat().st_size for path in SNAPSHOT.iterdir()}
    assert min(sizes.values()) > 0


def test_an_adapter_is_opened_by_its_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(CORPUS / "hub-cache"))
    assert Path(open_run("org/capitals-lora").path) == SNAPSHOT


def test_a_folder_of_predictions_is_refused_with_what_it_holds() -> None:
    """LLaMA-Factory predicts into a folder of its own, which looks like a run and holds no adapter."""
    with pytest.raises(RunError, match="holds no adapter") as caught:
        opened("llamafactory-predict")
    assert "generated_predictions.jsonl" in str(caught.value)


def test_a_half_written_run_of_axolotl_is_no_adapter_yet(tmp_path: Path) -> None:
    """It saves the adapter's configuration before it trains, so that the configuration alone tells nothing."""
    for name in (CONFIG, "config.json", "README.md"):
        (tmp_path / name).write_bytes((CORPUS / "axolotl" / name).read_bytes())
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    for source in (CORPUS / "axolotl" / "checkpoint-4").iterdir():
        (checkpoint / source.name).write_bytes(source.read_bytes())
    run = open_run(tmp_path)
    assert [one.name for one in run.checkpoints] == ["checkpoint-4"]
    assert {"run_unfinished", "steps_missing"} <= {finding.code for finding in run.findings}


def test_the_corpus_is_small_documented_and_names_no_machine() -> None:
    """Every directory is in its README, and no file tells where it was made."""
    described = set(re.findall(r"^\| `([\w-]+)` \|", (CORPUS / "README.md").read_text(), re.MULTILINE))
    assert described == {path.name for path in CORPUS.iterdir() if path.is_dir()}
    assert described == set(EXPECTED) | {"llamafactory-predict"}
    files = [path for path in CORPUS.rglob("*") if path.is_file() and not path.is_symlink()]
    assert max(path.stat().st_size for path in files) <= 100_000
    assert sum(path.stat().st_size for path in files) <= 1_500_000
    private = re.compile(rb"/(?:root|home|tmp|Users)/")
    assert [path for path in files if private.search(path.read_bytes())] == []

"""What each file is: told by its name and place, whichever tool wrote it, and whatever lies in the directory."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.runs import making
from tunesmith.record import Finding
from tunesmith.report.texts import text
from tunesmith.runs import files
from tunesmith.runs.files import CATALOGUE, classify, list_files

# A path as the tool writes it, with the place in its source or a run that shows it.
WRITTEN = {
    # PEFT: utils/constants.py
    "adapter_model.safetensors": ("adapter_weights", "inference", "peft"),
    "checkpoint-20/adapter_model.bin": ("adapter_pickle", "inference", "peft"),
    # Hugging Face Trainer: trainer.py
    "checkpoint-20/optimizer.pt": ("optimizer", "resuming", "trainer"),
    "checkpoint-20/rng_state_3.pth": ("rng_state", "resuming", "trainer"),
    "eval_results.json": ("results", "record", "trainer"),
    # Accelerate: utils/constants.py, utils/fsdp_utils.py
    "checkpoint-20/optimizer_1.bin": ("optimizer", "resuming", "accelerate"),
    "checkpoint-20/random_states_0.pkl": ("rng_state", "resuming", "accelerate"),
    "checkpoint-20/optimizer_0/__0_0.distcp": ("fsdp_optimizer", "resuming", "accelerate"),
    "checkpoint-20/pytorch_model_fsdp_0/.metadata": ("fsdp_model", "resuming", "accelerate"),
    "checkpoint-20/pytorch_model_fsdp.bin": ("fsdp_model", "resuming", "accelerate"),
    # DeepSpeed: runtime/engine.py
    "checkpoint-20/global_step20/mp_rank_00_model_states.pt": ("deepspeed_model", "resuming", "deepspeed"),
    "checkpoint-20/global_step20/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": (
        "deepspeed_optimizer",
        "resuming",
        "deepspeed",
    ),
    "checkpoint-20/latest": ("deepspeed_latest", "resuming", "deepspeed"),
    "checkpoint-20/zero_to_fp32.py": ("deepspeed_script", "resuming", "deepspeed"),
    # LLaMA-Factory: extras/constants.py, extras/ploting.py, train/sft/trainer.py
    "training_args.yaml": ("training_args_yaml", "record", "llamafactory"),
    "llamaboard_config.yaml": ("webui_config", "record", "llamafactory"),
    "training_eval_loss.png": ("loss_chart", "record", "llamafactory"),
    "generated_predictions.jsonl": ("predictions", "record", "llamafactory"),
    "value_head.safetensors": ("value_head", "inference", "llamafactory"),
    # ms-swift: pipelines/train/sft.py, arguments/base_args, tuners/peft.py
    "v0-20260101-120000/args.json": ("swift_args", "record", "ms-swift"),
    "v0-20260101-120000/logging.jsonl": ("swift_log", "record", "ms-swift"),
    "v0-20260101-120000/images/train_loss.png": ("loss_chart", "record", "ms-swift"),
    "v0-20260101-120000/val_dataset.jsonl": ("val_dataset", "record", "ms-swift"),
    "v0-20260101-120000/checkpoint-9/additional_config.json": ("adapter_additional", "inference", "ms-swift"),
    # axolotl: utils/tee.py, core/trainers/constants.py
    "debug.log": ("console_log", "record", "axolotl"),
    "checkpoint-20/tokens_state.json": ("tokens_state", "resuming", "axolotl"),
    "last_run_prepared/0a1b/data-00000-of-00001.arrow": ("dataset_cache", "record", "axolotl"),
    # mlx-lm: tuner/trainer.py
    "adapters.safetensors": ("mlx_weights", "inference", "mlx-lm"),
    "0000100_adapters.safetensors": ("mlx_weights", "inference", "mlx-lm"),
    # TRL: trainer/grpo_trainer.py
    "completions/completions_00010.parquet": ("completions", "record", "trl"),
    # others that lie about
    "runs/Nov26_host/events.out.tfevents.1764.host.1.0": ("tensorboard", "record", "tensorboard"),
    "wandb/run-20260101_120000-ab/files/config.yaml": ("wandb", "record", "wandb"),
    ".cache/huggingface/download/adapter_config.json.metadata": ("hub_cache", "record", "hub"),
    "model-00001-of-00002.safetensors": ("weights", "inference", "transformers"),
    "model.safetensors.index.json": ("weights_index", "inference", "transformers"),
    "pytorch_model-00001-of-00002.bin": ("weights_pickle", "inference", "transformers"),
    "model-lora-f16.gguf": ("gguf", "inference", "llama.cpp"),
    "preprocessor_config.json": ("processor", "inference", "transformers"),
    "modeling_custom.py": ("remote_code", "inference", None),
    ".DS_Store": ("litter", "record", None),
    "payload.pkl": ("pickle_unknown", "unknown", None),
    "notes.docx": ("unknown", "unknown", None),
}


def codes(findings: list[Finding]) -> list[str]:
    """The findings' codes."""
    return [finding.code for finding in findings]


@pytest.mark.parametrize("path", WRITTEN)
def test_what_the_tools_write_is_known_with_its_writer(path: str) -> None:
    """The table is what the tools' sources write."""
    known = classify(path)
    assert (known.kind, known.needed_for, known.written_by) == WRITTEN[path]


def test_no_line_of_the_catalogue_is_hidden_by_another() -> None:
    """A line that never wins would be an explanation that nobody reads."""
    samples = {known: known.pattern.replace("[0-9]*", "1").replace("*", "x") for known in CATALOGUE}
    assert [known for known, sample in samples.items() if classify(sample)[1:] != known[1:]] == []


@pytest.mark.parametrize(
    "name", ["optimizer_state.txt", "latest.txt", "adapter_model.safetensors.bak", "Adapter_config.json", "x/optimizer"]
)
def test_a_name_that_only_resembles_a_known_one_is_unknown(name: str) -> None:
    """What is taken for a training state may be offered for deletion."""
    assert classify(name).kind == "unknown"


def test_the_first_sentence_of_every_explanation_stands_alone() -> None:
    """The terminal shows it and no more."""
    for kind in {known.kind for known in CATALOGUE}:
        first = text(f"file.{kind}").partition(". ")[0]
        assert 10 < len(first) < 120, kind
        assert "。" in text(f"file.{kind}", "zh"), kind


def test_files_are_listed_by_path_with_size_and_writer(tmp_path: Path) -> None:
    """A whole run, and nothing to remark."""
    run = making.llama_factory(tmp_path / "run")
    (run / "checkpoint-20" / "optimizer.pt").write_bytes(b"1234567")
    listed, findings = list_files(run)
    assert findings == []
    assert [file.path for file in listed] == sorted(file.path for file in listed)
    optimizer = next(file for file in listed if file.path == "checkpoint-20/optimizer.pt")
    assert (optimizer.size_bytes, optimizer.kind, optimizer.written_by) == (7, "optimizer", "trainer")
    assert {file.kind for file in listed}.isdisjoint({"unknown", "link", "special"})


def test_links_are_listed_and_not_followed(tmp_path: Path) -> None:
    """A link out of the run would have foreign files explained, measured, or deleted."""
    run = making.adapter(tmp_path / "run")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "id_rsa").write_text("x" * 100)
    (run / "out").symlink_to(tmp_path / "secret")
    (run / "optimizer.pt").symlink_to(tmp_path / "secret" / "id_rsa")
    (run / "broken").symlink_to("nowhere")
    (run / "loop").symlink_to("loop")
    (run / "inside.json").symlink_to("adapter_config.json")
    listed, findings = list_files(run)
    links = {file.path: file.size_bytes for file in listed if file.kind == "link"}
    assert links == dict.fromkeys(["broken", "inside.json", "loop", "optimizer.pt", "out"], 0)
    assert not [file for file in listed if "id_rsa" in file.path]
    assert codes(findings) == ["link_leads_out"]
    assert findings[0].params == {"count": 4, "names": "broken, loop, optimizer.pt, out"}


def test_a_snapshot_of_the_hubs_cache_is_normal(tmp_path: Path) -> None:
    """There every file is a link to a blob beside the snapshots."""
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "abc").write_bytes(b"12345")
    (snapshot / "adapter_model.safetensors").symlink_to("../../blobs/abc")
    (snapshot / "escape.json").symlink_to("../../../elsewhere")
    (file, escape), findings = list_files(snapshot)
    assert (file.kind, file.size_bytes) == ("adapter_weights", 5)
    assert escape.kind == "link"
    assert findings[0].params["names"] == "escape.json"


def test_pipes_and_sockets_are_named_and_never_opened(tmp_path: Path) -> None:
    """Opening a named pipe would wait for ever."""
    os.mkfifo(tmp_path / "trainer_log.jsonl")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listed, findings = list_files(tmp_path)
    assert [(file.path, file.kind, file.size_bytes) for file in listed] == [
        ("s", "special", 0),
        ("trainer_log.jsonl", "special", 0),
    ]
    assert codes(findings) == ["special_file"]


def test_a_directory_without_end_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's home directory is a directory too."""
    monkeypatch.setattr(files, "MOST_ENTRIES", 30)
    for number in range(40):
        (tmp_path / f"f{number}").touch()
    listed, findings = list_files(tmp_path)
    assert len(listed) == 30
    assert codes(findings) == ["files_cut"]
    assert findings[0].params["count"] == 30


def test_folders_in_folders_are_cut(tmp_path: Path) -> None:
    """Nesting costs time and may exceed what the system can name."""
    folder = tmp_path
    for _ in range(files.MOST_DEPTH + 2):
        (folder / "f").touch()
        folder = folder / "d"
        folder.mkdir()
    listed, findings = list_files(tmp_path)
    assert len(listed) == files.MOST_DEPTH + 1
    assert codes(findings) == ["files_cut"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    """Else its files would silently be missing."""
    (tmp_path / "closed").mkdir(mode=0)
    listed, findings = list_files(tmp_path)
    (tmp_path / "closed").chmod(0o700)
    assert listed == ()
    assert findings[0].params == {"count": 1, "names": "closed"}


def test_a_folder_that_vanishes_is_named(tmp_path: Path) -> None:
    """A directory that cannot be listed is said so, not raised: here it is not there at all."""
    listed, findings = list_files(tmp_path / "gone")
    assert listed == ()
    assert codes(findings) == ["folder_unreadable"]


def test_hostile_names_are_listed_safely(tmp_path: Path) -> None:
    """Names that are not UTF-8 or hold control characters can be written as JSON, and stay one entry."""
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.bin")).touch()
    (tmp_path / "a\x1b[31m\nb").touch()
    listed, _ = list_files(tmp_path)
    assert [file.path for file in listed] == ["a\x1b[31m\nb", "��.bin"]
    assert all(file.model_dump_json() for file in listed)

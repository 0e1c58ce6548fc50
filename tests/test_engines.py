"""load_engine: what a variant may be called, where it is found, and a server in its place; what is kept where."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import tunesmith as ts
from tests.openai_server import serve
from tests.tiny_models import TinyRun, chat, peft_alone, row
from tunesmith.api.engines import kept, remembering
from tunesmith.errors import DataError, RunError
from tunesmith.models import Endpoint, LocalEngine

ROWS = [row(i, f"question {i}", f"the answer {i * i}") for i in range(3)]
SHORT = ts.GenerationSettings(greedy=True, max_new_tokens=4)


@pytest.fixture
def run(tiny: TinyRun, tmp_path: Path) -> Path:
    """A run with a checkpoint and a final adapter."""
    root = Path(shutil.copytree(tiny.adapters["final"], tmp_path / "run"))
    shutil.copytree(tiny.adapters["checkpoint-10"], root / "checkpoint-10")
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tunesmith"


def found(run: Path, *names: str) -> list[tuple[str, str]]:
    """Names and kinds of what was loaded."""
    return [(info.name, info.kind) for info in ts.load_engine(run, names, dtype="fp32")[1]]


def test_variants_are_found_by_all_their_names(run: Path, tiny: TinyRun) -> None:
    """The base, the run's own by step, a merged model, another adapter, another run, and a name of one's own."""
    other = shutil.copytree(run, run.parent / "other-run")
    (other / "adapter_config.json").unlink()
    assert found(
        run, "base", "final", "10", str(tiny.merged), str(other), f"again={tiny.adapters['checkpoint-10']}"
    ) == [
        ("base", "base"),
        ("final", "adapter"),
        ("checkpoint-10", "adapter"),
        ("merged", "full"),
        ("other-run", "adapter"),
        ("again", "adapter"),
    ]


def test_the_runs_own_checkpoint_goes_before_a_directory_of_that_name(
    run: Path, tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the command is typed."""
    (run.parent / "here" / "final").mkdir(parents=True)
    monkeypatch.chdir(run.parent / "here")
    _, (info,) = ts.load_engine(run, ["final"], dtype="fp32")
    assert info.path == str(run)
    assert tiny.base.exists()


def test_two_of_one_name_are_refused_with_the_way_out(run: Path, tiny: TinyRun) -> None:
    """Two merged directories are often both called merged."""
    with pytest.raises(DataError, match="same name") as caught:
        found(run, str(tiny.merged), f"merged={tiny.adapters['final']}")
    assert "NAME=DIR" in str(caught.value)


def test_a_name_that_is_nothing_lists_what_there_is(run: Path) -> None:
    """As before: the run's own adapters."""
    with pytest.raises(RunError, match="checkpoint-10, final"):
        found(run, "checkpoint-11")


def test_a_rendered_prompt_is_what_the_model_is_given(run: Path) -> None:
    """Text and ids, special tokens shown."""
    engine, _ = ts.load_engine(run, ["final"], dtype="fp32")
    prompt = ts.rendered_prompt(engine, "final", chat("hi"))
    assert prompt.text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    generation = engine.generate([ts.Request("final", chat("hi"))], SHORT)[0]
    assert generation.prompt_tokens == len(prompt.token_ids)
    plain = ts.rendered_prompt(engine, "final", "hi")
    assert plain.text == "hi"


def test_comparing_again_computes_nothing_and_says_the_same(run: Path, cache: Path) -> None:
    """Answers and scores are kept in the user's cache, by hash."""
    first = ts.compare(run, prompts=ROWS, data=ROWS, settings=SHORT, dtype="fp32")
    assert len(list((cache / "answers").glob("*.jsonl"))) == 2
    seen: list[ts.Progress] = []
    again = ts.compare(run, prompts=ROWS, data=ROWS, settings=SHORT, dtype="fp32", progress=seen.append)
    assert again == first
    assert not [step for step in seen if step.stage in ("generate", "score")]
    assert ts.compare(run, prompts=ROWS, data=ROWS, settings=SHORT, dtype="fp32", fresh=True).scores == first.scores


def test_a_stopped_comparison_says_what_is_kept_and_goes_on(run: Path) -> None:
    """Ctrl-C keeps what is done."""
    cancellation = ts.Cancellation()
    prompts = [row(i, "x" * (1 + i)) for i in range(40)]

    def stop(step: ts.Progress) -> None:
        if step.stage == "generate" and step.done >= 30:
            cancellation.cancel()

    with pytest.raises(ts.Cancelled, match=r"\d+ results are kept"):
        ts.compare(run, prompts=prompts, settings=SHORT, dtype="fp32", progress=stop, cancellation=cancellation)
    seen: list[ts.Progress] = []
    ts.compare(run, prompts=prompts, settings=SHORT, dtype="fp32", progress=seen.append)
    assert next(step.done for step in seen if step.stage == "generate") >= 30


def test_prompts_of_another_file_are_not_taken_for_held_out_rows(run: Path) -> None:
    """Both count from 0; a loss on one says nothing of the other."""
    prompts = [row(0, "something else", "another answer"), row(1, "and more", "still another")]
    comparison = ts.compare(run, prompts=prompts, data=ROWS, settings=SHORT, dtype="fp32")
    assert [prompt.id for prompt in comparison.prompts] == ["prompt-0", "prompt-1"]
    assert {one.row_id for one in comparison.row_losses} == {"row-0", "row-1", "row-2"}


def test_a_built_in_set_is_a_file_of_prompts(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a file has that name."""
    few = ts.GenerationSettings(greedy=True, max_new_tokens=1)
    built_in = ts.compare(run, ["final"], "general-en", data=ROWS, settings=few, dtype="fp32")
    assert len(built_in.prompts) > 10
    monkeypatch.chdir(tmp_path)
    Path("general-en.txt").write_text("mine\n")
    assert len(ts.compare(run, ["final"], "general-en.txt", settings=few, dtype="fp32").prompts) == 1


def test_a_server_gives_the_same_records_as_the_local_engine(run: Path, tiny: TinyRun, cache: Path) -> None:
    """Replies and scores of base and adapter; nothing of them is kept unless a directory is named."""
    model = LlamaForCausalLM.from_pretrained(tiny.base, dtype=torch.float32).eval()
    tuned = peft_alone(LlamaForCausalLM.from_pretrained(tiny.base, dtype=torch.float32), tiny.adapters["final"]).eval()
    local = ts.compare(run, prompts=ROWS, data=ROWS, settings=SHORT, dtype="fp32")
    shutil.rmtree(cache / "answers")
    with serve({"tiny": model, "tuned": tuned}, AutoTokenizer.from_pretrained(tiny.base)) as server:
        asked = {"endpoint": server.url, "models": ["base=tiny", "final=tuned"], "settings": SHORT}
        remote = ts.compare(run, prompts=ROWS, data=ROWS, **asked)
        assert not (cache / "answers").exists()
        ts.compare(run, prompts=ROWS, data=ROWS, records=cache / "mine", **asked)
    assert len(list((cache / "mine").glob("*.jsonl"))) == 2
    assert [(one.variant, one.text) for one in remote.replies] == [(one.variant, one.text) for one in local.replies]
    assert [one.loss for one in remote.scores] == pytest.approx([one.loss for one in local.scores], abs=1e-4)
    assert {info.kind for info in remote.variants} == {"endpoint"}
    assert remote.engine.kind == "endpoint"


def test_a_servers_model_must_be_named_and_a_model_needs_a_server(run: Path) -> None:
    """Neither is guessed."""
    with pytest.raises(DataError, match="--model"):
        ts.load_engine(run, endpoint="http://127.0.0.1:9/v1")
    with pytest.raises(DataError, match="--endpoint"):
        ts.load_engine(run, models=["x"])
    engine, _ = ts.load_engine(run, endpoint="http://127.0.0.1:9/v1", models=["x"])
    assert isinstance(engine, Endpoint)


def test_a_cancellation_before_anything_was_done_says_nothing_of_it(run: Path) -> None:
    """There is nothing kept."""
    loaded, _ = ts.load_engine(run, ["final"], dtype="fp32")
    assert isinstance(loaded, LocalEngine)
    with pytest.raises(ts.Cancelled) as caught, kept(remembering(loaded, None, fresh=False)):
        raise ts.Cancelled
    assert str(caught.value) == ""
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_runs_own_adapter_may_go_by_another_name(run: Path) -> None:
    """``NAME=DIR`` of the run itself, and of one of its checkpoints."""
    names = [("mine", "adapter"), ("early", "adapter")]
    assert found(run, f"mine={run}", f"early={run / 'checkpoint-10'}") == names

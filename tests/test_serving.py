"""What is typed to serve a run: flags and names, what each server cannot serve, and words that a shell takes whole."""

from __future__ import annotations

import configparser
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tunesmith as ts
from tests.tiny_models import TinyRun, build_adapter, edit_json
from tunesmith.errors import BaseModelError, DataError, RunError
from tunesmith.export.serving import ENGINES, ServeCommand

Make = Callable[..., Path]
ADAPTERS = ("vllm", "sglang", "llama.cpp")  # those that are given adapters


@pytest.fixture(scope="module")
def run(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a final adapter of rank 4 and a checkpoint of rank 2, of other modules."""
    root = tmp_path_factory.mktemp("serving") / "my run"
    shutil.copytree(tiny.adapters["final"], root)
    shutil.copytree(tiny.adapters["checkpoint-10"], root / "checkpoint-10")
    return root


@pytest.fixture
def made(tiny: TinyRun, tmp_path: Path) -> Make:
    """Makes a bare adapter with other settings of PEFT's."""
    return lambda **config: build_adapter(tiny.base, tmp_path / "adapter", seed=3, **config)


def codes(command: ServeCommand) -> set[str]:
    """What is said of it."""
    return {finding.code for finding in command.findings}


def after(words: tuple[str, ...], option: str) -> list[str]:
    """What an option is given, up to the next one."""
    rest = words[words.index(option) + 1 :]
    ends = [place for place, word in enumerate(rest) if word.startswith("--")]
    return list(rest[: ends[0]] if ends else rest)


def test_vllm_is_given_every_adapter_by_its_name(run: Path, tiny: TinyRun) -> None:
    """With the least rank that vLLM has and that holds both, and a slot for each and one that stays empty."""
    command = ts.serve_command(run)
    words = command.serve
    assert words[:3] == ("vllm", "serve", str(tiny.base))
    assert "--enable-lora" in words
    assert after(words, "--served-model-name") == ["base"]
    assert after(words, "--host") == ["127.0.0.1"]
    assert after(words, "--max-loras") == ["3"]
    assert after(words, "--max-lora-rank") == ["8"]
    assert after(words, "--lora-modules") == [f"checkpoint-10={run / 'checkpoint-10'}", f"final={run}"]
    assert after(words, "--lora-target-modules") == ["down_proj", "o_proj", "q_proj", "v_proj"]
    assert command.compare == (
        *("tunesmith", "compare", str(run), "--endpoint", "http://127.0.0.1:8000/v1"),
        *("--model", "base", "--model", "checkpoint-10", "--model", "final"),
    )
    assert (command.before, command.files, command.after, command.left_out) == ((), (), (), ())
    assert command.findings == ()


def test_one_adapter_and_another_port(run: Path) -> None:
    """What was not asked for is not served."""
    command = ts.serve_command(run, checkpoints=[10], port=9001)
    assert after(command.serve, "--lora-modules") == [f"checkpoint-10={run / 'checkpoint-10'}"]
    assert after(command.serve, "--port") == ["9001"]
    assert command.url == "http://127.0.0.1:9001/v1"
    assert [one.name for one in command.variants] == ["base", "checkpoint-10"]
    with pytest.raises(RunError, match="no checkpoint-11"):
        ts.serve_command(run, checkpoints=["checkpoint-11"])


@pytest.mark.parametrize(("rank", "given"), [(1, "1"), (9, "16"), (65, "128"), (300, "320")])
def test_the_rank_is_one_that_vllm_takes(made: Make, rank: int, given: str) -> None:
    """It takes a few ranks only, and refuses an adapter above the one that is named."""
    assert after(ts.serve_command(made(r=rank)).serve, "--max-lora-rank") == [given]


def test_sglang_answers_by_base_and_name(run: Path) -> None:
    """By its bare name it would answer as the base, so the model is ``base:NAME``; the base has a slot too."""
    command = ts.serve_command(run, engine="sglang")
    assert command.serve[:3] == ("python", "-m", "sglang.launch_server")
    assert after(command.serve, "--lora-paths") == [f"checkpoint-10={run / 'checkpoint-10'}", f"final={run}"]
    assert after(command.serve, "--max-loras-per-batch") == ["3"]
    assert command.compare[-6:] == (
        *("--model", "base", "--model", "checkpoint-10=base:checkpoint-10", "--model", "final=base:final"),
    )


def test_llama_cpp_has_a_preset_a_variant(run: Path, tiny: TinyRun, tmp_path: Path) -> None:
    """One base file, an adapter file each, and a section that names both."""
    command = ts.serve_command(run, engine="llama.cpp", out=tmp_path / "out")
    out = tmp_path / "out"
    assert command.before == (
        ("mkdir", "-p", str(out)),
        ("tunesmith", "gguf", str(tiny.base), "--out", str(out / "base.gguf")),
        *(
            (
                *("tunesmith", "gguf", str(run), "--adapter-only", "--checkpoint", name),
                *("--out", str(out / f"{name}-lora.gguf")),
            )
            for name in ("checkpoint-10", "final")
        ),
    )
    (file,) = command.files
    ini = configparser.ConfigParser()
    ini.read_string("[top]\n" + file.text)
    assert {name: dict(ini[name]) for name in ini.sections() if name != "top"} == {
        "base": {"model": str(out / "base.gguf")},
        "checkpoint-10": {"model": str(out / "base.gguf"), "lora": str(out / "checkpoint-10-lora.gguf")},
        "final": {"model": str(out / "base.gguf"), "lora": str(out / "final-lora.gguf")},
    }
    assert after(command.serve, "--models-preset") == [file.path]
    assert after(command.serve, "--models-max") == ["3"]
    assert codes(command) == {"serve_router", "serve_without_scores"}


def test_ollama_has_a_whole_model_a_variant(run: Path, tmp_path: Path) -> None:
    """Merged, converted with a Modelfile, and made once it serves; names are such as Ollama takes."""
    command = ts.serve_command(run, engine="ollama", checkpoints=["final"], out=tmp_path, port=1234)
    folder = tmp_path / "final"
    assert ("tunesmith", "merge", str(run), "--checkpoint", "final", "--out", str(folder / "merged")) in command.before
    assert command.before[-1] == (
        *("tunesmith", "gguf", str(folder / "merged"), "--out", str(folder / "final.gguf"), "--ollama"),
    )
    assert command.serve == ("env", "OLLAMA_HOST=127.0.0.1:1234", "ollama", "serve")
    assert command.after[-1][-5:] == ("ollama", "create", "my-run-final", "-f", str(folder / "Modelfile"))
    assert command.compare[-2:] == ("--model", "final=my-run-final:latest")
    assert [one.kind for one in command.variants] == ["base", "merged"]


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({}, {}),
        ({"use_dora": True}, dict.fromkeys(ADAPTERS, "serve_cannot_dora")),
        ({"modules_to_save": ["lm_head"]}, dict.fromkeys(ADAPTERS, "serve_cannot_whole")),
        ({"trainable_token_indices": [3]}, dict.fromkeys(ADAPTERS, "serve_cannot_whole")),
        ({"lora_bias": True}, dict.fromkeys(ADAPTERS, "serve_cannot_bias")),
        ({"r": 513}, {"vllm": "serve_cannot_rank"}),
        ({"use_rslora": True}, {"sglang": "serve_cannot_scales"}),
        ({"alpha_pattern": {"q_proj": 16}}, {"sglang": "serve_cannot_scales"}),
        ({"rank_pattern": {"q_proj": 2}}, {"sglang": "serve_cannot_scales"}),
        ({"target_modules": ["q_proj", "embed_tokens"]}, {"llama.cpp": "serve_cannot_pairs"}),
        ({"target_modules": [], "target_parameters": ["mlp.down_proj.weight"]}, {"llama.cpp": "serve_cannot_pairs"}),
        (
            {"layer_replication": [[0, 2], [1, 2]]},
            dict.fromkeys(ADAPTERS, "serve_cannot_layers"),
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) and "vllm" in value else next(iter(value), "plain"),
)
def test_what_a_server_cannot_serve_is_left_out_with_the_way_around(
    made: Make, tmp_path: Path, config: dict[str, Any], refused: dict[str, str]
) -> None:
    """Refused or ignored by the server, it is the same: it would not answer as the model that was tuned."""
    adapter = made(**config)
    for engine in ENGINES:
        command = ts.serve_command(adapter, engine=engine, out=tmp_path / "out")
        said = {code for code in codes(command) if code.startswith("serve_cannot")}
        assert said == ({refused[engine]} if engine in refused else set()), engine
        beside = engine in ("llama.cpp", "ollama")
        assert command.left_out == (("final",) if engine in refused and not beside else ())
        names = [one.name for one in command.variants]
        assert names == (["base"] if command.left_out else ["base", "final"])
        merged = [words for words in command.before if words[1] == "merge"]
        if engine in refused and beside:
            assert "serve_merged" in codes(command)
            assert len(merged) == 1
        if command.left_out:
            (way,) = [one for one in command.findings if one.code == "serve_merge_instead"]
            assert shlex.split(str(way.params["merge"]))[:3] == ["tunesmith", "merge", str(adapter)]
            assert str(tmp_path / "out" / "final") in shlex.split(str(way.params["serve"]))
            assert "--enable-lora" not in command.serve
        assert all(ts.finding_text(one, lang) for one in command.findings for lang in ts.LANGUAGES)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("change", "code"),
    [({"init_lora_weights": "pissa"}, "serve_cannot_residual"), ({"use_qalora": True}, "serve_cannot_method")],
)
def test_what_cannot_be_merged_either_is_not_told_to_be(
    run: Path, tmp_path: Path, engine: Any, change: dict[str, Any], code: str
) -> None:
    """No way around is named that would end in an error; the other adapter is served."""
    own = Path(shutil.copytree(run, tmp_path / "own"))
    edit_json(own / "checkpoint-10" / "adapter_config.json", **change)
    command = ts.serve_command(own, engine=engine)
    assert command.left_out == ("checkpoint-10",)
    assert [one.name for one in command.variants] == ["base", "final"]
    assert not {"serve_merge_instead", "serve_merged"} & codes(command)
    assert code in codes(command)


def test_a_trained_bias_of_the_base_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    """``bias: all`` stores biases beside the factors."""
    adapter = Path(shutil.copytree(tiny.adapters["final"], tmp_path / "adapter"))
    edit_json(adapter / "adapter_config.json", bias="all")
    for engine in ("vllm", "sglang"):
        assert "serve_cannot_bias" in codes(ts.serve_command(adapter, engine=engine))


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"rank_pattern": {"q_proj": 2}}, "serve_patterns"),
        ({"target_modules": ["q_proj", "lm_head"]}, "serve_head_scores"),
        ({"target_modules": [], "target_parameters": ["mlp.down_proj.weight"]}, "serve_experts"),
    ],
)
def test_what_is_served_with_a_warning(made: Make, config: dict[str, Any], code: str) -> None:
    """It is served, and what is to be known of it is said."""
    command = ts.serve_command(made(**config))
    assert code in codes(command)
    assert command.left_out == ()
    # A list of modules would not name an expert's parameters.
    assert ("--lora-target-modules" in command.serve) == ("target_parameters" not in config)


def test_the_runs_own_template_is_the_servers(run: Path, tiny: TinyRun, tmp_path: Path) -> None:
    """Where it is another one than the base's, the server is given it; within another file it is told of."""
    own = Path(shutil.copytree(run, tmp_path / "own"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tiny.base / name).is_file():
            shutil.copy(tiny.base / name, own / name)
    assert "--chat-template" not in ts.serve_command(own).serve
    (own / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    for engine in ("vllm", "sglang"):
        command = ts.serve_command(own, engine=engine)
        assert after(command.serve, "--chat-template") == [str(own / "chat_template.jinja")]
        assert "serve_template" in codes(command)
    (file,) = ts.serve_command(own, engine="llama.cpp").files
    assert file.text.count(f"chat-template-file = {own / 'chat_template.jinja'}\n") == 3
    (own / "chat_template.jinja").unlink()
    edit_json(own / "tokenizer_config.json", chat_template="{{ messages[0].content }}!")
    command = ts.serve_command(own)
    assert "--chat-template" not in command.serve
    assert codes(command) == {"serve_template_inside"}


def test_a_hub_id_stays_one_where_a_server_fetches_it(run: Path) -> None:
    """With its revision; a converter needs the directory."""
    command = ts.serve_command(run, base="org/not-here@v2")
    assert command.serve[2] == "org/not-here"
    assert after(command.serve, "--revision") == ["v2"]
    assert command.compare[-2:] == ("--base", "org/not-here@v2")
    for engine in ("llama.cpp", "ollama"):
        with pytest.raises(BaseModelError):
            ts.serve_command(run, engine=engine, base="org/not-here")
    with pytest.raises(BaseModelError):
        ts.serve_command(run, base="./not-here")


def test_lines_are_taken_whole_by_a_shell(run: Path, tmp_path: Path) -> None:
    """Spaces, quotes, commas and dollars in names: a shell hands on what was meant, and writes the file that was."""
    own = Path(shutil.copytree(run, tmp_path / "it's $HOME, a run"))
    command = ts.serve_command(own)
    echo = f"{shlex.quote(sys.executable)} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "
    for words, line in ((command.serve, command.serve_line), (command.compare, command.compare_line)):
        heard = subprocess.run(["sh", "-c", echo + line], capture_output=True, text=True, check=True).stdout
        assert tuple(json.loads(heard)) == words
    # vLLM takes what holds a comma for JSON.
    assert json.loads(after(command.serve, "--lora-modules")[1]) == {"name": "final", "path": str(own)}
    presets = ts.serve_command(own, engine="llama.cpp", out=tmp_path)
    subprocess.run(["sh", "-c", presets.preparation[-1]], check=True)
    assert Path(presets.files[0].path).read_text() == presets.files[0].text


def test_the_record_is_read_back(run: Path, tmp_path: Path) -> None:
    """As any record."""
    command = ts.serve_command(run, engine="llama.cpp")
    assert ServeCommand.read(command.write(tmp_path / "serve.json")) == command


def test_what_is_none_is_refused(run: Path) -> None:
    """An engine that is none, and a port that is none."""
    with pytest.raises(DataError, match="no such engine") as caught:
        ts.serve_command(run, engine="tgi")  # type: ignore[arg-type]
    assert caught.value.expected == "vllm, sglang, llama.cpp, ollama"
    with pytest.raises(DataError, match="no port"):
        ts.serve_command(run, port=70000)


def test_nothing_of_torch_is_imported(run: Path) -> None:
    """Headers and configurations are enough."""
    code = (
        f"import sys, tunesmith as ts; ts.serve_command({str(run)!r}); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

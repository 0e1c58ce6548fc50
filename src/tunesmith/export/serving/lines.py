"""The lines of each server: flags that exist, names that are the variants', and what must be written before.

Sources: vLLM's ``engine/arg_utils.py`` of 0.32; SGLang's ``docs/advanced_features/lora``; llama.cpp's
``tools/server/README.md``, "Using multiple models"; Ollama's ``docs/modelfile.mdx``.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.adapter import Adapter
from tunesmith.export.serving.limits import VLLM_RANKS, highest_rank, mergeable, refusals, warnings
from tunesmith.export.serving.records import (
    ServeCommand,
    ServedVariant,
    ServeFile,
    ServingEngine,
    Source,
    compare_words,
    shell,
    tunesmith,
)
from tunesmith.record import Finding

PORTS: Mapping[ServingEngine, int] = {"vllm": 8000, "sglang": 30000, "llama.cpp": 8080, "ollama": 11434}
"""Where each listens unless told otherwise."""

_BASE = "base"
_HOST = "127.0.0.1"  # vLLM would else listen to everybody
_PRESET = "models.ini"


def serve_lines(engine: ServingEngine, source: Source) -> ServeCommand:
    """Say what is typed to serve the base and the adapters of a run by their names.

    Args:
        engine: the server's program.
        source: what is to be served, and where.

    Returns:
        The lines, with what the program cannot serve left out and said.
    """
    return _ENGINES[engine](source)


@dataclass
class _Sorted:
    """Adapters by what becomes of them."""

    served: dict[str, Adapter] = field(default_factory=dict)
    merged: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def _sort(source: Source, engine: ServingEngine, *, beside: bool) -> _Sorted:
    """Tell adapters that a server serves from those that it does not.

    Args:
        source: the adapters.
        engine: the server's program.
        beside: whether merged models can be served beside the base.
    """
    sorted_ = _Sorted()
    for name, adapter in source.adapters.items():
        refused = refusals(adapter, name, engine)
        sorted_.findings += refused
        if not refused:
            sorted_.served[name] = adapter
            sorted_.findings += warnings(adapter, name, engine)
        elif beside and mergeable(adapter):
            sorted_.merged.append(name)
            sorted_.findings.append(Finding(code="serve_merged", severity="info", params={"variant": name}))
        else:
            sorted_.left_out.append(name)
    return sorted_


def _vllm(source: Source) -> ServeCommand:
    sorted_ = _sort(source, "vllm", beside=False)
    words = ["vllm", "serve", source.base, *_options(source, name=_BASE, port=source.port)]
    if sorted_.served:
        rank = max(map(highest_rank, sorted_.served.values()))
        # One slot more than adapters: on CPUs, vLLM 0.32 gives prompts of the base that run beside others the update of
        # the last slot (vllm-project/vllm, pull requests 48421 and 49656), which so stays empty.
        words += ["--enable-lora", "--max-loras", str(len(sorted_.served) + 1)]
        words += ["--max-lora-rank", str(next(one for one in VLLM_RANKS if one >= rank))]
        words += [*_vllm_targets(sorted_.served.values()), "--lora-modules"]
        words += [_vllm_module(name, adapter.path.absolute()) for name, adapter in sorted_.served.items()]
    variants = [ServedVariant(name=_BASE, model=_BASE, kind="base")]
    variants += [ServedVariant(name=name, model=name, kind="adapter") for name in sorted_.served]
    return _adapters_beside_a_base(source, "vllm", words, variants, sorted_)


def _vllm_targets(adapters: Iterable[Adapter]) -> list[str]:
    """Which modules may have adapters, where all are plain layers.

    vLLM else makes room for one on ``lm_head``, and then two prompts whose log-probabilities are asked for at once end
    the server (seen with 0.32 on a CPU; vllm-project/vllm, issues 16668 and 29955).
    """
    modules = [one for adapter in adapters for one in adapter.adapted]
    if any(one.parameter is not None or one.stacked > 1 for one in modules):
        return []
    return ["--lora-target-modules", *sorted({one.module.rpartition(".")[2] for one in modules})]


def _vllm_module(name: str, path: Path) -> str:
    """``NAME=PATH``; vLLM takes what holds a comma for JSON."""
    plain = f"{name}={path}"
    return json.dumps({"name": name, "path": str(path)}) if "," in plain else plain


def _sglang(source: Source) -> ServeCommand:
    sorted_ = _sort(source, "sglang", beside=False)
    words = ["python", "-m", "sglang.launch_server", "--model-path", source.base]
    words += _options(source, name=_BASE, port=source.port)
    if sorted_.served:
        slots = len(sorted_.served) + 1  # the base has one of its own
        words += ["--enable-lora", "--max-loras-per-batch", str(slots), "--lora-paths"]
        words += [f"{name}={adapter.path.absolute()}" for name, adapter in sorted_.served.items()]
    variants = [ServedVariant(name=_BASE, model=_BASE, kind="base")]
    # By its bare name SGLang answers as the base.
    variants += [ServedVariant(name=name, model=f"{_BASE}:{name}", kind="adapter") for name in sorted_.served]
    return _adapters_beside_a_base(source, "sglang", words, variants, sorted_)


def _options(source: Source, *, name: str, port: int, merged: bool = False) -> list[str]:
    """What vLLM and SGLang call the same."""
    words = ["--served-model-name", name, "--host", _HOST, "--port", str(port)]
    if source.revision is not None and not merged:
        words += ["--revision", source.revision]
    if source.template is not None and not merged:
        words += ["--chat-template", str(source.template)]
    return words


def _adapters_beside_a_base(
    source: Source, engine: ServingEngine, words: list[str], variants: list[ServedVariant], sorted_: _Sorted
) -> ServeCommand:
    findings = list(sorted_.findings)
    for place, name in enumerate(filter(lambda one: mergeable(source.adapters[one]), sorted_.left_out), 1):
        target = source.out / name
        begin = ["vllm", "serve"] if engine == "vllm" else ["python", "-m", "sglang.launch_server", "--model-path"]
        alone = [*begin, str(target), *_options(source, name=name, port=source.port + place, merged=True)]
        params = {"variant": name, "merge": shlex.join(_merge(source, name, target)), "serve": shlex.join(alone)}
        findings.append(Finding(code="serve_merge_instead", severity="info", params=params))
    url = f"http://{_HOST}:{source.port}/v1"
    return ServeCommand(
        engine=engine,
        url=url,
        variants=tuple(variants),
        left_out=tuple(sorted_.left_out),
        serve=tuple(words),
        compare=compare_words(source, url, variants),
        findings=tuple(findings),
    )


def _llama_cpp(source: Source) -> ServeCommand:
    """One server that starts one process a variant: with ``--lora`` alone, all would go by one name."""
    sorted_ = _sort(source, "llama.cpp", beside=True)
    base = source.out / "base.gguf"
    files: dict[str, tuple[Path, Path | None]] = {_BASE: (base, None)}
    before = [shell("mkdir", "-p", source.out), tunesmith("gguf", source.base_dir or source.base, "--out", base)]
    for name in sorted_.served:
        lora = source.out / f"{name}-lora.gguf"
        words = (source.run, "--adapter-only", "--checkpoint", name, "--out", lora)
        before.append(tunesmith("gguf", *words, base=source.base_option))
        files[name] = base, lora
    for name in sorted_.merged:
        target, whole = source.out / f"{name}-merged", source.out / f"{name}.gguf"
        before += [_merge(source, name, target), tunesmith("gguf", target, "--out", whole)]
        files[name] = whole, None
    kinds = {_BASE: "base", **dict.fromkeys(sorted_.served, "adapter"), **dict.fromkeys(sorted_.merged, "merged")}
    variants = [ServedVariant.model_validate({"name": name, "model": name, "kind": kinds[name]}) for name in files]
    preset = source.out / _PRESET
    url = f"http://{_HOST}:{source.port}/v1"
    notes = [Finding(code="serve_router", severity="info"), _without_scores("llama.cpp")]
    return ServeCommand(
        engine="llama.cpp",
        url=url,
        variants=tuple(variants),
        left_out=tuple(sorted_.left_out),
        before=tuple(before),
        files=(ServeFile(path=str(preset), text=_ini(files, source.template)),),
        serve=shell(
            *("llama-server", "--models-preset", preset, "--models-max", len(variants)),
            *("--host", _HOST, "--port", source.port),
        ),
        compare=compare_words(source, url, variants),
        findings=(*sorted_.findings, *notes),
    )


def _ini(files: Mapping[str, tuple[Path, Path | None]], template: Path | None) -> str:
    """The presets: a section a variant, whose keys are the server's own options."""
    lines = ["version = 1"]
    for name, (model, lora) in files.items():
        lines += ["", f"[{name}]", f"model = {model}"]
        lines += [f"lora = {lora}"] if lora is not None else []
        lines += [f"chat-template-file = {template}"] if template is not None else []
    return "\n".join(lines) + "\n"


def _ollama(source: Source) -> ServeCommand:
    """Whole models: an Ollama that runs a model by its own engine takes an adapter and fails at the first question."""
    left_out = [name for name, adapter in source.adapters.items() if not mergeable(adapter)]
    findings = [one for name in left_out for one in refusals(source.adapters[name], name, "ollama")]
    before: list[tuple[str, ...]] = []
    after: list[tuple[str, ...]] = []
    variants: list[ServedVariant] = []
    for name in (_BASE, *(one for one in source.adapters if one not in left_out)):
        folder, model = source.out / name, source.base_dir or source.base
        before.append(shell("mkdir", "-p", folder))
        if name != _BASE:
            model = folder / "merged"
            before.append(_merge(source, name, Path(model)))
        before.append(tunesmith("gguf", model, "--out", folder / f"{name}.gguf", "--ollama"))
        called = _ollama_name(f"{source.run_name}-{name}")
        after.append(shell("ollama", "create", called, "-f", folder / "Modelfile"))
        kind = "base" if name == _BASE else "merged"
        variants.append(ServedVariant.model_validate({"name": name, "model": f"{called}:latest", "kind": kind}))
    url = f"http://{_HOST}:{source.port}/v1"
    findings += [Finding(code="serve_whole_models", severity="info"), _without_scores("ollama")]
    host = [f"OLLAMA_HOST={_HOST}:{source.port}"] if source.port != PORTS["ollama"] else []
    return ServeCommand(
        engine="ollama",
        url=url,
        variants=tuple(variants),
        left_out=tuple(left_out),
        before=tuple(before),
        serve=shell(*(["env", *host] if host else []), "ollama", "serve"),
        after=tuple(shell("env", *host, *words) if host else words for words in after),
        compare=compare_words(source, url, variants),
        findings=tuple(findings),
    )


def _ollama_name(text: str) -> str:
    """A name that Ollama takes: letters, digits, dots, dashes; the first no mark."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._") or "model"


def _merge(source: Source, name: str, target: Path) -> tuple[str, ...]:
    return tunesmith("merge", source.run, "--checkpoint", name, "--out", target, base=source.base_option)


def _without_scores(engine: ServingEngine) -> Finding:
    return Finding(code="serve_without_scores", severity="info", params={"engine": engine})


_ENGINES = {"vllm": _vllm, "sglang": _sglang, "llama.cpp": _llama_cpp, "ollama": _ollama}

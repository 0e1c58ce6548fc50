"""``serve_command``: what is typed to serve a run's base and checkpoints by their names, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith.adapter import Adapter
from tunesmith.api.places import StrPath
from tunesmith.checkpoint import is_file, is_hub_id, local_target, locate_base, read_json_object
from tunesmith.errors import BaseModelError, DataError
from tunesmith.export.serving import ENGINES, PORTS, ServeCommand, ServingEngine, Source, serve_lines
from tunesmith.record import Finding
from tunesmith.runs import Run, RunCheckpoint, as_run, checkpoint_of, tokenizer_dir

_TEMPLATE_FILE = "chat_template.jinja"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_NEED_A_DIRECTORY = ("llama.cpp", "ollama")


def serve_command(
    run: Run | StrPath,
    *,
    engine: ServingEngine = "vllm",
    base: str | None = None,
    checkpoints: Sequence[str | int] | None = None,
    port: int | None = None,
    out: StrPath | None = None,
) -> ServeCommand:
    """Say what is typed to serve the base and the checkpoints of a run by their names, and to compare them there.

    Nothing is run, written or loaded: headers and configurations are read.  What the program would serve otherwise than
    it was tuned is left out, and the findings say why and what to do instead.

    Args:
        run: a run, or its directory.
        engine: ``vllm``, ``sglang``, ``llama.cpp`` or ``ollama``.
        base: the base model; None for the one that the adapter names.
        checkpoints: which adapters: ``final``, ``checkpoint-N`` or ``N``; None for all.
        port: where the server is to listen, on this machine only; None for the program's usual one.
        out: the directory for what must be written before (GGUF files, merged models); None for one beside the run.

    Raises:
        DataError: there is no such engine, or no such port.
        RunError: the run has no such adapter.
        BaseModelError: the base is named nowhere, or cannot be found.
        AdapterError: an adapter cannot be read.
    """
    if engine not in ENGINES:
        raise DataError("There is no such engine.", expected=", ".join(ENGINES), found=engine)
    if port is not None and not 0 < port < 1 << 16:
        raise DataError("This is no port.", expected="1 to 65535", found=port)
    run = as_run(run)
    chosen = [checkpoint_of(run, name) for name in checkpoints] if checkpoints else list(run.checkpoints)
    adapters = {one.name: Adapter(one.path) for one in chosen}
    served_as, revision, directory = _base(run, base or adapters[chosen[-1].name].base_model, engine)
    template, findings = _template(run, chosen[-1], directory)
    root = Path(run.path)
    command = serve_lines(
        engine,
        Source(
            run=root,
            run_name=run.name.rpartition("/")[2],
            adapters=adapters,
            base=served_as,
            base_dir=directory,
            base_option=base,
            revision=revision,
            template=template if engine != "ollama" else None,
            port=port or PORTS[engine],
            out=local_target(out).absolute() if out is not None else root.parent / f"{root.name}-{engine}",
        ),
    )
    return command.model_copy(update={"findings": (*command.findings, *findings)})


def _base(run: Run, name: str | None, engine: ServingEngine) -> tuple[str, str | None, Path | None]:
    """The base as a server is told it, its revision, and its directory where that is at hand."""
    if name is None:
        raise BaseModelError(
            "The adapter names no base model.", where=run.path, next_step="pass --base with the model that was tuned"
        )
    directory: Path | None = None
    try:
        directory = locate_base(name, relative_to=Path(run.path).parent, fetch=False).absolute()
    except BaseModelError:  # a server fetches it itself; a converter does not
        if not is_hub_id(name) or engine in _NEED_A_DIRECTORY:
            raise
    on_hub = directory is None or directory.parent.name == "snapshots"
    if not (on_hub and is_hub_id(name)):
        return str(directory), None, directory
    repository, _, revision = name.partition("@")
    return repository, revision or None, directory


def _template(run: Run, checkpoint: RunCheckpoint, base_dir: Path | None) -> tuple[Path | None, list[Finding]]:
    """The run's own chat template, where the server would not use the same one."""
    place = tokenizer_dir(run, checkpoint, base_dir or Path(run.path))
    if place is None or place == base_dir:
        return None, []
    own, bases = _template_text(place), _template_text(base_dir) if base_dir is not None else None
    if own is None or own == bases:
        return None, []
    if is_file(place / _TEMPLATE_FILE):
        params = {"file": str(place.absolute() / _TEMPLATE_FILE)}
        return place.absolute() / _TEMPLATE_FILE, [Finding(code="serve_template", severity="info", params=params)]
    params = {"file": str(place / _TOKENIZER_CONFIG)}
    return None, [Finding(code="serve_template_inside", severity="warning", params=params)]


def _template_text(folder: Path) -> str | None:
    if is_file(folder / _TEMPLATE_FILE):
        return (folder / _TEMPLATE_FILE).read_text(encoding="utf-8", errors="replace").strip()
    if is_file(folder / _TOKENIZER_CONFIG):
        template = read_json_object(folder / _TOKENIZER_CONFIG).get("chat_template")
        return template.strip() if isinstance(template, str) else None
    return None

"""Engines over a run's variants: loaded here, or asked of a server, and what they were asked before remembered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path

from tunesmith.adapter import ADAPTER_CONFIG
from tunesmith.api.places import StrPath, base_of
from tunesmith.checkpoint import CONFIG_FILE, cache_dir, local_target
from tunesmith.compare import VariantInfo
from tunesmith.errors import BaseModelError, Cancelled, DataError, RunError, TunesmithError
from tunesmith.models import (
    BASE,
    PARALLEL,
    ComputeDtype,
    Endpoint,
    Engine,
    Generation,
    LocalEngine,
    Prompt,
    RememberingEngine,
    RenderedPrompt,
    VariantSet,
)
from tunesmith.models import compute_dtype as measure_compute_dtype
from tunesmith.progress import ProgressCallback, no_progress
from tunesmith.record import Record
from tunesmith.runs import FINAL, Run, as_run, checkpoint_of, tokenizer_dir


class ChatTurn(Record):
    """One question and its answer.

    Attributes:
        variant: who answered.
        question: the last user turn.
        text: the answer, without special tokens.
        tokens: generated tokens, the end-of-turn token included.
        prompt_tokens: tokens of the prompt; None where a server does not tell.
        stop_reason: ``eos``, ``length``, ``stop`` or ``cancelled``.
        seconds: from the question to the last token.
        time_to_first_token_s: from the question to the first token; None where there is none.
        tokens_per_s: after the first token; None below two tokens.
        prompt: the prompt as the model was given it, where that was asked for.
        prompt_token_ids: its tokens, likewise.
    """

    variant: str
    question: str
    text: str
    tokens: int
    prompt_tokens: int | None
    stop_reason: str
    seconds: float
    time_to_first_token_s: float | None
    tokens_per_s: float | None
    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls, variant: str, question: str, generation: Generation, rendered: RenderedPrompt | None = None
    ) -> ChatTurn:
        """The turn that a generation is.

        Args:
            variant: who answered.
            question: the last user turn.
            generation: the answer.
            rendered: the prompt as the model was given it, where that is to be shown.
        """
        return cls(
            variant=variant,
            question=question,
            text=generation.text,
            tokens=generation.tokens,
            prompt_tokens=generation.prompt_tokens,
            stop_reason=generation.stop_reason,
            seconds=generation.seconds,
            time_to_first_token_s=generation.time_to_first_token_s,
            tokens_per_s=generation.tokens_per_s,
            prompt=rendered.text if rendered else None,
            prompt_token_ids=rendered.token_ids if rendered else None,
        )


def compute_dtype(requested: str = "auto") -> ComputeDtype:
    """The dtype that this machine computes in: measured once, kept in the user's cache.

    Args:
        requested: ``auto``, or a dtype that is taken as it is.
    """
    return measure_compute_dtype(requested, cache_dir=cache_dir())


def load_engine(
    run: Run | StrPath,
    names: Sequence[str] = (FINAL,),
    *,
    base: str | None = None,
    dtype: str = "auto",
    quantization: str | None = None,
    endpoint: str | Sequence[str] | None = None,
    models: Sequence[str] = (),
    parallel: int = PARALLEL,
    executor: Executor | None = None,
    memory_budget_bytes: int | None = None,
    progress: ProgressCallback = no_progress,
) -> tuple[Engine, list[VariantInfo]]:
    """Load variants of one base, its weights once, or turn to a server that holds them.

    Args:
        run: a run, or its directory.
        names: ``base``, ``final``, ``checkpoint-N`` or ``N``, the directory of another adapter or run of the same base,
            or of a complete model; ``NAME=DIR`` gives a directory a name of its own.  Not used with an endpoint.
        base: the base model; None for the one that the adapter names.
        dtype: of the arithmetic; ``auto`` is measured.
        quantization: quantize every model while it is loaded, by bitsandbytes: ``nf4``, ``fp4`` or ``int8``; adapters
            stay as they are.  None leaves models as they are.
        endpoint: address of an OpenAI-compatible server, such as ``http://localhost:8000/v1``; several addresses of
            servers that hold the same models, which share the work.
        models: the server's models: ``NAME=MODEL`` where the variant is to have another name than the model.
        parallel: how many requests are in flight at each server.
        executor: whose workers ask the servers, a Ray cluster's, as :func:`executor_of` gives it; None for this
            process.
        memory_budget_bytes: what complete models may take together; None for half of the memory that is free.
        progress: told of what is loaded.

    Returns:
        The engine, and what each variant is, in order.

    Raises:
        DataError: no name is given, or one twice.
        RunError: the run has no such adapter.
        BaseModelError: the base cannot be found, or not be loaded so.
        MissingExtraError: what quantizes is not installed.
        TunesmithError: an executor without a server, or that is not of a Ray cluster.
    """
    run = as_run(run, progress=progress)
    endpoints = [endpoint] if isinstance(endpoint, str) else list(endpoint or ())
    if endpoints:
        if quantization is not None:
            raise DataError(
                "How a server loads its models is for its own command line.",
                where=", ".join(endpoints),
                found=f"--quantization {quantization}",
                next_step="leave --quantization out",
            )
        return _ask_servers(run, endpoints, models, base, parallel=parallel, executor=executor)
    if executor is not None:
        raise TunesmithError(
            "An executor runs requests to servers only.",
            next_step="pass --endpoint with a server's address, or leave --executor out",
        )
    if models:
        raise DataError("A model of a server is named, but no server.", next_step="pass --endpoint with its address")
    variants, infos = load_variants(
        run,
        names,
        base=base,
        dtype=dtype,
        quantization=quantization,
        memory_budget_bytes=memory_budget_bytes,
        progress=progress,
    )
    return LocalEngine(variants), infos


@contextmanager
def attached_variant(engine: Engine, run: Run | StrPath, name: str) -> Iterator[VariantInfo]:
    """Have one more adapter beside those that an engine holds; its base is not loaded again.

    Args:
        engine: a local one.
        run: the run that it was loaded for, or its directory.
        name: as for :func:`load_engine`, of an adapter.

    Yields:
        What the variant is; the engine answers for it by its name until the block ends.

    Raises:
        DataError: a server, a name that is taken, or a model of its own rather than an adapter.
        RunError: the run has no such adapter.
        AdapterError: it does not fit the base, or not beside the others.
    """
    info = _info(as_run(run), name, Path())
    if not isinstance(engine, LocalEngine) or info.kind != "adapter":
        raise DataError("Only an adapter can be put beside others.", where=engine.capabilities.where, found=name)
    with engine.variants.attached(info.name, info.path):
        yield info


def rendered_prompt(engine: Engine, variant: str, prompt: Prompt) -> RenderedPrompt:
    """What a variant is really given for a prompt: the chat template's rendering and its token ids.

    Raises:
        DataError: no such variant, no chat template, or a server, which renders prompts out of sight.
    """
    if not isinstance(engine, LocalEngine):
        raise DataError("A server renders prompts itself, and does not show how.", where=engine.capabilities.where)
    return engine.render(variant, prompt)


def load_variants(
    run: Run,
    names: Sequence[str],
    *,
    base: str | None,
    dtype: str,
    quantization: str | None = None,
    memory_budget_bytes: int | None = None,
    progress: ProgressCallback = no_progress,
) -> tuple[VariantSet, list[VariantInfo]]:
    """The variants themselves: see :func:`load_engine`."""
    if not names:
        raise DataError("No variant is named.", expected="base, final, checkpoint-N, or a merged model's directory")
    base_name, base_dir = base_of(run, run.checkpoints[-1], base, progress=progress)
    infos = [_info(run, name, base_dir) for name in names]
    asked = {info.path for info in infos if info.kind == "adapter"}
    own = [one for one in run.checkpoints if one.path in asked]  # whatever they are called here
    tokens = tokenizer_dir(run, own[-1] if own else run.checkpoints[-1], base_dir)
    if tokens is None:
        raise BaseModelError("Neither the run nor the base holds a tokenizer.", where=run.path, found=base_name)
    compute = compute_dtype(dtype)
    variants = VariantSet.load(
        base_dir,
        adapters=_paths(infos, "adapter"),
        full=_paths(infos, "full"),
        tokenizer_dir=tokens,
        dtype=compute.dtype,
        device=compute.device,
        quantization=quantization,
        memory_budget_bytes=memory_budget_bytes,
        progress=progress,
    )
    return variants, infos


def remembering(engine: Engine, records: StrPath | None, *, fresh: bool) -> RememberingEngine:
    """An engine that keeps what it answers, and goes on where it stopped.

    Args:
        engine: who answers.
        records: the directory of what is kept; None for the user's cache.
        fresh: ask again, whatever is there.
    """
    directory = local_target(records) if records is not None else cache_dir() / "answers"
    return RememberingEngine(engine, directory, named=records is not None, fresh=fresh)


@contextmanager
def kept(engine: RememberingEngine) -> Iterator[None]:
    """Say of work that was stopped what is kept of it."""
    try:
        yield
    except Cancelled as error:
        if engine.written:
            raise Cancelled(f"{engine.written} results are kept; the same command goes on from there.") from error
        raise


def _ask_servers(
    run: Run,
    endpoints: Sequence[str],
    models: Sequence[str],
    base: str | None,
    *,
    parallel: int,
    executor: Executor | None,
) -> tuple[Engine, list[VariantInfo]]:
    named = [_named(model) for model in models]
    if not named:
        raise DataError(
            "No model of the server is named.",
            where=", ".join(endpoints),
            next_step="pass --model with its name; repeat for more",
        )
    infos = [VariantInfo(name=name or model, kind="endpoint", path=model) for name, model in named]
    _refuse_twice(infos)
    try:
        _, base_dir = base_of(run, run.checkpoints[-1], base, fetch=False)
    except BaseModelError:  # the server has it; only its template would have been of use, to score
        base_dir = Path(run.path)
    tokens = tokenizer_dir(run, run.checkpoints[-1], base_dir)
    engine = Endpoint(
        endpoints,
        models={info.name: info.path for info in infos},
        parallel=parallel,
        tokenizer_dir=tokens,
        executor=executor,
    )
    return engine, infos


def _info(run: Run, name: str, base_dir: Path) -> VariantInfo:
    """What a name stands for; the run's own checkpoints go before directories."""
    label, place = _named(name)
    if place == BASE and label is None:
        return VariantInfo(name=BASE, kind="base", path=str(base_dir))
    if label is None:
        try:
            chosen = checkpoint_of(run, place)
            return VariantInfo(name=chosen.name, kind="adapter", path=chosen.path)
        except RunError:
            if not Path(place).is_dir():
                raise
    path = Path(place)
    label = label or path.resolve().name
    if (path / ADAPTER_CONFIG).is_file():
        return VariantInfo(name=label, kind="adapter", path=place)
    if (path / CONFIG_FILE).is_file():
        return VariantInfo(name=label, kind="full", path=place)
    return VariantInfo(name=label, kind="adapter", path=as_run(path).checkpoints[-1].path)


def _named(name: str) -> tuple[str | None, str]:
    """``NAME=REST`` in two; a name alone is the rest."""
    label, equals, rest = name.partition("=")
    return (label.strip(), rest.strip()) if equals and label.strip() and rest.strip() else (None, name)


def _paths(infos: Sequence[VariantInfo], kind: str) -> dict[str, str]:
    _refuse_twice(infos)
    return {info.name: info.path for info in infos if info.kind == kind}


def _refuse_twice(infos: Sequence[VariantInfo]) -> None:
    names = [info.name for info in infos]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            "Two variants have the same name.", found=", ".join(twice), next_step="name one of them: NAME=DIR"
        )

"""What a fine-tune becomes for others, as jobs: merged, quantized, held against the adapter, GGUF, on a hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

import tunesmith as ts
from tunesmith.web.answers import RequestError
from tunesmith.web.places import Places
from tunesmith.web.work import (
    Desk,
    OfRun,
    Params,
    Reporter,
    Text,
    Verb,
    Work,
    command,
    given,
    is_occupied,
    maybe,
    record_from,
    run_and_base,
    shown,
)
from tunesmith.web.workers import worker_processes

Level = Literal["structure", "assets", "weights", "behaviour"]
_NOT_IN_A_PLAN = {"binding", "shards", "assets", "index", "quantized"}
_LONGEST_CARD = 200_000
_TYPED_CARD = "card.md"


class MergeParams(OfRun):
    """A merge; as for ``ts.plan_merge``.

    Attributes:
        dry_run: only tell what it would do.
        force: replace ``out`` where it is not empty.
    """

    out: Text
    checkpoint: Text | None = None
    dtype: Text | None = None
    rounding: Text | None = None
    shard_size: Text | None = None
    dry_run: bool = False
    force: bool = False


class QuantizeParams(Params):
    """A quantization; as for ``ts.plan_quantization``.

    Attributes:
        run: whose base and adapter are rounded once; or
        directory: a whole model.
        base_view: how a run's base is seen, as QLoRA training saw it; None for as it is stored.
        dry_run: only tell what it would do.
        force: replace ``out`` where it is not empty.
    """

    run: Text | None = None
    directory: Text | None = None
    base: Text | None = None
    out: Text
    checkpoint: Text | None = None
    scheme: Text | None = None
    rounding: Text | None = None
    calibration: Text | None = None
    base_view: Text | None = None
    dry_run: bool = False
    force: bool = False


class DriftParams(OfRun):
    """Exports against the live adapter; as for ``ts.drift``, or ``ts.compare_schemes``, which leaves no model.

    Attributes:
        directories: merged and quantized models; or
        schemes: those that are made for the comparison alone.
        rounding: of the schemes.
    """

    checkpoint: Text | None = None
    directories: Annotated[tuple[Text, ...], Field(max_length=16)] = ()
    schemes: Annotated[tuple[Text, ...], Field(max_length=16)] = ()
    rounding: Text | None = None
    calibration: Text | None = None
    data: Text | None = None
    max_rows: Annotated[int, Field(ge=2, le=100_000)] | None = None


class GgufParams(Params):
    """A GGUF file; as for ``ts.write_gguf``, and then ``ts.verify_gguf``.

    Attributes:
        directory: a merged model; or
        run: whose adapter alone is written, with ``adapter_only``.
        verify: False leaves the proof out.
        force: replace files that are there.
    """

    directory: Text | None = None
    run: Text | None = None
    base: Text | None = None
    checkpoint: Text | None = None
    out: Text
    type: Text | None = None
    adapter_only: bool = False
    ollama: bool = False
    verify: bool | None = None
    force: bool = False


class VerifyGgufParams(Params):
    """The proof of a GGUF file; as for ``ts.verify_gguf``.

    Attributes:
        directory: the model that it was made from; of an adapter's file, the run.
        file: the file.
    """

    directory: Text
    file: Text
    base: Text | None = None
    checkpoint: Text | None = None
    levels: tuple[Level, ...] | None = None


class PushParams(Params):
    """What goes up to a hub; as for ``ts.plan_push``, but that the hub's address is the server's own.

    Attributes:
        card: a file that becomes the card; or
        card_text: a card that was typed.
        evaluation_job: the job whose evaluation the card shows.
        drift_job: the job whose drift has a row of the directory, which the card shows.
        dry_run: only tell what would go up.
        plan_job: the dry run whose plan is carried out: nothing is sent but what was shown.
    """

    directory: Text
    repo_id: Text
    to: Text | None = None
    private: bool = False
    revision: Text | None = None
    unverified: bool = False
    replace: bool = False
    run: Text | None = None
    model: Text | None = None
    base_model: Text | None = None
    licence: Text | None = None
    data: Text | None = None
    card: Text | None = None
    card_text: Annotated[str, Field(min_length=1, max_length=_LONGEST_CARD)] | None = None
    language: Text | None = None
    evaluation_job: Text | None = None
    drift_job: Text | None = None
    dry_run: bool = False
    plan_job: Text | None = None


def _merge(params: MergeParams, places: Places, _: Desk) -> Work:
    run, base = run_and_base(params, places)
    out = places.resolve(params.out, must_exist=False)
    names = ("checkpoint", "dtype", "rounding", "shard_size")
    asked = given(ts.plan_merge, **{name: getattr(params, name) for name in names})

    def plan(job: Reporter, force: bool) -> ts.MergePlan:
        return ts.plan_merge(run, out, base=base, **asked, force=force, progress=job.progress)

    line = command(
        "merge",
        places.shown(run),
        out=places.shown(out),
        base=shown(places, base),
        **asked,
        force=params.force,
        dry_run=params.dry_run,
    )
    return _planned_work(line, params, out, plan=plan, do=ts.merge)


def _quantize(params: QuantizeParams, places: Places, _: Desk) -> Work:
    _one_of(run=params.run, directory=params.directory)
    source = places.run(params.run) if params.run is not None else str(places.resolve(params.directory or ""))
    base = places.base(params.base, run=source)
    out = places.resolve(params.out, must_exist=False)
    calibration = maybe(places, params.calibration)
    names = ("checkpoint", "scheme", "rounding", "base_view")
    asked = given(ts.plan_quantization, **{name: getattr(params, name) for name in names})

    def plan(job: Reporter, force: bool) -> ts.QuantizationPlan:
        return ts.plan_quantization(
            source, out, base=base, **asked, calibration=calibration, force=force, progress=job.progress
        )

    line = command(
        "quantize",
        places.shown(source),
        out=places.shown(out),
        base=shown(places, base),
        **asked,
        calibration=shown(places, calibration),
        force=params.force,
        dry_run=params.dry_run,
    )
    return _planned_work(line, params, out, plan=plan, do=ts.quantize)


def _planned_work(
    line: str,
    params: MergeParams | QuantizeParams,
    out: Path,
    *,
    plan: Callable[[Reporter, bool], Any],
    do: Callable[..., Any],
) -> Work:
    """A plan that is only shown, or carried out by processes of its own."""
    occupied = is_occupied(out)

    def call(job: Reporter) -> Any:
        # A plan may be looked at where the target is not empty; that is one of the things it tells.
        made = plan(job, params.force or (params.dry_run and occupied))
        if params.dry_run:
            return made
        with worker_processes(made.write_bytes) as executor:
            return do(made, executor=executor, progress=job.progress, cancellation=job.cancellation)

    return Work(
        command=line,
        call=call,
        needs_model=_calibrates(params),
        result=(lambda made: planned(made, occupied=occupied)) if params.dry_run else _written,
    )


def _drift(params: DriftParams, places: Places, _: Desk) -> Work:
    _one_of(directories=params.directories or None, schemes=params.schemes or None)
    run, base = run_and_base(params, places)
    directories = [places.variant(name) for name in params.directories]
    data, calibration = maybe(places, params.data), maybe(places, params.calibration)
    asked = given(ts.drift, checkpoint=params.checkpoint, max_rows=params.max_rows)
    rounding = given(ts.plan_quantization, rounding=params.rounding)
    if directories and (rounding or calibration):
        raise RequestError("Models that are there are not rounded anew.", where="rounding, calibration")
    words = [*map(places.shown, directories)]
    line = command(
        "drift" if directories else "quantize",
        places.shown(run),
        *words,
        compare=",".join(params.schemes) or None,
        base=shown(places, base),
        data=shown(places, data),
        calibration=shown(places, calibration),
        **asked,
        **rounding,
    )

    def call(job: Reporter) -> Any:
        rest = {"base": base, "data": data, **asked, "progress": job.progress, "cancellation": job.cancellation}
        if directories:
            return ts.drift(run, directories, **rest)
        made: dict[str, Any] = {"roundings": tuple(rounding.values())} if rounding else {}
        return ts.compare_schemes(run, params.schemes, calibration=calibration, **made, **rest)

    return Work(command=line, call=call, result=_drifted)


def _gguf(params: GgufParams, places: Places, _: Desk) -> Work:
    _one_of(directory=params.directory, run=params.run)
    if (params.run is not None) != params.adapter_only:
        raise RequestError(
            "A GGUF file is made of a merged model, or with adapter_only of a run.", where="directory, run"
        )
    source = places.run(params.run) if params.run is not None else str(places.resolve(params.directory or ""))
    out = places.resolve(params.out, must_exist=False)
    base = places.base(params.base, run=source)
    about = {"base": base, **given(ts.write_gguf, checkpoint=params.checkpoint)}
    kind = given(ts.write_gguf, type=params.type)
    proves = params.verify is not False

    def call(job: Reporter) -> ts.GgufOutcome:
        told: dict[str, Any] = {"progress": job.progress, "cancellation": job.cancellation}
        export = ts.write_gguf(
            source,
            out,
            **kind,
            **about,
            adapter_only=params.adapter_only,
            ollama=params.ollama,
            force=params.force,
            **told,
        )
        verdict = ts.verify_gguf(source, out, **about, **told) if proves else None
        return ts.GgufOutcome(export=export, verdict=verdict)

    line = command(
        "gguf",
        places.shown(source),
        out=places.shown(out),
        **kind,
        adapter_only=params.adapter_only,
        **{**about, "base": shown(places, base)},
        ollama=params.ollama,
        no_verify=not proves,
        force=params.force,
    )
    return Work(command=line, call=call, needs_model=proves and not params.adapter_only)


def _verify_gguf(params: VerifyGgufParams, places: Places, _: Desk) -> Work:
    source, file = places.run(params.directory), places.resolve(params.file)
    base = places.base(params.base, run=source)
    asked = given(ts.verify_gguf, checkpoint=params.checkpoint)
    levels = params.levels or None
    line = command(
        "gguf", places.shown(source), check=places.shown(file), base=shown(places, base), **asked, level=levels
    )
    return Work(
        command=line,
        call=lambda job: ts.verify_gguf(
            source, file, base=base, **asked, levels=levels, progress=job.progress, cancellation=job.cancellation
        ),
        needs_model=levels is None or "behaviour" in levels,
    )


def _push(params: PushParams, places: Places, desk: Desk) -> Work:
    if params.card is not None and params.card_text is not None:
        raise RequestError("A card is typed and in a file; leave one out.", where="card_text, card")
    directory = places.resolve(params.directory)
    files: dict[str, Any] = {name: maybe(places, getattr(params, name)) for name in ("run", "model", "card")}
    names = ("to", "private", "revision", "unverified", "replace", "base_model", "licence", "data", "language")
    asked = given(ts.plan_push, **{name: getattr(params, name) for name in names})
    jobs = {"evaluation": (params.evaluation_job, ts.Evaluation), "drift": (params.drift_job, ts.Drift)}
    records = {name: record_from(desk, job, kind) for name, (job, kind) in jobs.items() if job is not None}
    named = {"card": _TYPED_CARD} if params.card_text is not None else {}
    line = command(
        "push",
        places.shown(directory),
        params.repo_id,
        **{("license" if name == "licence" else name): value for name, value in asked.items()},
        **{**{name: shown(places, path) for name, path in files.items()}, **named},
        **{name: f"{name}-{jobs[name][0]}.json" for name in records},
        dry_run=params.dry_run,
    )
    if not params.dry_run:
        plan = _shown_plan(params, directory, desk)
        return Work(
            command=line,
            call=lambda job: ts.push(plan, progress=job.progress, cancellation=job.cancellation),
            needs_model=False,
        )

    def call(job: Reporter) -> ts.PushPlan:
        with tempfile.TemporaryDirectory() as folder:
            given_files = files
            if params.card_text is not None:
                typed = Path(folder) / _TYPED_CARD
                typed.write_text(params.card_text, encoding="utf-8")
                given_files = {**files, "card": str(typed)}
            return ts.plan_push(
                directory,
                params.repo_id,
                **asked,
                **given_files,
                **records,
                progress=job.progress,
                cancellation=job.cancellation,
            )

    return Work(command=line, call=call, needs_model=False, result=_push_planned)


EXPORTS: Mapping[str, Verb] = {
    "merge": Verb(MergeParams, _merge),
    "quantize": Verb(QuantizeParams, _quantize),
    "drift": Verb(DriftParams, _drift),
    "gguf": Verb(GgufParams, _gguf),
    "verify_gguf": Verb(VerifyGgufParams, _verify_gguf),
    "push": Verb(PushParams, _push),
}


def planned(plan: ts.MergePlan | ts.QuantizationPlan, *, occupied: bool) -> dict[str, Any]:
    """A plan without its thousands of tensors, and what is to be known before it is carried out."""
    facts = plan.model_dump(mode="json", exclude=_NOT_IN_A_PLAN)
    free = plan.free_bytes
    return facts | {
        "changed": plan.changed if isinstance(plan, ts.MergePlan) else len(plan.quantized),
        "tensors": plan.tensors,
        **({"files": len(plan.shards)} if isinstance(plan, ts.MergePlan) else {}),
        "preflight": {
            "fits": None if free is None else plan.write_bytes <= free,
            "write_bytes": plan.write_bytes,
            "free_bytes": free,
            "target_not_empty": occupied,
            "quantized_base": any("quantized" in finding.code for finding in plan.warnings),
        },
    }


def _written(done: ts.Merged | ts.Quantized) -> dict[str, Any]:
    facts = done.model_dump(mode="json", exclude={"plan": _NOT_IN_A_PLAN})
    if isinstance(done, ts.Quantized):
        facts["plan"]["changed"] = len(done.plan.quantized)
    return facts | {"path": str(done.path)}


def _drifted(drift: ts.Drift) -> dict[str, Any]:
    """A drift with its picture, in every language."""
    return drift.model_dump(mode="json") | {"charts": {lang: ts.drift_spec(drift, lang) for lang in ts.LANGUAGES}}


def _push_planned(plan: ts.PushPlan) -> dict[str, Any]:
    """A plan whose files do not each carry their text; the card is there once."""
    facts = plan.model_dump(mode="json")
    files = [{**file, "text": None, "rewritten": file["text"] is not None} for file in facts["files"]]
    return facts | {"files": files}


def _shown_plan(params: PushParams, directory: Path, desk: Desk) -> ts.PushPlan:
    """The plan that a person has seen.

    Raises:
        RequestError: none is named, or it is about something else.
    """
    if params.plan_job is None:
        raise RequestError(
            "Only what a dry run has shown is sent.",
            where="plan_job",
            expected="the id of a job of the kind push with dry_run",
        )
    plan: ts.PushPlan = record_from(desk, params.plan_job, ts.PushPlan)
    asked = (directory, params.repo_id, params.private, params.revision, params.replace)
    there = (Path(plan.directory), plan.repo_id, plan.private, plan.revision, plan.replace)
    if asked != there or params.to not in (None, plan.to):
        raise RequestError(
            "The dry run was about something else.",
            where="plan_job",
            expected=f"{params.directory} to {params.repo_id}, as it was shown",
            found=f"{plan.directory} to {plan.repo_id}",
        )
    return plan


def _calibrates(params: MergeParams | QuantizeParams) -> bool:
    return (params.rounding or "").startswith("calibrated") and not params.dry_run


def _one_of(**asked: object) -> None:
    """See to it that one of two is there, and not both."""
    there = [name for name, value in asked.items() if value is not None]
    if len(there) != 1:
        raise RequestError(
            "One of two is asked for.", where=", ".join(asked), expected="one of them", found=", ".join(there) or "none"
        )

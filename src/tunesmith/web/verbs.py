"""What a job can be: its parameters, the public function that does it, and the command line that does the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

import tunesmith as ts
from tunesmith.web import recipes
from tunesmith.web.answers import RequestError, misfit_of
from tunesmith.web.exports import EXPORTS
from tunesmith.web.places import Places
from tunesmith.web.work import (
    Count,
    Desk,
    OfRun,
    Params,
    Reporter,
    Text,
    Verb,
    Work,
    bytes_of,
    command,
    defaults_of,
    given,
    maybe,
    record_from,
    run_and_base,
    shown,
)
from tunesmith.web.workers import worker_processes

_DEFAULT_REPORT = "report.html"


class DemoParams(Params):
    """The whole story on the embedded model.

    Attributes:
        force: replace an earlier demo.
    """

    force: bool = False


class PlanTrainingParams(Params):
    """What a training will be.

    Attributes:
        recipe_text: the recipe, as YAML; or
        run: a run that was made from one.
        overrides: ``key=value`` pairs that replace keys of it.
        recipe_path: what the recipe is, or will be, called.
    """

    recipe_text: Annotated[str, Field(max_length=recipes.LONGEST)] | None = None
    run: Text | None = None
    overrides: Annotated[tuple[Text, ...], Field(max_length=100)] = ()
    recipe_path: Text | None = None


class TrainParams(PlanTrainingParams):
    """A training.

    Attributes:
        resume: go on from the last checkpoint.
        overwrite_recipe: replace what lies at ``recipe_path``.
    """

    resume: bool = False
    overwrite_recipe: bool = False


class CheckpointsParams(OfRun):
    """Which checkpoint to take; as for ``ts.checkpoints``."""

    data: Text | None = None
    answers: Count | None = None


class CompareParams(OfRun):
    """Variants side by side; as for ``ts.compare``.

    Attributes:
        variants: which.
        prompts_text: prompts that were typed, one a line; or
        prompts_file: a file of prompts, or the name of a built-in set.
        max_prompts: how many held-out rows are answered where there are no prompts.
        settings: how replies are drawn.
    """

    variants: Annotated[tuple[Text, ...], Field(min_length=1, max_length=16)] | None = None
    prompts_text: Annotated[str, Field(max_length=200_000)] | None = None
    prompts_file: Text | None = None
    max_prompts: Count | None = None
    settings: dict[str, Any] | None = None


class EvaluateParams(OfRun):
    """What a tuning did; as for ``ts.evaluate``."""

    variants: Annotated[tuple[Text, ...], Field(min_length=1, max_length=16)] | None = None
    data: Text | None = None
    answers: Count | None = None
    tasks: Annotated[int, Field(ge=0, le=20)] | None = None
    general: bool | None = None


class VerifyParams(OfRun):
    """A proof; as for ``ts.verify``.

    Attributes:
        directory: the merged model.
        levels: which levels; None for all.
        prompts_file: a file of prompts for the behaviour level, or the name of a built-in set.
    """

    directory: Text
    checkpoint: Text | None = None
    levels: tuple[Literal["structure", "assets", "weights", "behaviour"], ...] | None = None
    prompts_file: Text | None = None


class ReportParams(OfRun):
    """A report; as for ``ts.report``.

    Attributes:
        comparison_job: the job whose comparison it shows; None to compare now.
        verdict_job: the job whose verdict it shows; None to verify now, where there is a merged model.
        evaluation_job: the job whose evaluation it shows.
        choice_job: the job that recommended a checkpoint.
        out: the HTML file.
    """

    merged: Text | None = None
    checkpoint: Text | None = None
    comparison_job: Text | None = None
    verdict_job: Text | None = None
    evaluation_job: Text | None = None
    choice_job: Text | None = None
    out: Text | None = None


class CleanupParams(Params):
    """What of a run may go.

    Attributes:
        apply: delete it.
    """

    run: Text
    apply: bool = False


def demo_folder(places: Places) -> Path:
    """Where the demo is made."""
    return places.root / str(defaults_of(ts.demo)["out"])


def _demo(params: DemoParams, places: Places, _: Desk) -> Work:
    folder = places.resolve(demo_folder(places).name, must_exist=False)
    # A demo that was stopped on its way is begun anew; one that is whole is kept, unless its end is asked for.
    broken = (folder / "run").is_dir() and not (folder / "report.html").is_file()
    force = params.force or broken
    return Work(
        command=command("demo", force=force),
        call=lambda job: ts.demo(
            folder,
            force=force,
            progress=job.progress,
            on_step=lambda step: job.log(f"$ {step.command}  ({step.seconds:.1f} s)"),
            cancellation=job.cancellation,
        ),
    )


def _plan_training(params: PlanTrainingParams, places: Places, _: Desk) -> Work:
    recipe = recipes.located(params.recipe_text, params.run, params.overrides, places, name=params.recipe_path)

    def call(job: Reporter) -> Any:
        with recipe.file() as file:
            return ts.plan_training(file, recipe.overrides, progress=job.progress, cancellation=job.cancellation)

    return Work(command=command("train", recipe.shown, *params.overrides, dry_run=True), call=call)


def _train(params: TrainParams, places: Places, _: Desk) -> Work:
    recipe = recipes.located(params.recipe_text, params.run, params.overrides, places, name=params.recipe_path)
    if params.recipe_path is not None and not params.overwrite_recipe:
        recipe.check_free()

    def call(job: Reporter) -> Any:
        with recipe.file(keep=True) as file:
            return ts.train(
                file,
                recipe.overrides,
                resume=params.resume,
                told=job.log,
                progress=job.progress,
                cancellation=job.cancellation,
            )

    line = command("train", recipe.shown, *params.overrides, resume=params.resume)
    return Work(command=line, call=call, stop_saves=True)


def _checkpoints(params: CheckpointsParams, places: Places, desk: Desk) -> Work:
    run, base = run_and_base(params, places)
    data = maybe(places, params.data)
    asked = given(ts.checkpoints, answers=params.answers, dtype=desk.dtype)
    return Work(
        command=command("checkpoints", places.shown(run), data=shown(places, data), base=shown(places, base), **asked),
        call=lambda job: ts.checkpoints(
            run, data, base=base, **asked, progress=job.progress, cancellation=job.cancellation
        ),
    )


def _compare(params: CompareParams, places: Places, desk: Desk) -> Work:
    if params.prompts_text is not None and params.prompts_file is not None:
        raise RequestError("Prompts are typed and in a file; leave one out.", where="prompts_text, prompts_file")
    run, base = run_and_base(params, places)
    asked = given(ts.compare, max_prompts=params.max_prompts, dtype=desk.dtype)
    prompts: Any = _prompts_file(places, params.prompts_file)
    named_file = shown(places, prompts)
    if params.prompts_text is not None:
        prompts, named_file = typed_prompts(params.prompts_text), "prompts.txt"
    variants = [places.variant(name) for name in params.variants] if params.variants else None
    if variants is not None and tuple(variants) != defaults_of(ts.compare)["variants"]:
        asked["variants"] = variants
    settings = _settings(params.settings)
    named = {"variants": ",".join(map(places.shown, asked["variants"]))} if "variants" in asked else {}
    line = command(
        "compare",
        places.shown(run),
        **named,
        prompts=named_file,
        base=shown(places, base),
        max_prompts=asked.get("max_prompts"),
        dtype=asked.get("dtype"),
        **_settings_options(settings),
    )
    return Work(
        command=line,
        call=lambda job: ts.compare(
            run,
            prompts=prompts,
            base=base,
            settings=settings,
            **asked,
            progress=job.progress,
            cancellation=job.cancellation,
        ),
        result=_marked,
    )


def _evaluate(params: EvaluateParams, places: Places, desk: Desk) -> Work:
    run, base = run_and_base(params, places)
    data = maybe(places, params.data)
    variants = [places.variant(name) for name in params.variants] if params.variants else None
    asked = given(ts.evaluate, answers=params.answers, tasks=params.tasks, dtype=desk.dtype)
    general: dict[str, Any] = {} if params.general is not False else {"general": False}
    line = command(
        "evaluate",
        places.shown(run),
        variants=",".join(map(places.shown, variants)) if variants else None,
        data=shown(places, data),
        base=shown(places, base),
        no_general=bool(general),
        **asked,
    )
    return Work(
        command=line,
        call=lambda job: ts.evaluate(
            run, variants, data, base=base, **asked, **general, progress=job.progress, cancellation=job.cancellation
        ),
    )


def _verify(params: VerifyParams, places: Places, _: Desk) -> Work:
    run, base = run_and_base(params, places)
    directory = places.resolve(params.directory)
    prompts = _prompts_file(places, params.prompts_file)
    asked = given(ts.verify, checkpoint=params.checkpoint)
    levels = params.levels or None
    line = command(
        "verify",
        places.shown(run),
        places.shown(directory),
        base=shown(places, base),
        **asked,
        level=levels,
        prompts=shown(places, prompts),
    )

    def call(job: Reporter) -> Any:
        with worker_processes(bytes_of(directory)) as executor:
            return ts.verify(
                run,
                directory,
                base=base,
                **asked,
                executor=executor,
                levels=levels,
                prompts=prompts,
                progress=job.progress,
                cancellation=job.cancellation,
            )

    return Work(command=line, call=call, result=_judged)


def _report(params: ReportParams, places: Places, desk: Desk) -> Work:
    run, base = run_and_base(params, places)
    merged = maybe(places, params.merged)
    out = places.resolve(params.out or _DEFAULT_REPORT, must_exist=False)
    asked = given(ts.report, checkpoint=params.checkpoint, dtype=desk.dtype)
    jobs: dict[str, tuple[str | None, type]] = {
        "comparison": (params.comparison_job, ts.Comparison),
        "verdict": (params.verdict_job, ts.Verdict),
        "evaluation": (params.evaluation_job, ts.Evaluation),
        "choice": (params.choice_job, ts.CheckpointChoice),
    }
    records = {name: record_from(desk, job, kind) for name, (job, kind) in jobs.items() if job is not None}
    files = {name: f"{type(record).__name__.lower()}-{jobs[name][0]}.json" for name, record in records.items()}
    words = ("report", places.shown(run), *([places.shown(merged)] if merged else []))
    page = places.shown(out)
    line = command(*words, out=None if page == _DEFAULT_REPORT else page, base=shown(places, base), **asked, **files)
    return Work(
        command=line,
        call=lambda job: ts.report(
            run,
            out,
            merged=merged,
            base=base,
            **asked,
            **records,
            progress=job.progress,
            cancellation=job.cancellation,
        ),
        needs_model="comparison" not in records or (merged is not None and "verdict" not in records),
        result=lambda report: {"path": places.shown(report.path), "run": report.run.path},
    )


def _cleanup(params: CleanupParams, places: Places, _: Desk) -> Work:
    run = places.run(params.run)

    def call(_job: Reporter) -> Any:
        plan = ts.plan_cleanup(ts.open_run(run))
        return ts.apply_cleanup(plan) if params.apply else plan

    line = command("inspect", places.shown(run), cleanup=True, apply=params.apply, yes=params.apply)
    return Work(command=line, call=call, needs_model=False)


VERBS: Mapping[str, Verb] = {
    "demo": Verb(DemoParams, _demo),
    "plan_training": Verb(PlanTrainingParams, _plan_training),
    "train": Verb(TrainParams, _train),
    "checkpoints": Verb(CheckpointsParams, _checkpoints),
    "compare": Verb(CompareParams, _compare),
    "evaluate": Verb(EvaluateParams, _evaluate),
    "verify": Verb(VerifyParams, _verify),
    "report": Verb(ReportParams, _report),
    "cleanup": Verb(CleanupParams, _cleanup),
    **EXPORTS,
}


def typed_prompts(text: str) -> list[ts.Conversation]:
    """Prompts that were typed, one a line, as a text file of them is read.

    Raises:
        RequestError: there is none.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise RequestError("No prompt was typed.", where="prompts_text", expected="a prompt a line")
    return [
        ts.Conversation(id=f"row-{place}", messages=(ts.Message(role="user", content=line),))
        for place, line in enumerate(lines)
    ]


def _marked(comparison: ts.Comparison) -> dict[str, Any]:
    """A comparison with what is to be seen at each reply."""
    marks = [
        {"prompt_id": prompt, "variant": variant, **mark.model_dump()}
        for (prompt, variant), mark in ts.marks_of(comparison).items()
    ]
    return comparison.model_dump(mode="json") | {"marks": marks}


def _judged(verdict: ts.Verdict) -> dict[str, Any]:
    """A verdict with its sentence and its map, in every language."""
    languages = ts.LANGUAGES
    return verdict.model_dump(mode="json") | {
        "sentence": {lang: ts.verdict_sentence(verdict, lang) for lang in languages},
        "charts": {"heatmap": {lang: ts.heatmap_spec(verdict, lang) for lang in languages}},
    }


def _settings(given: Mapping[str, Any] | None) -> ts.GenerationSettings | None:
    if given is None:
        return None
    try:
        return ts.GenerationSettings.model_validate(dict(given))
    except ValidationError as error:
        raise misfit_of(error, "The settings do not fit.") from None


def _settings_options(settings: ts.GenerationSettings | None) -> dict[str, Any]:
    """Options that say the same to the command line, which is greedy unless told otherwise."""
    if settings is None:
        return {}
    given = settings.model_dump(exclude_defaults=True, exclude={"greedy"})
    return ({} if settings.greedy else {"sample": True}) | given


def _prompts_file(places: Places, name: str | None) -> str | None:
    """A file of prompts, or the name of a built-in set, which has no file of that name beside it."""
    if name is None or (name.split("-")[0] == "general" and "/" not in name and not (places.root / name).exists()):
        return name
    return str(places.resolve(name))

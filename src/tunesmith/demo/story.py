"""The demo, step by step; each step is one public verb, and its command is shown so that a reader can type it."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from tunesmith.allocator import give_memory_back
from tunesmith.api import comparing, inspecting, merging, reporting, training, verifying
from tunesmith.checkpoint import local_target
from tunesmith.compare import Comparison
from tunesmith.errors import OutputError
from tunesmith.merge import Merged, plan_merge
from tunesmith.models import GenerationSettings
from tunesmith.progress import Cancellation, ProgressCallback, no_progress
from tunesmith.record import Part, Record
from tunesmith.verify import Verdict

_FILES = ("recipe.yaml", "workshop_train.jsonl", "workshop_held_out.jsonl")
_MADE = ("run", "merged", "comparison.json", "verdict.json", "report.html")
PROMPTS = 5
MAX_NEW_TOKENS = 128


class DemoStep(Part):
    """One finished step.

    Attributes:
        name: the verb.
        command: what a person would type for it.
        seconds: wall time.
    """

    name: str
    command: str
    seconds: float


class DemoResult(Record):
    """What the demo made.

    Attributes:
        path: the directory.
        report: the HTML report.
        steps: what was done.
        comparison: base against tuned model.
        verdict: merged model against adapter.
        seconds: wall time, the embedded model's preparation included.
    """

    path: str
    report: str
    steps: tuple[DemoStep, ...]
    comparison: Comparison
    verdict: Verdict
    seconds: float


class _Story:
    def __init__(self, root: Path, on_step: Callable[[DemoStep], None]) -> None:
        self.root = root
        self.on_step = on_step
        self.steps: list[DemoStep] = []

    @contextmanager
    def step(self, name: str, arguments: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        give_memory_back()  # the next step loads a model of its own
        words = (word.replace("@", f"{self.root}{os.sep}") for word in arguments.split())
        command = shlex.join(["tunesmith", name, *words])
        self.steps.append(DemoStep(name=name, command=command, seconds=time.monotonic() - started))
        self.on_step(self.steps[-1])


def demo(
    out: str | os.PathLike[str] = "tunesmith-demo",
    *,
    force: bool = False,
    progress: ProgressCallback = no_progress,
    on_step: Callable[[DemoStep], None] = lambda _: None,
    cancellation: Cancellation | None = None,
) -> DemoResult:
    """Tune the embedded model, and go all the way to a proven merge and a report.

    Args:
        out: the directory to make; recipe and data are copied there first.
        force: run again where a demo was before.
        progress: told of the work's parts.
        on_step: told of each finished step.
        cancellation: read between the parts of every step.

    Returns:
        What was made.

    Raises:
        OutputError: ``out`` holds something else.
        MissingExtraError: the extra ``train`` is not installed.
    """
    started = time.monotonic()
    root = _prepare(local_target(out), force=force)
    story = _Story(root, on_step)
    with story.step("train", "@recipe.yaml output_dir=@run"):
        run = training.train(
            root / "recipe.yaml", [f"output_dir={root / 'run'}"], progress=progress, cancellation=cancellation
        )
    with story.step("inspect", "@run"):
        inspecting.inspect(run)
    with story.step(
        "compare", f"@run --max-prompts {PROMPTS} --max-new-tokens {MAX_NEW_TOKENS} --out @comparison.json"
    ):
        comparison = comparing.compare(
            run,
            max_prompts=PROMPTS,
            settings=GenerationSettings(greedy=True, max_new_tokens=MAX_NEW_TOKENS),
            progress=progress,
            cancellation=cancellation,
        )
        comparison.write(root / "comparison.json")
    with story.step("merge", "@run --out @merged"):
        merged: Merged = merging.merge(
            plan_merge(run, root / "merged"), sha256=True, progress=progress, cancellation=cancellation
        )
    with story.step("verify", "@run @merged --out @verdict.json"):
        verdict = verifying.verify(run, merged, progress=progress, cancellation=cancellation)
        verdict.write(root / "verdict.json")
    with story.step("report", "@run @merged --comparison @comparison.json --verdict @verdict.json --out @report.html"):
        report = reporting.report(run, root / "report.html", merged=merged, comparison=comparison, verdict=verdict)
    return DemoResult(
        path=str(root),
        report=report.path,
        steps=tuple(story.steps),
        comparison=comparison,
        verdict=verdict,
        seconds=time.monotonic() - started,
    )


def _prepare(root: Path, *, force: bool) -> Path:
    """The demo's directory with recipe and data in it; of an earlier demo only what it made goes."""
    if root.exists() and not root.is_dir():
        raise OutputError("The demo's directory is a file.", where=root, next_step="choose another --out")
    there = [entry.name for entry in root.iterdir()] if root.is_dir() else []
    strangers = [name for name in there if name not in (*_FILES, *_MADE)]
    made = [name for name in there if name in _MADE]
    if strangers or (made and not force):
        raise OutputError(
            "The demo's directory holds other files." if strangers else "A demo was run here before.",
            where=root,
            found=", ".join(sorted(strangers or made)[:6]),
            next_step="choose another --out" + ("" if strangers else ", or pass --force to run it again"),
        )
    for name in there:
        path = root / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    try:
        root.mkdir(parents=True, exist_ok=True)
        package = resources.files("tunesmith.demo")
        for name in _FILES:
            (root / name).write_bytes((package / name).read_bytes())
    except OSError as error:
        raise OutputError("The demo's directory cannot be written.", where=root, found=error.strerror) from error
    return root

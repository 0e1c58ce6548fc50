"""``train``: a recipe to a run directory, and the pictures of its losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith.api.engines import compute_dtype
from tunesmith.api.places import StrPath
from tunesmith.checkpoint import locate_base, weights_sha256
from tunesmith.progress import Cancellation, ProgressCallback, no_progress
from tunesmith.report import eval_loss_png, loss_png
from tunesmith.runs import Run, open_run


def train(
    recipe: StrPath,
    overrides: Sequence[str] = (),
    *,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> Run:
    """Tune a LoRA adapter as a recipe says.

    Args:
        recipe: a YAML file.
        overrides: ``key=value`` pairs that replace keys of it.
        progress: told of steps.
        cancellation: read between steps.

    Returns:
        The run.

    Raises:
        RecipeError: unknown, wrong or missing keys.
        DataError: a data set that cannot be trained on.
        MissingExtraError: the extra ``train`` is not installed.
    """
    from tunesmith.train import check_installed, read_recipe
    from tunesmith.train import train as fit

    check_installed()
    parsed = read_recipe(recipe, overrides)
    name = parsed.model_name_or_path
    base = locate_base(name, relative_to=Path(recipe).parent, progress=progress)
    run_dir = fit(
        parsed,
        base_dir=base,
        base_name=name,
        compute=compute_dtype(parsed.dtype),
        base_sha256=weights_sha256(base),
        progress=progress,
        cancellation=cancellation,
    )
    for filename, draw in (("training_loss.png", loss_png), ("training_eval_loss.png", eval_loss_png)):
        picture = draw(open_run(run_dir))
        if picture is not None:
            (run_dir / filename).write_bytes(picture)
    return open_run(run_dir)

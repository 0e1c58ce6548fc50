"""Find out all that a quantization will do, and every reason not to, before a byte is written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.adapter import Adapter, Binding, LowRank, Stack
from tunesmith.checkpoint import (
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    BaseView,
    Checkpoint,
    QuantizedScheme,
    TensorInfo,
    check_free_space,
    check_out_dir,
    local_target,
    locate_base,
    view_of,
)
from tunesmith.errors import BaseModelError, OutputError
from tunesmith.export.quantize.choose import Choice, choose
from tunesmith.export.quantize.records import QuantizationPlan
from tunesmith.export.quantize.rounders import CALIBRATED, FINE_BITS, ROUNDINGS
from tunesmith.export.quantize.schemes import require_package, scheme_of
from tunesmith.merge import (
    Ingredient,
    OutputFile,
    assets_of,
    index_of,
    layout_of,
    quantized_training,
    size_in_bytes,
)
from tunesmith.progress import ProgressCallback, no_progress
from tunesmith.record import Finding
from tunesmith.runs import FINAL, Run, RunCheckpoint, as_run, checkpoint_of

_SCALE_DTYPES = {"F64": "F32"}
_ADAPTER_CONFIG = "adapter_config.json"

Form = tuple[str, tuple[int, ...]]


def plan_quantization(
    source: Run | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    scheme: str = "int4",
    base: str | None = None,
    checkpoint: str | int = FINAL,
    rounding: str = "auto",
    calibration: str | os.PathLike[str] | None = None,
    seed: int = 0,
    shard_size: str | int | None = None,
    base_view: str | None = None,
    force: bool = False,
    progress: ProgressCallback = no_progress,
) -> QuantizationPlan:
    """Plan to quantize a run's tuned model, or a whole model, into a compressed-tensors directory.

    Of a run, base and adapter are summed and rounded once, straight to codes.

    Args:
        source: the run, or its directory; or the directory of a whole model, merged or not.
        out: the directory to make.
        scheme: ``int8`` (a scale a row), ``int4`` (a scale for 128 columns of a row), ``int4:64``, ``int4:32``,
            ``w8a8`` (with activations of 8 bits) or ``fp8``.
        base: the base model of a run; None for the one that the adapter names.
        checkpoint: ``final``, ``checkpoint-N`` or ``N``; of a run.
        rounding: ``nearest``, ``faithful`` or ``calibrated``: see :mod:`tunesmith.export.quantize.rounders`.
            ``auto`` is ``faithful``, the best without data.
        calibration: rows for calibrated rounding, in any format that prompts may have; None for text that the model
            writes itself.
        seed: of that text.
        shard_size: the size that no file of more than one tensor exceeds, such as ``5GB``, ``500MB`` or ``2GiB``, or a
            number of bytes; None keeps the base's own division into files.
        base_view: see a run's base as QLoRA training saw it: ``nf4``, ``nf4-double`` or ``int8``; None for as it is
            stored.
        force: replace ``out`` where it is not empty.
        progress: told of the embedded model's preparation, where that is the base.

    Returns:
        The plan; nothing is written.

    Raises:
        TunesmithError: any reason not to quantize, all mismatches of a kind in one.
    """
    form, chosen_rounding, view = scheme_of(scheme), _rounding(rounding), view_of(base_view)
    rows = _calibration(calibration, chosen_rounding)
    shard_bytes = size_in_bytes(shard_size)
    require_package()
    origin = _origin(source, base, checkpoint, progress=progress)
    target = local_target(out).expanduser()
    check_out_dir(target, force=force, inputs=origin.inputs)
    model = Checkpoint(origin.base_dir)
    if view is not None:
        _check_view(view, origin, model, chosen_rounding)
    layout = laid_out(model, origin.adapters, form, shard_bytes=shard_bytes)
    assets, warnings = assets_of(origin.run, origin.checkpoint, model)
    runs = [origin.run] if origin.run is not None else []
    coarse = form.bits < FINE_BITS and chosen_rounding != CALIBRATED
    advice = [Finding(code="quantize_calibrated_is_nearer", severity="info")] if coarse else []
    seen = quantized_training(runs, base_view)
    warnings = [*advice, *layout.choice.findings, *layout.binding.findings, *seen, *warnings]
    write_bytes = sum(file.size_bytes for file in layout.files) + len((layout.index or "").encode())
    write_bytes += sum(Path(asset.source).stat().st_size for asset in assets)
    elements = sum(layout.before[name].elements for name in layout.choice.quantized)
    return QuantizationPlan(
        adapters=tuple(
            Ingredient(run=origin.run.path, checkpoint=origin.checkpoint.name, adapter=path, weight=weight)
            for path, weight in origin.adapters
            if origin.run is not None and origin.checkpoint is not None
        ),
        base_model=origin.base_name,
        base=str(origin.base_dir.resolve()),
        base_view=base_view,
        out=str(target.resolve()),
        scheme=form.name,
        rounding=chosen_rounding,
        seed=seed,
        calibration=rows,
        shard_bytes=shard_bytes,
        binding=layout.binding,
        quantized=layout.choice.quantized,
        ignore=layout.choice.ignore,
        elements=elements,
        tensors=len(layout.before),
        assets=assets,
        read_bytes=sum(info.size_bytes for info in layout.before.values()),
        write_bytes=write_bytes,
        free_bytes=check_free_space(target, write_bytes),
        memory_bytes=_memory(layout, chosen_rounding),
        seconds=_STARTING_S + elements * _seconds_each(chosen_rounding, rows) + write_bytes / 1.5e9,
        force=force,
        warnings=tuple(warnings),
    )


_STARTING_S = 4.0  # the imports, and the headers


def _seconds_each(rounding: str, rows: str | None) -> float:
    """What a number takes on two cores, in seconds: measured by benchmarks/quantize_drift.py."""
    if rounding == CALIBRATED:
        return 1.5e-6 if rows is None else 6.5e-7  # its text is written first
    return 5e-8


@dataclass(frozen=True)
class _Origin:
    """What is quantized: a base with an adapter of a run, or a model alone."""

    base_name: str
    base_dir: Path
    adapters: tuple[tuple[str, float], ...] = ()
    run: Run | None = None
    checkpoint: RunCheckpoint | None = None

    @property
    def inputs(self) -> dict[str, Path]:
        """The directories that are read."""
        return {"base model": self.base_dir} | ({"run": Path(self.run.path)} if self.run is not None else {})


def _origin(
    source: Run | str | os.PathLike[str], base: str | None, checkpoint: str | int, *, progress: ProgressCallback
) -> _Origin:
    if not isinstance(source, Run) and _is_whole_model(Path(source).expanduser()):
        if base is not None:
            raise OutputError(
                "A whole model has no base.", where=source, found=f"--base {base}", next_step="leave --base out"
            )
        path = Path(source).expanduser()
        return _Origin(str(source), path)
    run = as_run(source)
    chosen = checkpoint_of(run, checkpoint)
    name = base or Adapter(chosen.path).base_model
    if name is None:
        raise BaseModelError("The adapter names no base model.", where=chosen.path, next_step="pass --base")
    base_dir = locate_base(name, relative_to=Path(run.path).parent, progress=progress)
    return _Origin(name, base_dir, ((chosen.path, 1.0),), run, chosen)


def _check_view(view: BaseView, origin: _Origin, model: Checkpoint, rounding: str) -> None:
    """Make sure that a base can be seen so, and that nothing is asked of it that only the stored one has."""
    asked = f"--base-view {view.kind}"
    if origin.run is None:
        raise OutputError(
            "A whole model has no base.", where=origin.base_dir, found=asked, next_step="leave --base-view out"
        )
    if rounding == CALIBRATED:
        raise OutputError(
            "Calibrated rounding needs the live adapter beside its base, and a view of the base has no such twin.",
            where=f"--rounding {rounding}",
            expected="the base as it is stored",
            found=asked,
            next_step="leave --rounding out: faithful rounding needs no forward pass",
        )
    view.check(model)


def _is_whole_model(path: Path) -> bool:
    weights = any((path / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))
    return weights and (path / CONFIG_FILE).is_file() and not (path / _ADAPTER_CONFIG).is_file()


@dataclass(frozen=True)
class Layout:
    """Which tensor lies where, before and after.

    Attributes:
        binding: what the adapters make of the base.
        before: dtype and shape of every tensor of the merged model, by name.
        choice: which of them are quantized.
        files: the files to write.
        index: the new index's text; None where the model has none.
    """

    binding: Binding
    before: Mapping[str, TensorInfo]
    choice: Choice
    files: tuple[OutputFile, ...]
    index: str | None


def laid_out(
    model: Checkpoint, adapters: Sequence[tuple[str, float]], scheme: QuantizedScheme, *, shard_bytes: int | None
) -> Layout:
    """Lay out the quantized model.

    Args:
        model: the base, or the model alone.
        adapters: directory and weight of each adapter.
        scheme: how weights are stored.
        shard_bytes: the size that no file of more than one tensor exceeds; None for the base's own division.

    Raises:
        TunesmithError: the adapter does not fit, or the model cannot be quantized so.
    """
    stack = Stack(adapters)
    binding = stack.bind(model) if adapters else Binding(updates=())
    before = {info.name: info for file in layout_of(model, binding, stack) for info in file.tensors}
    choice = choose(model, before, scheme)
    instead: dict[str, dict[str, Form]] = {}
    for name in choice.quantized:
        info = before[name]
        forms = scheme.tensors(name.removesuffix(".weight"), *info.shape)
        scale = _SCALE_DTYPES.get(info.dtype, info.dtype)
        instead[name] = {other: (form.dtype or scale, form.shape) for other, form in forms.items()}
    files = layout_of(model, binding, stack, shard_bytes=shard_bytes, instead=instead)
    return Layout(binding, before, choice, files, index_of(model, files))


def _rounding(asked: str) -> str:
    if asked not in ("auto", *ROUNDINGS):
        raise OutputError("There is no such rounding.", where=asked, expected=", ".join(("auto", *ROUNDINGS)))
    return "faithful" if asked == "auto" else asked


def _calibration(file: str | os.PathLike[str] | None, rounding: str) -> str | None:
    if file is None:
        return None
    if rounding != CALIBRATED:
        raise OutputError(
            "Only calibrated rounding looks at rows.",
            where=file,
            expected=f"--rounding {CALIBRATED}",
            found=f"--rounding {rounding}",
        )
    return str(Path(file).expanduser().resolve())


def _memory(layout: Layout, rounding: str) -> int:
    """The largest unit's working set: the factors, the Hessian, some tiles of float64."""
    lows = [update for updates in layout.binding.by_name.values() for update in updates if isinstance(update, LowRank)]
    rank = max((update.r for update in lows), default=0)
    most = 0
    for name in layout.choice.quantized:
        rows, columns = layout.before[name].shape
        hessian = {"nearest": 0, CALIBRATED: 4 * 8 * columns**2}.get(rounding, 8 * columns * (5 * rank + 64))
        most = max(most, 2 * 8 * rank * (rows + columns) + hessian + 12 * 8 * max(1 << 20, columns))
    return most

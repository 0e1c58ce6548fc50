"""What is there: the session, folders, runs, one run inspected, texts, recipes and rows; nothing here takes long."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import psutil
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

import tunesmith as ts
from tunesmith.web import recipes
from tunesmith.web.answers import JsonReply, NotThereError, to_json
from tunesmith.web.live import Opened
from tunesmith.web.places import Places
from tunesmith.web.verbs import demo_folder
from tunesmith.web.work import command, defaults_of

_CERTIFICATE = "tunesmith-certificate.json"
_CERTIFICATE_BYTES = 4 * 1024 * 1024
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_MOST_ENTRIES = 500
_MOST_LISTED = 5000
_STALE_SECONDS = 10
_WARM_AFTER_SECONDS = 1.0  # the page that asks is still loading
_Language = Literal["en", "zh"]
_Path = Annotated[str, Query(min_length=1, max_length=4096)]
_MaybeText = Annotated[str | None, Query(min_length=1, max_length=4096)]
_FoundT = TypeVar("_FoundT")

router = APIRouter(prefix="/api/v1", tags=["runs"])


class Known:
    """What was found out and still holds.

    Args:
        most: how many are kept.
    """

    def __init__(self, most: int = 256) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._found: OrderedDict[object, tuple[object, Any]] = OrderedDict()
        self._making: dict[object, threading.Lock] = {}

    def get(self, key: object, stamp: Callable[[], object], make: Callable[[], _FoundT]) -> _FoundT:
        """What is known, or is found out now; by one of those who ask at once.

        Args:
            key: what is asked.
            stamp: what the answer was found in, cheaply told: as long as it is equal, the answer holds.
            make: finds it out.
        """
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        try:
            with making:
                seen = stamp()
                with self._lock:
                    known = self._found.get(key)
                if known is not None and known[0] == seen:
                    return known[1]  # type: ignore[no-any-return] # of the type that was made
                found = make()
                with self._lock:
                    self._found[key] = (seen, found)
                    self._found.move_to_end(key)
                    while len(self._found) > self._most:
                        self._found.popitem(last=False)
                return found
        finally:
            with self._lock:
                if not making.locked():
                    self._making.pop(key, None)


class RecipeAsked(BaseModel):
    """A recipe's text.

    Attributes:
        text: YAML.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Annotated[str, Field(max_length=recipes.LONGEST)]


class RecipeValues(BaseModel):
    """A recipe's values.

    Attributes:
        values: by key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    values: dict[str, Any]


class RowAsked(BaseModel):
    """A training row.

    Attributes:
        recipe_text: the recipe, as YAML; or
        run: a run that was made from one.
        overrides: what replaces keys of it.
        row: which, from 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe_text: Annotated[str, Field(max_length=recipes.LONGEST)] | None = None
    run: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    overrides: Annotated[tuple[str, ...], Field(max_length=100)] = ()
    row: Annotated[int, Field(ge=0, le=10**9)] = 0


@router.get("/session")
async def session(request: Request) -> JsonReply:
    """What the page is about: root, run, machine, who has the model; and the library's defaults, once they are read."""
    state = request.app.state
    # To read them takes a second of CPU, which the first page need not wait for.
    defaults = library_defaults() if library_defaults.cache_info().currsize else None
    settings, places = state.settings, state.places
    holder = state.live.slot.holder
    machine = state.machine.found
    if machine is None and not state.warming:
        state.warming = True
        state.machine.warm_in(_WARM_AFTER_SECONDS)
    return JsonReply(
        {
            "version": ts.__version__,
            "root": str(places.root),
            "run": None if settings.run is None else places.shown(places.run(settings.run)),
            "base": settings.base,
            "languages": list(ts.LANGUAGES),
            "device": machine,
            "torch_ready": machine is not None,
            "memory_free_bytes": psutil.virtual_memory().available,
            "disk_free_bytes": shutil.disk_usage(places.root).free,
            "holder": holder,
            "loaded": state.live.loaded,
            "demo": None if defaults is None else _demo(places),
            "defaults": defaults,
        }
    )


@router.get("/folders")
def folders(request: Request, path: Annotated[str, Query(max_length=4096)] = ".") -> JsonReply:
    """The folders in a folder of the root."""
    places: Places = request.app.state.places
    folder, listed, truncated = places.folders(path or ".")
    return JsonReply(
        {
            "path": places.shown(folder),
            "parent": places.shown(folder.parent) if folder != places.root else None,
            "folders": [
                {"name": one.name, "path": places.shown(one.path), "is_run": one.is_run, "modified_s": one.modified_s}
                for one in listed
            ],
            "truncated": truncated,
        }
    )


@router.get("/runs")
def runs(request: Request) -> JsonReply:
    """The runs below the root."""
    places: Places = request.app.state.places
    known: Known = request.app.state.known
    found, truncated = places.find_runs()
    told = [known.get(("summary", path), partial(_stamp, path), partial(_summary, path)) for path in found]
    listed = [{**one, "path": places.shown(one["path"])} for one in told if one is not None]
    listed.sort(key=lambda one: -one["modified_s"])
    return JsonReply({"runs": listed, "truncated": truncated})


@router.get("/run")
def run(
    request: Request,
    path: _Path,
    base: _MaybeText = None,
    checkpoint: Annotated[str | None, Query(max_length=64)] = None,
    lang: _Language = "en",
) -> Response:
    """One run inspected, its pictures, what of it may go, and the models that were merged from it."""
    places: Places = request.app.state.places
    known: Known = request.app.state.known
    place = places.run(path)
    model = places.base(base, run=place)
    asked, home = (place, model, checkpoint), Path(place)

    def inspected() -> ts.Inspection:
        return ts.inspect(place, base=model, checkpoint=checkpoint)

    def told() -> bytes:
        found = known.get(("inspection", asked), lambda: _stamp(home), inspected)
        return to_json(_told(places, found, asked, lang))

    def seen() -> object:
        # What is old enough to go depends on the hour too.
        hour = int(time.time() / _STALE_SECONDS)
        return _stamp(home), _listing(home.parent), _listing(places.root), hour

    body = known.get(("run", asked, lang), seen, told)
    request.app.state.live.opened = Opened.of(places, path, base)  # what /v1 speaks of from here on
    return Response(body, media_type="application/json")


def _told(places: Places, found: ts.Inspection, asked: tuple[str, str | None, str | None], lang: str) -> dict[str, Any]:
    place, model, checkpoint = asked
    return {
        "inspection": {**found.model_dump(mode="json"), "health": found.health},
        "charts": {
            "loss": ts.loss_spec(found.run, lang),
            "heatmap": ts.heatmap_spec(found.adapter, lang) if found.adapter else None,
        },
        "cleanup": ts.plan_cleanup(found.run),
        "merged": merged_models(places, found.run),
        "gguf": gguf_files(places, found.run),
        "command": command(
            "inspect", places.shown(place), base=None if model is None else places.shown(model), checkpoint=checkpoint
        ),
    }


@router.get("/run/log")
def run_log(request: Request, path: _Path) -> JsonReply:
    """What a training has logged so far, though it may have saved nothing yet."""
    places: Places = request.app.state.places
    return JsonReply({"log": ts.training_log(places.run(path))})


@router.get("/texts/{lang}")
def texts(request: Request, lang: str) -> Response:
    """Every interface text of a language."""
    if lang not in ts.LANGUAGES:
        raise NotThereError("There is no such language.", expected=", ".join(ts.LANGUAGES), found=lang[:20])
    body, tag = _texts(lang)
    headers = {"etag": tag, "cache-control": "no-cache"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


@router.post("/recipe/read")
def recipe_read(asked: RecipeAsked) -> JsonReply:
    """A recipe's values, what becomes of each key, and what is wrong with it so far."""
    return JsonReply(ts.read_recipe(asked.text))


@router.post("/recipe/write")
def recipe_write(asked: RecipeValues) -> JsonReply:
    """A recipe's values as YAML; comments of the text that they came from are lost."""
    return JsonReply({"text": ts.write_recipe(asked.values), "comments_lost": True})


@router.get("/recipe/keys")
def recipe_keys() -> JsonReply:
    """Every key that a recipe may have, as a form needs it."""
    return JsonReply({"keys": ts.recipe_keys()})


@router.post("/data/preview")
def data_preview(request: Request, asked: RowAsked) -> JsonReply:
    """One training row, and which of its tokens count in the loss."""
    recipe = recipes.located(asked.recipe_text, asked.run, asked.overrides, request.app.state.places)
    with recipe.file() as file:
        found = ts.preview_row(file, asked.row, recipe.overrides)
    row = found.model_dump(mode="json", include={"pieces", "tokens", "cut", "findings"})
    return JsonReply({"rows": found.rows, "row": {"index": found.row, **row}})


def merged_models(places: Places, run: ts.Run) -> list[dict[str, Any]]:
    """Complete models in the run, beside it or at the root that were merged from it, as their certificates say.

    Where there is no certificate, a model counts whose name begins with the run's.

    Args:
        places: what may be looked at.
        run: the run.
    """
    home = Path(run.path)
    found: dict[Path, dict[str, Any]] = {}
    for folder in (home, home.parent, places.root):
        for path in _folders_in(folder):
            if path in found or not _is_model(path):
                continue
            told = _certified(path)
            if run.name in told["runs"] if told else path.name.startswith(run.name):
                answer, checkpoints = (told["answer"], told["checkpoints"]) if told else (None, [])
                kept = {"certificate": answer, "checkpoints": checkpoints}
                found[path] = {"path": places.shown(path), **_stored(path, told), **kept}
    return list(found.values())


def gguf_files(places: Places, run: ts.Run) -> list[dict[str, Any]]:
    """GGUF files in the run, beside it or at the root, and in folders there, whose name or folder begins as the run's.

    Args:
        places: what may be looked at.
        run: the run.
    """
    home = Path(run.path)
    found: dict[Path, dict[str, Any]] = {}
    for near in dict.fromkeys((home, home.parent, places.root)):
        for folder in (near, *_folders_in(near)):
            own = folder == home or (folder not in (home.parent, places.root) and folder.name.startswith(run.name))
            for path, size in _files_in(folder, ".gguf"):
                if own or path.name.startswith(run.name):
                    found[path] = {"path": places.shown(path), "size_bytes": size}
    return list(found.values())


def _summary(path: Path) -> dict[str, Any] | None:
    """A run in a line; None where it cannot be opened, as long as its training has saved nothing."""
    try:
        found = ts.open_run(path)
    except ts.TunesmithError:
        return None
    last = found.checkpoints[-1]

    def logged(name: str) -> float | None:
        return next((value for row in reversed(found.log) if (value := getattr(row, name)) is not None), None)

    return {
        "path": path,
        "name": found.name,
        "base_model": found.base_model,
        "tool": found.writer,
        "steps": logged("step") if last.step is None else last.step,
        "last_loss": logged("loss") if last.loss is None else last.loss,
        "eval_loss": logged("eval_loss") if last.eval_loss is None else last.eval_loss,
        "checkpoints": len(found.checkpoints),
        "modified_s": path.stat().st_mtime,
    }


def _demo(places: Places) -> dict[str, Any]:
    folder = demo_folder(places)
    ready = (folder / "run").is_dir() and (folder / "report.html").is_file()
    return {"ready": ready, "run": places.shown(folder / "run") if ready else None}


@cache
def library_defaults() -> dict[str, Any]:
    """The library's own defaults; those of its signatures that JSON has words for."""
    generation = {name: field.default for name, field in ts.GenerationSettings.model_fields.items()}
    verbs: dict[str, Callable[..., object]] = {"merge": ts.plan_merge, "verify": ts.verify, "demo": ts.demo}
    plain = (bool, int, float, str, type(None), tuple)
    signatures = {
        name: {key: value for key, value in defaults_of(verb).items() if isinstance(value, plain)}
        for name, verb in verbs.items()
    }
    return {"generation": generation, **signatures}


@cache
def _texts(lang: str) -> tuple[bytes, str]:
    body = to_json(dict(ts.templates(lang)))
    return body, f'"{hashlib.sha256(body).hexdigest()[:16]}"'


def _folders_in(folder: Path) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            for place, entry in enumerate(entries):
                if place >= _MOST_ENTRIES:
                    return
                if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                    yield Path(entry.path)
    except OSError:
        return


def _files_in(folder: Path, ending: str) -> Iterator[tuple[Path, int]]:
    try:
        with os.scandir(folder) as entries:
            for entry in islice(entries, _MOST_LISTED):
                if entry.name.endswith(ending) and entry.is_file(follow_symlinks=False):
                    yield Path(entry.path), entry.stat(follow_symlinks=False).st_size
    except OSError:
        return


def _stored(path: Path, told: dict[str, Any] | None) -> dict[str, Any]:
    """Whether a model is quantized, and by what scheme: by its certificate, or else as its configuration says."""
    try:
        file = path / "config.json"
        config = json.loads(file.read_bytes()) if file.stat().st_size <= _CERTIFICATE_BYTES else {}
        section = config.get("quantization_config")
        word = _scheme_word(section) if section else None
    except (OSError, ValueError, AttributeError, RecursionError):
        word = None
    scheme = (told or {}).get("scheme") or word
    return {"kind": "model" if scheme is None else "quantized", "scheme": scheme}


def _scheme_word(section: dict[str, Any]) -> str:
    """What people call a quantization: ``int4:64``; the method's name where it is another one than weights alone."""
    method = str(section.get("quant_method", "?"))
    try:
        (group,) = section["config_groups"].values()
        weights = group["weights"]
        if group.get("input_activations") or weights["type"] != "int":
            return method
        size = weights.get("group_size")
        return f"int{int(weights['num_bits'])}" + (f":{int(size)}" if size else "")
    except (KeyError, TypeError, ValueError, AttributeError):
        return method


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file() and any((path / name).is_file() for name in _WEIGHTS)


def _certified(path: Path) -> dict[str, Any] | None:
    """What a certificate says of runs and verdict; None where there is none that can be read."""
    file = path / _CERTIFICATE
    try:
        if not file.is_file() or file.stat().st_size > _CERTIFICATE_BYTES:
            return None
        predicate = json.loads(file.read_bytes())["predicate"]
        adapters = [(str(one["run"]), str(one["checkpoint"])) for one in predicate["adapters"]]
        verdict = predicate.get("verdict")
        answer = str(verdict["answer"]) if verdict else None
        quantization = predicate.get("quantization")
        scheme = str(quantization["scheme"]) if quantization else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    runs, checkpoints = [run for run, _ in adapters], [name for _, name in adapters]
    return {"runs": runs, "checkpoints": checkpoints, "answer": answer, "scheme": scheme}


def _stamp(folder: Path) -> object:
    """Names, dates and sizes of a folder's files and of those in its folders."""
    return [_listing(folder), *(_listing(path) for path in sorted(_folders_in(folder)))]


def _listing(folder: Path) -> list[tuple[str, int, int]] | None:
    try:
        with os.scandir(folder) as entries:
            found = [(one.name, one.stat(follow_symlinks=False)) for one in islice(entries, _MOST_LISTED)]
    except OSError:
        return None
    return sorted((name, facts.st_mtime_ns, facts.st_size) for name, facts in found)

"""What was answered and scored before, kept as lines of JSON, so that long work goes on where it stopped.

Every variant has a file of its own, named by its identity: a hash of weights, tokenizer and arithmetic.  A line's key
is a hash of what was asked.  So nothing that has changed is ever taken for what it was, and the base is scored once for
all the runs that were tuned from it.

A server's variant is known by the server's address and its own name.  Servers that were asked together were seen to
hold the same: their files name each other, and what any of them answered is found, whichever is asked later.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from tunesmith.models.engine import (
    Capabilities,
    Engine,
    Generation,
    GenerationSettings,
    OnGeneration,
    OnScore,
    OnText,
    Request,
    RowScore,
    ScoredRow,
)
from tunesmith.progress import Cancellation, Progress, ProgressCallback, no_progress

Answer = TypeVar("Answer", Generation, RowScore)

_FORMAT = "1"  # of the keys and the lines
_ALIKE = "servers alike"  # the key of the line that names the files of servers that hold the same


class RememberingEngine:
    """An engine that answers from a directory what it was asked before, and writes there what is new.

    Args:
        engine: who answers what is new.
        directory: where the lines are; it is made when there is something to write.
        named: whether variants of an engine that cannot tell their identity are remembered by their names.
        fresh: ask again, whatever is there.

    Attributes:
        engine: the same.
        remembered: how many answers and scores were there already.
        written: how many were written.
    """

    def __init__(self, engine: Engine, directory: Path, *, named: bool = False, fresh: bool = False) -> None:
        self.engine = engine
        self.remembered = self.written = 0
        self._directory, self._named, self._fresh = directory, named, fresh
        self._lines: dict[Path, dict[str, dict[str, Any]]] = {}
        self._alike: dict[str, tuple[Path, ...]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The engine's variants."""
        return self.engine.names

    @property
    def capabilities(self) -> Capabilities:
        """The engine's."""
        return self.engine.capabilities

    def identity(self, variant: str) -> str | None:
        """The engine's."""
        return self.engine.identity(variant)

    def generate(
        self,
        requests: Sequence[Request],
        settings: GenerationSettings | None = None,
        *,
        on_text: OnText | None = None,
        on_done: OnGeneration | None = None,
        progress: ProgressCallback = no_progress,
        cancellation: Cancellation | None = None,
    ) -> list[Generation]:
        """Answer every request: see :meth:`tunesmith.models.engine.Engine.generate`."""
        settings = settings or GenerationSettings()
        keys = _generation_keys(requests, settings)
        found = {i: self._find(one.variant, keys[i], Generation) for i, one in enumerate(requests)}
        done = {i: generation for i, generation in found.items() if generation is not None}
        for i, generation in done.items():
            if on_text is not None and generation.text:
                on_text(i, generation.text)
            if on_done is not None:
                on_done(i, generation)
        left = [i for i in range(len(requests)) if i not in done]

        def write(place: int, generation: Generation) -> None:
            self._write(requests[left[place]].variant, keys[left[place]], asdict(generation))
            if on_done is not None:
                on_done(left[place], generation)

        new = self.engine.generate(
            [requests[i] for i in left],
            settings,
            on_text=None if on_text is None else lambda place, text: on_text(left[place], text),
            on_done=write,
            progress=_further(progress, len(done)),
            cancellation=cancellation,
        )
        done |= dict(zip(left, new, strict=True))
        return [done[i] for i in range(len(requests))]

    def score(
        self,
        names: Sequence[str],
        rows: Sequence[ScoredRow],
        *,
        reference: str | None = None,
        on_done: OnScore | None = None,
        progress: ProgressCallback = no_progress,
        cancellation: Cancellation | None = None,
    ) -> dict[str, list[RowScore]]:
        """Score every row under every variant: see :meth:`tunesmith.models.engine.Engine.score`."""
        compared = self._compared_with(reference) if reference is not None else ""
        result: dict[str, dict[int, RowScore]] = {}
        keys: dict[str, list[str]] = {}
        for name in names:
            about = compared if name != reference else ""
            keys[name] = [_key("score", about, row.model_dump_json(exclude={"id"})) for row in rows]
            found = {i: self._find(name, key, RowScore) for i, key in enumerate(keys[name])}
            result[name] = {i: replace(one, id=rows[i].id) for i, one in found.items() if one is not None}
        before = sum(len(found) for found in result.values())
        for indexes, asked in _gaps(result, len(rows)).items():
            wanted = list(dict.fromkeys([*([reference] if reference is not None else []), *asked]))

            def write(name: str, place: int, score: RowScore, indexes: tuple[int, ...] = indexes) -> None:
                index = indexes[place]
                if index in result[name]:
                    return
                result[name][index] = score
                self._write(name, keys[name][index], asdict(score))
                if on_done is not None:
                    on_done(name, index, score)

            self.engine.score(
                wanted,
                [rows[index] for index in indexes],
                reference=reference,
                on_done=write,
                progress=_further(progress, before),
                cancellation=cancellation,
            )
            before = sum(len(found) for found in result.values())
        return {name: [result[name][i] for i in range(len(rows))] for name in names}

    def _compared_with(self, reference: str) -> str:
        """What a divergence is from, as a part of keys; no server's address, for another may answer the next time."""
        place = self._place(reference)
        return "" if place is None else place.name if self.engine.identity(reference) is not None else reference

    def _place(self, variant: str) -> Path | None:
        """Where a variant's new lines go; None where nobody can say which variant it is."""
        return next(iter(self._places(variant)), None)

    def _places(self, variant: str) -> tuple[Path, ...]:
        """The files of a variant: of several servers that hold it one each."""
        if variant not in self._alike:
            identity = self.engine.identity(variant)
            named = [identity] if identity is not None else self._by_address(variant) if self._named else []
            self._alike[variant] = tuple(self._directory / f"{one[:32]}.jsonl" for one in named)
            self._join(variant)
        return self._alike[variant]

    def _by_address(self, variant: str) -> list[str]:
        known = self.engine.capabilities
        places = known.servers or (known.where,)
        return [hashlib.sha256(f"{place}\n{variant}".encode()).hexdigest() for place in places]

    def _join(self, variant: str) -> None:
        """Read whatever servers answered that hold the same, and say in each file of these which others do."""
        ours = self._alike[variant]
        if not ours:
            return
        known, found, named = dict[str, dict[str, Any]](), list(ours), dict[Path, set[str]]()
        for place in found:  # it grows
            lines = _read(place)
            named[place] = {Path(str(name)).name for name in lines.pop(_ALIKE, {}).get("files", ())}
            found += [other for name in sorted(named[place]) if (other := self._directory / name) not in found]
            known = lines | known
        self._lines[ours[0]] = known
        for place in ours if len(ours) > 1 else ():
            others = {one.name for one in found if one != place}
            if not others <= named[place]:
                self._append(place, _ALIKE, {"files": sorted(others)})

    def _find(self, variant: str, key: str, kind: type[Answer]) -> Answer | None:
        place = self._place(variant)
        if place is None or self._fresh:
            return None
        line = self._lines[place].get(key)
        try:
            found = None if line is None else TypeAdapter(kind).validate_python(line)
        except ValidationError:  # of another version, or somebody's own
            return None
        self.remembered += found is not None
        return found

    def _write(self, variant: str, key: str, answer: dict[str, Any]) -> None:
        place = self._place(variant)
        if place is not None:
            self.written += self._append(place, key, answer)

    def _append(self, place: Path, key: str, answer: dict[str, Any]) -> bool:
        """Add a line to a file; False where that cannot be done: what cannot be kept is asked again."""
        line = json.dumps({"key": key, "answer": answer}, ensure_ascii=False) + "\n"
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(place, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                # A line that a kill cut short is to stay alone; a line is one write, so that two processes mix none.
                whole = line if _ends_whole(descriptor) else f"\n{line}"
                os.write(descriptor, whole.encode("utf-8", "surrogatepass"))
                return True
            finally:
                os.close(descriptor)
        return False


def _ends_whole(descriptor: int) -> bool:
    size = os.lseek(descriptor, 0, os.SEEK_END)
    if size:
        os.lseek(descriptor, size - 1, os.SEEK_SET)
    return size == 0 or os.read(descriptor, 1) == b"\n"


def _gaps(result: Mapping[str, Mapping[int, RowScore]], rows: int) -> dict[tuple[int, ...], list[str]]:
    """Variants by the rows that they still lack, so that those with the same gap are asked together."""
    gaps: dict[tuple[int, ...], list[str]] = {}
    for name, found in result.items():
        missing = tuple(i for i in range(rows) if i not in found)
        if missing:
            gaps.setdefault(missing, []).append(name)
    return gaps


def _read(place: Path) -> dict[str, dict[str, Any]]:
    """The lines of a file by key; a line that was cut short, or is none of ours, is passed over."""
    found: dict[str, dict[str, Any]] = {}
    with suppress(OSError), place.open("rb") as file:
        for line in file:
            try:
                document = json.loads(line)
                found[str(document["key"])] = dict(document["answer"])
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
    return found


def _generation_keys(requests: Sequence[Request], settings: GenerationSettings) -> list[str]:
    ignored = set() if settings.samples else {"seed", "temperature", "top_p", "top_k", "min_p", "greedy"}
    how = settings.model_dump_json(exclude=ignored)
    seen: Counter[str] = Counter()
    keys = []
    for request in requests:
        prompt = request.prompt
        asked = json.dumps(prompt if isinstance(prompt, str) else [[turn.role, turn.content] for turn in prompt])
        twin = f"{request.variant}\n{asked}"
        keys.append(_key("generate", how, asked, str(seen[twin])))
        seen[twin] += 1
    return keys


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join((_FORMAT, *parts)).encode("utf-8", "surrogatepass")).hexdigest()


def _further(progress: ProgressCallback, before: int) -> ProgressCallback:
    """Progress of what is left as progress of the whole."""

    def tell(step: Progress) -> None:
        total = None if step.total is None else before + step.total
        progress(Progress(step.stage, before + step.done, total, step.unit, step.detail))

    return tell

"""What a tuned model computes with: text that it writes by itself, and what its adapted layers are given on that text.

Rounding a layer's weights W to Q costs its output  Σ ‖(Q − W)·x‖²  over the inputs x that it meets.  These are recorded
here, in the live model, for whoever rounds; who that is this room does not know, so they go through a folder:

- ``NNNN.npy``: inputs X, float32, C order, (rows, features): NumPy's format 1.0.  A row is one token at one layer.
- ``inputs.json``:
  ``{"tokens": n, "files": {"0000.npy": {"rows": r, "features": d}, …}, "modules": {module: "0000.npy", …}}``.
  Layers that are given the same tensor share a file.  r is n, but for an expert that sees only the tokens routed to it.
  The file is written last: a folder that has it is whole.
"""

from __future__ import annotations

import inspect
import itertools
import json
import shutil
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.checkpoint import check_free_space, write_error
from tunesmith.conversations import Conversation, Message, encode, encode_prompt
from tunesmith.errors import CheckpointError, DataError, OutputError, PromptError
from tunesmith.models.engine import Generation, GenerationSettings
from tunesmith.models.generate import continue_rows
from tunesmith.models.quiet import quiet_logging
from tunesmith.models.variants import VariantSet, check_token_ids, context_window
from tunesmith.progress import Cancellation, Progress, ProgressCallback, no_progress

if TYPE_CHECKING:
    import torch

INPUTS_FILE = "inputs.json"

# Beginnings of a user's text, in two languages by turns.
SEEDS = (
    *("How", "写", "Why does", "为什么", "What is", "什么是", "Write", "怎么", "Explain", "解释", "Can you", "请"),
    *("Give me", "帮我", "Who", "谁", "Where", "哪里", "I want", "我想", "Please", "如何", "The", "今天"),
)
_OPENINGS = ((), (Message(role="system", content="You are a helpful assistant."),))
_MARKER_TOKENS = 3  # enough of what follows a user's text to know it by
_WRITTEN_AT_ONCE = 16
_POSITIONS_AT_ONCE = 512
_LOGITS_BUDGET_BYTES = 512 * 2**20
_FLOAT32_BYTES = 4
_LEAST_ROWS = 8

Write = Callable[[list[list[int]], int], list[Generation]]
TakeInput = Callable[[str, "torch.Tensor"], None]


@dataclass(frozen=True)
class RecordedInputs:
    """What a folder of recorded inputs holds.

    Attributes:
        folder: where ``inputs.json`` and the arrays are.
        tokens: how many tokens the model saw.
        modules: the file's name of every module whose inputs were recorded.
        left_out: modules that were asked for and are not linear layers of the live model, or saw no token.
    """

    folder: Path
    tokens: int
    modules: Mapping[str, str]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Frame:
    """Token ids before a user's text, of the seeds as that text, and of what follows up to the answer."""

    before: list[int]
    seeds: list[list[int]]
    after: list[int]

    @property
    def longest(self) -> int:
        return len(self.before) + max(map(len, self.seeds)) + len(self.after)


def write_calibration_text(
    variants: VariantSet,
    name: str,
    *,
    sequences: int = 48,
    bare: int = 0,
    tokens: int = 64,
    seed: int = 0,
    temperature: float = 0.7,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> list[tuple[int, ...]]:
    """Let a model write conversations with itself: user turns from nothing and from short seeds, then the answers.

    Every second user turn begins from nothing, the others with one of :data:`SEEDS`.  Where the chat template renders
    no user turn, or the context window is too small for one, the model goes on from its first token instead.

    Args:
        variants: the loaded variants, float32 where the text is to calibrate a rounding.
        name: which of them writes.
        sequences: how many.
        bare: so many more, which go on from the first token, outside of any conversation: what a model writes there is
            spread over all that it knows.
        tokens: of a sequence at most, chat template included; more where that alone takes over half of them.
        seed: the same seed gives the same text on the same machine.
        temperature: divides the logits; tokens are then drawn from all.
        progress: called with the stage ``write calibration text``, in turns.
        cancellation: read after every token.

    Returns:
        Token ids, one sequence a conversation, none of them empty.

    Raises:
        DataError: there is no such variant.
        Cancelled: somebody asked to stop.
    """
    settings = GenerationSettings(temperature=temperature, top_p=1.0, seed=seed)
    with variants.active(name) as (model, tokenizer), quiet_logging():
        window = context_window(model.config)
        frame = _chat_frame(tokenizer)
        if frame is not None and window is not None and frame.longest + 2 > window:
            frame = None
        turns = bare + (sequences if frame is None else 2 * sequences)
        write = _author(variants, name, turns, settings, progress=progress, cancellation=cancellation)
        if frame is None:
            prompts = _plain_starts(tokenizer, sequences, window)
            length = tokens
        else:
            room = tokens // 3 if window is None else min(tokens // 3, window - frame.longest - 1)
            prompts = _user_turns(tokenizer, frame, sequences, write=write, most=room)
            length = max(tokens, len(frame.before) + len(frame.after) + tokens // 2)
        answers = write(prompts, length - min(map(len, prompts), default=0))
        starts = _plain_starts(tokenizer, bare, window, opens_turns=set(frame.after) if frame else set())
        loose = write(starts, tokens - min(map(len, starts), default=0)) if bare else []
    written = [(*prompt, *answer.token_ids)[:length] for prompt, answer in zip(prompts, answers, strict=True)]
    return written + [(*start, *answer.token_ids)[:tokens] for start, answer in zip(starts, loose, strict=True)]


def encode_calibration_rows(
    variants: VariantSet, name: str, rows: Sequence[Conversation], *, tokens_at_most: int = 4096
) -> list[tuple[int, ...]]:
    """Token ids of the user's own rows, taken from all over the file until there are enough.

    A row longer than the context window, or than an eighth of all tokens while there are other rows, is cut.

    Args:
        variants: the loaded variants.
        name: which of them is to see the rows.
        rows: conversations, with or without an answer.
        tokens_at_most: of all sequences together.

    Returns:
        Token ids, one sequence a row; the same rows give the same sequences.

    Raises:
        DataError: no such variant, no chat template, a row that the template refuses, or no tokens at all.
        CheckpointError: the tokenizer knows tokens that the model does not.
    """
    result: list[tuple[int, ...]] = []
    left = tokens_at_most
    with variants.active(name) as (model, tokenizer), quiet_logging():
        most = max(tokens_at_most // _LEAST_ROWS, tokens_at_most // max(1, len(rows)))
        most = min(most, context_window(model.config) or most)
        for index in np.random.default_rng(0).permutation(len(rows)):
            ids = _row_ids(tokenizer, rows[index])[: min(most, left)]
            result += [tuple(ids)] if ids else []
            left -= len(ids)
            if left <= 0:
                break
        if not result:
            raise DataError(
                "The calibration rows give no tokens.",
                expected="at least one row with text",
                found=f"{len(rows)} rows, of which at most {tokens_at_most} tokens are taken",
                next_step="give a file with rows like those that the model was tuned on",
            )
        check_token_ids(model, result)
    return result


def record_inputs(
    variants: VariantSet,
    name: str,
    sequences: Sequence[Sequence[int]],
    modules: Sequence[str],
    folder: Path,
    *,
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> RecordedInputs:
    """Record what linear layers are given, in one pass over all sequences, into a folder that appears whole or not.

    Only sequences of one length run together, so that nothing is padded: neither a file nor an expert's routing ever
    sees a token that is not text.  Memory is the model's and one batch's.  The folder's format is this module's
    docstring's; rows are in the order of the sequences' lengths, and of the sequences where these are equal.

    Args:
        variants: the loaded variants, in float32 if the inputs are to be float32's.
        name: which of them is run, live.
        sequences: token ids, one document each.
        modules: names of modules in the live model, such as ``model.layers.0.self_attn.q_proj``.  What is not a linear
            layer there (an embedding, experts fused into one tensor, a name that the live model does not have) is
            left out, as is an expert that no token reached.
        folder: a new or empty directory, in one that exists.
        progress: called after every batch with the stage ``record inputs``, in tokens.
        cancellation: read at every layer.

    Returns:
        What the folder holds.

    Raises:
        DataError: no such variant, or no tokens.
        PromptError: a sequence is longer than the context window.
        CheckpointError: token ids that the model has no embedding for, or inputs that are not finite.
        OutputError: the folder is not empty, cannot be written, or its disk has too little space.
        Cancelled: somebody asked to stop.
    """
    cancellation = cancellation or Cancellation()
    rows = [list(sequence) for sequence in sequences if len(sequence)]
    tokens = sum(map(len, rows))
    with variants.active(name) as (model, _), quiet_logging(), _whole_or_nothing(folder):
        _check_sequences(model, rows)
        layers = _linear_layers(model, modules)
        groups = _sharing(model, layers, min(rows, key=len), cancellation)
        features = {members[0]: _features(layers[members[0]]) for members in groups}
        check_free_space(folder, _FLOAT32_BYTES * tokens * sum(features.values()))
        files = {lead: _RowsFile(folder / f"{i:04}.npy", features[lead]) for i, lead in enumerate(features)}

        def take(module: str, x: torch.Tensor) -> None:
            cancellation.check()
            files[module].add(x)

        with _watched({lead: layers[lead] for lead in files}, take):
            done = 0
            for batch in _batches(rows, _positions_at_once(model, layers)):
                _forward(model, layers, batch)
                done += sum(map(len, batch))
                progress(Progress("record inputs", done, tokens, "tokens", name))
        kept = {lead: file for lead, file in files.items() if file.rows}
        for file in kept.values():
            file.finish()
        recorded = {
            module: kept[members[0]].path.name for members in groups if members[0] in kept for module in members
        }
        _write_index(folder, tokens, kept.values(), recorded)
    left_out = tuple(module for module in modules if module not in recorded)
    return RecordedInputs(folder, tokens, recorded, left_out)


def _author(
    variants: VariantSet,
    name: str,
    turns: int,
    settings: GenerationSettings,
    *,
    progress: ProgressCallback,
    cancellation: Cancellation | None,
) -> Write:
    """What lets the model go on from rows, first with the user turns and then with the answers."""
    cancellation = cancellation or Cancellation()
    before = 0

    def write(rows: list[list[int]], most: int) -> list[Generation]:
        nonlocal before
        # The seed moves with the turns, or an answer would be drawn by the random numbers of its user's turn.
        changes = {"max_new_tokens": max(1, most), "seed": settings.seed + before}

        def tell(step: Progress) -> None:
            progress(Progress("write calibration text", before + step.done, turns, "turns", name))

        result = continue_rows(
            variants,
            [name] * len(rows),
            rows,
            settings.model_copy(update=changes),
            progress=tell,
            cancellation=cancellation,
            rows_at_once=_WRITTEN_AT_ONCE,
        )
        cancellation.check()
        before += len(rows)
        return result

    return write


def _chat_frame(tokenizer: Any) -> _Frame | None:
    """What the chat template puts around a user's text, or None where it renders no user turn that holds it.

    It is what the seeds' renderings have in common, so that tokens which a text's first or last letters would melt
    into are counted with the text.
    """
    for opening in _OPENINGS:
        try:
            rows = [encode_prompt(tokenizer, (*opening, Message(role="user", content=seed))) for seed in SEEDS]
        except DataError:
            continue
        before = _common_start(rows)
        rows = [row[len(before) :] for row in rows]
        after = _common_start([row[::-1] for row in rows])[::-1]
        seeds = [row[: len(row) - len(after)] for row in rows]
        if all(seeds):
            return _Frame(before, seeds, after)
    return None


def _common_start(rows: list[list[int]]) -> list[int]:
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    return [column[0] for column in same]


def _seed_of(seeds: list[list[int]], index: int) -> list[int]:
    return seeds[index // 2 % len(seeds)]


def _user_turns(tokenizer: Any, frame: _Frame, sequences: int, *, write: Write, most: int) -> list[list[int]]:
    """Prompts whose user turns the model wrote; where it wrote nothing, a seed is the turn."""
    from_seed = [index % 2 == 1 or not frame.before for index in range(sequences)]
    begun = [_seed_of(frame.seeds, index) if seeded else [] for index, seeded in enumerate(from_seed)]
    written = write([frame.before + text for text in begun], most)
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    texts = [start + _before_end(item, special, frame.after) for start, item in zip(begun, written, strict=True)]
    return [frame.before + (text or _seed_of(frame.seeds, index)) + frame.after for index, text in enumerate(texts)]


def _before_end(turn: Generation, special: set[int], after: list[int]) -> list[int]:
    """A turn up to its end, to a special token, or to what the template lets follow it."""
    ids = list(turn.token_ids[:-1] if turn.stop_reason == "eos" else turn.token_ids)
    marker = after[:_MARKER_TOKENS]
    for place, token in enumerate(ids):
        if token in special or (marker and ids[place : place + len(marker)] == marker):
            return ids[:place]
    return ids


def _plain_starts(
    tokenizer: Any, sequences: int, window: int | None, *, opens_turns: Container[int] = ()
) -> list[list[int]]:
    """The beginning of a text, and of texts that begin with the seeds; not with a token that opens a turn of a chat."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    begin = [] if first is None or first in opens_turns else [first]
    seeds = [list(tokenizer(seed, add_special_tokens=False)["input_ids"]) for seed in SEEDS]
    rows = [begin + (_seed_of(seeds, i) if i % 2 == 1 or not begin else []) for i in range(sequences)]
    return rows if window is None else [row[: max(1, window - 1)] for row in rows]


def _row_ids(tokenizer: Any, row: Conversation) -> list[int]:
    if row.answer is not None:
        try:
            return encode(tokenizer, row).input_ids
        except DataError:  # a template that rewrites earlier turns: as when the model answers
            pass
    try:
        prompt = encode_prompt(tokenizer, row.prompt)
    except DataError as error:
        raise DataError(error.what, where=row.id, found=error.found, next_step=error.next_step) from error
    return prompt + list(tokenizer(row.answer or "", add_special_tokens=False)["input_ids"])


def _check_sequences(model: Any, rows: list[list[int]]) -> None:
    if not rows:
        raise DataError("There are no tokens to calibrate with.", expected="at least one sequence of token ids")
    check_token_ids(model, rows)
    window, longest = context_window(model.config), max(map(len, rows))
    if window is not None and longest > window:
        raise PromptError(
            "A sequence is longer than the model's context window.", expected=f"at most {window} tokens", found=longest
        )


def _linear_layers(model: Any, names: Sequence[str]) -> dict[str, Any]:
    """Those of the named modules that are linear layers, bare or wrapped by PEFT."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    return {name: modules[name] for name in names if isinstance(_inner(modules.get(name)), nn.Linear | Conv1D)}


def _inner(module: Any) -> Any:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _features(layer: Any) -> int:
    inner = _inner(layer)
    return int(inner.in_features if hasattr(inner, "in_features") else inner.weight.shape[0])


def _sharing(model: Any, layers: Mapping[str, Any], sequence: list[int], cancellation: Cancellation) -> list[list[str]]:
    """Groups of layers that are given the very same tensors, in the order of ``layers``.

    One sequence shows it.  A layer that this does not reach is a group of its own.
    """
    numbers = itertools.count()
    alive: list[tuple[weakref.ref[Any], int, int]] = []
    seen: dict[str, tuple[int, ...]] = dict.fromkeys(layers, ())

    def see(module: str, x: torch.Tensor) -> None:
        cancellation.check()
        # An address is used again once its tensor is gone, and a tensor may be written to between two layers.
        alive[:] = [entry for entry in alive if entry[0]() is not None]
        version = x._version
        same = [number for tensor, written, number in alive if tensor() is x and written == version]
        if not same:
            same = [next(numbers)]
            alive.append((weakref.ref(x), version, same[0]))
        seen[module] += (same[0],)

    with _watched(layers, see):
        _forward(model, layers, [sequence])
    groups: dict[object, list[str]] = {}
    for module, inputs in seen.items():
        groups.setdefault(inputs or module, []).append(module)
    return list(groups.values())


@contextmanager
def _watched(layers: Mapping[str, Any], take: TakeInput) -> Iterator[None]:
    """Call ``take`` with a layer's name and its input, whenever that is run."""

    def hook(module: str) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
        return lambda _, args, kwargs: take(module, args[0] if args else next(iter(kwargs.values())))

    handles = []
    try:
        for module, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(hook(module), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _head_is_among(model: Any, layers: Mapping[str, Any]) -> bool:
    head = model.get_output_embeddings()
    return any(layer is head for layer in layers.values())


def _positions_at_once(model: Any, layers: Mapping[str, Any]) -> int:
    if not _head_is_among(model, layers):
        return _POSITIONS_AT_ONCE
    vocabulary = _inner(model.get_output_embeddings()).weight.shape[0]
    return min(_POSITIONS_AT_ONCE, int(_LOGITS_BUDGET_BYTES // (_FLOAT32_BYTES * vocabulary)))


def _batches(rows: list[list[int]], positions: int) -> Iterator[list[list[int]]]:
    """Sequences of one length, at most so many positions at once, but one sequence at least."""
    for length, same in itertools.groupby(sorted(rows, key=len), key=len):
        group = list(same)
        count = max(1, positions // length)
        for start in range(0, len(group), count):
            yield group[start : start + count]


def _forward(model: Any, layers: Mapping[str, Any], batch: list[list[int]]) -> None:
    import torch

    # The head sees only the positions whose logits are asked for.
    few = "logits_to_keep" in inspect.signature(model.forward).parameters and not _head_is_among(model, layers)
    ids = torch.tensor(batch, device=model.device)
    model(input_ids=ids, use_cache=False, **({"logits_to_keep": 1} if few else {}))


class _RowsFile:
    """An ``.npy`` file of float32 rows that grows; open only while it is written to, for there may be thousands.

    Args:
        path: the file.
        features: of a row.
    """

    def __init__(self, path: Path, features: int) -> None:
        self.path = path
        self.features = features
        self.rows = 0

    def add(self, x: torch.Tensor) -> None:
        """Append the rows of x, (…, features)."""
        import torch

        rows = x.detach().reshape(-1, self.features).to("cpu", torch.float32).contiguous()
        if not bool(torch.isfinite(rows).all()):
            raise CheckpointError("The model computes numbers that are not finite.", where=self.path.name)
        if not self.rows and len(rows):
            with self.path.open("xb") as file:
                self._write_header(file)
        with self.path.open("ab") as file:
            file.write(rows.numpy().astype("<f4", copy=False).data)
        self.rows += len(rows)

    def finish(self) -> None:
        """Write into the header how many rows there are; NumPy leaves room for a number that grows."""
        with self.path.open("r+b") as file:
            self._write_header(file)

    def _write_header(self, file: Any) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (self.rows, self.features)}
        np.lib.format.write_array_header_1_0(file, header)


def _write_index(folder: Path, tokens: int, files: Iterable[_RowsFile], modules: Mapping[str, str]) -> None:
    index = {
        "tokens": tokens,
        "files": {file.path.name: {"rows": file.rows, "features": file.features} for file in files},
        "modules": dict(modules),
    }
    (folder / INPUTS_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[None]:
    """Make a directory to fill; on any error it is as it was.  Nothing is synced: what is recorded is used at once."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError("Inputs are recorded into a new or empty directory only.", where=folder)
    made = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
        yield
    except BaseException as error:
        for path in folder.iterdir() if folder.is_dir() else ():
            path.unlink()
        if made:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise write_error(error, folder) from error
        raise

"""How the rows of a batch lie in one forward pass: side by side with padding, or behind each other without any.

*Flat*: the rows of a batch lie behind each other, and each attends to itself alone.  What all of them begin with (a
system text, mostly) lies there once, and every row sees it; its positions go on from there.  Each row is computed from
just what it would see alone, so the loss is the same sum, of fewer tokens.

Importing this module imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tunesmith.train.rows import IGNORED

Example = dict[str, list[int]]
_ATTENTION = "rows"
_GPU_TILE = 8  # tokens; what a GPU's attention kernels take without copying the mask


@dataclass(frozen=True)
class Layout:
    """What decides how the rows of a batch lie.

    Attributes:
        pad_token_id: what shorter rows are filled up with; it is attended to by nothing.
        longest_flat: rows longer than that are not laid flat, since the model sees only so far back, which attention
            of ours would overrule; None where it sees everything.
        flat: whether rows may lie flat at all; a model is asked first, by :func:`computes_flat_rows`.
        pad_to_multiple_of: what the length of padded rows is a multiple of.
    """

    pad_token_id: int
    longest_flat: int | None = None
    flat: bool = True
    pad_to_multiple_of: int = 1


def layout_of(config: Any, pad_token_id: int, *, device: str) -> Layout:
    """What a model's configuration tells of how its rows may lie.

    Rows lie flat on CPUs, where a product costs what its tokens cost.  On a GPU, short rows one after another would
    leave it idle; there rows of like length share a batch.

    Args:
        config: a loaded model's configuration.
        pad_token_id: what shorter rows are filled up with.
        device: ``cpu``, ``cuda`` …, that is trained on.
    """
    config = config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return Layout(
        pad_token_id=pad_token_id,
        longest_flat=min((window for window in windows if window), default=None),
        flat=device == "cpu" and config._attn_implementation == "sdpa",
        pad_to_multiple_of=1 if device == "cpu" else _GPU_TILE,
    )


def collate(examples: Sequence[Example], *, layout: Layout) -> dict[str, torch.Tensor]:
    """Lay the rows of a batch out for one forward pass.

    Args:
        examples: each with ``input_ids`` and ``labels``; with ``seq_lengths``, it is several rows packed into one.
        layout: how rows may lie.

    Returns:
        ``input_ids``, ``labels`` and ``shift_labels`` (the label of the token that follows, so that position i is held
        against ``shift_labels[i]``), int64; flat ones [1, tokens] with ``position_ids`` of that shape and
        ``row_bounds`` [rows + 1], where the shared beginning and each row end, and an ``attention_mask`` that hides
        nothing; padded ones [rows, longest row] with ``attention_mask`` of that shape, and longer
        than it where the layout says so.
    """
    rows = [row for example in examples for row in _unpacked(example)]
    # Blank rows only even out what processes are given; one is left where there is nothing else.
    rows = [row for row in rows if any(label != IGNORED for label in row["labels"])] or rows[:1]
    longest = max(len(row["input_ids"]) for row in rows)
    if layout.flat and longest <= (layout.longest_flat or longest):
        return _flat(rows)
    return _padded(rows, layout)


def _unpacked(example: Example) -> list[Example]:
    rows, start = [], 0
    for length in example.get("seq_lengths") or [len(example["input_ids"])]:
        rows.append({key: example[key][start : start + length] for key in ("input_ids", "labels")})
        start += length
    return rows


def _shared_beginning(rows: Sequence[Example]) -> int:
    """Tokens that all rows begin with, one short of the first answer: what follows them may differ between rows."""
    if len(rows) < 2:
        return 0
    most = min(next(at for at, label in enumerate(row["labels"]) if label != IGNORED) for row in rows) - 1
    first, last = min(row["input_ids"] for row in rows), max(row["input_ids"] for row in rows)
    same = next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    return max(0, min(same, most))


def _flat(rows: Sequence[Example]) -> dict[str, torch.Tensor]:
    shared = _shared_beginning(rows)
    pieces = [(rows[0]["input_ids"][:shared], rows[0]["labels"][:shared])]
    pieces += [(row["input_ids"][shared:], row["labels"][shared:]) for row in rows]
    lengths = torch.tensor([len(tokens) for tokens, _ in pieces])
    following = [label for _, labels in pieces for label in (*labels[1:], IGNORED)[: len(labels)]]
    positions = [torch.arange(shared), *(torch.arange(shared, shared + length) for length in lengths[1:].tolist())]
    return {
        "input_ids": torch.tensor([[token for tokens, _ in pieces for token in tokens]]),
        "labels": torch.tensor([[label for _, labels in pieces for label in labels]]),
        "shift_labels": torch.tensor([following]),
        "position_ids": torch.cat(positions)[None],
        "row_bounds": lengths.cumsum(0),
        # Transformers takes a mask of four dimensions as it is, and makes none of its own, which nobody would read.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
    }


def _padded(rows: Sequence[Example], layout: Layout) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    width = math.ceil(longest / layout.pad_to_multiple_of) * layout.pad_to_multiple_of

    def padded(values: Sequence[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([[*row, *[filler] * (width - len(row))] for row in values])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {
        "input_ids": padded([row["input_ids"] for row in rows], layout.pad_token_id),
        "labels": padded([row["labels"] for row in rows], IGNORED),
        "shift_labels": padded([row["labels"][1:] for row in rows], IGNORED),
        "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
    }


def attend_by_rows(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    row_bounds: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for Transformers' models: of flat rows each over its own and the shared beginning, else SDPA's.

    Args:
        module: the attention layer.
        query: [1, heads, tokens, size].
        key: [1, key heads, tokens, size].
        value: like ``key``.
        attention_mask: of padded rows.
        scaling: of the products; None for 1 / sqrt(size).
        dropout: of the attention weights.
        row_bounds: as :func:`collate` gives it; None for padded rows.
        **options: what SDPA takes beside.

    Returns:
        The sums, [1, tokens, heads, size], and no weights.
    """
    if row_bounds is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
    # Split rather than sliced, whose gradient would be as large as the whole, and zero but for a row.
    shared, *lengths = row_bounds.diff(prepend=row_bounds.new_zeros(1)).tolist()
    queries, keys, values = (whole.split((shared, *lengths), 2) for whole in (query, key, value))
    rows = []
    for at, own in enumerate(queries):
        before = shared if at else 0
        if not own.shape[2]:  # nothing in common
            continue
        seen = [(part[0], part[at]) if before else (part[at],) for part in (keys, values)]
        row_keys, row_values = (torch.cat(parts, 2) for parts in seen)
        order = torch.arange(before + own.shape[2], device=query.device)
        rows.append(
            F.scaled_dot_product_attention(
                own,
                row_keys,
                row_values,
                attn_mask=(order <= order[before:, None]) if before else None,
                is_causal=not before,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=key.shape[1] != query.shape[1],
            )
        )
    return torch.cat(rows, 2).transpose(1, 2), None


def let_rows_lie_flat(model: Any) -> None:
    """Have a model attend by rows where a batch says where they end; nothing changes for padded ones."""
    AttentionInterface.register(_ATTENTION, attend_by_rows)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    model.set_attn_implementation(_ATTENTION)


def computes_flat_rows(model: Any, examples: Sequence[Example], layout: Layout) -> bool:
    """Whether a model computes flat rows as it computes them padded: asked of the model itself, on some rows.

    A model whose layers mix tokens otherwise than by attention, or that counts positions in a way of its own, does not.
    Where it does, it attends by rows from then on.

    Args:
        model: the model, on its device; its mode is kept.
        examples: a few rows of unequal lengths.
        layout: how its rows may lie.
    """
    rows = [row for example in examples for row in _unpacked(example)]
    if not layout.flat or any(len(row["input_ids"]) > (layout.longest_flat or len(row["input_ids"])) for row in rows):
        return False
    training = model.training
    model.eval()
    try:
        let_rows_lie_flat(model)
        with torch.no_grad():
            flat = _log_likelihoods(model, _flat(rows))
            padded = _log_likelihoods(model, _padded(rows, layout))
        # Sums in another order; a row that saw another row, or other positions, is off by tenths of a nat.
        same = bool((flat - padded).abs().mean() <= (1e-4 if model.dtype == torch.float32 else 0.1))
    except (RuntimeError, ValueError, TypeError, IndexError):  # it cannot take them at all
        same = False
    finally:
        model.train(training)
    if not same:
        model.set_attn_implementation("sdpa")
    return same


def _log_likelihoods(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-likelihood of each supervised token, in the order of the rows; float32, [tokens]."""
    batch = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
    targets = batch.pop("shift_labels")
    logits = model(**batch, use_cache=False).logits[targets != IGNORED].float()
    return -F.cross_entropy(logits, targets[targets != IGNORED], reduction="none")

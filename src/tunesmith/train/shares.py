"""How rows are shared out over processes, each of them once.

Where rows do not come out even, the Trainer gives some of them a second time at the end of a pass.  Here blank rows
fill that up, which count in no loss, so that several processes take the steps of one with as many rows.

Importing this module imports torch and transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import RandomSampler, Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from tunesmith.train.rows import IGNORED

Example = dict[str, list[int]]


class RepeatableGroups(LengthGroupedSampler):  # type: ignore[misc] # transformers has no types here
    """Rows of like length together, in an order that the seed and the pass decide: a resumed run has the same.

    The Trainer's takes what random numbers come next, and after a restart others do.
    """

    def __init__(self, batch_size: int, *, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Begin the pass of that number."""
        self.generator.manual_seed(self._seed + epoch)


class BlanksLast(Sampler[int]):  # type: ignore[misc] # torch is untyped here
    """The order of another sampler, and after it the blank rows.

    It asks which pass begins: where a pass is gone on with, accelerate tells that to the samplers of one process only.

    Args:
        order: of the rows.
        rows: how many these are.
        blanks: how many blank ones follow.
        epoch: tells the number of the pass that begins.
    """

    def __init__(self, order: Any, *, rows: int, blanks: int, epoch: Callable[[], int]) -> None:
        self._order, self._rows, self._blanks, self._epoch = order, rows, blanks, epoch

    def __iter__(self) -> Iterator[int]:
        """A pass."""
        if hasattr(self._order, "set_epoch"):
            self._order.set_epoch(self._epoch())
        yield from self._order
        yield from range(self._rows, self._rows + self._blanks)

    def __len__(self) -> int:
        """All of them."""
        return self._rows + self._blanks


def blank_like(example: Example) -> Example:
    """A short row that is laid out as ``example`` is, and counts in no loss."""
    tokens = example["input_ids"][:2]
    blank = {"input_ids": tokens, "labels": [IGNORED] * len(tokens)}
    return blank | ({"seq_lengths": [len(tokens)]} if "seq_lengths" in example else {})


def shared_out(examples: Sequence[Example], *, rows_a_pass: int, processes: int) -> list[Example]:
    """The rows, and so many blank ones after them that every process has as many whole batches.

    Args:
        examples: the rows.
        rows_a_pass: rows of one forward pass of one process.
        processes: how many there are; for one nothing is added.
    """
    missing = -len(examples) % (rows_a_pass * processes) if processes > 1 else 0
    return [*examples, *([blank_like(examples[0])] * missing)]


def order_of_rows(sampler: Any, *, rows: int, seed: int, processes: int, epoch: Callable[[], int]) -> Any:
    """The Trainer's order of rows, made repeatable, and the same over several processes as in one.

    Args:
        sampler: the Trainer's, over all rows, blank ones included.
        rows: how many are not blank.
        seed: of the order.
        processes: how many share the rows.
        epoch: tells the number of the pass that begins.
    """
    everything = len(sampler)
    if isinstance(sampler, LengthGroupedSampler):
        lengths = list(sampler.lengths)[:rows]
        sampler = RepeatableGroups(sampler.batch_size * processes, lengths=lengths, seed=seed)
    elif processes > 1 and isinstance(sampler, RandomSampler):
        # What accelerate makes of it in one process.
        sampler = SeedableRandomSampler(range(rows), generator=torch.Generator(), data_seed=seed)
    elif processes > 1:
        sampler = range(rows)
    return sampler if processes == 1 else BlanksLast(sampler, rows=rows, blanks=everything - rows, epoch=epoch)

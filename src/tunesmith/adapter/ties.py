"""What an adapter does to an output head that is its embedding's own tensor, and to the size of the vocabulary.

A tied head follows its embedding where both are meant: token rows, a resized vocabulary, an update that is stored on
both sides (``ensure_weight_tying``).  An update of one side only unties them, as it did in the tuned model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tunesmith.adapter.heads import HEADED_TASKS, has_lm_head, is_bare
from tunesmith.adapter.load import Adapter
from tunesmith.adapter.places import Places
from tunesmith.adapter.records import Copied, LowRank, Replaced, Rows, Update
from tunesmith.checkpoint import same_values
from tunesmith.record import Finding


class Ties:
    """The embedding and the head of one base, under a stack of adapters.

    Args:
        places: the base's names.
        adapters: the stack.
        refuse: told of what cannot be merged truly.

    Attributes:
        config: changes to ``config.json``.
        dropped: tensors that the merged model does not need.
        findings: what the user should know.
    """

    def __init__(self, places: Places, adapters: Sequence[Adapter], refuse: Callable[[str], None]) -> None:
        self.places, self.adapters, self.refuse = places, adapters, refuse
        self.config: dict[str, bool] = {}
        self.dropped: list[str] = []
        self.findings: list[Finding] = []

    def settle(self, updates: Sequence[Update], shared: dict[str, Replaced]) -> list[Update]:
        """Give head and embedding what is theirs.

        Args:
            updates: of all adapters.
            shared: tensors that adapters store for the base's own, by name.

        Returns:
            All updates, the shared tensors' among them.
        """
        embedding, head = self.places.embedding, self.places.head or self.places.written_as("lm_head.weight")
        touched = {update.name for update in updates} | shared.keys()
        plain = [*_unless_replaced(shared.values(), updates), *updates]
        if embedding is None or not touched & {embedding, head} or self._headless():
            return plain
        if not self.places.tied:
            if self.places.says_tied:
                self._untie_the_unlike(head, [update for update in updates if isinstance(update, Rows)])
            return plain
        others = [update for update in updates if update.name not in (embedding, head)]
        others += _unless_replaced([shared[name] for name in shared if name not in (embedding, head)], others)
        of_embedding = [update for update in updates if update.name == embedding]
        of_head = [update for update in updates if update.name == head]
        own, own_head = shared.get(embedding), shared.get(head)
        if own and own_head and not self._same(own, own_head):
            self._untie(head)
            return [
                *others,
                *_unless_replaced([own], of_embedding),
                *of_embedding,
                *_unless_replaced([own_head], of_head),
                *of_head,
            ]
        own = own or own_head
        begin = _unless_replaced([own.model_copy(update={"name": embedding})] if own else [], of_embedding)
        if self._follows(of_embedding, of_head):
            if self.places.head and (own or of_embedding):
                self.dropped.append(head)
            return [*others, *begin, *of_embedding]
        if any(isinstance(update, Rows) for update in of_embedding) and not any(
            isinstance(update, Rows | Replaced) for update in of_head
        ):
            self.refuse(
                "trained token rows of a tied embedding, beside an update of its head or of the whole embedding"
            )
        self._untie(head)
        if not any(isinstance(update, Replaced) for update in of_head):
            copied = Copied(name=head, source=embedding)
            of_head.insert(0, own.model_copy(update={"name": head}) if own else copied)
        return [*others, *begin, *of_embedding, *of_head]

    def _untie_the_unlike(self, head: str, rows: Sequence[Rows]) -> None:
        """The configuration says *tied*, the files hold two: transformers 5 takes both, and other loaders shall too."""
        self._untie(head)
        if rows and head not in {update.name for update in rows}:
            self.refuse("trained token rows of an embedding that is tied by config.json, and not by its files")

    def _headless(self) -> bool:
        """Whether the tuned model has no output head over the vocabulary."""
        tasks = {adapter.config.get("task_type") for adapter in self.adapters}
        return bool(tasks & HEADED_TASKS.keys()) or is_bare(self.places.architecture)

    def _untie(self, head: str) -> None:
        if self.places.head is None and not has_lm_head(self.places.architecture):
            self.refuse(
                f"an update of the embedding alone, which {self.places.architecture or 'the base'} shares with an "
                "output head of a name that is not known here"
            )
        self.config["tie_word_embeddings"] = False
        if self.places.section():
            self.config["text_config.tie_word_embeddings"] = False
        self.findings.append(Finding(code="head_untied", severity="info", params={"name": head}))

    def _follows(self, of_embedding: Sequence[Update], of_head: Sequence[Update]) -> bool:
        """Whether one tensor can go on being both."""
        if not of_head:
            return all(isinstance(update, Rows) for update in of_embedding)
        mirrored = len(of_head) == len(of_embedding) and all(
            self._mirrors(ours, theirs) for ours, theirs in zip(of_embedding, of_head, strict=True)
        )
        tying = any(
            self.adapters[update.adapter].config.get("ensure_weight_tying")
            for update in of_head
            if not isinstance(update, Copied)
        )
        if tying and not mirrored:
            self.refuse(
                "ensure_weight_tying, but what the file holds for the embedding is not what it holds for the head"
            )
        return mirrored

    def _mirrors(self, ours: Update, theirs: Update) -> bool:
        """Whether an update of the embedding and one of the head are the same change of the one tensor."""
        if isinstance(ours, LowRank) and isinstance(theirs, LowRank):
            adapter, other = self.adapters[ours.adapter], self.adapters[theirs.adapter]
            return (
                ours.scaling == theirs.scaling
                and np.array_equal(adapter.stored(ours.lora_A).T, other.stored(theirs.lora_B))
                and np.array_equal(adapter.stored(ours.lora_B).T, other.stored(theirs.lora_A))
            )
        if isinstance(ours, Rows) and isinstance(theirs, Rows):
            return ours.indices == theirs.indices and self._same(ours, theirs)
        return isinstance(ours, Replaced) and isinstance(theirs, Replaced) and self._same(ours, theirs)

    def _same(self, ours: Replaced | Rows, theirs: Replaced | Rows) -> bool:
        first, second = self.adapters[ours.adapter].header, self.adapters[theirs.adapter].header
        return same_values(first, ours.tensor, second, theirs.tensor)


def _unless_replaced(shared: Iterable[Replaced], updates: Iterable[Update]) -> list[Replaced]:
    """What adapters store of the base's own, where no trained copy takes its place."""
    copies = {update.name for update in updates if isinstance(update, Replaced)}
    return [update for update in shared if update.name not in copies]

"""Which modules are given the same input: the projections of one attention, the two halves of one gated layer."""

from __future__ import annotations

from tunesmith.adapter.records import Binding, LowRank

# The last parts of the names of modules that stand side by side and read one tensor.
_SIDE_BY_SIDE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
_GROUPS = {leaf: leaves[0] for leaves in _SIDE_BY_SIDE for leaf in leaves}


def beside(binding: Binding) -> dict[str, tuple[LowRank, ...]]:
    """The updates of the modules that are given the same input as a tensor's own.

    Args:
        binding: what the adapters make of the base.

    Returns:
        By the name of a tensor, the other tensors' updates; tensors without any are left out, and so are single blocks
        of a stack and tensors that are stored the other way round.
    """
    groups: dict[tuple[str, str], list[LowRank]] = {}
    for update in binding.updates:
        if isinstance(update, LowRank) and update.block is None and not update.transposed:
            parent, _, leaf = update.name.removesuffix(".weight").rpartition(".")
            if leaf in _GROUPS:
                groups.setdefault((parent, _GROUPS[leaf]), []).append(update)
    return {
        name: others
        for group in groups.values()
        for name in {update.name for update in group}
        if (others := tuple(update for update in group if update.name != name))
    }

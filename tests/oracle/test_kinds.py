"""Every kind of adapter, merged: the closed form's bytes, and the live adapter's logits."""

from __future__ import annotations

import operator

import pytest
import torch
import transformers

from tests.oracle import formula
from tests.oracle.kinds import KINDS
from tests.oracle.zoo import Zoo, logits_of, relative

# Two ways to the same float32 logits differ by some ulps a layer: 2e-6 at most here.  A mistake moves them by 1e-1.
LIVE_TOLERANCE = 1e-5
A_MOVE = 1e-2

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [kind for kind, made in KINDS.items() if made.truth])
def test_merge_has_the_bytes_of_the_closed_form(zoo: Zoo, kind: str, dtype: str) -> None:
    """W' is the formula's in float64, rounded once, in every tensor; names, shapes and dtypes too."""
    base = formula.read(zoo.base(KINDS[kind].base, DTYPES[dtype]))
    truth = KINDS[kind].truth
    assert truth
    expected = formula.merge(base, formula.read(zoo.adapter(kind)), truth)
    formula.assert_same(formula.read(zoo.merged(kind, DTYPES[dtype])), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_acts_as_the_live_adapter(zoo: Zoo, kind: str) -> None:
    """A plain loader's logits of the merged directory are those of the model that PEFT trained, unmerged."""
    live = logits_of(zoo.live(kind))
    assert relative(logits_of(zoo.load_merged(kind)[0]), live) < LIVE_TOLERANCE
    base = zoo.base_logits(kind)
    width = min(base.shape[-1], live.shape[-1])
    assert relative(base[..., :width], live[..., :width]) > A_MOVE  # the adapter does something


@pytest.mark.parametrize("kind", KINDS)
def test_merged_directory_says_what_its_tensors_are(zoo: Zoo, kind: str) -> None:
    """A loader finds every tensor that it looks for, none too many and none of another shape; the config is true."""
    config = transformers.AutoConfig.from_pretrained(zoo.merged(kind))
    truth = KINDS[kind].truth
    for key, value in ((truth and truth.config) or {}).items():
        assert operator.attrgetter(key)(config) == value
    model, info = zoo.load_merged(kind)
    leftover = KINDS[kind].leftover
    unexpected = {key for key in info["unexpected_keys"] if not leftover or not key.startswith(leftover)}
    assert not any({**info, "unexpected_keys": unexpected}.values()), info
    assert type(model).__name__ == config.architectures[0] == type(zoo.live(kind).get_base_model()).__name__

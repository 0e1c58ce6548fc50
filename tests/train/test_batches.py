"""Batches: however rows lie, each is computed as it would be alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    import transformers

from tunesmith.train import batches
from tunesmith.train.batches import Layout, attend_by_rows, collate, computes_flat_rows, layout_of, let_rows_lie_flat
from tunesmith.train.rows import IGNORED

FLAT, PADDED = Layout(pad_token_id=0), Layout(pad_token_id=0, flat=False)
# Log-likelihoods in float32 against those of the row alone in float32: sums in another order.
NATS = 2e-5


def row(ids: Sequence[int], supervised: int) -> dict[str, list[int]]:
    """A row whose last tokens are supervised."""
    return {"input_ids": list(ids), "labels": [IGNORED] * (len(ids) - supervised) + list(ids[-supervised:])}


def tiny(name: str, **changes: Any) -> Any:
    """A random model of an architecture, with 96 tokens in its vocabulary."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = transformers.AutoConfig.for_model(name, **{**sizes, **heads, "initializer_range": 0.3, **changes})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def llama() -> Any:
    """A tiny llama that attends by rows."""
    model = tiny("llama")
    let_rows_lie_flat(model)
    return model


def alone(model: Any, rows: Sequence[dict[str, list[int]]]) -> torch.Tensor:
    """Log-likelihoods of the supervised tokens, each row computed by itself."""
    found = []
    for one in rows:
        with torch.no_grad():
            log_p = torch.log_softmax(model(torch.tensor([one["input_ids"]]), use_cache=False).logits[0], -1)
        found += [log_p[at - 1, label] for at, label in enumerate(one["labels"]) if at and label != IGNORED]
    return torch.stack(found)


def together(model: Any, rows: Sequence[dict[str, list[int]]], layout: Layout) -> torch.Tensor:
    """The same, all rows in one batch."""
    with torch.no_grad():
        return batches._log_likelihoods(model, collate(rows, layout=layout))


@given(
    beginning=st.integers(0, 6),
    lengths=st.lists(st.tuples(st.integers(2, 9), st.integers(1, 8)), min_size=1, max_size=5),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_rows_are_computed_as_alone(llama: Any, beginning: int, lengths: list[tuple[int, int]], seed: int) -> None:
    """Whatever their lengths, and whatever they begin with in common, flat or padded."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randint(3, 9, (beginning,), generator=generator).tolist()
    rows = [
        row([*common, *torch.randint(3, 9, (prompt + answer,), generator=generator).tolist()], answer)
        for prompt, answer in lengths
    ]
    expected = alone(llama, rows)
    for layout in (FLAT, PADDED):
        torch.testing.assert_close(together(llama, rows, layout), expected, rtol=0, atol=NATS)


def test_common_beginning_lies_in_a_batch_once() -> None:
    """And ends a token before the first answer, as what follows it may differ."""
    rows = [row([5, 6, 7, 8, 9], 1), row([5, 6, 7, 4, 3, 2], 2), row([5, 6, 7, 8, 1], 1)]
    batch = collate(rows, layout=FLAT)
    assert batch["row_bounds"].tolist() == [3, 5, 8, 10]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4, 3, 2, 8, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 3, 4]]
    same = collate([row([5, 6, 7], 1), row([5, 6, 7], 1)], layout=FLAT)
    assert same["row_bounds"].tolist() == [1, 3, 5]  # though all three tokens are the same


def test_labels_are_shifted_by_one_and_never_across_rows() -> None:
    """Position i is held against the token after it; the last one of a row against nothing."""
    rows = [row([3, 4, 5], 2), row([6, 7], 1)]
    flat, padded = (collate(rows, layout=layout) for layout in (FLAT, PADDED))
    assert flat["shift_labels"].tolist() == [[4, 5, IGNORED, 7, IGNORED]]
    assert padded["shift_labels"].tolist() == [[4, 5, IGNORED], [7, IGNORED, IGNORED]]
    for batch in (flat, padded):  # what the Trainer counts, in whichever of its ways
        assert (batch["labels"] != IGNORED).sum() == (batch["shift_labels"] != IGNORED).sum()
        assert (batch["labels"][..., 1:] != IGNORED).sum() == (batch["shift_labels"] != IGNORED).sum()


def test_packed_rows_do_not_see_each_other(llama: Any) -> None:
    """One example that holds several rows is those rows."""
    rows = [row([3, 4, 5, 6], 2), row([7, 8, 9], 1), row([3, 9, 9, 9], 3)]
    packed = {key: [value for one in rows for value in one[key]] for key in ("input_ids", "labels")}
    packed["seq_lengths"] = [4, 3, 4]
    for layout in (FLAT, PADDED):
        torch.testing.assert_close(together(llama, [packed], layout), alone(llama, rows), rtol=0, atol=NATS)


def test_rows_beyond_a_sliding_window_are_padded() -> None:
    """Attention by rows sees all of a row, the model only so far back."""
    model = tiny("mistral", sliding_window=6)
    layout = layout_of(model.config, 0, device="cpu")
    assert layout.longest_flat == 6
    short, long = [row([3, 4, 5], 1), row([6, 7, 8, 9], 2)], [row(range(3, 13), 4), row([3, 4, 5], 1)]
    assert computes_flat_rows(model, short, layout)
    assert "row_bounds" in collate(short, layout=layout)
    assert "row_bounds" not in collate(long, layout=layout)
    torch.testing.assert_close(together(model, long, layout), alone(model, long), rtol=0, atol=NATS)


ROWS = [row([3, 4, 5, 6, 7], 2), row([3, 4, 9, 8, 7, 6, 5], 3), row([3, 4, 8], 1)]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "gpt_neox", "phi3", "olmo2", "qwen3"])
def test_models_that_only_attention_mixes_take_flat_rows(name: str) -> None:
    """They are asked, and then do."""
    model = tiny(name)
    layout = layout_of(model.config, 0, device="cpu")
    assert computes_flat_rows(model, ROWS, layout)
    torch.testing.assert_close(together(model, ROWS, layout), alone(model, ROWS), rtol=0, atol=NATS)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("bloom", {"n_head": 4, "n_layer": 2}),
        ("mamba", {"state_size": 8}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    ],
)
def test_models_that_mix_tokens_otherwise_are_found_out(name: str, changes: dict[str, Any]) -> None:
    """Positions of their own (Bloom), a recurrent state (Mamba), a convolution (LFM2): padded, and still right."""
    model = tiny(name, **changes)
    layout = layout_of(model.config, 0, device="cpu")
    assert not computes_flat_rows(model, ROWS, layout)
    torch.testing.assert_close(together(model, ROWS, PADDED), alone(model, ROWS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("fault", ["rows see each other", "no common beginning"])
def test_wrong_attention_would_be_noticed(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """The question that a model is asked has teeth."""

    def wrong(*inputs: Any, row_bounds: Any = None, **options: Any) -> Any:
        if row_bounds is not None:
            shared, *ends = row_bounds.tolist()
            row_bounds = torch.tensor([0, ends[-1]] if fault == "rows see each other" else [0, shared, *ends])
        return attend_by_rows(*inputs, row_bounds=row_bounds, **options)

    monkeypatch.setattr(batches, "attend_by_rows", wrong)
    model = tiny("llama")
    assert not computes_flat_rows(model, ROWS, layout_of(model.config, 0, device="cpu"))


def test_gpus_get_padded_rows() -> None:
    """There, rows of like length share a batch, whose length a GPU's kernels take as it is; the loss stays the same."""
    model = tiny("llama")
    layout = layout_of(model.config, 0, device="cuda")
    assert collate(ROWS, layout=layout)["input_ids"].shape == (3, 8)
    assert collate([row(range(3, 12), 4)], layout=layout)["input_ids"].shape == (1, 16)
    torch.testing.assert_close(together(model, ROWS, layout), alone(model, ROWS), rtol=0, atol=NATS)

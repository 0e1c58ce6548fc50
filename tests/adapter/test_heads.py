"""tuned_class: the name that transformers has for a task's class, and the names of labels."""

from __future__ import annotations

import pytest
from transformers.models.auto import modeling_auto

from tunesmith.adapter.heads import label_names, tuned_class

TABLES = {
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}
BASES = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    modeling_auto.MODEL_MAPPING_NAMES,
)
# Transformers 5.6, which LLaMA-Factory 0.9.5 pins, has one class for both halves of this family; later releases have
# two.  Either finds its own by `model_type`, whatever class a configuration names.
ONCE_SHARED = {("qwen3_5_text", "Qwen3_5ForSequenceClassification")}


def first(names: object) -> str:
    """Some entries are tuples."""
    return names if isinstance(names, str) else next(iter(names))  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("task", TABLES)
def test_every_class_of_transformers_is_found_from_its_bases(task: str) -> None:
    """Whatever class the base's own configuration names, the language model's or the bare one's."""
    wrong = [
        (kind, first(table[kind]), found)
        for kind, wanted in TABLES[task].items()
        for table in BASES
        if kind in table
        and (kind, first(wanted)) not in ONCE_SHARED
        and (found := tuned_class(first(table[kind]), kind, task)) != first(wanted)
    ]
    assert wrong == []
    assert tuned_class(first(TABLES[task]["bert"]), "bert", task) == first(TABLES[task]["bert"])


def test_labels_are_named_where_the_base_names_another_number() -> None:
    """Names of the base that still fit are kept."""
    assert label_names(2, {"0": "no", "1": "yes"}) == {}
    assert label_names(2, None) == {
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    }
    assert label_names(3, {"0": "no", "1": "yes"})["id2label"]["2"] == "LABEL_2"

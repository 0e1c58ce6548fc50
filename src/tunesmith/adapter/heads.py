"""The class of a model that was tuned with a head of its own: a classifier over a language model's base."""

from __future__ import annotations

import re
from typing import Any

LABELLED_TASKS = ("SEQ_CLS", "TOKEN_CLS")
HEADED_TASKS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}

_HEAD = re.compile(r"(For[A-Z]\w*|(Model)?(With)?LMHead(Model)?|Model)$")
_SIMPLE = {"flaubert", "xlm", "xlnet"}  # their plain class for answering questions is an older, other one


def tuned_class(architecture: str, model_type: object, task: str) -> str:
    """The class that transformers loads for a task.

    Args:
        architecture: the base's class, such as ``LlamaForCausalLM``.
        model_type: the base's ``model_type``.
        task: PEFT's ``task_type``, one of ``HEADED_TASKS``.

    Source:
        ``MODEL_FOR_*_MAPPING_NAMES`` of transformers; a test goes through them all.
    """
    if architecture.endswith(HEADED_TASKS[task]):
        return architecture
    stem = _HEAD.sub("", architecture)
    # The text half of a multimodal family has classes of its own, though its language model has the family's name.
    if str(model_type).endswith("_text") and task == "SEQ_CLS" and not stem.endswith("Text"):
        stem += "Text"
    simple = "Simple" if task == "QUESTION_ANS" and model_type in _SIMPLE else ""
    return stem + HEADED_TASKS[task] + simple


def has_lm_head(architecture: str) -> bool:
    """Whether a class calls its output head ``lm_head``; where no class is named, it is taken for one of those."""
    return not architecture or architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))


def is_bare(architecture: str) -> bool:
    """Whether a class has no head at all."""
    return architecture.endswith("Model") and not architecture.endswith("LMHeadModel")


def label_names(count: int, known: object) -> dict[str, dict[str, Any]]:
    """``id2label`` and ``label2id`` for a number of labels; nothing where the base names as many.

    Args:
        count: rows of the classifier.
        known: the base's ``id2label``.
    """
    if isinstance(known, dict) and len(known) == count:
        return {}
    names = {label: f"LABEL_{label}" for label in range(count)}
    return {
        "id2label": {str(label): name for label, name in names.items()},
        "label2id": {name: label for label, name in names.items()},
    }

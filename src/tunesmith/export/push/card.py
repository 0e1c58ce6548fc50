"""The model card: front matter that the hub reads, and prose for people, from what the records say and nothing else.

The words come from outside (``say``), in the reader's language; the commands and the front matter are made here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import yaml

from tunesmith.checkpoint import is_hub_id
from tunesmith.export.push.licence import Licence, front_matter
from tunesmith.export.push.records import Kind, Place

# What tells a card that no person wrote: PEFT's, the Trainer's and TRL's marks, LLaMA-Factory's gap, and our own.
WRITTEN_BY_US = "<!-- This card was written by tunesmith push, from records. -->"
_STUBS = (
    "[More Information Needed]",
    "More information needed",
    "generated automatically according to the information the Trainer had access to",
    "It has been trained using [TRL]",
    WRITTEN_BY_US,
)
# The settings that a reader asks for, under the names that tools give them.
SETTINGS = (
    "finetuning_type", "lora_rank", "r", "lora_alpha", "lora_dropout", "lora_target", "use_dora", "use_rslora", "stage",
    "learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "cutoff_len", "optim", "quantization_bit", "seed",
)  # fmt: skip
_MEANS_SOMETHING = re.compile(r"([\\`*_{}\[\]<>#|~$&])")
_LIBRARIES: Mapping[Kind, str] = {
    "model": "transformers",
    "quantized": "transformers",
    "adapter": "peft",
    "gguf": "gguf",
}
_MOST_VALUE = 120


class Say(Protocol):
    """A text by its key, in one language."""

    def __call__(self, key: str, **params: object) -> str:
        """The text, with its placeholders filled in."""


@dataclass(frozen=True)
class CardFacts:
    """What is known of the model.

    Attributes:
        kind: what it is.
        to: which hub the commands are for.
        repo_id: ``owner/name``.
        base_model: the base's hub id; None where it is not known.
        base_name: what the base is called in prose; None where nothing names one.
        relation: the hub's word for what it is to its base; None where no base is known.
        fine_tuned: whether it is known that an adapter went into it.
        licence: of the base; None where it is not known.
        pipeline: the hub's word for its task; None where that is not known.
        scheme: how its weights are stored, such as ``pack-quantized, int4``; empty for as the base.
        weights: names of its files of weights.
        data: what the user says it was trained on; None for nothing.
        verdict: what was proved, in words; None where nothing was, or that does not hold.
        certificate: the certificate's file; empty where what was proved stands in none, as of a GGUF file.
        results: cells of a table, a line each, the first its head; empty for none.
        results_note: what the table rests on.
        drift: a Markdown table of how far the model is from the unmerged adapter; empty for none.
        drift_note: what that table rests on.
        settings: names and values of the training's settings.
        code: whether it brings code of its own.
    """

    kind: Kind
    to: Place
    repo_id: str
    base_model: str | None = None
    base_name: str | None = None
    relation: str | None = None
    fine_tuned: bool = False
    licence: Licence | None = None
    pipeline: str | None = None
    scheme: str = ""
    weights: Sequence[str] = ()
    data: str | None = None
    verdict: str | None = None
    certificate: str = ""
    results: Sequence[Sequence[str]] = ()
    results_note: str = ""
    drift: str = ""
    drift_note: str = ""
    settings: Sequence[tuple[str, str]] = ()
    code: bool = False


def write_card(facts: CardFacts, say: Say) -> str:
    """The card of a model.

    Args:
        facts: what is known of it.
        say: the words.

    Returns:
        The text of README.md: UTF-8, one final newline.
    """
    parts = [
        _front_matter(facts),
        WRITTEN_BY_US,
        f"# {plain(facts.repo_id.split('/')[-1])}",
        _about(facts, say),
    ]
    if facts.results:
        parts += [f"## {say('card.results')}", _table(facts.results), facts.results_note]
    if facts.drift:
        parts += [f"## {say('card.drift')}", facts.drift, facts.drift_note]
    if facts.kind != "adapter":
        parts += [f"## {say('card.verification')}", *_verification(facts, say)]
    parts += [f"## {say('card.run')}", *_run(facts, say)]
    if facts.settings:
        head = (say("card.setting"), say("card.value"))
        rows = [(f"`{name}`", plain(value)) for name, value in facts.settings]
        parts += [f"## {say('card.training')}", _table([head, *rows])]
    if facts.data:
        parts += [f"## {say('card.data')}", plain(facts.data)]
    parts += [f"## {say('card.licence')}", _licence(facts, say)]
    return "\n\n".join(part for part in parts if part) + "\n"


def a_tool_wrote(card: str) -> bool:
    """Whether a card is one that a trainer left, or that this module wrote: nobody's words are lost with it."""
    return any(mark in card for mark in _STUBS)


def settings_of(hyperparameters: Mapping[str, object]) -> list[tuple[str, str]]:
    """Of a training's settings those that a reader asks for; none that names a path."""
    found = [(name, hyperparameters.get(name)) for name in SETTINGS]
    told = [(name, str(value)) for name, value in found if value not in (None, "", False)]
    return [(name, value[:_MOST_VALUE]) for name, value in told if not re.match(r"[/~]|[A-Za-z]:\\", value)]


def problems_of(card: str) -> list[str]:
    """What a hub would refuse in a card that a person wrote, a line each."""
    if not card.startswith("---"):
        return []
    said = front_matter(card)
    if not said:
        return ["the lines between the dashes are no YAML mapping"]
    relation = said.get("base_model_relation")
    wrong = []
    if relation is not None and relation not in ("adapter", "finetune", "merge", "quantized"):
        wrong.append(f"base_model_relation: {relation!r} is none of adapter, finetune, merge, quantized")
    bases = said.get("base_model") or []
    for base in [bases] if isinstance(bases, str) else bases if isinstance(bases, list) else [str(bases)]:
        if not is_hub_id(str(base)):
            wrong.append(f"base_model: {base!r} is no hub id")
    return wrong


def plain(words: str) -> str:
    """One line of text in which nothing has a meaning in Markdown."""
    return _MEANS_SOMETHING.sub(r"\\\1", " ".join(words.split()))


def _front_matter(facts: CardFacts) -> str:
    said: dict[str, Any] = {}
    if facts.base_model:
        said["base_model"] = facts.base_model
        said["base_model_relation"] = facts.relation
    if facts.licence is not None:
        said["license"] = facts.licence.word
        if facts.licence.word == "other":
            said["license_name"] = facts.licence.name
    said["library_name"] = _LIBRARIES[facts.kind]
    if facts.pipeline:
        said["pipeline_tag"] = facts.pipeline
    known = ("lora" if _tuned(facts) else "", "gguf" if facts.kind == "gguf" else "", "tunesmith")
    said["tags"] = [tag for tag in (*known, "compressed-tensors" if facts.kind == "quantized" else "") if tag]
    named = [name.strip() for name in (facts.data or "").split(",")]
    if sets := [name for name in named if is_hub_id(name) and "@" not in name]:
        said["datasets"] = sets
    return "---\n" + yaml.safe_dump(said, sort_keys=False, allow_unicode=True) + "---"


def _about(facts: CardFacts, say: Say) -> str:
    name = plain(facts.base_model or facts.base_name or "")
    link = f"[{name}]({_page(facts)})" if facts.base_model else name
    base = link or say("card.base.unknown")
    told = [say(f"card.about.{facts.kind}" if _tuned(facts) else f"card.about.{facts.kind}.plain", base=base)]
    if facts.scheme:
        told.append(say("card.scheme", scheme=plain(facts.scheme)))
    if facts.code:
        told.append(say("card.code"))
    return " ".join(told)


def _tuned(facts: CardFacts) -> bool:
    return facts.fine_tuned or facts.kind == "adapter"


def _page(facts: CardFacts) -> str:
    site = "https://modelscope.cn/models" if facts.to == "modelscope" else "https://huggingface.co"
    return f"{site}/{(facts.base_model or '').split('@')[0]}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *lines = rows
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def _verification(facts: CardFacts, say: Say) -> list[str]:
    if facts.verdict is None:
        return [say("card.verified.not")]
    if not facts.certificate:
        return [say("card.verified.gguf", verdict=facts.verdict)]
    told = say("card.verified", verdict=facts.verdict, file=facts.certificate)
    return [told, _block("bash", f"{_download(facts)}\ntunesmith verify {facts.repo_id.split('/')[-1]}")]


def _download(facts: CardFacts) -> str:
    name = facts.repo_id.split("/")[-1]
    if facts.to == "modelscope":
        return f"modelscope download --model {facts.repo_id} --local_dir {name}"
    return f"hf download {facts.repo_id} --local-dir {name}"


def _run(facts: CardFacts, say: Say) -> Iterator[str]:
    if facts.kind == "gguf":
        yield from _run_gguf(facts, say)
    elif facts.kind == "adapter":
        yield from _run_adapter(facts, say)
    else:
        yield "Transformers:"
        needs = "# pip install transformers compressed-tensors\n" if facts.kind == "quantized" else ""
        yield _block("python", needs + _transformers(facts, [f'MODEL = "{facts.repo_id}"', ""], "MODEL"))
        yield "vLLM:"
        trust = " --trust-remote-code" if facts.code else ""
        yield _block("bash", f"{_serve_from(facts)}vllm serve {facts.repo_id}{trust}")
        if facts.kind == "model":
            yield "Ollama:"
            yield say("card.ollama.convert")
            name = facts.repo_id.split("/")[-1]
            yield _block("bash", f"{_download(facts)}\ntunesmith gguf {name} --out {name}.gguf --type q8_0 --ollama")


def _run_adapter(facts: CardFacts, say: Say) -> Iterator[str]:
    base, name = facts.base_model or "BASE", facts.repo_id.split("/")[-1]
    if facts.base_model is None:
        yield say("card.base.fill")
    yield "Transformers, PEFT:"
    load = [f'BASE, ADAPTER = "{base}", "{facts.repo_id}"', ""]
    yield _block("python", _transformers(facts, load, "BASE", adapter="ADAPTER"))
    yield "vLLM:"
    lora = f"--enable-lora --lora-modules {name}={facts.repo_id}"
    yield _block("bash", f"{_serve_from(facts)}vllm serve {base} {lora}")
    yield "Ollama:"
    yield say("card.ollama.adapter")


def _run_gguf(facts: CardFacts, say: Say) -> Iterator[str]:
    file = next(iter(facts.weights), "FILE.gguf")
    site = "modelscope.cn" if facts.to == "modelscope" else "hf.co"
    yield "Ollama:"
    yield _block("bash", f"ollama run {site}/{facts.repo_id}")
    yield "llama.cpp:"
    direct = f"llama-server -hf {facts.repo_id}\n# " if facts.to == "huggingface" else ""
    yield _block("bash", f"{direct}{_download(facts)} && llama-server -m {facts.repo_id.split('/')[-1]}/{file}")
    yield say("card.gguf.elsewhere")


def _serve_from(facts: CardFacts) -> str:
    return "VLLM_USE_MODELSCOPE=True " if facts.to == "modelscope" else ""


def _transformers(facts: CardFacts, names: Sequence[str], model: str, *, adapter: str | None = None) -> str:
    library = "modelscope" if facts.to == "modelscope" else "transformers"
    trust = ", trust_remote_code=True" if facts.code else ""
    lines = [
        f"from {library} import AutoModelForCausalLM, AutoTokenizer",
        *(["from peft import PeftModel"] if adapter else []),
        "",
        *names,
        f"tokenizer = AutoTokenizer.from_pretrained({adapter or model}{trust})",
        f'model = AutoModelForCausalLM.from_pretrained({model}, dtype="auto", device_map="auto"{trust})',
        *([f"model = PeftModel.from_pretrained(model, {adapter})"] if adapter else []),
        "",
        'messages = [{"role": "user", "content": "..."}]',
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ").to(model.device)",
        "output = model.generate(**inputs, max_new_tokens=256)",
        'print(tokenizer.decode(output[0][inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
    ]
    return "\n".join(lines)


def _licence(facts: CardFacts, say: Say) -> str:
    if facts.licence is None:
        return say("card.licence.unknown")
    return say("card.licence.of_base" if facts.base_model else "card.licence.named", licence=facts.licence.name)


def _block(language: str, code: str) -> str:
    return f"```{language}\n{code}\n```"

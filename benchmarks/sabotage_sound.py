"""Sound merges by many hands, none of which may be called different.

Most are of the run itself or of adapters of other kinds on its base; what no Llama has (biases, convolutions, experts,
classifiers) is merged into the tiny models of ``tests/oracle``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from sabotage_shop import KINDS, PEFT_WRONG, RUN, Claim, Draft, Shop
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tunesmith as ts
from tunesmith.checkpoint import INDEX_FILE, SINGLE_FILE
from tunesmith.models.quiet import quiet_loading

if TYPE_CHECKING:
    from tests.oracle.zoo import Zoo

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Kinds of the tiny models, with the dtypes that the base is stored in and that it is merged in.
_ZOO = {
    "bias-all": ("bf16", "bf16"),
    "lora-bias": ("fp32", "fp32"),
    "saved-both-tied": ("bf16", "bf16"),
    "gpt2-mixed": ("bf16", "bf16"),
    "mixtral-both": ("bf16", "bf16"),
    "qwen3-moe-both": ("fp32", "bf16"),
    "gpt-oss-both": ("fp32", "bf16"),
    "qwen2-vl-new": ("bf16", "bf16"),
    "classifier": ("bf16", "bf16"),
    "bert-classifier": ("bf16", "bf16"),
    "dora-conv2d": ("fp32", "bf16"),
}

Make = Callable[[Shop, Path], Claim]


@dataclass(frozen=True)
class Sound:
    """One sound merge.

    Attributes:
        name: whose and of what.
        make: makes it in an empty directory.
        kind: of which adapter it is.
    """

    name: str
    make: Make
    kind: str = RUN


SOUND: list[Sound] = []


def sound(name: str, kind: str = RUN) -> Callable[[Make], Make]:
    """Register a function as the maker of a sound merge."""

    def register(make: Make) -> Make:
        SOUND.append(Sound(name, make, kind))
        return make

    return register


def _claim(shop: Shop, merged: Path, kind: str = RUN, **options: Any) -> Claim:
    return Claim(merged, shop.adapter(kind), shop.base, options)


def _ours(name: str, kind: str = RUN, **options: Any) -> None:
    sound(f"Tunesmith, {name}", kind)(
        lambda shop, root: _claim(shop, shop.merge(kind, root / "merged", **options), kind)
    )


def _peft(name: str, kind: str = RUN, **options: Any) -> None:
    sound(f"PEFT, {name}", kind)(lambda shop, root: _claim(shop, shop.peft(kind, root / "merged", **options), kind))


# The run itself, by its own tool and by PEFT.

for _rounding in ("faithful", "nearest", "stochastic"):
    _ours(_rounding, rounding=_rounding)
_ours("faithful, files of 40 MB", shard_size="40MB")
_ours("nearest, files of 100 MB", rounding="nearest", shard_size="100MB")
_ours("into fp16", dtype="fp16")
_ours("into fp32", dtype="fp32")
for _dtype in ("bf16", "fp16", "fp32"):
    _peft(_dtype, dtype=DTYPES[_dtype])
_peft("bf16, safe_merge", dtype=DTYPES["bf16"], safe=True)
_peft("fp16, safe_merge", dtype=DTYPES["fp16"], safe=True)
_peft("bf16, files of 50 MB", dtype=DTYPES["bf16"], max_shard_size="50MB")
for _kind in KINDS:
    _ours(f"{_kind}, faithful", _kind)
for _kind in ("rslora", "dora", "embedding", "added"):
    _ours(f"{_kind}, nearest", _kind, rounding="nearest")
for _kind in (kind for kind in KINDS if kind not in PEFT_WRONG):
    _peft(f"{_kind}, bf16", _kind, dtype=DTYPES["bf16"])


@sound("PEFT, merged in fp32 and cast to bf16")
def _cast(shop: Shop, root: Path) -> Claim:
    shop.peft(RUN, root / "merged", dtype=torch.float32)
    return _claim(shop, _in_bf16(root / "merged"))


def _in_bf16(merged: Path) -> Path:
    tensors = load_file(merged / SINGLE_FILE)
    save_file({name: weight.bfloat16() for name, weight in tensors.items()}, merged / SINGLE_FILE, {"format": "pt"})
    return merged


# A run names the base that it was trained on, byte for byte, and these hold its numbers in another dtype; an adapter
# alone names no bytes.


@sound("Tunesmith, rslora, the base in fp16", "rslora")
def _base_in_half(shop: Shop, root: Path) -> Claim:
    base = _base_in(shop, root, "fp16")
    return Claim(shop.merge("rslora", root / "merged", base=base), shop.adapter("rslora"), base)


@sound("PEFT, rslora, the base in fp32, merged in bf16", "rslora")
def _base_in_float(shop: Shop, root: Path) -> Claim:
    base = _base_in(shop, root, "fp32")
    merged = shop.peft("rslora", root / "merged", dtype=torch.bfloat16, base=base)
    return Claim(merged, shop.adapter("rslora"), base)


def _base_in(shop: Shop, root: Path, dtype: str) -> str:
    with quiet_loading():
        AutoModelForCausalLM.from_pretrained(shop.base_dir, dtype=DTYPES[dtype]).save_pretrained(root / "base")
        AutoTokenizer.from_pretrained(shop.base_dir).save_pretrained(root / "base")
    return str(root / "base")


# Several adapters, another checkpoint, another view of the base.


@sound("Tunesmith, a weighted sum of two")
def _weighted(shop: Shop, root: Path) -> Claim:
    options = {"weight": 0.8, "adapters": [(shop.other_run, 0.5)]}
    return _claim(shop, shop.merge(RUN, root / "merged", **options), **options)


@sound("PEFT, a weighted sum of two (cat)")
def _concatenated(shop: Shop, root: Path) -> Claim:
    # On a base in bf16 PEFT rounds the new adapter's factors to bf16, and that is another adapter.
    with _two(shop, torch.float32) as tuned:
        tuned.add_weighted_adapter(["default", "other"], [0.8, 0.5], "sum", combination_type="cat")
        tuned.set_adapter("sum")
        tuned.merge_and_unload(adapter_names=["sum"]).save_pretrained(root / "merged")
        AutoTokenizer.from_pretrained(shop.run).save_pretrained(root / "merged")
    return _claim(shop, _in_bf16(root / "merged"), weight=0.8, adapters=[(shop.other_run, 0.5)])


@sound("PEFT, two one after another")
def _in_turn(shop: Shop, root: Path) -> Claim:
    with _two(shop) as tuned:
        tuned.merge_and_unload(adapter_names=["default", "other"]).save_pretrained(root / "merged")
        AutoTokenizer.from_pretrained(shop.run).save_pretrained(root / "merged")
    return _claim(shop, root / "merged", adapters=[(shop.other_run, 1.0)])


class _two:  # noqa: N801 - a context manager, named as one
    """The base with the run's adapter and another, live, quietly."""

    def __init__(self, shop: Shop, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shop, self.dtype, self.quiet = shop, dtype, quiet_loading()

    def __enter__(self) -> PeftModel:
        self.quiet.__enter__()
        model = AutoModelForCausalLM.from_pretrained(self.shop.base_dir, dtype=self.dtype)
        tuned = PeftModel.from_pretrained(model, self.shop.run)
        tuned.load_adapter(self.shop.other_run, "other")
        return tuned

    def __exit__(self, *raised: object) -> None:
        self.quiet.__exit__(None, None, None)


@sound("Tunesmith, an earlier checkpoint, asked for by name")
def _earlier(shop: Shop, root: Path) -> Claim:
    options = {"checkpoint": shop.checkpoint}
    return _claim(shop, shop.merge(RUN, root / "merged", **options), **options)


@sound("Tunesmith, --base-view nf4")
def _view(shop: Shop, root: Path) -> Claim:
    return _claim(shop, shop.merge(RUN, root / "merged", base_view="nf4"), base_view="nf4")


# The same model, written otherwise.


def _rewritten(name: str) -> Callable[[Callable[[Draft], object]], None]:
    def register(change: Callable[[Draft], object]) -> None:
        def make(shop: Shop, root: Path) -> Claim:
            draft = Draft(shop, RUN, shop.merge(RUN, root / "merged"))
            change(draft)
            return draft.claim

        sound(name)(make)

    return register


@_rewritten("a tied head written out")
def _head(draft: Draft) -> None:
    draft.rewrite(lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))


@_rewritten("a tied head written out and declared untied")
def _untied(draft: Draft) -> None:
    draft.rewrite(lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    draft.configure(tie_word_embeddings=False)


@_rewritten("loaded and saved by Transformers")
def _saved_again(draft: Draft) -> None:
    with quiet_loading():
        AutoModelForCausalLM.from_pretrained(draft.path, dtype="auto").save_pretrained(draft.path)
        AutoTokenizer.from_pretrained(draft.path).save_pretrained(draft.path)


@_rewritten("names without their prefix")
def _bare(draft: Draft) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    draft.rewrite(change)


@_rewritten("an index beside a single file")
def _indexed(draft: Draft) -> None:
    weight_map = dict.fromkeys(draft.base.tensors, SINGLE_FILE)
    (draft.path / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@_rewritten("RoPE in the older spelling, dtype under its old name")
def _older(draft: Draft) -> None:
    def change(config: dict[str, Any]) -> None:
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        config["torch_dtype"] = config.pop("dtype")

    draft.edit("config.json", change)


@_rewritten("four files, the tensors in turn")
def _interleaved(draft: Draft) -> None:
    draft.shard(4)


# Kinds that no Llama has.


@lru_cache(maxsize=1)
def _zoo(root: Path) -> tuple[ModuleType, Zoo]:
    """The tests' makers of bases and adapters, and a zoo of this process."""
    sys.path.append(str(Path(__file__).parents[1]))
    from tests.oracle import zoo

    place = root / f"zoo-{os.getpid()}"
    place.mkdir()
    return zoo, zoo.Zoo(place)


def _tiny(kind: str, *, stored_in: str, merged_in: str) -> None:
    def ours(shop: Shop, root: Path) -> Claim:
        made, zoo = _zoo(shop.root)
        base = str(zoo.base(made.KINDS[kind].base, DTYPES[stored_in]))
        ts.merge(ts.plan_merge(zoo.adapter(kind), root / "merged", base=base))
        return Claim(root / "merged", zoo.adapter(kind), base)

    def peft(shop: Shop, root: Path) -> Claim:
        made, zoo = _zoo(shop.root)
        spec = made.KINDS[kind]
        base, adapter = zoo.base(spec.base, DTYPES[stored_in]), zoo.adapter(kind)
        with quiet_loading():
            model = made.load(base, spec.auto, dtype=DTYPES[merged_in], **spec.loading)
            if spec.prepare:
                spec.prepare(model)
            PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(root / "merged")
        return Claim(root / "merged", adapter, str(base))

    sound(f"Tunesmith, {kind} on a tiny model")(ours)
    sound(f"PEFT, {kind} on a tiny model")(peft)


for _kind, (_stored, _merged) in _ZOO.items():
    _tiny(_kind, stored_in=_stored, merged_in=_merged)


# Another project's export, in an environment of its own.


def llamafactory(command: Path) -> list[Sound]:
    """The exports of LLaMA-Factory, by its own command line.

    Args:
        command: ``llamafactory-cli`` of an environment of its own.
    """
    return [
        Sound("LLaMA-Factory's export", lambda shop, root: export(shop, root, command, template="smollm2")),
        Sound(
            "LLaMA-Factory's export, infer_dtype bfloat16",
            lambda shop, root: export(shop, root, command, template="smollm2", infer_dtype="bfloat16"),
        ),
    ]


def export(shop: Shop, root: Path, command: Path, **options: str) -> Claim:
    """Export the run with LLaMA-Factory.

    Args:
        shop: where the run is.
        root: an empty directory.
        command: ``llamafactory-cli``.
        options: further keys of its recipe.
    """
    recipe = {
        "model_name_or_path": str(shop.base_dir),
        "adapter_name_or_path": str(shop.run),
        "finetuning_type": "lora",
        "export_dir": str(root / "merged"),
        "export_size": 1,
        "export_device": "cpu",
        "export_legacy_format": False,
        **options,
    }
    (root / "export.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    subprocess.run(  # noqa: S603
        [command, "export", root / "export.yaml"], check=True, capture_output=True, env=environment
    )
    return _claim(shop, root / "merged")

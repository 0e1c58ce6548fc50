"""A tiny run with sizes like a real one's, and sound merges of it by several hands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tiny_models import SPECIAL, TEMPLATE
from tunesmith.merge import merge, plan_merge
from tunesmith.models.quiet import quiet_loading
from tunesmith.runs import open_run
from tunesmith.verify import Verdict, verify

LAYERS = 2
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
R, ALPHA = 8, 16

# ‖Δ‖ / ‖W‖ of the real run that docs/merge-numerics.md measures: bf16 then loses about half the elements of Δ.
RELATIVE_UPDATE = 0.003

Tensors = dict[str, torch.Tensor]

_CORPUS = [
    "the merged model is the model that was tested, and the proof is in the weights",
    "rounding once to the nearest value loses about half of a small update",
    "微调完成后，请先验证合并后的模型，再发布。",
]


@dataclass(frozen=True)
class Workshop:
    """Directories of one run.

    Attributes:
        base: the base model, bf16.
        run: adapters on every linear layer: checkpoint-10, checkpoint-20, checkpoint-30; the root holds the last.
        merged: a sound merge of the last by Tunesmith, as it merges by default: every number a neighbour.
        nearest: another, every number the nearest.
        other: another base of the same form, with the same tokenizer.
    """

    base: Path
    run: Path
    merged: Path
    nearest: Path
    other: Path


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that has merges to swap."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[2], pad_token=SPECIAL[0], bos_token=SPECIAL[1]
    )
    fast.chat_template = TEMPLATE
    return fast


def make_base(directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **config: Any) -> Path:
    """Write a two-layer Llama whose weights spread as trained ones do, its norms not all 1, with its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
        "initializer_range": 0.08,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **config}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.normal_(1.0, 0.1)
    shards = {"max_shard_size": "60KB"} if config.get("num_hidden_layers", LAYERS) > LAYERS else {}
    model.to(dtype).save_pretrained(directory, **shards)
    tokenizer.save_pretrained(directory)
    return directory


def make_adapter(base: Path, directory: Path, *, seed: int, **config: Any) -> Path:
    """Write an adapter on every linear layer with ‖Δ‖ / ‖W‖ as after a real training, and the run's tokenizer."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    settings = {"r": R, "lora_alpha": ALPHA, "target_modules": list(LINEARS), "task_type": "CAUSAL_LM", **config}
    with quiet_loading():
        tuned = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for module in tuned.modules():
            if hasattr(module, "lora_B"):
                module.lora_B["default"].weight.normal_()
                scale = RELATIVE_UPDATE * module.base_layer.weight.norm() / module.get_delta_weight("default").norm()
                module.lora_B["default"].weight.mul_(scale)
    with quiet_loading():
        tuned.save_pretrained(directory)
    AutoTokenizer.from_pretrained(base).save_pretrained(directory)
    return directory


def make_run(base: Path, directory: Path) -> Path:
    """Write a run of three checkpoints, each a step on from the one before; the last is also the final adapter."""
    directory.mkdir()
    make_adapter(base, directory, seed=1)
    final = load_file(directory / "adapter_model.safetensors")
    torch.manual_seed(2)
    for step, share in ((10, 0.4), (20, 0.8), (30, 1.0)):
        folder = directory / f"checkpoint-{step}"
        folder.mkdir()
        for file in [file for file in directory.iterdir() if file.is_file()]:
            shutil.copy(file, folder)
        wander = 0.3 * (1 - share)
        tensors = {
            name: weight * (share if "lora_B" in name else 1.0) + wander * weight.std() * torch.randn_like(weight)
            for name, weight in final.items()
        }
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


def make_workshop(root: Path) -> Workshop:
    """Write everything of one run."""
    base = make_base(root / "base")
    run = make_run(base, root / "run")
    merged = tunesmith_merge(run, base, root / "merged")
    nearest = tunesmith_merge(run, base, root / "nearest", rounding="nearest")
    return Workshop(base, run, merged, nearest, make_base(root / "other", seed=9))


def tunesmith_merge(
    run: Path,
    base: Path,
    out: Path,
    *,
    checkpoint: str | int = "final",
    rounding: str = "auto",
    base_view: str | None = None,
) -> Path:
    """A merge by Tunesmith itself."""
    merge(plan_merge(run, out, base=str(base), checkpoint=checkpoint, rounding=rounding, base_view=base_view))
    return out


def peft_merge(run: Path, base: Path, out: Path, *, dtype: torch.dtype, safe: bool = False, **saving: Any) -> Path:
    """A merge as a PEFT script does it: load, ``merge_and_unload``, save, and save the tokenizer again."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=dtype)
    with quiet_loading():
        merged = PeftModel.from_pretrained(model, run).merge_and_unload(safe_merge=safe)
        merged.save_pretrained(out, **saving)
    AutoTokenizer.from_pretrained(run).save_pretrained(out)
    return out


def check(run: Path, merged: Path, base: Path, *, levels: tuple[str, ...] = ("assets", "weights")) -> Verdict:
    """The verdict on a merge of the run's final adapter."""
    return verify(open_run(run), merged, base_dir=base, base_model="base", levels=levels)


def rewrite(directory: Path, change: Callable[[Tensors], object], file: str = "model.safetensors") -> None:
    """Change tensors of a weights file in place, by way of memory."""
    tensors = load_file(directory / file)
    change(tensors)
    save_file({name: weight.contiguous() for name, weight in tensors.items()}, directory / file, {"format": "pt"})


def flip_bit(directory: Path, name: str, index: int, bit: int) -> None:
    """Flip one bit of one bf16 number."""

    def change(tensors: Tensors) -> None:
        tensors[name].view(-1).view(torch.int16)[index] ^= 1 << bit if bit < 15 else -(1 << 15)

    rewrite(directory, change)


def deltas(run: Path, *, checkpoint: str = "") -> Tensors:
    """s·B·A of every adapted tensor, float64, formed without a line of Tunesmith's."""
    config = json.loads((run / checkpoint / "adapter_config.json").read_text())
    factors = load_file(run / checkpoint / "adapter_model.safetensors")
    scaling = config["lora_alpha"] / config["r"]
    return {
        key.removeprefix("base_model.model.").replace("lora_A.", ""): scaling
        * factors[key.replace("lora_A", "lora_B")].double()
        @ factors[key].double()
        for key in factors
        if "lora_A" in key
    }


def remerge(directory: Path, shop: Workshop, added: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    """Merge anew into bf16, rounded once, with whatever ``added`` makes of every Δ (None for nothing)."""
    base = load_file(shop.base / "model.safetensors")
    for name, delta in deltas(shop.run).items():
        change = added(name, delta)
        if change is not None:
            # float64 → float32 → bf16 rounds twice, which differs from once in about one of 2^17 numbers.
            base[name] = (base[name].double() + change).float().bfloat16()
    save_file(base, directory / "model.safetensors", {"format": "pt"})

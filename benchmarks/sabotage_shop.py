"""What ``sabotage.py`` works on: a run, adapters of other kinds on its base, sound merges, and drafts of them.

Only tensors that a mutant changes are written anew, in place; all else of a draft is a copy of the sound merge.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tunesmith as ts
from tunesmith.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LowRank, Stack
from tunesmith.checkpoint import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, Checkpoint, locate_base
from tunesmith.models.quiet import quiet_loading
from tunesmith.record import Finding
from tunesmith.verify import LEVELS

Tensors = dict[str, torch.Tensor]
Change = Callable[[str, torch.Tensor], torch.Tensor | None]

RUN, NEAREST = "run", "nearest"
PEFT = "peft"  # in the place of a rounding: merges by PEFT, where it merges a kind rightly
PEFT_WRONG = ("embedding", "head", "saved-head", "added-embedding")  # of a tied embedding it makes one tensor, not two
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 8, 16
NEW_TOKENS = ["<|tool|>", "<|result|>", "<|end_of_tool|>"]
TRAINED_ROWS = [5, 77, 4242]

# ‖Δ‖ / ‖W‖ of the demo's run on all linear layers, and how far other trained numbers are moved.
_RELATIVE_UPDATE = 0.003
_STEP = 0.02

# Adapters of other kinds on the run's own base: arguments of PEFT's LoraConfig.
KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"target_modules": LINEAR, "use_rslora": True},
    "r1": {"target_modules": LINEAR, "r": 1, "lora_alpha": 7},
    "r64": {"target_modules": LINEAR, "r": 64, "lora_alpha": 16},
    "patterns": {
        "target_modules": LINEAR,
        "rank_pattern": {"q_proj": 2, "layers.1.self_attn.k_proj": 3},
        "alpha_pattern": {"up_proj": 5, "q_proj": 3},
    },
    "layers": {"target_modules": LINEAR, "layers_to_transform": [3, 4, 29]},
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "norms": {"target_modules": ATTENTION, "modules_to_save": ["input_layernorm", "norm"]},
    "embedding": {"target_modules": [*ATTENTION, "embed_tokens"]},
    "head": {"target_modules": [*ATTENTION, "lm_head"]},
    "saved-head": {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ATTENTION, "trainable_token_indices": TRAINED_ROWS},
    "added": {"target_modules": ATTENTION, "trainable_token_indices": "new"},
    "added-embedding": {"target_modules": [*ATTENTION, "embed_tokens"], "ensure_weight_tying": True},
    "parameters": {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]},
}


@dataclass(frozen=True)
class Claim:
    """What a directory is said to be: a base plus adapters.

    Attributes:
        merged: the directory.
        run: the run, or an adapter's directory.
        base: the base, as a user names it.
        options: further arguments of ``tunesmith.verify``.
    """

    merged: Path
    run: Path
    base: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgement:
    """What was said of a claim.

    Attributes:
        answer: the verdict's.
        causes: the likeliest first.
        sentence: what a person reads.
        seconds: wall time of the verification.
    """

    answer: str
    causes: tuple[Finding, ...]
    sentence: str
    seconds: float


@dataclass(frozen=True)
class Shop:
    """Directories of one run and all that is made of it.

    Attributes:
        root: where everything is made.
        base: the base model, as a user names it.
        base_dir: its directory.
        rounding: how the merges are rounded that mutants are made of, but for those that ask for the nearest; or PEFT.
        behaviour: whether the behaviour level is looked at too.
    """

    root: Path
    base: str
    base_dir: Path
    rounding: str = "auto"
    behaviour: bool = False

    @classmethod
    def open(cls, run: Path, base: str, root: Path, **options: Any) -> Shop:
        """Copy a run, and see to it that it has a checkpoint that is not its last.

        Raises:
            SystemExit: it is no run of the demo's form, whose figures the mutants' expectations name.
        """
        shop = cls(root, base, locate_base(base, relative_to=run.parent), **options)
        settings = json.loads((run / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        form = settings["r"], settings["lora_alpha"], sorted(settings["target_modules"])
        if form != (RANK, ALPHA, sorted(LINEAR)):
            raise SystemExit(f"expected a run of rank {RANK}, alpha {ALPHA} on all linear layers, found {form}")
        shutil.copytree(run, shop.run, ignore=shutil.ignore_patterns("optimizer.pt", "rng_state.pth", "*.png"))
        last = (shop.run / ADAPTER_WEIGHTS).read_bytes()
        if all((folder / ADAPTER_WEIGHTS).read_bytes() == last for folder in shop.run.glob("checkpoint-*")):
            _write_altered(shop.run, shop.run / "checkpoint-3", _earlier)
        _write_altered(shop.run, shop.other_run, _shuffled)
        return shop

    @property
    def run(self) -> Path:
        """The run."""
        return self.root / RUN

    @property
    def other_run(self) -> Path:
        """An adapter of the run's form and size that has nothing to do with it."""
        return self.root / "other-run"

    @property
    def checkpoint(self) -> str:
        """A checkpoint of the run that is not its last."""
        last = (self.run / ADAPTER_WEIGHTS).read_bytes()
        folders = sorted(self.run.glob("checkpoint-*"))
        return next(folder.name for folder in folders if (folder / ADAPTER_WEIGHTS).read_bytes() != last)

    @property
    def own_rounding(self) -> str:
        """How Tunesmith's own merges are rounded."""
        return NEAREST if self.rounding == PEFT else self.rounding

    def adapter(self, kind: str) -> Path:
        """The directory of an adapter; ``prepare`` writes it."""
        return self.run if kind in (RUN, NEAREST) else self.root / f"adapter-{kind}"

    def sound(self, kind: str) -> Path:
        """The sound merge that mutants of a kind are made of; ``prepare`` writes it."""
        return self.root / f"sound-{kind}"

    def prepare(self, kind: str, *, merged: bool) -> None:
        """Write an adapter, and its sound merge where mutants are made of that."""
        if kind not in (RUN, NEAREST):
            _write_kind(self, kind)
        if merged and self.rounding == PEFT and kind != NEAREST and kind not in PEFT_WRONG:
            self.peft(kind, self.sound(kind))
        elif merged:
            self.merge(kind, self.sound(kind), rounding=NEAREST if kind == NEAREST else self.own_rounding)

    def merge(self, kind: str, out: Path, **options: Any) -> Path:
        """A merge by Tunesmith."""
        ts.merge(ts.plan_merge(self.adapter(kind), out, **{"base": self.base, **options}))
        return out

    def peft(
        self, kind: str, out: Path, *, safe: bool = False, dtype: Any = "auto", base: str = "", **saving: Any
    ) -> Path:
        """A merge as a PEFT script does it."""
        adapter = self.adapter(kind)
        with quiet_loading():
            model = AutoModelForCausalLM.from_pretrained(base or self.base_dir, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(adapter)
            if len(tokenizer) > model.config.vocab_size:
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=safe).save_pretrained(out, **saving)
            tokenizer.save_pretrained(out)
        return out

    def judge(self, claim: Claim) -> Judgement:
        """Verify a claim."""
        levels = LEVELS if self.behaviour else LEVELS[:3]
        started = time.monotonic()
        verdict = ts.verify(
            claim.run, claim.merged, base=claim.base, levels=levels, certificate=False, **dict(claim.options)
        )
        seconds = time.monotonic() - started
        return Judgement(verdict.answer, verdict.causes, ts.verdict_sentence(verdict), seconds)

    @contextmanager
    def draft(self, kind: str, name: str = "draft") -> Iterator[Draft]:
        """A copy of a sound merge, gone afterwards."""
        out = self.root / f"{name}-{os.getpid()}"
        shutil.copytree(self.sound(kind), out)
        try:
            yield Draft(self, kind, out)
        finally:
            shutil.rmtree(out)


class Draft:
    """A copy of a sound merge, to be spoilt.

    Args:
        shop: what it was made in.
        kind: of which adapter.
        path: the copy.
    """

    def __init__(self, shop: Shop, kind: str, path: Path) -> None:
        self.shop, self.kind, self.path = shop, kind, path
        self.base = Checkpoint(shop.base_dir)

    @property
    def claim(self) -> Claim:
        """What it is said to be."""
        return Claim(self.path, self.shop.adapter(self.kind), self.shop.base)

    @property
    def updates(self) -> dict[str, LowRank]:
        """The low-rank updates by tensor."""
        return _updates(self.shop.adapter(self.kind), self.shop.base_dir)

    @property
    def layers(self) -> int:
        """How many blocks the model has."""
        return int(self.base.config["num_hidden_layers"])

    def original(self, name: str) -> torch.Tensor:
        """The base's own tensor."""
        return _read(self.base, name)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as it stands."""
        return _read(Checkpoint(self.path), name)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor in place; it must have as many bytes as the one that is there."""
        merged = Checkpoint(self.path)
        info = merged.info(name)
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else b""
        if len(data) != info.size_bytes:
            raise ValueError(f"{name}: {len(data)} bytes for {info.size_bytes}")
        self.patch(merged.shard_of(name), info.begin, data)

    def patch(self, file: str, offset: int, data: bytes) -> None:
        """Write bytes into a file."""
        with (self.path / file).open("r+b") as handle:
            handle.seek(offset)
            handle.write(data)

    def delta(self, name: str) -> torch.Tensor:
        """Scaling · B · A, float32."""
        update = self.updates[name]
        factors = _factors(self.shop.adapter(self.kind))
        return update.scaling * factors[update.lora_B].float() @ factors[update.lora_A].float()

    def exact(self, name: str) -> torch.Tensor:
        """Base plus update, float64."""
        update = self.updates[name]
        factors = _factors(self.shop.adapter(self.kind))
        delta = update.scaling * factors[update.lora_B].double() @ factors[update.lora_A].double()
        return self.original(name).double() + delta

    def restore(self, *parts: str) -> None:
        """Put the base's own tensor wherever one of these is part of an updated tensor's name."""
        for name in self.updates:
            if any(part in name for part in parts):
                self.put(name, self.original(name))

    def remerge(self, change: Change, *, start: Callable[[str], torch.Tensor] | None = None) -> None:
        """Merge anew, rounded to nearest, with whatever ``change`` makes of every Δ (None: as it stands)."""
        for name in self.updates:
            delta = change(name, self.delta(name))
            if delta is not None:
                begin = start(name) if start else self.original(name)
                self.put(name, (begin.float() + delta).to(self.original(name).dtype))

    def rewrite(self, change: Callable[[Tensors], object]) -> None:
        """Change tensors by way of memory, where shapes, names or dtypes change; into one file."""
        tensors = {name: tensor for file in Checkpoint(self.path).shards for name, tensor in self.load(file).items()}
        for file in [*Checkpoint(self.path).shards, INDEX_FILE]:
            (self.path / file).unlink(missing_ok=True)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self.path / SINGLE_FILE, _METADATA)

    def load(self, file: str) -> Tensors:
        """All tensors of one file."""
        return load_file(self.path / file)

    def shard(self, count: int) -> list[str]:
        """Spread the tensors over files in the order of their names, with an index; returns the files."""
        tensors = self.load(SINGLE_FILE)
        (self.path / SINGLE_FILE).unlink()
        names = list(Checkpoint(self.shop.sound(self.kind)).tensors)
        files = {f"model-{n + 1:05}-of-{count:05}.safetensors": names[n::count] for n in range(count)}
        for file, members in files.items():
            save_file({name: tensors[name] for name in members}, self.path / file, _METADATA)
        weight_map = {name: file for file, members in files.items() for name in members}
        (self.path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return list(files)

    def edit(self, file: str, change: Callable[[dict[str, Any]], object]) -> None:
        """Change a JSON file."""
        document = json.loads((self.path / file).read_text(encoding="utf-8"))
        change(document)
        (self.path / file).write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")

    def configure(self, **fields: Any) -> None:
        """Change fields of ``config.json``."""
        self.edit(CONFIG_FILE, lambda config: config.update(fields))


_METADATA = {"format": "pt"}
_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def _read(model: Checkpoint, name: str) -> torch.Tensor:
    info = model.info(name)
    with (model.path / model.shard_of(name)).open("rb") as file:
        file.seek(info.begin)
        data = bytearray(file.read(info.size_bytes))
    return torch.frombuffer(data, dtype=_TORCH[info.dtype]).reshape(info.shape)


@lru_cache(maxsize=4)
def _factors(adapter: Path) -> Tensors:
    return load_file(adapter / ADAPTER_WEIGHTS)


@lru_cache(maxsize=4)
def _updates(adapter: Path, base: Path) -> dict[str, LowRank]:
    updates = Stack([(adapter, 1.0)]).bind(Checkpoint(base)).updates
    return {update.name: update for update in updates if isinstance(update, LowRank)}


def _write_altered(run: Path, out: Path, change: Callable[[Tensors], Tensors]) -> None:
    """An adapter's directory with other factors."""
    out.mkdir()
    for file in run.iterdir():
        if file.is_file() and (file.name == ADAPTER_CONFIG or "token" in file.name or file.suffix == ".jinja"):
            shutil.copy(file, out)
    save_file(change(load_file(run / ADAPTER_WEIGHTS)), out / ADAPTER_WEIGHTS, _METADATA)


def _earlier(factors: Tensors) -> Tensors:
    """Where a training may have been before: a part of the way, and a little beside it."""
    torch.manual_seed(2)
    return {
        name: weight * (0.7 if "lora_B" in name else 1.0) + 0.1 * weight.std() * torch.randn_like(weight)
        for name, weight in factors.items()
    }


def _shuffled(factors: Tensors) -> Tensors:
    """The same numbers in other places."""
    torch.manual_seed(3)
    return {
        name: weight.reshape(-1)[torch.randperm(weight.numel())].reshape(weight.shape)
        for name, weight in factors.items()
    }


def _write_kind(shop: Shop, kind: str) -> None:
    """Write an adapter by PEFT, every trained number of it moved as far as training moves it."""
    torch.manual_seed(11)
    settings = {"r": RANK, "lora_alpha": ALPHA, "task_type": "CAUSAL_LM", **KINDS[kind]}
    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(shop.base_dir, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(shop.run)
        if kind.startswith("added"):
            tokenizer.add_tokens(NEW_TOKENS, special_tokens=True)
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        if settings.get("trainable_token_indices") == "new":
            settings["trainable_token_indices"] = list(range(len(tokenizer) - len(NEW_TOKENS), len(tokenizer)))
        tuned = get_peft_model(model, LoraConfig(**settings))
        _move(tuned)
        tuned.save_pretrained(shop.adapter(kind))
        tokenizer.save_pretrained(shop.adapter(kind))


@torch.no_grad()
def _move(tuned: PeftModel) -> None:
    for module in tuned.modules():
        if "default" in getattr(module, "lora_embedding_B", {}):
            module.lora_embedding_A["default"].normal_()  # which begins as zeros, where a linear layer's B does
            factor = module.lora_embedding_B["default"]
        elif "default" in getattr(module, "lora_B", {}):
            factor = module.lora_B["default"].weight
        else:
            continue
        factor.normal_()
        changed = getattr(module.get_base_layer(), getattr(module, "parameter_name", None) or "weight")
        factor.mul_(_RELATIVE_UPDATE * changed.norm() / module.get_delta_weight("default").norm())
    for name, weight in tuned.named_parameters():
        if "magnitude" in name:
            weight.mul_(1 + _STEP * torch.randn_like(weight))
        elif "trainable_tokens_delta" in name or (weight.requires_grad and "lora_" not in name):
            weight.add_(_STEP * weight.std() * torch.randn_like(weight))


def pick(names: Sequence[str], part: str) -> str:
    """The name in the middle of those that hold a part."""
    found = [name for name in names if part in name]
    return found[len(found) // 2]

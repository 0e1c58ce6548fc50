"""plan_merge on random tiny bases and adapters, right and wrong: a plan that uses every tensor once, or an error.

Written with plain safetensors bytes, so that what PEFT would never save is tried too.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tunesmith as ts
from tests.checkpoint.mutations import PIECES, VALUES, framed, spoilt_file
from tunesmith.adapter import LowRank
from tunesmith.adapter.records import Copied

Tensor = tuple[str, list[int], bytes]
PREFIX = "base_model.model."
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I8": 1}


def tensor(rng: Random, shape: list[int], dtype: str) -> Tensor:
    """Small whole numbers in a dtype."""
    values = np.array([rng.randrange(-3, 4) for _ in range(math.prod(shape))], np.float32)
    if dtype == "BF16":
        return dtype, shape, (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    kinds = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "i1"}
    return dtype, shape, values.astype(kinds[dtype]).tobytes()


def file_of(tensors: dict[str, Tensor]) -> bytes:
    """A safetensors file."""
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    return framed(json.dumps(header).encode(), data)


class Case:
    """One base and one adapter, sound until something is done to them.

    Attributes:
        base: the base's tensors.
        config: its ``config.json``.
        adapter: the adapter's tensors.
        settings: its ``adapter_config.json``.
        layers: the weights that may be adapted, by module.
        wrong: whether what was done must be refused; otherwise it may be.
        spoilt: what was done.
    """

    def __init__(self, rng: Random) -> None:
        self.rng, self.wrong, self.spoilt = rng, False, ""
        self.dtype = rng.choice(["F32", "F16", "BF16"])
        hidden, inner, vocabulary = rng.choice([3, 4, 5]), rng.choice([6, 7]), rng.choice([8, 9])
        self.layers: dict[str, list[int]] = {}
        for layer in range(rng.choice([1, 2])):
            root = f"model.layers.{layer}."
            self.layers[f"{root}self_attn.q_proj"] = [inner, hidden]
            self.layers[f"{root}self_attn.o_proj"] = [hidden, inner]
            self.layers[f"{root}mlp.up_proj"] = [inner, hidden]
        shapes = {f"{module}.weight": shape for module, shape in self.layers.items()}
        shapes |= {"model.embed_tokens.weight": [vocabulary, hidden], "model.norm.weight": [hidden]}
        tied = rng.random() < 0.5
        if not tied:
            shapes["lm_head.weight"] = [vocabulary, hidden]
        self.base = {
            name: tensor(rng, shape, rng.choice([self.dtype, self.dtype, "F32"])) for name, shape in shapes.items()
        }
        self.config: Any = {"model_type": "llama", "tie_word_embeddings": tied, "vocab_size": vocabulary}
        self.settings: Any = {"peft_type": "LORA", "r": rng.choice([1, 2]), "lora_alpha": rng.choice([1, 4, 0.5])}
        self.adapter: dict[str, Tensor] = {}
        self._adapt(vocabulary, hidden)

    def _adapt(self, vocabulary: int, hidden: int) -> None:
        rng, prefix = self.rng, self.rng.choice([PREFIX, PREFIX, ""])
        dtype, named = rng.choice(["F32", "BF16", "F16"]), rng.choice(["", "", ".default"])
        modules = rng.sample(sorted(self.layers), rng.randrange(1, len(self.layers) + 1))
        self.settings["use_rslora"] = rng.random() < 0.3
        self.settings["use_dora"] = rng.random() < 0.2
        for module in modules:
            r = self.settings["r"]
            if rng.random() < 0.2:
                r = 3
                self.settings.setdefault("rank_pattern", {})[module] = r
            rows, columns = self.layers[module]
            self.adapter[f"{prefix}{module}.lora_A{named}.weight"] = tensor(rng, [r, columns], dtype)
            self.adapter[f"{prefix}{module}.lora_B{named}.weight"] = tensor(rng, [rows, r], dtype)
            if self.settings["use_dora"]:
                self.adapter[f"{prefix}{module}.lora_magnitude_vector{named}"] = tensor(rng, [rows], dtype)
        if rng.random() < 0.3:
            self.settings["modules_to_save"] = ["norm"]
            self.adapter[f"{prefix}model.norm.weight"] = tensor(rng, [hidden], dtype)
        if rng.random() < 0.2 and not self.settings["use_dora"]:
            r = self.settings["r"]
            self.adapter[f"{prefix}model.embed_tokens.lora_embedding_A{named}"] = tensor(rng, [r, vocabulary], dtype)
            self.adapter[f"{prefix}model.embed_tokens.lora_embedding_B{named}"] = tensor(rng, [hidden, r], dtype)
        elif rng.random() < 0.2:
            indices = sorted(rng.sample(range(vocabulary), 2))
            self.settings["trainable_token_indices"] = {"embed_tokens": indices}
            self.adapter[f"{prefix}model.embed_tokens.trainable_tokens_delta"] = tensor(rng, [2, hidden], dtype)

    def write(self, folder: Path) -> tuple[Path, Path]:
        """The base's and the adapter's directories."""
        base, adapter = folder / "base", folder / "run"
        base.mkdir(parents=True)
        adapter.mkdir()
        (base / "config.json").write_text(json.dumps(self.config))
        names = list(self.base)
        self.rng.shuffle(names)
        count = self.rng.choice([1, 1, 2, 3])
        shards = {f"model-{n + 1}-of-{count}.safetensors": names[n::count] for n in range(count)}
        if count == 1:
            shards = {"model.safetensors": names}
        else:
            weight_map = {name: shard for shard, held in shards.items() for name in held}
            (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        for shard, held in shards.items():
            (base / shard).write_bytes(file_of({name: self.base[name] for name in held}))
        (adapter / "adapter_config.json").write_text(json.dumps(self.settings))
        (adapter / "adapter_model.safetensors").write_bytes(file_of(self.adapter))
        return base, adapter


def _rename(case: Case, old: str, new: str) -> None:
    case.adapter = {name.replace(old, new): value for name, value in case.adapter.items()}


def _shape(case: Case) -> None:
    name = case.rng.choice(sorted(case.adapter))
    dtype, shape, _ = case.adapter[name]
    choices = [[*shape, 1], shape[:-1], [size + 1 for size in shape], [0, *shape[1:]], [*shape[:-1], shape[-1] + 1], []]
    case.adapter[name] = tensor(case.rng, case.rng.choice([new for new in choices if new != shape]), dtype)


def _turned(case: Case) -> None:
    name = next(name for name in case.adapter if "lora_A" in name)
    dtype, shape, _ = case.adapter[name]
    case.adapter[name] = tensor(case.rng, shape[::-1], dtype)
    case.wrong = shape != shape[::-1]


def _half(case: Case) -> None:
    del case.adapter[case.rng.choice([name for name in case.adapter if "lora_A" in name or "lora_B" in name])]
    case.wrong = True


def _elsewhere(case: Case) -> None:
    _rename(case, "self_attn.q_proj", "self_attn.qq_proj")
    _rename(case, "self_attn.o_proj", "self_attn.oo_proj")
    _rename(case, "mlp.up_proj", "mlp.down_proj")
    case.wrong = True


def _layer(case: Case) -> None:
    number = case.rng.choice(["7", "-1", "00", "0.0", "x", "٣", "9" * 30, "9" * 5000])
    _rename(case, "layers.0.", f"layers.{number}.")


def _stranger(case: Case) -> None:
    names = ["lora_E", "x.lora_A.other.weight", "model.layers.0.lora_C.weight", "", "model", "model.extra.weight",
             "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight.more"]  # fmt: skip
    case.adapter[case.rng.choice(names)] = tensor(case.rng, [2, 2], "F32")
    case.wrong = True


def _twice(case: Case) -> None:
    name = next(name for name in case.adapter if "lora_A" in name)
    twin = name.removeprefix(PREFIX) if name.startswith(PREFIX) else PREFIX + name
    case.adapter[twin] = case.adapter[name]
    case.wrong = True


def _numbers(case: Case) -> None:
    name = case.rng.choice([name for name in case.adapter if "lora_A" in name])
    case.adapter[name] = tensor(case.rng, case.adapter[name][1], "I8")
    case.wrong = True


def _rank(case: Case) -> None:
    case.settings |= {"r": case.settings["r"] + 7, "rank_pattern": {}}
    case.wrong = True


def _dora(case: Case) -> None:
    case.settings["use_dora"] = not case.settings["use_dora"]
    case.wrong = True


FIELDS = (
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias", "lora_bias",
    "target_parameters", "megatron_config", "layer_replication", "trainable_token_indices", "modules_to_save",
    "init_lora_weights", "new_field", "target_modules", "base_model_name_or_path", "ensure_weight_tying",
    "loftq_config", "fan_in_fan_out", "peft_version", "task_type",
)  # fmt: skip
ODD = (
    None, True, False, 0, -1, 1.5, 10**400, float("inf"), float("nan"), "", "x", "pissa", "\n", [], [[0, 1]], [[0, 2]],
    [[0, 1.5]], ["ab"],
    [1, [2]], [None], ["norm"], {}, {"(": 1}, {"q_proj": "x"}, {"q_proj": -1}, {"q_proj": 0}, {"q_proj": 10**400},
    {"embed_tokens": [0, 0]}, {"embed_tokens": [99, -1]}, {"embed_tokens": "x"}, {".*": 2}, {"a": {"b": []}}, {"": 1},
)  # fmt: skip


def _setting(case: Case) -> None:
    case.settings[case.rng.choice(FIELDS)] = case.rng.choice(ODD)


def _two_settings(case: Case) -> None:
    _setting(case)
    _setting(case)


def _base_setting(case: Case) -> None:
    fields = ["tie_word_embeddings", "vocab_size", "model_type", "num_hidden_layers", "text_config", "architectures",
              "quantization_config", "torch_dtype", "dtype"]  # fmt: skip
    case.config[case.rng.choice(fields)] = case.rng.choice(
        [None, True, "x", -1, [], {}, [1], {"vocab_size": "x"}, 1e400]
    )


def _base_tensor(case: Case) -> None:
    name = case.rng.choice(sorted(case.base))
    dtype, shape, _ = case.base[name]
    choice = case.rng.randrange(4)
    if choice == 0:
        del case.base[name]
    elif choice == 1:
        case.base[name] = tensor(case.rng, shape, "I8")
    else:
        case.base[name] = tensor(case.rng, [*shape, 1] if choice == 2 else shape[:-1], dtype)


SPOIL: dict[str, Callable[[Case], None]] = {
    "a shape": _shape, "a factor turned": _turned, "half a pair": _half, "another module": _elsewhere,
    "another layer": _layer, "a stranger": _stranger, "a twin": _twice, "whole numbers": _numbers, "the rank": _rank,
    "dora": _dora, "a setting": _setting, "two settings": _two_settings,
    "the base's setting": _base_setting, "the base's tensor": _base_tensor,
}  # fmt: skip


def spoil_file(rng: Random, place: Path) -> None:
    """Change a file's text or bytes, or put another file in its place."""
    raw = place.read_bytes()
    if place.suffix == ".safetensors" and rng.random() < 0.5:
        place.write_bytes(
            rng.choice([spoilt_file(rng.randrange(10**6)).content, raw[: rng.randrange(len(raw))], raw + b"x"])
        )
        return
    start = rng.randrange(len(raw))
    piece = rng.choice([*VALUES, *PIECES]).encode()
    place.write_bytes(raw[:start] + piece + raw[start + rng.choice([0, 1, len(piece)]) :])


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below a folder, with its size and the time of its last change."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def check_plan(plan: ts.MergePlan, adapter: dict[str, Tensor]) -> None:
    """Every adapter tensor is in exactly one update, and every update is of a tensor that will be written."""
    used: Counter[str] = Counter()
    for update in plan.binding.updates:
        if isinstance(update, LowRank):
            used.update([update.lora_A, update.lora_B])
        elif not isinstance(update, Copied):
            used[update.tensor] += 1
    assert used == Counter(dict.fromkeys(adapter, 1))
    changed = {name for shard in plan.shards for name in shard.changed}
    assert {update.name for update in plan.binding.updates if isinstance(update, LowRank)} <= changed


def outcome_of(seed: int, folder: Path) -> str:
    """Plan the case of a seed; ``planned`` or ``refused``, where that is right."""
    rng = Random(seed)  # noqa: S311 - a test is to be repeatable
    case = Case(rng)
    kind = rng.choice([*["sound"] * 4, *SPOIL, "a file"])
    if kind in SPOIL:
        SPOIL[kind](case)
    shutil.rmtree(folder, ignore_errors=True)
    base, run = case.write(folder)
    if kind == "a file":
        spoil_file(rng, rng.choice(sorted([*base.iterdir(), *run.iterdir()])))
    before = state_of(folder)
    try:
        plan, refusal = ts.plan_merge(run, folder / "out", base=str(base)), None
    except ts.TunesmithError as error:
        plan, refusal = None, error
    assert state_of(folder) == before
    if plan is None:
        assert kind != "sound", refusal
        return "refused"
    assert not case.wrong, kind
    if kind != "a file":
        check_plan(plan, case.adapter)
    return "planned"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**40))
def test_a_plan_uses_every_tensor_once_or_is_refused(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Whatever is wrong with names, shapes, settings or files; and nothing is written."""
    assert outcome_of(seed, tmp_path_factory.getbasetemp() / "planner") in ("planned", "refused")


def test_the_cases_reach_both_outcomes(tmp_path: Path) -> None:
    """A fuzzer that is always refused tests nothing."""
    outcomes = Counter(outcome_of(seed, tmp_path / "planner") for seed in range(60))
    assert min(outcomes["planned"], outcomes["refused"]) >= 10

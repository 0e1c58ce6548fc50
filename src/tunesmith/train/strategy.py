"""How a training is spread over processes: what the launcher was asked for, held against what was set up.

It is chosen in accelerate's own file, and told to the processes by environment variables.  Accelerate follows some of
them only on some devices and says nothing where it does not, so the outcome is looked at.

Importing this module does not import torch.
"""

from __future__ import annotations

import os
from typing import Any

from tunesmith.errors import RecipeError
from tunesmith.train.processes import processes

_SINGLE, _DDP, _FSDP2 = "one process", "DDP", "FSDP2"
_BUILT = (_SINGLE, _DDP, _FSDP2)
_PRECISIONS = {"bfloat16": "bf16", "float16": "fp16"}


def asked_for() -> str:
    """The strategy that the launcher was asked for: ``one process``, ``DDP``, ``FSDP2``, ``DeepSpeed`` ….

    Source: the variables are those of ``accelerate.utils.launch``.
    """
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        return "DeepSpeed"
    if _is_on("ACCELERATE_USE_MEGATRON_LM"):
        return "Megatron-LM"
    if _is_on("ACCELERATE_USE_FSDP"):
        return f"FSDP{os.environ.get('FSDP_VERSION', '1')}"
    return _SINGLE if processes() == 1 else _DDP


def refuse_unbuilt_launch() -> None:
    """Refuse a launch that cannot become the training that was asked for, before anything is read.

    Raises:
        RecipeError: the strategy is none that is built in, or ``accelerate launch`` was given a number of processes,
            and this process is alone, since on a CPU it starts several through MPI only.
    """
    asked = asked_for()
    if asked not in _BUILT:
        raise RecipeError(
            "This strategy of the launcher is not built in.",
            expected="DDP or FSDP2",
            found=asked,
            next_step="choose another one in accelerate's own file, or use torchrun",
        )
    # It is told where the others are, which a launch of one process is not, and not which of them it is.
    launched = "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ
    if launched and processes() == 1 and "RANK" not in os.environ:
        raise RecipeError(
            "The launcher was asked for several processes and started one.",
            expected="several processes",
            found="accelerate launch, which starts several on a CPU through MPI only",
            next_step="torchrun --nproc_per_node N -m tunesmith train RECIPE, with use_cpu: true in the recipe; or "
            "give accelerate a --mpirun_hostfile; for one process, unset MASTER_ADDR and MASTER_PORT",
        )


def save_whole_adapters() -> None:
    """Have FSDP gather what it saves, so that an adapter is PEFT's own; to be called before anything is set up."""
    if asked_for() == _FSDP2:
        os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"


def refuse_other_strategy(accelerator: Any, *, dtype: str) -> None:
    """Refuse to train otherwise than the launcher was asked.

    Args:
        accelerator: the Trainer's, set up.
        dtype: what the base is computed in.

    Raises:
        RecipeError: another strategy, number of processes or number format was set up.
    """
    asked, found = asked_for(), _set_up(accelerator)
    if (asked, processes()) != (found, accelerator.num_processes):
        raise RecipeError(
            "What was set up is not what the launcher was asked for.",
            expected=f"{asked}, {processes()} processes",
            found=f"{found}, {accelerator.num_processes} processes, on {accelerator.device.type}",
            next_step="FSDP needs GPUs: leave use_cpu out, or choose another strategy in accelerate's own file",
        )
    precision = _PRECISIONS.get(dtype, "no") if accelerator.device.type != "cpu" or dtype == "bfloat16" else "no"
    if accelerator.mixed_precision != precision:
        raise RecipeError(
            "The launcher was asked for another number format than the recipe's.",
            expected=f"mixed_precision {precision}, as the base is computed in {dtype}",
            found=accelerator.mixed_precision,
            next_step="write mixed_precision: no into accelerate's own file, or insist by dtype in the recipe",
        )


def _set_up(accelerator: Any) -> str:
    kind = str(accelerator.distributed_type.value)
    if kind == "FSDP":
        return f"FSDP{2 if accelerator.is_fsdp2 else 1}"
    named = {"NO": _SINGLE, "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}
    if kind.startswith("MULTI_") and accelerator.num_processes == 1:
        return _SINGLE
    return named.get(kind, _DDP if kind.startswith("MULTI_") else kind)


def _is_on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")

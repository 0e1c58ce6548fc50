"""An adapter in a storage, as a run: nothing but the adapter is looked at."""

from __future__ import annotations

from typing import Any

from tunesmith.checkpoint import StoragePath, is_file, read_json_object
from tunesmith.errors import RunError
from tunesmith.runs.records import Run, RunCheckpoint
from tunesmith.runs.tools import ADAPTER_CONFIG

_FINAL = "final"


def open_stored(address: StoragePath) -> Run:
    """Open a bare adapter by its address.

    Args:
        address: of the objects ``adapter_config.json`` and the weights beside it.

    Raises:
        RunError: there is no adapter.
        CheckpointError: the storage does not answer, or refuses.
    """
    if not is_file(address / ADAPTER_CONFIG):
        raise RunError(
            "There is no adapter at this address.",
            where=address,
            expected=f"{ADAPTER_CONFIG} there; of a run in a storage, give one of its adapters",
        )
    config: dict[str, Any] = read_json_object(address / ADAPTER_CONFIG)
    base = config.get("base_model_name_or_path") or config.get("model")
    return Run(
        path=str(address),
        kind="adapter",
        writer="peft",
        base_model=base if isinstance(base, str) else None,
        files=(),
        checkpoints=(RunCheckpoint(name=_FINAL, step=None, path=str(address)),),
    )

"""``tunesmith doctor``."""

from __future__ import annotations

import tunesmith as ts
from tunesmith.cli.options import DtypeOption, JsonOption
from tunesmith.cli.output import console, human_bytes, print_json


def doctor(dtype: DtypeOption = "auto", as_json: JsonOption = False) -> None:
    """Show versions, devices, memory, disk, the compute dtype, and which extras are missing.

    Example: tunesmith doctor
    """
    health = ts.doctor(dtype=dtype)
    if as_json:
        print_json(health)
        return
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, version in health.versions.items():
        table.add_row(name, version or "not installed")
    table.add_row("platform", f"{health.platform}, {health.cores} cores")
    table.add_row("memory", f"{human_bytes(health.free_memory_bytes)} free of {human_bytes(health.memory_bytes)}")
    table.add_row("disk", f"{human_bytes(health.free_disk_bytes)} free at {health.cache}")
    table.add_row("device", health.compute.device)
    timings = ", ".join(f"{name} {milliseconds:.2f} ms" for name, milliseconds in health.compute.gemm_ms.items())
    table.add_row(
        "compute dtype", f"{health.compute.dtype} ({health.compute.reason}{': ' + timings if timings else ''})"
    )
    for extra in health.extras:
        state = f"missing {', '.join(extra.missing)}: {extra.install}" if extra.missing else "installed"
        table.add_row(f"extra {extra.name}", state)
    console().print(table)

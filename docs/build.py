"""Write ``docs/cli.md`` from the program's own help, or check that the documents are true.

python docs/build.py            write docs/cli.md
python docs/build.py --check    fail where it is out of date, a link leads nowhere, the two READMEs tell of
                                different verbs, or a document names a place on somebody's machine
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CLI = ROOT / "docs" / "cli.md"
HEAD = """# The command line

Written by `make docs` from the program's own help; do not edit.

Data goes to stdout, everything else to stderr; `--json` prints one document with a `schema_version`. Exit codes:

| code | meaning |
| --- | --- |
| 0 | done, and good |
| 1 | a bug of ours, with a traceback |
| 2 | you can mend it: the message says what, where and what to type next |
| 3 | it ran, and the answer is *no* (the merged model is not what was tested) |
| 130 | interrupted; nothing half-made is left |
| 141 | whoever read the output went away |
"""
_LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")
_MACHINE = re.compile(r"(?<![\w.])/(?:home|root|work|Users)/\w")


def verbs() -> list[str]:
    """Every verb, in the order of the help."""
    from tunesmith.cli.app import app

    return [str(command.name or command.callback.__name__) for command in app.registered_commands if command.callback]


def cli_document() -> str:
    """The help of every verb as one document."""
    parts = [HEAD]
    for arguments in ([], *([verb] for verb in verbs())):
        title = " ".join(["tunesmith", *arguments])
        parts.append(f"\n## `{title}`\n\n```text\n{_help(arguments)}\n```\n")
    return "".join(parts)


def _help(arguments: list[str]) -> str:
    plain = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    command = [sys.executable, "-m", "tunesmith", *arguments, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)  # noqa: S603
    return "\n".join(line.rstrip() for line in result.stdout.strip("\n").splitlines())


def problems() -> list[str]:
    """What is untrue in the documents."""
    found = []
    if not CLI.exists() or CLI.read_text(encoding="utf-8") != cli_document():
        found.append("docs/cli.md is out of date: run `make docs`")
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        text = document.read_text(encoding="utf-8")
        name = document.relative_to(ROOT)
        found += [
            f"{name}: the link {target} leads nowhere"
            for target in _LINK.findall(text)
            if not (document.parent / target).exists()
        ]
        found += [f"{name}: names a place on a machine: {hit.group()}" for hit in _MACHINE.finditer(text)]
    for name in ("README.md", "README.zh.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        found += [f"{name}: does not tell of `tunesmith {verb}`" for verb in verbs() if f"tunesmith {verb}" not in text]
    return found


def main() -> int:
    """Write or check; the exit code is 1 where something is untrue."""
    if "--check" not in sys.argv:
        CLI.write_text(cli_document(), encoding="utf-8")
        return 0
    found = problems()
    for problem in found:
        print(problem, file=sys.stderr)  # noqa: T201 - this is a program
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Write what the program itself can tell into the documents, or check that they are true.

That is ``docs/cli.md``, from the help of every verb; the tables of ``docs/run-directory.md``, from the catalogue of
files and its texts; and the names of chat templates in ``docs/training.md``.

python docs/build.py            write them
python docs/build.py --check    fail where they are out of date, a link leads nowhere, the two READMEs tell of
                                different verbs, or a document names a place on somebody's machine
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
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
RUN_DIRECTORY = ROOT / "docs" / "run-directory.md"
TRAINING = ROOT / "docs" / "training.md"
TABLE_HEADS = {
    "en": ("File", "Written by", "Needed", "Deleted by `--cleanup`", "What it is"),
    "zh": ("文件", "由谁写入", "用途", "`--cleanup` 会删吗", "说明"),
}
GOES = {"en": {True: "yes", False: "no", None: "a copy"}, "zh": {True: "会", False: "不会", None: "只删副本"}}
_TABLE = "<!-- files {lang}: written by docs/build.py -->\n{table}<!-- end -->"
_TEMPLATES = "<!-- templates: written by docs/build.py -->\n{names}\n<!-- end -->"
_LINE = 124  # characters, as the documents are wrapped
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


def run_directory_document() -> str:
    """The hand-written document with both tables of files as the catalogue has them."""
    document = RUN_DIRECTORY.read_text(encoding="utf-8")
    for lang in TABLE_HEADS:
        document = _filled(document, _TABLE.format(lang=lang, table="@"), files_table(lang), where=RUN_DIRECTORY)
    return document


def training_document() -> str:
    """The hand-written document with the name of every chat template."""
    from tunesmith.conversations import template_names

    names = ", ".join(f"`{name}`" for name in template_names())
    wrapped = textwrap.fill(names, _LINE, break_long_words=False, break_on_hyphens=False)
    return _filled(TRAINING.read_text(encoding="utf-8"), _TEMPLATES.format(names="@"), wrapped, where=TRAINING)


def _filled(document: str, frame: str, content: str, *, where: Path) -> str:
    """The document with what stands in its one such frame replaced; ``@`` is the content's place in the frame."""
    block = re.compile(re.escape(frame).replace("@", ".*?"), re.DOTALL)
    filled, count = block.subn(lambda _: frame.replace("@", content), document)
    if count != 1:
        raise SystemExit(f"{where.name} must have this once, and has it {count} times: {frame}")
    return filled


def files_table(lang: str) -> str:
    """Every kind of file in the catalogue's order, its patterns together."""
    from tunesmith.report.texts import text
    from tunesmith.runs.cleanup import COPIED_KIND, STATE_KINDS
    from tunesmith.runs.files import CATALOGUE

    kinds = {known.kind: [line for line in CATALOGUE if line.kind == known.kind] for known in CATALOGUE}
    rows = [TABLE_HEADS[lang], ("---",) * len(TABLE_HEADS[lang])]
    for kind, lines in kinds.items():
        writers = dict.fromkeys(text(f"written.{line.written_by}", lang) for line in lines if line.written_by)
        needs = dict.fromkeys(text(f"needed.{line.needed_for}", lang) for line in lines)
        patterns = (f"`{line.pattern.replace('[0-9]*', 'N')}`" for line in lines)
        goes = GOES[lang][None if kind == COPIED_KIND else kind in STATE_KINDS]
        rows.append(
            (", ".join(patterns), ", ".join(writers) or "–", ", ".join(needs), goes, text(f"file.{kind}", lang))
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def problems() -> list[str]:
    """What is untrue in the documents."""
    found = []
    if not CLI.exists() or CLI.read_text(encoding="utf-8") != cli_document():
        found.append("docs/cli.md is out of date: run `make docs`")
    if RUN_DIRECTORY.read_text(encoding="utf-8") != run_directory_document():
        found.append("docs/run-directory.md is out of date: run `make docs`")
    if TRAINING.read_text(encoding="utf-8") != training_document():
        found.append("docs/training.md is out of date: run `make docs`")
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
        RUN_DIRECTORY.write_text(run_directory_document(), encoding="utf-8")
        TRAINING.write_text(training_document(), encoding="utf-8")
        return 0
    found = problems()
    for problem in found:
        print(problem, file=sys.stderr)  # noqa: T201 - this is a program
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())

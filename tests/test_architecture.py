"""The house as design.md draws it: who may import whom, and what is never imported before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import tunesmith
from tests.tiny_models import TinyRun

PACKAGE = Path(tunesmith.__file__).parent

LEVELS = {
    **dict.fromkeys(("errors", "progress", "record", "allocator", "executors"), 1),
    **dict.fromkeys(("checkpoint", "conversations"), 2),
    **dict.fromkeys(("adapter", "runs"), 3),
    **dict.fromkeys(("merge", "models"), 4),
    **dict.fromkeys(("compare", "verify", "train", "export"), 5),
    **dict.fromkeys(("report",), 6),
    **dict.fromkeys(("api", "doctor", "demo", "__init__"), 7),
    **dict.fromkeys(("cli", "web", "__main__"), 8),
}

# Inside a level nobody imports anybody, but:
SIBLINGS = {
    ("progress", "errors"): "a cancelled work raises Cancelled",
    ("executors", "errors"): "a cluster that is not there is an error of ours",
    ("record", "errors"): "a record that cannot be read or written says so in our errors",
    ("demo", "api"): "the demo is the verbs, one after another",
    ("doctor", "api"): "the compute dtype is measured and kept by the verb of that name",
    ("__init__", "api"): "the public names, loaded when they are used",
    ("__init__", "demo"): "the public names, loaded when they are used",
    ("__init__", "doctor"): "the public names, loaded when they are used",
    ("__main__", "cli"): "python -m tunesmith is the command line",
}

# The command line sees the public API only, but:
CLI_BELOW_THE_API = {
    ("cli/app.py", "errors"): "the exit codes, when an error has happened: the public API would load pydantic first",
    ("cli/web.py", "web"): "the command that serves the page; the page is no part of the library's API",
}


@dataclass(frozen=True)
class Import:
    """One import of ours by ours.

    Attributes:
        file: the importing file, relative to the package.
        room: its room.
        target: the imported room; ``__init__`` for the package itself.
        line: where.
        typing_only: it stands under ``if TYPE_CHECKING``.
        at_top: it stands at the module's top, so that it is executed with it.
    """

    file: str
    room: str
    target: str
    line: int
    typing_only: bool
    at_top: bool


def room_of(file: str) -> str:
    """The room of a file: its folder, or its own name at the package's top."""
    first = file.split("/", 1)[0]
    return first.removesuffix(".py")


def imports_of(file: str, source: str) -> Iterator[Import]:
    """Every import of the package in a source, wherever it stands."""

    def walk(node: ast.AST, *, typing_only: bool, at_top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom | ast.Import):
                for target in _targets(child):
                    yield Import(file, room_of(file), target, child.lineno, typing_only, at_top)
            inside = at_top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                for statement in child.body:
                    yield from walk(ast.Module([statement], []), typing_only=True, at_top=inside)
            else:
                yield from walk(child, typing_only=typing_only, at_top=inside)

    yield from walk(ast.parse(source), typing_only=False, at_top=True)


def _targets(node: ast.ImportFrom | ast.Import) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom) and node.level:
        yield "a relative import"
        return
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    for name in names:
        package, _, rest = name.partition(".")
        if package != "tunesmith":
            continue
        if rest:
            yield rest.split(".", 1)[0]
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name if alias.name in LEVELS else "__init__" for alias in node.names)
        else:
            yield "__init__"


def complaint(found: Import) -> str | None:
    """What is wrong with an import; None where nothing is."""
    if found.room == found.target:
        return None
    if found.room not in LEVELS or found.target not in LEVELS:
        return "no such room"
    if (found.room, found.target) in SIBLINGS:
        return None
    if found.room == "verify" and found.target == "merge":
        return "a shared bug would verify itself"
    if found.room in ("cli", "web"):
        if found.target == "__init__" or found.typing_only:
            return None
        allowed = (found.file, found.target) in CLI_BELOW_THE_API and not found.at_top
        return None if allowed else "only the public API"
    level, target = LEVELS[found.room], LEVELS[found.target]
    if target > level:
        return "upward"
    return "sideways" if target == level else None


def complaints(file: str, source: str) -> list[str]:
    """All that is wrong with a file's imports."""
    return [
        f"{file}:{found.line}: {found.room} imports {found.target}: {why}"
        for found in imports_of(file, source)
        if (why := complaint(found))
    ]


def test_every_import_goes_down() -> None:
    """Nothing imports upward, siblings do not import each other, and the command line sees the public API only."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        found += complaints(path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


def test_every_file_belongs_to_a_room() -> None:
    """A new top-level file or folder must be given its level here first."""
    strangers = {room_of(path.relative_to(PACKAGE).as_posix()) for path in PACKAGE.rglob("*.py")} - set(LEVELS)
    assert not strangers


def test_no_exception_outlives_its_use() -> None:
    """An exception that nothing needs any more is deleted."""
    used = set()
    for path in PACKAGE.rglob("*.py"):
        file = path.relative_to(PACKAGE).as_posix()
        for found in imports_of(file, path.read_text(encoding="utf-8")):
            used |= {(found.room, found.target), (found.file, found.target)}
    assert {*SIBLINGS, *CLI_BELOW_THE_API} <= used


@pytest.mark.parametrize(
    ("file", "source", "why"),
    [
        ("verify/weights.py", "from tunesmith.merge.tiles import merge_tile", "verify itself"),
        ("verify/weights.py", "def f():\n    from tunesmith.merge import merge", "verify itself"),
        ("verify/weights.py", "from tunesmith import merge", "verify itself"),
        ("checkpoint/header.py", "from tunesmith.adapter import Adapter", "upward"),
        ("errors.py", "import tunesmith.record", "sideways"),
        ("adapter/load.py", "if TYPE_CHECKING:\n    from tunesmith.runs import Run", "sideways"),
        ("compare/run.py", "from tunesmith.verify import verify", "sideways"),
        ("report/html.py", "import tunesmith as ts", "upward"),
        ("cli/merge.py", "from tunesmith.merge import merge", "only the public API"),
        ("cli/merge.py", "def f():\n    from tunesmith.api import merge", "only the public API"),
        ("cli/app.py", "from tunesmith.errors import Cancelled", "only the public API"),
        ("utils.py", "from tunesmith.errors import Cancelled", "no such room"),
        ("merge/plan.py", "from .write import merge", "no such room"),
    ],
)
def test_a_forbidden_import_is_found(file: str, source: str, why: str) -> None:
    """The checker is sabotaged: each of these must be a complaint."""
    assert [why in line for line in complaints(file, source)] == [True]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("verify/run.py", "from tunesmith.models import VariantSet"),
        ("cli/merge.py", "import tunesmith as ts"),
        ("cli/output.py", "if TYPE_CHECKING:\n    from tunesmith.record import Record"),
        ("cli/app.py", "def main():\n    from tunesmith.errors import Cancelled"),
        ("merge/plan.py", "from tunesmith.merge.records import Asset\nimport numpy"),
    ],
)
def test_an_allowed_import_is_passed(file: str, source: str) -> None:
    """The checker does not cry wolf."""
    assert not complaints(file, source)


HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "fastapi", "vl_convert", "jinja2", "scipy", "pandas")
CLUSTERS = ("ray", "distributed", "dask")
MODELS = ("torch", "transformers", "peft")


def loaded_by(program: str, *arguments: object) -> tuple[set[str], str]:
    """The top-level modules that a Python program has loaded when it ends, and its standard error."""
    code = f"import sys, atexit\natexit.register(lambda: print('\\nMODULES', *sys.modules))\n{program}"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60
    )
    assert "MODULES" in done.stdout, done.stderr
    return {name.partition(".")[0] for name in done.stdout.rpartition("MODULES")[2].split()}, done.stderr


_MAIN = "from tunesmith.cli import main\nmain()"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["inspect", "--help"], ["compare", "--help"]])
def test_help_loads_no_heavy_library(arguments: list[str]) -> None:
    """A person who asks for help waits for no library."""
    loaded, _ = loaded_by(_MAIN, *arguments)
    assert not loaded.intersection((*HEAVY, *CLUSTERS))


def test_importing_the_package_loads_no_library_at_all() -> None:
    """``import tunesmith`` costs what the standard library costs."""
    loaded, _ = loaded_by("import tunesmith")
    assert not loaded.intersection((*HEAVY, *CLUSTERS, "pydantic", "numpy", "rich", "typer", "yaml", "huggingface_hub"))


def test_models_are_not_loaded_to_read_merge_or_verify_weights(tiny: TinyRun, tmp_path: Path) -> None:
    """``inspect``, ``merge`` and the first three levels of ``verify`` work on headers and numbers alone."""
    run, out = tiny.adapters["final"], tmp_path / "out"
    for arguments in (
        ["inspect", run],
        ["merge", run, "--out", out],
        ["verify", run, out, "--level", "structure", "--level", "assets", "--level", "weights"],
    ):
        loaded, errors = loaded_by(_MAIN, *arguments)
        assert not loaded.intersection((*MODELS, *CLUSTERS)), arguments
        assert "Error" not in errors

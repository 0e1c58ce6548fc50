"""The command line as a person runs it: a process of its own, on a tiny run directory."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from tests.cli.ready import Ready
from tests.tiny_models import TinyRun


@dataclass(frozen=True)
class Result:
    """What a finished command left.

    Attributes:
        code: its exit code.
        out: its standard output.
        err: its standard error.
    """

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Cli:
    """Runs ``python -m tunesmith`` offline, with a cache of its own.

    Attributes:
        home: that cache.
    """

    home: Path

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of a command: ours, without what would change its output."""
        ours = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LC_ALL")}
        return {**ours, "HF_HUB_OFFLINE": "1", "TUNESMITH_HOME": str(self.home), "LANG": "C.UTF-8", **more}

    @cached_property
    def ready(self) -> Ready:
        """A process that has the libraries loaded."""
        return Ready(self.environment())

    def close(self) -> None:
        """End it, where it was begun."""
        if "ready" in self.__dict__:
            self.ready.close()

    def start(self, *arguments: object, **options: object) -> subprocess.Popen[str]:
        """Start a command and hand it back running."""
        return subprocess.Popen(
            [sys.executable, "-m", "tunesmith", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment(),
            **options,  # type: ignore[call-overload]
        )

    def __call__(
        self,
        *arguments: object,
        cwd: Path | None = None,
        stdin: str | bytes = b"",
        preexec: Callable[[], None] | None = None,
        fresh: bool = False,
        **environment: str,
    ) -> Result:
        """Run a command to its end; ``fresh`` in an interpreter that has imported nothing."""
        data = stdin.encode() if isinstance(stdin, str) else stdin
        if not (fresh or preexec or environment):
            with tempfile.TemporaryDirectory(dir=self.home) as folder:
                code, out, err = self.ready.run([*map(str, arguments)], cwd=cwd, stdin=data, folder=Path(folder))
            return Result(code, out.decode(), err.decode())
        done = subprocess.run(
            [sys.executable, "-m", "tunesmith", *map(str, arguments)],
            cwd=cwd,
            input=data,
            capture_output=True,
            env=self.environment(**environment),
            preexec_fn=preexec,
            timeout=120,
            check=False,
        )
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    """The command."""
    made = Cli(tmp_path_factory.mktemp("home"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def run_dir(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a final adapter and one checkpoint, whose base is named by its path."""
    root = tmp_path_factory.mktemp("cli") / "run"
    shutil.copytree(tiny.adapters["final"], root)
    shutil.copytree(tiny.adapters["checkpoint-10"], root / "checkpoint-10")
    return root


@pytest.fixture
def own_run(run_dir: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(run_dir, tmp_path / "own-run"))


@pytest.fixture
def own_base(tiny: TinyRun, tmp_path: Path) -> Path:
    """A copy of the base that a test may damage."""
    return Path(shutil.copytree(tiny.base, tmp_path / "own-base"))


def tree(root: Path) -> dict[str, str]:
    """Every entry below a directory, hidden ones too, with the hash of its bytes."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        for path in sorted(root.rglob("*"))
    }

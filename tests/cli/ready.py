"""A process that has imported what a command needs, and forks one child for each command.

To import the libraries takes most of a command's time.  A child has streams, a working directory and an exit code of
its own, as any process; what differs is that its modules are loaded already.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

# What the commands import when they run; and nothing that computes, for a fork must not lose threads.
LIBRARIES = (
    "peft", "rich.progress", "safetensors.torch", "tokenizers", "transformers", "tunesmith.cli.app",
    "tunesmith.api.merging", "tunesmith.api.reporting", "tunesmith.report.html",
    "tunesmith.compare", "tunesmith.doctor", "tunesmith.merge", "tunesmith.models", "tunesmith.report",
    "tunesmith.runs", "tunesmith.train", "tunesmith.verify",
)  # fmt: skip


class Ready:
    """The parent of the commands.

    Args:
        environment: what they run in.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.cli.ready"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],
        )
        self._one_by_one = threading.Lock()

    def run(self, arguments: list[str], *, cwd: Path | None, stdin: bytes, folder: Path) -> tuple[int, bytes, bytes]:
        """Run a command to its end.

        Args:
            arguments: the command's.
            cwd: where; None for here.
            stdin: what it reads.
            folder: an empty directory for its streams.

        Returns:
            Its exit code, standard output and standard error.
        """
        streams = [folder / name for name in ("in", "out", "err")]
        streams[0].write_bytes(stdin)
        order = {"arguments": arguments, "cwd": str(cwd or Path.cwd()), "streams": [str(path) for path in streams]}
        with self._one_by_one:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            code = int(self._process.stdout.readline())
        return code, streams[1].read_bytes(), streams[2].read_bytes()

    def close(self) -> None:
        """End the parent."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait()


def _command(order: dict[str, Any]) -> NoReturn:
    """Become the command, in a process of its own."""
    source, *targets = order["streams"]
    os.dup2(os.open(source, os.O_RDONLY), 0)
    for number, target in enumerate(targets, 1):
        os.dup2(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(order["cwd"])
    ways = (("r", "surrogateescape"), ("w", "surrogateescape"), ("w", "backslashreplace"))  # as Python opens them
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, encoding="utf-8", errors=errors) for number, (mode, errors) in enumerate(ways)
    )
    sys.argv = ["tunesmith", *order["arguments"]]
    code = 1
    try:
        runpy.run_module("tunesmith", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter reports it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # or every child's collector would copy all that it looks at
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _command(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)  # noqa: T201 - the answer
    os._exit(0)  # the libraries take their time to be taken down


if __name__ == "__main__":
    _serve()

"""Merges and proofs compute in processes of their own: the same bytes, cancelled as before, gone with the page."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from tests.web.conftest import Page
from tunesmith.executors import processes
from tunesmith.web import workers


def test_small_work_stays_where_it_is() -> None:
    """Processes cost more than they spare."""
    with workers.worker_processes(1 << 20) as executor:
        assert executor is None


def test_work_is_done_elsewhere_and_nothing_stays() -> None:
    """Workers are other processes; after the job there are none."""
    before = set(psutil.Process().children(recursive=True))
    with workers.worker_processes(1 << 30) as executor:
        assert executor is not None
        assert executor.submit(os.getpid).result(timeout=60) != os.getpid()
        pids = {one.pid for one in psutil.Process().children(recursive=True)}
    assert pids
    assert set(psutil.Process().children(recursive=True)) <= before | _trackers()


def _trackers() -> set[psutil.Process]:
    """Python's own resource tracker, which stays for the life of the process."""
    return {one for one in psutil.Process().children() if "resource_tracker" in " ".join(one.cmdline())}


def test_workers_end_with_a_page_that_is_killed(tmp_path: Path) -> None:
    """No process waits for ever on a queue that nobody writes to."""
    program = tmp_path / "page.py"
    program.write_text(
        textwrap.dedent("""
            import os, time
            from tunesmith.web.workers import worker_processes
            if __name__ == "__main__":
                with worker_processes(1 << 30) as executor:
                    print(executor.submit(os.getpid).result(), flush=True)
                    time.sleep(600)
        """)
    )
    page = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    assert page.stdout is not None
    worker = psutil.Process(int(page.stdout.readline()))
    page.kill()
    page.wait()
    page.stdout.close()
    worker.wait(timeout=30)


@pytest.mark.parametrize("kind", ["merge", "verify"])
def test_jobs_use_them(page: Page, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merged model is the same, byte for byte, and the proof is one of the same model."""
    page.done("merge", run="run", base="base", out=f"{kind}-here")
    monkeypatch.setattr(workers, "_WORTH_BYTES", 0)
    started: list[object] = []
    pool = processes.ProcessPoolExecutor
    monkeypatch.setattr(processes, "ProcessPoolExecutor", lambda *a, **k: started.append(k) or pool(*a, **k))
    if kind == "merge":
        page.done("merge", run="run", base="base", out=f"{kind}-there")
        one, other = (page.root / f"{kind}-{name}" / "model.safetensors" for name in ("here", "there"))
        assert one.read_bytes() == other.read_bytes()
    else:
        done = page.done("verify", run="run", base="base", directory=f"{kind}-here", levels=["structure", "weights"])
        assert done["result"]["answer"] == "identical", done["result"]
    assert len(started) == 1

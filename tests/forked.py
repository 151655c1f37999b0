"""Scripts that start quickly, for tests that start many runs.

A process that has imported torch and transformers waits, and each script runs in a fork of it, as
`python SCRIPT FLAGS` would. It can be killed like any process, and spends no seconds on imports;
it draws no curves, which take longer than a small run, and which `conftest.run_script` tests.
Several forks can share one run, as the processes that torchrun starts do.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "forked", "openai", "peft", "sequence_level", "token_level", "on_policy", "cross_tokenizer",
        "transformers.models.llama.modeling_llama",
    ]
)  # fmt: skip


class ForkedScript(FORKS.Process):
    """A running script, with the methods of `subprocess.Popen` that the tests use."""

    def __init__(
        self, script: str | Path, flags: Sequence[str | Path], cwd: Path, output: Path,
        errors: Path | None = None, **environment: str,
    ) -> None:  # fmt: skip
        """Start it in `cwd`. What it prints is appended to `output`, with its errors unless there
        is a file for `errors`."""
        super().__init__()
        self.script, self.flags, self.cwd = str(script), [*map(str, flags)], cwd
        self.outputs, self.environment = (output, errors or output), os.environ | environment
        for path in self.outputs:
            path.touch()
        # Python 3.11 does not give the waiting process this one's sys.path.
        with mock.patch.dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}"):
            multiprocessing.forkserver.ensure_running()
        self.start()

    def run(self) -> None:
        os.chdir(self.cwd)
        os.environ.clear()
        os.environ.update(self.environment)
        for stream, path in zip((1, 2), self.outputs, strict=True):
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
        sys.stdout.reconfigure(line_buffering=True)
        sys.argv = [self.script, *self.flags]
        import common  # it is loaded, as what the forks have in common

        common.draw_curves = lambda *_: None
        runpy.run_path(str(ROOT / self.script), run_name="__main__")

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, limit: float = 1800.0) -> int:
        self.join(limit)
        if self.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.script, limit)
        return self.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


class ForkedRanks:
    """The processes of one run on the CPU, which find each other as those of torchrun do."""

    def __init__(
        self, count: int, script: str | Path, flags: Sequence[str | Path], cwd: Path, output: Path,
        errors: Path | None = None, **environment: str,
    ) -> None:  # fmt: skip
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.environment = environment = {
            "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
            **environment,
        }  # fmt: skip
        self.processes = [
            ForkedScript(
                script, flags, cwd, output, errors, RANK=rank, LOCAL_RANK=rank, **environment
            )
            for rank in map(str, range(count))
        ]

    def poll(self) -> int | None:
        """None while all run or have succeeded but not all have ended."""
        codes = [process.poll() for process in self.processes]
        failed = [code for code in codes if code]
        return failed[0] if failed else None if None in codes else 0

    def wait(self, limit: float = 1800.0, after_failure: float = 120.0) -> int:
        """The code of the first process that failed, or 0. Others may wait for it forever, so they
        are killed some time after it."""
        end = time.monotonic() + limit
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        code, end = self.poll(), time.monotonic() + after_failure
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()) if code is not None else 0)
            process.kill()
            process.join()
        if code is None:
            raise subprocess.TimeoutExpired(self.processes[0].script, limit)
        return code

    def terminate(self) -> None:
        """SIGTERM to all, as torchrun does when it gets one."""
        for process in self.processes:
            process.terminate()


def run_forked(
    script: str | Path, *flags: str | Path, cwd: Path, processes: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """As `conftest.run_script`, in a fork, or in several that share the run."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("out", "err")]
        if processes:
            process = ForkedRanks(processes, script, flags, cwd, *outputs, **environment)
        else:
            process = ForkedScript(script, flags, cwd, *outputs, **environment)
        code = process.wait()
        printed = [path.read_text() for path in outputs]
    return subprocess.CompletedProcess([str(script), *map(str, flags)], code, *printed)

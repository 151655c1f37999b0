"""Scripts that start quickly, for tests that start one script many times.

A process that has imported torch and transformers waits, and each script runs in a fork of it, as
`python SCRIPT FLAGS` would. It can be killed like any process, and spends no seconds on imports.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["forked", "openai", "token_level", "sequence_level"])


class ForkedScript(FORKS.Process):
    """A running script, with the methods of `subprocess.Popen` that the tests use."""

    def __init__(
        self, script: str, flags: Sequence[str | Path], cwd: Path, output: Path, **environment: str
    ) -> None:
        """Start it in `cwd`; `output` gets what it prints, errors included."""
        super().__init__()
        self.script, self.flags, self.cwd, self.output = script, [*map(str, flags)], cwd, output
        self.environment = environment
        # Python 3.11 does not give the waiting process this one's sys.path.
        with mock.patch.dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}"):
            multiprocessing.forkserver.ensure_running()
        self.start()

    def run(self) -> None:
        os.chdir(self.cwd)
        os.environ.update(self.environment)
        descriptor = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        sys.stdout.reconfigure(line_buffering=True)
        sys.argv = [self.script, *self.flags]
        runpy.run_path(str(ROOT / self.script), run_name="__main__")

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self) -> int:
        self.join()
        return self.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

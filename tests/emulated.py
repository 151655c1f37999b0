"""Scripts on an emulated CUDA device, each in a fork of one process that has imported torch there.

The emulation lies beside the repository, in shared/; it has to be imported before torch.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import threading
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EMULATION = ROOT.parent / "shared" / "emulated_cuda"


class Emulation:
    """The process that waits, and its forks."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        paths = [str(EMULATION), str(ROOT), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip

    def run(self, *command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        """As `python COMMAND` in `cwd`."""
        outputs = [self.directory / name for name in ("out", "err")]
        job = {"command": [*map(str, command)], "cwd": str(cwd), "outputs": [*map(str, outputs)]}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        limit = threading.Timer(1800, self.process.kill)  # of a run that hangs
        limit.start()
        code = int(self.process.stdout.readline())
        limit.cancel()
        return subprocess.CompletedProcess(command, code, *(o.read_text() for o in outputs))

    def close(self) -> None:
        self.process.communicate()


def work(command: list[str], cwd: str, outputs: list[str]) -> None:
    """What the fork does."""
    os.chdir(cwd)
    for stream, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    code = 1
    try:
        sys.argv = command
        common.draw_curves = lambda *_: None
        runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the emulated device's thread may still be at work


def main() -> None:
    for line in sys.stdin:
        if not (pid := os.fork()):
            work(**json.loads(line))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    import emulated_cuda  # noqa: F401  (before torch)

    import common
    import cross_tokenizer  # noqa: F401
    import on_policy  # noqa: F401

    main()

"""Run a command as a person would, with a limit, and leave nothing of it behind."""

import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, Popen

ROOT = Path(__file__).parents[1]
COMMAND = str(Path(sys.executable).with_name("lightning-localsgd"))
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@dataclass
class Finished:
    """How a command ended, and all that it and its processes printed."""

    code: int
    output: str


def run(*command: object, cwd: Path = ROOT, timeout: float = 240) -> Finished:
    """Run ``command`` in ``cwd``; after ``timeout`` seconds kill its processes and raise ``TimeoutExpired``."""
    process = Popen(
        [str(word) for word in command],
        cwd=cwd,
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": "120"},
        start_new_session=True,  # a process group of its own, with the ranks that Lightning starts
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return Finished(process.returncode, output)


def ok(*command: object, **options: object) -> str:
    """Run ``command``, see it succeed, and return what it printed."""
    finished = run(*command, **options)
    assert finished.code == 0, finished.output
    return finished.output

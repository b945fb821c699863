"""Run a function on several real Gloo workers and bring each rank's value back."""

import faulthandler
import multiprocessing as mp
import os
import pickle
import signal
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

_CONTEXT = mp.get_context("forkserver")  # starts as fast as a fork, from a process that has done nothing but imports
_CONTEXT.set_forkserver_preload(["lightning.pytorch", "torchmetrics", "lightning_localsgd", "tests.models", "pytest"])


class WorkerError(AssertionError):
    """Raised in the parent when a worker raised or died; names the ranks and carries their tracebacks."""

    def __init__(self, errors: dict[int, str]) -> None:
        self.errors = errors
        super().__init__("\n".join(f"--- rank {rank} ---\n{error}" for rank, error in sorted(errors.items())))


@dataclass
class Raised:
    """What a rank raised, from `run_workers(..., catch=True)`."""

    type: str
    message: str


def run_workers(
    function: Callable[..., Any], size: int, *args: Any, timeout: float = 120, catch: bool = False
) -> list[Any]:
    """Call ``function(*args)`` in ``size`` processes and return each rank's value.

    The processes know each other as Lightning's own launcher would tell them (rank, address, port), so that
    ``Trainer(devices=size)`` joins them. None of them outlives the call.

    Args:
        function: importable, called in each process.
        size: number of processes.
        args: passed on; must pickle.
        timeout: seconds until all are killed and ``TimeoutError`` is raised, which names the ranks that hung.
        catch: return :class:`Raised` for a rank that raised, and wait for the others, instead of raising
            :class:`WorkerError` soon after.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes: dict[int, Connection] = {}
    processes = []
    for rank in range(size):
        pipes[rank], there = _CONTEXT.Pipe(duplex=False)
        filters = list(warnings.filters)
        process = _CONTEXT.Process(target=_work, args=(there, rank, port, filters, timeout, function, args))
        process.start()
        there.close()
        processes.append(process)
    try:
        values, errors = _collect(pipes, timeout, grace=timeout if catch else 10)
    finally:
        for process in processes:
            process.join(timeout=5)
            with suppress(ProcessLookupError):  # also loader processes that a killed worker has left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
    hung = [rank for rank in range(size) if rank not in values and rank not in errors]
    if errors and not catch:
        raise WorkerError({rank: text for rank, (_, text) in errors.items()} | dict.fromkeys(hung, "killed"))
    if hung:
        raise TimeoutError(
            f"ranks {hung} had not ended after {timeout} s; the others: {values or None} {errors or None}"
        )
    return [values[rank] if rank in values else errors[rank][0] for rank in range(size)]


def as_node(devices: int) -> None:
    """In one of these processes: let it be a device of a node that has so many of them."""
    process = int(os.environ["PROCESS"])
    os.environ.update(NODE_RANK=str(process // devices), LOCAL_RANK=str(process % devices))


def _collect(
    pipes: dict[int, Connection], timeout: float, grace: float
) -> tuple[dict[int, Any], dict[int, tuple[Raised, str]]]:
    values: dict[int, Any] = {}
    errors: dict[int, tuple[Raised, str]] = {}
    deadline = time.monotonic() + timeout
    waiting = dict(pipes)
    while waiting and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(list(waiting.values()), timeout=left):
            rank = next(rank for rank, other in waiting.items() if other is pipe)
            del waiting[rank]
            try:
                fine, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                errors[rank] = Raised("died", "without a word"), "died without a word"
                continue
            if fine:
                values[rank] = value
            else:
                errors[rank] = value
                deadline = min(deadline, time.monotonic() + grace)
    return values, errors


def _work(
    pipe: Connection, rank: int, port: int, filters: list[Any], timeout: float, function: Callable[..., Any], args: Any
) -> None:
    os.setpgid(0, 0)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        PROCESS=str(rank),
        LOCAL_RANK=str(rank),
        NODE_RANK="0",
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",  # else Lightning sets as many threads as there are cores for each process
    )
    torch.set_num_threads(1)
    # Processes that load data start as Linux starts them, at once, and end with a worker that is killed.
    mp.set_start_method("fork", force=True)
    faulthandler.dump_traceback_later(max(timeout - 2, 1))
    warnings.filters[:] = filters  # type: ignore[index]
    try:
        value = (True, function(*args))
    except BaseException as error:
        # A rank that raises must not take the others down with it before they have said what they saw.
        value = (False, (Raised(type(error).__name__, str(error)), traceback.format_exc()))
    with suppress(BrokenPipeError):
        pipe.send_bytes(pickle.dumps(value))  # by value: `send` would pass tensors in memory that ends with us
    pipe.close()
    os._exit(0)

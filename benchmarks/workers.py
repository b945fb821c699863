"""Start processes that Lightning takes for the ranks of one job, talk to them by pipes, and end them."""

import logging
import multiprocessing as mp
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

os.environ.update(TORCH_CPP_LOG_LEVEL="ERROR", KINETO_LOG_LEVEL="9")  # not what torch tells its developers
_CONTEXT = mp.get_context("forkserver")  # a fresh process in milliseconds: the imports are done once
_CONTEXT.set_forkserver_preload(["lightning.pytorch", "torchmetrics", "lightning_localsgd"])

QUIET: dict[str, Any] = {  # for a Trainer that only trains
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@contextmanager
def workers(
    size: int, function: Callable[..., None], *args: Any, job: Callable[..., Any] | None = None
) -> Iterator[list[Connection]]:
    """Run ``function(pipe, rank, *args)`` in ``size`` processes of one thread each; yield the pipes to them.

    Args:
        size: number of processes.
        function: importable.
        args: passed on; must pickle.
        job: called as ``job(rank)`` first of all in each process; by default :func:`same_host`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here, processes = [], []
    try:
        for rank in range(size):
            pipe, there = _CONTEXT.Pipe()
            process = _CONTEXT.Process(
                target=_work, args=(there, rank, port, job or same_host, function, args), daemon=True
            )
            process.start()
            there.close()
            here.append(pipe)
            processes.append(process)
        yield here
        for process in processes:
            process.join(timeout=30)
    finally:
        for process in processes:
            process.kill()
            process.join()


def ask(pipes: list[Connection], message: Any, timeout: float = 120) -> list[Any]:
    """Send ``message`` to all, and return what each sends back."""
    for pipe in pipes:
        pipe.send(message)
    return listen(pipes, timeout)


def listen(pipes: list[Connection], timeout: float = 120) -> list[Any]:
    """Return the next word of each process."""
    for rank, pipe in enumerate(pipes):
        if not pipe.poll(timeout):
            raise TimeoutError(f"rank {rank} has said nothing for {timeout:.0f} s")
    return [pipe.recv() for pipe in pipes]


def same_host(rank: int) -> None:
    """Rank ``rank`` of a job on this host, on a core of its own as long as there are enough."""
    os.environ.update(MASTER_ADDR="127.0.0.1", LOCAL_RANK=str(rank), NODE_RANK="0", GLOO_SOCKET_IFNAME="lo")
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})


def _work(
    pipe: Connection,
    rank: int,
    port: int,
    job: Callable[..., Any],
    function: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    os.environ["MASTER_PORT"] = str(port)
    job(rank)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    function(pipe, rank, *args)

"""WHEN the scheduler interrupts: a handler takes note, and a thread tells the other ranks between headers.

A header carries the signals that a rank has received. But a round can last longer than a scheduler's patience, so each
rank has a thread, too, which writes and reads notes in the rendezvous store, by a connection of its own: nothing is
done in a handler, and neither a step nor a header ever waits for the store, whatever becomes of the network. Who reads
that there is a signal stops before its next batch and says so in a header; what follows is decided there.
"""

import os
import signal
import threading
import time
from contextlib import suppress
from datetime import timedelta
from types import FrameType
from typing import Any
from uuid import uuid4

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store

SIGTERM, REQUEUE = 1, 2  # bits of `Message.signals`
_EVERY = 1.0  # seconds between two looks at the store
_SAME = 60.0  # seconds within which a signal that comes again, or on another rank, is the same one
_CONNECT = timedelta(seconds=30)


class Signals:
    """What this process has received, from the strategy's constructor to the end of its fit.

    On SLURM the handlers are set at once, since a job may be interrupted while it starts; Lightning, which sets its own
    just before training, skips that of SIGUSR1 where there is one, and calls that of SIGTERM after its own.
    """

    def __init__(self) -> None:
        self.listens = True
        self._bits: set[int] = set()  # handlers add, the main thread discards: nothing is lost between
        self._acted: dict[int, float] = {}
        self._before: dict[int, Any] = {}
        if _is_slurm_task() and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                if signal.getsignal(number) in (signal.SIG_DFL, signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._note)

    def receive(self, bits: int) -> None:
        """In a handler: take note."""
        self._bits.add(bits)

    @property
    def pending(self) -> int:
        """The signals that are to be acted on, one bit each."""
        bits = 0
        for bit in tuple(self._bits):
            if time.monotonic() - self._acted.get(bit, -_SAME) < _SAME:
                self._bits.discard(bit)
            else:
                bits |= bit
        return bits

    def acted_on(self, bits: int) -> None:
        """All ranks act on these now."""
        for bit in (SIGTERM, REQUEUE):
            if bits & bit:
                self._acted[bit] = time.monotonic()
                self._bits.discard(bit)

    def has_acted_on(self, bit: int) -> bool:
        """Whether all ranks have acted on it before."""
        return bit in self._acted

    def _note(self, number: int, frame: FrameType | None) -> None:
        before = self._before[number]
        if self.listens:
            self.receive(SIGTERM if number == signal.SIGTERM else REQUEUE)
        elif before is signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def __getstate__(self) -> dict[str, Any]:  # for a process that is spawned, whose handlers are its own
        return {"listens": True, "_bits": set(), "_acted": {}, "_before": {}}


class Board:
    """Where ranks leave word for each other while they train: that a signal has come, or that they have left.

    Args:
        name: of the board; all ranks make it at once.
        rank: this one.
        signals: what this process has received.
    """

    def __init__(self, name: str, rank: int, signals: Signals) -> None:
        self._signals = signals
        store = _get_default_store()
        if rank == 0:  # a store that outlives a restart may hold an older board of this name
            store.set(name, uuid4().hex)
        self._name = f"{name}/{store.get(name).decode()}"
        self._store: Any = store
        while hasattr(self._store, "underlying_store"):
            self._store = self._store.underlying_store
        self._turn = 0  # how many times all ranks have acted on signals
        self._told = -1  # the last turn in which some rank has told of a signal
        self._closed = threading.Event()
        # Not in the thread: in torch 2.6 a store that is made beside another thread's work may end the process
        # (pybind11's issue 5473: its constructor takes it into a common list while it does not hold Python's lock).
        self._own: Any = None
        with suppress(RuntimeError):
            self._own = self._connect()
        self.left = self._own is None  # whether some rank has left with an exception, or taken the store with it
        self._thread = threading.Thread(target=self._serve, name="localsgd board", daemon=True)
        self._thread.start()

    @property
    def tells_of_signals(self) -> bool:
        """Whether some rank has received a signal that is still to be acted on."""
        return self._told == self._turn

    def turn_over(self) -> None:
        """All ranks act on what the board tells of, at the same header."""
        self._turn += 1

    def leave(self) -> None:
        """Tell the others that this rank has left with an exception."""
        self.close()
        with suppress(RuntimeError):  # the store is rank 0's, which may have left before
            self._store.set(f"{self._name}/left", "")

    def close(self) -> None:
        """Look no more."""
        self._closed.set()
        self._thread.join(timeout=_EVERY)  # so that the connection does not go while the main thread makes another one

    def _serve(self) -> None:
        try:
            store, due = self._own, False
            while not (self.left or self._closed.wait(_EVERY)):
                turn = self._turn
                key = f"{self._name}/signal/{turn}"
                if self._signals.pending and due:  # a second time: the next header has not told it meanwhile
                    store.set(key, "")
                due = bool(self._signals.pending)
                if store.check([key]):
                    self._told = turn
                self.left = store.check([f"{self._name}/left"])
        except RuntimeError:  # the store has left with rank 0
            self.left = True

    def _connect(self) -> Any:
        """Return a connection for the thread: one of another thread may be in use for long."""
        if not isinstance(self._store, TCPStore):
            return self._store
        return TCPStore(self._store.host, self._store.port, is_master=False, timeout=_CONNECT)


def _is_slurm_task() -> bool:
    return "SLURM_NTASKS" in os.environ and SLURMEnvironment.job_name() not in ("bash", "interactive")

"""Several hosts on this machine: network namespaces joined by a bridge, each with a link of a given bandwidth.

    with hosts(2) as lab, workers(2, train, job=lab.enter) as pipes:
        lab.shape(100)  # Mbit/s from now on
        ...

Needs Linux, root, `ip` and `tc` (Debian: iproute2). What is set up is named `lsgd<process id>...`, so that runs do not
clash, and is removed at the end, also on failure and on SIGTERM.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from workers import same_host

COUNTERS = Path("/proc/self/net/dev")  # of the host that this process is in; /sys shows the outer one


def missing() -> str | None:
    """Return what this machine lacks for :func:`hosts`, or None."""
    if sys.platform == "linux" and not os.geteuid() and shutil.which("ip") and shutil.which("tc"):
        return None
    return "this needs Linux, root, and `ip` and `tc` (Debian: apt-get install iproute2)"


@dataclass(frozen=True)
class Hosts:
    """Hosts that exist; one worker each, by rank.

    Args:
        names: of the namespaces, and of the bridge's end of each link.
    """

    names: tuple[str, ...]

    def shape(self, mbit: float, rank: int | None = None, burst: str = "256kb") -> None:
        """Give the link of each host, or of that of ``rank``, this bandwidth from now on, in both directions.

        Args:
            mbit: the bandwidth, in Mbit/s.
            rank: of the host, or None for all.
            burst: what may pass at once when nothing has for a while, as `tc` takes it.
        """
        for name in self.names if rank is None else self.names[rank : rank + 1]:
            for place in (f"-n {name} qdisc replace dev eth0", f"qdisc replace dev {name}"):
                _run(f"tc {place} root tbf rate {round(1000 * mbit)}kbit burst {burst} latency 200ms")

    def cut(self, rank: int) -> None:
        """Cut the host of ``rank`` off from the others, as a pulled plug does."""
        _run(f"ip link set {self.names[rank]} down")

    def mend(self, rank: int) -> None:
        """Plug it in again."""
        _run(f"ip link set {self.names[rank]} up")

    def stall(self, rank: int) -> None:
        """Let the link of ``rank`` pass next to nothing, until it is shaped anew."""
        for place in (f"-n {self.names[rank]} qdisc replace dev eth0", f"qdisc replace dev {self.names[rank]}"):
            _run(f"tc {place} root tbf rate 8bit burst 1600 latency 1000s")

    def enter(self, rank: int) -> None:
        """Move this process to the host of ``rank``, for good."""
        same_host(rank)
        os.environ.update(MASTER_ADDR=address(0), LOCAL_RANK="0", NODE_RANK=str(rank), GLOO_SOCKET_IFNAME="eth0")
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self.names[rank]}") as namespace:
            if libc.setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), "setns")


@contextmanager
def hosts(number: int = 2) -> Iterator[Hosts]:
    """That many hosts, 10.77.0.1 and so on, joined by a bridge; their links are not shaped yet.

    Args:
        number: from 1 to 99.

    Raises:
        ValueError: if ``number`` is something else.
    """
    if not 1 <= number <= 99:
        raise ValueError(f"`number` of hosts must be from 1 to 99, got {number!r}.")
    bridge = f"lsgd{os.getpid()}"  # an interface has a name of at most 15 characters
    names = tuple(f"{bridge}-{rank}" for rank in range(number))
    with ExitStack() as undo:
        undo.enter_context(_exit_on_sigterm())
        _run(f"ip link add {bridge} type bridge")
        undo.callback(_run, f"ip link del {bridge}")
        _run(f"ip link set {bridge} up")
        for rank, name in enumerate(names):
            _run(f"ip netns add {name}")
            undo.callback(_run, f"ip netns del {name}")
            _run(f"ip link add {name} type veth peer name eth0 netns {name}")
            undo.callback(_run, f"ip link del {name}")  # else it goes some time after its namespace
            _run(f"ip link set {name} master {bridge} up")
            _run(f"ip -n {name} address add {address(rank)}/24 dev eth0")
            for device in ("lo", "eth0"):
                _run(f"ip -n {name} link set {device} up")
        yield Hosts(names)


def address(rank: int) -> str:
    """Return the address of a host."""
    return f"10.77.0.{rank + 1}"


def sent(counters: str | None = None) -> int:
    """Return the bytes that the host of this process has sent, headers of packets included.

    Args:
        counters: what stands in ``/proc/self/net/dev``; None reads it.
    """
    lines = (COUNTERS.read_text() if counters is None else counters).splitlines()
    line = next(line for line in lines if line.strip().startswith("eth0:"))
    return int(line.split(":")[1].split()[8])


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Within it SIGTERM is an exception, so that what was set up is removed."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(1)

    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True)

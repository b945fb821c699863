"""WHO IS THERE: the start, when the ranks look for each other and nothing of ours is there yet."""

import os
import socket
import struct
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import timedelta
from os import _exit as end_process  # with whatever its threads wait for
from socket import gethostname
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

_SPARE = 5.0  # seconds more than torch needs to give up by itself
_INTERFACE = "GLOO_SOCKET_IFNAME"  # where Gloo looks which one to use
_GET_ADDRESS = 0x8915  # Linux's ioctl SIOCGIFADDR


@contextmanager
def joining(strategy: Any, timeout: timedelta | None) -> Generator[None, None, None]:
    """Within it the ranks look for each other; tell of a start that has failed, who could not find whom.

    torch waits for ever if something else listens at the address and does not answer, where no exception can reach it;
    such a process is ended.

    Args:
        strategy: Lightning's.
        timeout: what torch takes to find the others, and again to hear of all of them.

    Raises:
        RuntimeError: if the others cannot be found.
    """
    environment = strategy.cluster_environment
    if environment is None or environment.world_size() == 1:
        yield
        return
    if strategy.num_nodes > 1 and _INTERFACE not in os.environ:
        name_interface(environment.main_address)
    who = f"Rank {environment.global_rank()} on host {gethostname()}, which starts, cannot join the other workers"
    told = f"{who} at {environment.main_address}:{environment.main_port}"
    watch = None
    if timeout is not None:
        watch = threading.Timer(2 * timeout.total_seconds() + _SPARE, _end, [f"{told}: what listens there is silent."])
        watch.daemon = True
        watch.start()
    try:
        yield
    except (RuntimeError, OSError) as error:  # torch's errors of the store and of sockets are among them
        raise RuntimeError(f"{told}, where all must come within the `timeout` of the strategy: {error}") from error
    finally:
        if watch is not None:
            watch.cancel()


def name_interface(address: str) -> None:
    """See that Gloo does not tell the other hosts to look for this one at its loopback device.

    It tells them the address for which this host's own name stands: on many systems, Debian among them, that is
    127.0.1.1. Then the interface is named to it that leads to ``address``, or the only one that there is.

    Args:
        address: where the ranks meet.
    """
    if address == "localhost" or address.startswith("127.") or not _is_loopback(gethostname()):
        return  # all are on this host, or others find it
    addresses = addresses_of_interfaces()
    if not _is_loopback(address):
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
            probe.connect((address, 9))
            own = probe.getsockname()[0]
            addresses = {name: found for name, found in addresses.items() if found == own}
    if len(addresses) != 1:
        return
    ((name, found),) = addresses.items()
    os.environ[_INTERFACE] = name
    rank_zero_info(
        f"Gloo uses the interface {name} ({found}), since this host's own name, {gethostname()}, stands for a loopback "
        f"address, at which no other host finds it; set `{_INTERFACE}` to choose another one."
    )


def _is_loopback(name: str) -> bool:
    """Return whether a name stands for a loopback address, or for none."""
    try:
        return socket.gethostbyname(name).startswith("127.")
    except OSError:
        return True


def addresses_of_interfaces() -> dict[str, str]:
    """Return the IPv4 address of each interface that has one and leads to other hosts; none but on Linux."""
    try:
        from fcntl import ioctl
    except ImportError:
        return {}
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has none
                answer = ioctl(asked, _GET_ADDRESS, struct.pack("256s", name.encode()))
                found[name] = socket.inet_ntoa(answer[20:24])
    return {name: address for name, address in found.items() if not address.startswith("127.")}


def _end(why: str) -> None:
    print(f"RuntimeError: {why}", file=sys.stderr, flush=True)  # noqa: T201 - there is nobody to raise it
    end_process(1)

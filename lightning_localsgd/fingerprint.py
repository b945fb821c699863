"""WHO may join: workers that speak the same protocol, run the same setting and have the same model, and no others.

Two things are compared before a run sends anything else. What each worker speaks stands in the rendezvous store, where
it is read without a collective, so that a stranger is told from a worker before the first one. Then a digest of each
field travels, of the same size whatever the field; only where two differ, by workers that all know this protocol, is
it said what they are.
"""

import hashlib
import re
import time
from collections.abc import Mapping
from datetime import timedelta
from itertools import chain
from typing import Any

from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import _get_default_store

from lightning_localsgd.header import LEFT, PROTOCOL, Header
from lightning_localsgd.replica import Line, difference, line

MODEL = "model"  # the field whose difference is told tensor by tensor
_KEY = "lightning_localsgd/protocol/"


def greet(rank: int, size: int, timeout: timedelta | None) -> None:
    """See that all ranks speak our protocol, before the first collective of ours.

    Args:
        rank: this process's.
        size: how many there are.
        timeout: how long to wait for the others to say so.

    Raises:
        RuntimeError: on all ranks, if one speaks another version; on the others, if one says nothing in that time.
    """
    if size == 1:
        return
    store, keys = _get_default_store(), [f"{_KEY}{each}" for each in range(size)]
    timeout = timeout or default_pg_timeout
    end, pause = time.monotonic() + timeout.total_seconds(), 0.001
    try:
        store.set(keys[rank], str(PROTOCOL))
        while not store.check(keys):  # unlike `wait` and a collective, not deaf to Ctrl-C
            if time.monotonic() > end:
                silent = [str(each) for each in range(size) if not store.check([keys[each]])]
                break
            time.sleep(pause)
            pause = min(2 * pause, 0.25)
        else:
            said = store.multi_get(keys)
            silent = []
    except RuntimeError as error:  # the store has left with rank 0
        raise RuntimeError(f"Rank {rank}, which joins the run, cannot go on, because {LEFT}.") from error
    if silent:
        raise RuntimeError(
            f"Rank {rank}, which joins the run, cannot go on, because within the `timeout` of the strategy ({timeout}) "
            f"rank {', '.join(silent)} has not said that it is a worker of `LocalSGDStrategy`: it may run another "
            "strategy, have ended, or need longer to start."
        )
    for each, spoken in enumerate(said):
        if spoken != said[0]:
            raise RuntimeError(
                "All workers must speak one protocol, that is have one version of lightning_localsgd, and rank "
                f"{each}'s protocol is {spoken.decode()} where rank 0's is {said[0].decode()}."
            )


def compare(header: Header, fields: Mapping[str, Any]) -> None:
    """See that these fields are equal on all ranks, which all call it with fields of the same names.

    Args:
        header: how the ranks hear of each other.
        fields: what must be called the same (see :func:`words`), by name; ``model`` is what :func:`describe` returns.

    Raises:
        RuntimeError: on all ranks alike, with the first rank and field that differ.
    """
    mine = [_digest(name, value) for name, value in fields.items()]
    rows = header.gather_numbers(mine, "joins the run")
    if all(row == rows[0] for row in rows):
        return
    odd = next(rank for rank, row in enumerate(rows) if row != rows[0])
    said = header.gather(list(fields.values()) if header.rank in (0, odd) else [])
    place = next(place for place, (one, other) in enumerate(zip(rows[0], rows[odd], strict=True)) if one != other)
    name, value, other = list(fields)[place], said[odd][place], said[0][place]
    if name == MODEL:
        raise other_model(0, odd, other, value)
    raise RuntimeError(
        f"All workers must run the same setting, and rank {odd}'s `{name}` is {words(value)} where rank 0's is "
        f"{words(other)}."
    )


def describe(module: nn.Module) -> list[Line]:
    """Return a line for each tensor of a module, also for one that could not be averaged."""
    return [line(name, tensor) for name, tensor in chain(module.named_parameters(), module.named_buffers())]


def other_model(one: int, odd: int, lines: list[Line], odd_lines: list[Line]) -> RuntimeError:
    """Return the error that says in what the model of rank ``odd`` differs from that of rank ``one``."""
    return RuntimeError(
        f"All workers must train the same model, and the parameters and buffers of rank {odd} differ from those of "
        f"rank {one}: {difference(lines, odd_lines)}."
    )


def words(value: Any) -> str:
    """Return what a value is called, without the addresses that differ between processes.

    Example:
        >>> words(print), words(object())
        ('<built-in function print>', '<object object>')
    """
    return re.sub(r" at 0x[0-9a-fA-F]+", "", value if isinstance(value, str) else repr(value))


def _digest(name: str, value: Any) -> int:
    return int.from_bytes(hashlib.sha256(f"{name}={words(value)}".encode()).digest()[:8], "big") >> 1

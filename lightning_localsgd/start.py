"""WHO IS THERE: the start, when the ranks look for each other and nothing of ours is there yet."""

import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from os import _exit as end_process  # with whatever its threads wait for
from socket import gethostname
from typing import Any

_SPARE = 5.0  # seconds more than torch needs to give up by itself


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


def _end(why: str) -> None:
    print(f"RuntimeError: {why}", file=sys.stderr, flush=True)  # noqa: T201 - there is nobody to raise it
    end_process(1)

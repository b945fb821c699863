"""torchrun with a range of nodes: one is lost for good, and later another one comes, within one epoch."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress

from tests.elastic import BATCH, PERIOD, SAMPLES
from tests.shell import ROOT
from tests.test_killed import children_of


def agent(folder, port, name):
    """Start torchrun as on a node of its own, with one worker."""
    where = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=9", "--monitor-interval=0.2"]
    meets = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=1", "--local-addr=127.0.0.1"]
    quick = "--rdzv-conf=last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"
    own = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    own["PYTHONPATH"] = str(ROOT)
    with (folder / f"log-{name}").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *where, *meets, quick, "-m", "tests.elastic", str(folder)],
            cwd=ROOT,
            env=os.environ | own,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def turns(folder):
    """Return what each worker of each turn has written, the oldest first: [workers, step, epoch, ids ...] a batch."""
    files = sorted((folder / "ids").glob("*"), key=lambda path: float(path.name.split("-")[0]))
    return [[[int(word) for word in line.split()] for line in file.read_text().splitlines()] for file in files]


def wait(folder, workers, batches):
    """Wait until the newest worker has had so many batches, and is one of so many."""
    deadline = time.monotonic() + 240  # on a machine that does much else
    while True:
        newest = ([turn for turn in turns(folder) if turn] or [[]])[-1]
        if len(newest) >= batches and newest[0][0] == workers:
            return
        assert time.monotonic() < deadline, "\n".join(path.read_text() for path in folder.glob("log-*"))
        time.sleep(0.1)


def kill(process):
    if process.poll() is not None:
        return
    for pid in [process.pid, *children_of(process.pid)]:  # the agent first, which would tell the others
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def test_a_worker_is_lost_for_good_and_another_one_comes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agents = [agent(tmp_path, port, "first")]
    try:
        while agents[0].poll() is None:  # it is where the others meet
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        agents.append(agent(tmp_path, port, "lost"))
        wait(tmp_path, workers=2, batches=10)
        kill(agents[1])
        wait(tmp_path, workers=1, batches=5)
        agents.append(agent(tmp_path, port, "new"))
        wait(tmp_path, workers=2, batches=1)
        codes = [agents[0].wait(120), agents[2].wait(120)]
    finally:
        for one in agents:
            kill(one)
    printed = "\n".join(path.read_text() for path in tmp_path.glob("log-*"))
    assert codes == [0, 0], printed
    found = turns(tmp_path)
    batches = [batch for turn in found for batch in turn]
    assert [workers for workers, _ in itertools.groupby(batch[0] for batch in batches)] == [2, 1, 2], printed
    ids = Counter(one for _, _, _, *ids in batches for one in ids)
    assert ids.keys() == set(range(SAMPLES))
    assert ids.total() - SAMPLES <= len(found) * BATCH * PERIOD
    assert max(batch[1] for batch in batches) < SAMPLES / BATCH  # steps go on counting

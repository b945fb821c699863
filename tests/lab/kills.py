"""Workers that are killed at random moments under torchrun, which starts all of them anew: does each run end the same?

    sudo python -m tests.lab.kills --runs 60

Each run is `torchrun --max-restarts` on two hosts. Digits for four epochs, a checkpoint every five steps; at a random
moment one worker gets SIGKILL. After the restart all go on from the newest checkpoint, and in the end all weights must
be those of the run in which nobody was killed, bit for bit.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.lab.cluster import Cluster, address, cluster, missing
from tests.lab.preemption import ENV, PERIODS, undisturbed

# torch lets the attempts share a store, where one that was killed while it joined has left its address to the next.
OWN = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def kill(lab: Cluster, seed: int, folder: Path, first: int = 0) -> str:
    """Run once on two hosts from ``first`` on, kill a worker, and see that the run ends well; say how it went."""
    chance = random.Random(seed)
    period, rank, after = chance.choice(PERIODS), chance.randrange(2), chance.uniform(0, 6)
    tail = [sys.executable, "-m", "tests.lab.restarted", folder, period]
    logs = [(folder / f"log-{node}").open("w") for node in range(2)]
    where = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--monitor-interval=0.2"]
    meets = [f"--rdzv-endpoint={address(first)}:29400", f"--rdzv-id={seed}"]
    agents = []
    for node in range(2):
        host = lab.hosts[first + node]
        here = [f"--local-addr={address(first + node)}", "--no-python", *tail]
        command = [sys.executable, "-m", "torch.distributed.run", *where, *meets, *here]
        agents.append(host.start(*command, env=ENV | OWN, stdout=logs[node], stderr=logs[node]))
    try:
        deadline = time.monotonic() + 60
        while not (folder / f"pid-0-{rank}").exists():
            assert time.monotonic() < deadline, (folder / "log-0").read_text()
            time.sleep(0.05)
        time.sleep(after)
        with suppress(ProcessLookupError):
            os.kill(int((folder / f"pid-0-{rank}").read_text()), signal.SIGKILL)
        codes = [agent.wait(150) for agent in agents]
    finally:
        for agent, log in zip(agents, logs, strict=True):
            agent.terminate()
            log.close()
    turns = max(len(list(folder.glob(f"pid-*-{one}"))) for one in range(2)) - 1
    told = f"seed {seed}, period {period}, rank {rank} after {after:.1f} s, restarts: {turns}"
    printed = "\n".join(Path(log.name).read_text() for log in logs)
    assert codes == [0, 0], f"{told}: {codes}: {printed}"
    for one in range(2):
        assert (folder / f"digest-{one}").read_text() == undisturbed(period), f"other weights: {told}: {printed}"
    assert "does not go on exactly" not in printed, f"{told}: {printed}"
    return told


def main() -> None:
    """Run as many as are asked for."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=60)
    options.add_argument("--seed", type=int, default=0, help="of the first run")
    args = options.parse_args()
    if why := missing():
        sys.exit(f"skipped: {why}")
    start, restarts = time.monotonic(), 0
    with cluster(2, nodes=0) as lab:
        for seed in range(args.seed, args.seed + args.runs):
            folder = Path(tempfile.mkdtemp(prefix="lsgd-kills-"))
            told = kill(lab, seed, folder)
            restarts += int(told.rsplit(" ", 1)[1])
            print(told, flush=True)  # noqa: T201
            shutil.rmtree(folder)
    seconds = time.monotonic() - start
    print(f"{args.runs} of {args.runs} runs, restarted {restarts} times, ended the same; {seconds:.0f} s")  # noqa: T201


if __name__ == "__main__":
    main()

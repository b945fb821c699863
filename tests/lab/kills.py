"""Workers that are killed at random moments under torchrun, which starts all of them anew: does each run end the same?

    sudo python -m tests.lab.kills --runs 60

Each run is `torchrun --max-restarts` on two hosts. Digits for four epochs of 19 steps, a checkpoint every five; at a
random moment one worker gets SIGKILL: one time in five while it starts, else in or after a step, but for the last one.
After the restart all go on from the newest checkpoint, and in the end all weights must be those of the run in which
nobody was killed, bit for bit. (Once a worker has ended well, torchrun starts nobody again, but waits for it.)
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import Queue

from tests.lab.cluster import Cluster, address, cluster, missing
from tests.lab.preemption import ENV, PERIODS, undisturbed

# torch lets the attempts share a store, where one that was killed while it joined has left its address to the next.
OWN = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def kill(lab: Cluster, seed: int, folder: Path, first: int = 0) -> str:
    """Run once on two hosts from ``first`` on, kill a worker, and see that the run ends well; say how it went."""
    chance = random.Random(seed)
    period, rank = chance.choice(PERIODS), chance.randrange(2)
    step = chance.choice([None, *4 * [chance.randrange(74)]])  # the one that has ended; None in the start
    after = chance.uniform(0, 1.5 if step is None else 0.04)
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
        deadline, taken = time.monotonic() + 60, folder / f"step-0-{rank}"
        while not (folder / f"pid-0-{rank}").exists() or (step is not None and _number(taken) < step):
            assert time.monotonic() < deadline, (folder / "log-0").read_text()
            time.sleep(0.001)
        time.sleep(after)
        with suppress(ProcessLookupError):
            os.kill(int((folder / f"pid-0-{rank}").read_text()), signal.SIGKILL)
        codes = [agent.wait(150) for agent in agents]
    finally:
        for agent, log in zip(agents, logs, strict=True):
            agent.terminate()
            log.close()
    turns = max(len(list(folder.glob(f"pid-*-{one}"))) for one in range(2)) - 1
    when = "the start" if step is None else f"step {step}"
    told = f"seed {seed}, period {period}, rank {rank} {after:.3f} s after {when}, restarts: {turns}"
    printed = "\n".join(Path(log.name).read_text() for log in logs)
    assert codes == [0, 0], f"{told}: {codes}: {printed}"
    for one in range(2):
        assert (folder / f"digest-{one}").read_text() == undisturbed(period), f"other weights: {told}: {printed}"
    assert "does not go on exactly" not in printed, f"{told}: {printed}"
    return told


def _number(path: Path) -> int:
    """Return the steps that a worker has told."""
    written = path.read_text() if path.exists() else ""
    return int(written) if written else -1


def main() -> None:
    """Run as many as are asked for."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=60)
    options.add_argument("--seed", type=int, default=0, help="of the first run")
    options.add_argument("--at-once", type=int, default=2)
    args = options.parse_args()
    if why := missing():
        sys.exit(f"skipped: {why}")
    start, restarts = time.monotonic(), 0
    firsts: Queue[int] = Queue()  # hosts of pairs that are free
    for pair in range(args.at_once):
        firsts.put(2 * pair)

    def one(seed: int) -> str:
        folder, first = Path(tempfile.mkdtemp(prefix="lsgd-kills-")), firsts.get()
        told = kill(lab, seed, folder, first)
        firsts.put(first)
        shutil.rmtree(folder)
        return told

    with cluster(2 * args.at_once, nodes=0) as lab, ThreadPoolExecutor(args.at_once) as pool:
        for told in pool.map(one, range(args.seed, args.seed + args.runs)):
            restarts += int(told.rsplit(" ", 1)[1])
            print(told, flush=True)  # noqa: T201
    seconds = time.monotonic() - start
    print(f"{args.runs} of {args.runs} runs, restarted {restarts} times, ended the same; {seconds:.0f} s")  # noqa: T201


if __name__ == "__main__":
    main()

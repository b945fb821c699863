"""What an average costs, on a model of 200 MB: memory, number of collectives, and time.

    python benchmarks/average.py

Every number is measured in a `Trainer.fit` with real worker processes:

1. Extra memory: how far the resident memory of a process rises in an average (the kernel's high-water mark), against
   the aim of one bucket + 5 % of the model, for buckets of 16 and 64 MiB.
2. Collectives of a round of 4 steps, seen by the profiler, against the aim of one header + ceil(bytes / bucket)
   all-reduces for each dtype, for 4 and for 2,000 tensors.
3. Time for 2,000 small tensors against 4 tensors of the same total size, taking turns; the aim is at most 2 times.
4. Time against bare `all_reduce` calls on the same bytes in the same buckets, taking turns, with 2 and with 4 workers.
5. The look for elements that are not finite, on 20M parameters in 150 tensors: its time, and what an average takes with
   it and without it, taking turns; the aim is at most 2 % more. (What it finds saves a look in the average.)

Needs: Linux for the memory, 4 GB for 4 workers; about 4 minutes (`--quick`: one). With fewer cores than workers they
disturb one another, in the bare `all_reduce` as well.
"""

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from workers import QUIET, listen, workers

from lightning_localsgd import LocalSGDStrategy, Mean
from lightning_localsgd.finite import Finding
from lightning_localsgd.replica import Replica

MIB, LONG = 2**20, 10**9
FEW, MANY = 4, 2000  # tensors
Action = Callable[[LocalSGDStrategy, int], None]


class Large(LightningModule):
    """``megabytes`` of float32 in ``tensors`` tensors, and buffers of two other dtypes; trains one number."""

    def __init__(self, megabytes: int, tensors: int) -> None:
        super().__init__()
        size = megabytes * 10**6 // 4 // tensors
        self.weights = nn.ParameterList(torch.randn(size) for _ in range(tensors))
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("moments", torch.zeros(1000, dtype=torch.float64))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.scale - batch.mean()) ** 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.scale], lr=0.1)


class AfterStep(Callback):
    """Calls ``action(strategy, step)`` after every step."""

    def __init__(self, action: Action) -> None:
        self.action = action

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self.action(trainer.strategy, trainer.global_step)


def fit(model: Large, size: int, bucket_mb: float, action: Action, steps: int, period: int = LONG) -> None:
    strategy = LocalSGDStrategy(period, mean=Mean(bucket_mb=bucket_mb))
    trainer = Trainer(strategy=strategy, devices=size, max_steps=steps, callbacks=AfterStep(action), **QUIET)
    trainer.fit(model, DataLoader(torch.randn(size * steps, 1)))


def memory(pipe: Connection, rank: int, megabytes: int, bucket_mb: float) -> None:
    """Tell the bytes by which resident memory rose in each of a few averages."""
    rises = []

    def action(strategy: LocalSGDStrategy, step: int) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
        before = _status("VmRSS")
        strategy.synchronize()
        rises.append(_status("VmHWM") - before)

    fit(Large(megabytes, 100), 2, bucket_mb, action, steps=4)
    pipe.send(rises)


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def collectives(pipe: Connection, rank: int, megabytes: int, tensors: int, bucket_mb: float) -> None:
    """Tell how many collectives of each kind a round of 4 steps has, and how many there should be."""
    model = Large(megabytes, tensors)
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def action(strategy: LocalSGDStrategy, step: int) -> None:
        if step == 4:
            profile.start()
        if step == 8:
            profile.stop()

    fit(model, 2, bucket_mb, action, steps=8, period=4)
    seen = Counter(event.name for event in profile.events() if event.name.startswith("gloo:"))
    sizes: Counter[torch.dtype] = Counter()
    for tensor in (*model.parameters(), *model.buffers()):
        sizes[tensor.dtype] += tensor.nbytes
    due = sum(math.ceil(size / (bucket_mb * MIB)) for size in sizes.values())
    pipe.send((dict(seen), {"gloo:all_gather": 1, "gloo:all_reduce": due}))


def times(pipe: Connection, rank: int, megabytes: int, size: int, repeats: int) -> None:
    """Tell the seconds of averages of many tensors, of few, and of bare all-reduces beside each."""
    bucket_mb = Mean().bucket_mb
    buckets = torch.full((megabytes * 10**6 // 4,), 0.0).split(int(bucket_mb * MIB) // 4)
    models = {tensors: Large(megabytes, tensors) for tensors in (MANY, FEW)}
    turns = []

    def bare() -> None:
        for bucket in buckets:
            dist.all_reduce(bucket)

    def action(strategy: LocalSGDStrategy, step: int) -> None:
        turn.append((_seconds(strategy.synchronize), _seconds(bare)))

    for _ in range(repeats):
        for tensors, model in models.items():
            turn: list[tuple[float, float]] = []
            fit(model, size, bucket_mb, action, steps=4)
            turns += [(tensors, *times) for times in turn[1:]]  # the first one warms up
    pipe.send(turns)


def look(pipe: Connection, rank: int, repeats: int) -> None:
    """Tell the seconds of a look for elements that are not finite, and of averages with and without it."""
    turns = []

    def action(strategy: LocalSGDStrategy, step: int) -> None:
        worker = strategy.worker
        alone = _seconds(worker.replica.examine)
        both = []
        for examine in (Replica.examine, lambda _: Finding(0, modest=False)):
            with mock.patch.object(Replica, "examine", examine):
                worker.stepped = True
                both.append(_seconds(strategy.synchronize))
        turns.append((alone, *both))

    fit(Large(80, 150), 2, Mean().bucket_mb, action, steps=8 * repeats)
    pipe.send(turns[1:])


def _seconds(action: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200, help="of the model, in 10^6 bytes")
    parser.add_argument("--repeats", type=int, default=5, help="fits of each model, with 3 timed averages in each")
    parser.add_argument("--quick", action="store_true", help="1 fit of each model, and 2 workers only")
    args = parser.parse_args()
    repeats = 1 if args.quick else args.repeats
    mb = args.megabytes
    print(f"a model of {mb} MB (10^6 bytes); buckets in MiB (2^20 bytes)")

    for bucket_mb in (16, 64):
        with workers(2, memory, mb, bucket_mb) as pipes:
            rises = listen(pipes)
        allowed = bucket_mb * MIB + 0.05 * mb * 10**6
        print(
            f"memory, bucket of {bucket_mb} MiB: an average takes at most {max(map(max, rises)) / MIB:.1f} MiB "
            f"(aim: {allowed / MIB:.1f}); first average {max(rise[0] for rise in rises) / MIB:.1f}, "
            f"later ones {max(max(rise[1:]) for rise in rises) / MIB:.1f}",
            flush=True,
        )

    for tensors in (FEW, MANY):
        with workers(2, collectives, mb, tensors, 16) as pipes:
            seen, due = listen(pipes)[0]
        print(f"collectives of a round of 4 steps, {tensors} tensors, 16 MiB: {seen} (aim: {due})", flush=True)

    for size in (2,) if args.quick else (2, 4):
        with workers(size, times, mb, size, repeats) as pipes:
            turns = listen(pipes, timeout=500)[0]
        seconds = {tensors: median(ours for count, ours, _ in turns if count == tensors) for tensors in (FEW, MANY)}
        bare = median(bare for _, _, bare in turns)
        print(
            f"time, {size} workers, {len(turns)} averages: {FEW} tensors {seconds[FEW]:.3f} s, "
            f"{MANY} tensors {seconds[MANY]:.3f} s, ratio {seconds[MANY] / seconds[FEW]:.2f} (aim: 2); "
            f"bare all_reduce {bare:.3f} s, ratio of {FEW} tensors to it {seconds[FEW] / bare:.2f}",
            flush=True,
        )

    with workers(2, look, repeats) as pipes:
        turns = listen(pipes, timeout=500)[0]
    alone, with_look, without = (median(turn[i] for turn in turns) for i in range(3))
    print(
        f"look for elements that are not finite, 20M parameters, 2 workers, {len(turns)} averages: alone "
        f"{1000 * alone:.1f} ms, average with it {1000 * with_look:.0f} ms, without it {1000 * without:.0f} ms: "
        f"{100 * (with_look / without - 1):+.1f} % (aim: +2 %)"
    )


if __name__ == "__main__":
    main()

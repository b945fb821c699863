"""How close averages come to what the links can carry, by wire, and what of them training feels, by delay.

    sudo python benchmarks/network.py

Hosts are network namespaces joined by a bridge, with the bandwidth of each link shaped by the kernel (`tbf`, both
directions); one worker of one thread a host. All that is compared takes turns in one run; medians count.

1. One blocking average of a model of 20 MB in 50 tensors, with 2 and with 4 workers, at 10, 100 and 1000 Mbit/s.
   *Time* is relative to plain TCP streams in Python between the same hosts, each sending the next one as many bytes as
   the theory says that a worker sends, 2 (N - 1) / N of the model in the wire's bits and scales, in both directions of
   each link at once. *Bytes* that a host sends, by the kernel's counter, are relative to a bare `all_reduce` of the
   same payload (float32, and 16 bits), and to those of float32. Replicas must be equal bit for bit afterwards.
2. Training with rounds of 32 steps, of a model whose blocking average in float32 takes 20 to 30 local steps at
   100 Mbit/s: speed as a share of the ceiling (the same run, two workers at once, without averages), for DDP and for
   each wire, blocking and with a delay of 31 steps; CPU time of a worker, threads of Gloo included, beside the
   ceiling's, which other jobs on the machine disturb less; and the bytes that a host sends for a step.

Prints tables, which `docs/performance.md` shows, and writes the picture `docs/network.png`.

Needs: Linux, root, `ip` and `tc` (Debian: iproute2), scikit-learn, matplotlib; a core for each worker, and where Gloo's
threads have none of their own they take from the steps; about 20 minutes (`--quick`: one, and no picture).
"""

import argparse
import os
import random
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, get_args

import torch
import torch.distributed as dist
from hosts import address, hosts, missing, sent
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from slow_link import Digits
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from workers import QUIET, ask, workers

from lightning_localsgd import AtEnd, LocalSGDStrategy, Mean
from lightning_localsgd.anchor import Anchor
from lightning_localsgd.exchange import Exchange
from lightning_localsgd.links import Links
from lightning_localsgd.mean import Bucket
from lightning_localsgd.wire import FORMATS, WireName

WIRES: tuple[str, ...] = get_args(WireName)
BARE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PERIOD, DELAYS, BATCH = 32, (0, 31), 128
CEILING, DDP = "without averages", "DDP"
PICTURE = Path(__file__).parent.parent / "docs" / "network.png"


class Cost(NamedTuple):
    """Of an average, or of a step."""

    seconds: float
    bytes: float
    cpu: float = 0.0  # seconds of all threads of this process


def bits(wire: str) -> float:
    """Return the bits of an element, with its part of a scale."""
    return 8 * FORMATS[wire].block_bytes / FORMATS[wire].block if wire in FORMATS else 32


def theory(elements: int, size: int, wire: str) -> int:
    """Return the bytes that each of ``size`` workers has to send."""
    return round(2 * (size - 1) / size * elements * bits(wire) / 8)


# ---------------------------------------------------------------------------------------------------------- one average


class Ring:
    """Plain TCP connections, from each host to the next."""

    def __init__(self, rank: int, size: int) -> None:
        port = 29_000
        with socket.create_server((address(rank), port)) as server:
            dist.barrier()
            self.next = socket.create_connection((address((rank + 1) % size), port))
            self.last, _ = server.accept()
        self.memory = bytearray(1 << 20)

    def stream(self, size: int) -> None:
        """Send so many bytes to the next, and receive as many from the last."""
        payload = memoryview(bytes(size))
        sender = threading.Thread(target=self.next.sendall, args=(payload,))
        sender.start()
        left = size
        while left:
            left -= self.last.recv_into(self.memory, min(left, len(self.memory)))
        sender.join()


class Model:
    """A replica of ``megabytes`` in 50 tensors, that has moved away from an anchor, on each worker in another way."""

    def __init__(self, megabytes: float, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        elements = round(megabytes * 1e6 / 4 / 50)
        random_ = torch.Generator().manual_seed(0)
        self.tensors = [0.02 * torch.randn(elements, generator=random_) for _ in range(50)]
        self.anchor = Anchor([(str(place), x, [x]) for place, x in enumerate(self.tensors)])
        random_.manual_seed(rank + 1)
        self.moved = [x + 1e-3 * torch.randn(elements, generator=random_) for x in self.tensors]
        self.flat = torch.cat(self.tensors)
        self.exchanges = {wire: Exchange(Mean(wire=wire), Links(rank, size)) for wire in FORMATS}

    def average(self, wire: str) -> None:
        """Average as a blocking round does, up to the replica's new start."""
        weights = [1] * self.size
        if wire == "float32":
            Mean().average(self.tensors, weights, Links(self.rank, len(weights)), modest=True)
        else:
            self.exchanges[wire].average(self.tensors, self.anchor, weights, 0, then=self._nothing)

    def _nothing(self, bucket: Bucket) -> None:
        """Leave the anchor where it is, so that all averages are of the same numbers."""

    def check(self) -> None:
        """See that all have the same bits, which are near the mean."""
        line = torch.cat(self.tensors)
        sums = torch.stack([line.view(torch.int32).long().sum(), line.view(torch.int32)[::7].long().sum()])
        others = [torch.empty_like(sums) for _ in range(self.size)]
        dist.all_gather(others, sums)
        if not all(other.equal(sums) for other in others):
            raise RuntimeError("The replicas differ after an average.")


def averages(pipe: Connection, rank: int, size: int, megabytes: float) -> None:
    """Do what the parent says, time after time: receives (what, wire), sends the cost."""
    dist.init_process_group("gloo", rank=rank, world_size=size)
    ring, model = Ring(rank, size), Model(megabytes, rank, size)
    while message := pipe.recv():
        what, wire = message
        if what == "average":
            torch._foreach_copy_(model.tensors, model.moved)
        payload = model.flat.to(BARE.get(wire, torch.float32), copy=True) if what == "bare" else None
        actions: dict[str, Callable[[], Any]] = {
            "stream": lambda wire=wire: ring.stream(theory(len(model.flat), size, wire)),
            "bare": lambda payload=payload: dist.all_reduce(payload),
            "average": lambda wire=wire: model.average(wire),
        }
        dist.barrier()
        time.sleep(0.3)  # until the shaper lets a burst pass again, the same for all
        dist.barrier()
        start = time.perf_counter(), sent()
        actions[what]()
        end = time.perf_counter(), sent()
        if what == "average":
            model.check()
        pipe.send(Cost(*(after - before for before, after in zip(start, end, strict=True))))
    dist.destroy_process_group()


def measure_averages(
    size: int, speeds: Sequence[float], wires: Sequence[str], megabytes: float, repeats: dict[float, int]
) -> dict[tuple[float, str, str], list[Cost]]:
    """Return for each speed of the links, each thing to do and wire, what it cost the slowest worker."""
    costs = defaultdict(list)
    turns = [(what, wire) for wire in wires for what in ("stream", "bare", "average")]
    turns = [turn for turn in turns if turn[0] != "bare" or turn[1] in BARE]
    with hosts(size) as lab, workers(size, averages, size, megabytes, job=lab.enter) as pipes:
        lab.shape(1000)
        for turn in turns:
            ask(pipes, turn)  # warms up
        for mbit in speeds:
            lab.shape(mbit)
            for _ in range(repeats[mbit]):
                for what, wire in random.sample(turns, len(turns)):
                    found = ask(pipes, (what, wire), timeout=600)
                    costs[mbit, what, wire].append(Cost(*(max(of) for of in zip(*found, strict=True))))
        for pipe in pipes:
            pipe.send(None)
    return costs


class Row(NamedTuple):
    """Of the table of averages; ratios are medians of ratios in one repeat."""

    seconds: float
    to_stream: float
    bare_to_stream: float | None
    bytes: float
    to_bare: float | None
    to_float32: float


def row(costs: dict[tuple[float, str, str], list[Cost]], mbit: float, wire: str) -> Row:
    ours, stream, bare = (costs.get((mbit, what, wire), []) for what in ("average", "stream", "bare"))
    whole = costs[mbit, "average", "float32"]

    def ratio(ones: Sequence[Cost], others: Sequence[Cost], place: int) -> float | None:
        return median(a[place] / b[place] for a, b in zip(ones, others, strict=True)) if ones and others else None

    return Row(
        median(cost.seconds for cost in ours),
        ratio(ours, stream, 0) or 0.0,
        ratio(bare, stream, 0),
        median(cost.bytes for cost in ours),
        ratio(ours, bare, 1) if bare else None,
        ratio(ours, whole, 1) or 0.0,
    )


def table_of_averages(size: int, costs: dict[tuple[float, str, str], list[Cost]], wires: Sequence[str]) -> str:
    lines = [
        "| workers | Mbit/s | wire | ms | / stream | bare `all_reduce` / stream | MB sent | / bare | / float32 |",
        "|" + "---|" * 9,
    ]
    for mbit in dict.fromkeys(mbit for mbit, _, _ in costs):
        for wire in wires:
            of = row(costs, mbit, wire)
            bare, to_bare = (f"{value:.3f}" if value else "" for value in (of.bare_to_stream, of.to_bare))
            lines.append(
                f"| {size} | {mbit:g} | {wire} | {1000 * of.seconds:.0f} | {of.to_stream:.3f} | {bare} | "
                f"{of.bytes / 1e6:.3f} | {to_bare} | {of.to_float32:.4f} |"
            )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- training


class Stopwatch(Callback):
    """Measures seconds and bytes sent from the end of one step to the end of another."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.start = self.end = (0.0, 0, 0.0)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.first:
            self.start = time.perf_counter(), sent(), time.process_time()
        if trainer.global_step == self.last:
            self.end = time.perf_counter(), sent(), time.process_time()


Way = str | tuple[str, int]  # or wire and delay


def train(pipe: Connection, rank: int) -> None:
    """Train as the parent says, time after time: receives (way, steps), sends the cost of a step."""
    from sklearn.datasets import load_digits  # an extra

    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    while message := pipe.recv():
        way, steps = message
        seed_everything(0, verbose=False)
        if way == DDP:
            strategy, first = DDPStrategy(), 2
        elif way == CEILING:
            strategy, first = LocalSGDStrategy(AtEnd()), PERIOD
        else:
            wire, delay = way
            strategy, first = LocalSGDStrategy(PERIOD, mean=Mean(wire=wire, delay=delay)), PERIOD
            if wire != "float32":
                first *= 2  # all has been allocated
        watch = Stopwatch(first, first + steps)
        trainer = Trainer(
            strategy=strategy,
            devices=1,
            num_nodes=2,
            max_steps=first + steps + 1,
            max_epochs=1,
            use_distributed_sampler=False,
            callbacks=watch,
            **QUIET,
        )
        sampler = RandomSampler(
            data, replacement=True, num_samples=10**7, generator=torch.Generator().manual_seed(rank)
        )
        trainer.fit(Digits(), DataLoader(data, batch_size=BATCH, sampler=sampler))
        pipe.send(Cost(*((after - before) / steps for before, after in zip(watch.start, watch.end, strict=True))))


def measure_training(
    speeds: Sequence[float], ways: Sequence[Way], rounds: int, repeats: dict[float, int]
) -> dict[tuple[float, Way], list[Cost]]:
    """Return for each speed of the links, for each way to train, the cost of a step to the slower worker."""
    costs = defaultdict(list)
    with hosts(2) as lab, workers(2, train, job=lab.enter) as pipes:
        lab.shape(1000)
        ask(pipes, (DDP, 2))  # starts the process group, warms up
        for mbit in speeds:
            lab.shape(mbit)
            for _ in range(repeats[mbit]):
                for way in random.sample(ways, len(ways)):
                    steps = max(4, round(mbit / 10)) if way == DDP else rounds * PERIOD
                    found = ask(pipes, (way, min(steps, rounds * PERIOD)), timeout=600)
                    costs[mbit, way].append(Cost(*(max(of) for of in zip(*found, strict=True))))
        for pipe in pipes:
            pipe.send(None)
    return costs


def share(costs: dict[tuple[float, Way], list[Cost]], mbit: float, way: Way) -> float:
    """Return the speed relative to the ceiling, the median of the repeats."""
    pairs = zip(costs[mbit, CEILING], costs[mbit, way], strict=True)
    return median(ceiling.seconds / cost.seconds for ceiling, cost in pairs)


def table_of_training(costs: dict[tuple[float, Way], list[Cost]], ways: Sequence[Way]) -> str:
    speeds = list(dict.fromkeys(mbit for mbit, _ in costs))
    columns = "".join(
        f" {mbit:g} Mbit/s: ms a step | share of the ceiling | lowest to highest | CPU time / the ceiling's |"
        for mbit in speeds
    )
    lines = [f"| |{columns} MB sent a step |", "|" + "---|" * (4 * len(speeds) + 2)]
    for way in ways:
        name = way if isinstance(way, str) else f"{way[0]}, " + (f"delay {way[1]}" if way[1] else "blocking")
        line = f"| {name} |"
        for mbit in speeds:
            pairs = zip(costs[mbit, CEILING], costs[mbit, way], strict=True)
            shares = [ceiling.seconds / cost.seconds for ceiling, cost in pairs]
            seconds = median(cost.seconds for cost in costs[mbit, way])
            line += f" {1000 * seconds:.1f} | {median(shares):.3f} | {min(shares):.3f} to {max(shares):.3f} |"
            work, least = (median(cost.cpu for cost in costs[mbit, of]) for of in (way, CEILING))
            line += f" {work / least:.3f} |"
        lines.append(f"{line} {median(cost.bytes for cost in costs[speeds[0], way]) / 1e6:.3f} |")
    for mbit in speeds:
        ceiling, whole = (median(c.seconds for c in costs[mbit, way]) for way in (CEILING, ("float32", 0)))
        lines.append(
            f"\n{mbit:g} Mbit/s: a blocking average in float32 takes {PERIOD * (whole / ceiling - 1):.1f} steps"
        )
    return "\n".join(lines)


def draw(
    size: int,
    averages_: dict[tuple[float, str, str], list[Cost]],
    training: dict[tuple[float, Way], list[Cost]],
    ways: Sequence[Way],
) -> None:
    import matplotlib.pyplot as plt  # an extra

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 4), layout="constrained", width_ratios=(1, 1.5))
    speeds = sorted({mbit for mbit, _, _ in averages_})
    left.axhline(1, color="lightgray", zorder=0)
    for number, mbit in enumerate(speeds):
        values = [row(averages_, mbit, wire).to_stream for wire in WIRES]
        left.plot(range(len(WIRES)), values, f"C{number}o", label=f"{mbit:g} Mbit/s")
    left.set_xticks(range(len(WIRES)), WIRES, rotation=30)
    left.set_ylim(bottom=0)
    left.set_ylabel("time of an average / of plain TCP streams")
    left.set_title(f"a blocking average of 20 MB, {size} workers", fontsize=10)
    right.axhline(100, color="lightgray", zorder=0)
    speeds = sorted({mbit for mbit, _ in training})
    names = [
        DDP,
        *(f"{wire}\n{delay or 'blocking'}" for wire, delay in (way for way in ways if not isinstance(way, str))),
    ]
    drawn = [way for way in ways if way != CEILING]
    width = 0.8 / len(speeds)
    for number, mbit in enumerate(speeds):
        places = [place + width * (number - (len(speeds) - 1) / 2) for place in range(len(drawn))]
        right.bar(places, [100 * share(training, mbit, way) for way in drawn], width, color=f"C{number}")
    names = [name.replace("\n31", "\ndelay 31") for name in names]
    right.set_xticks(range(len(drawn)), names, rotation=60, fontsize=8)
    right.set_ylabel("speed, % of training without averages")
    right.set_title(f"rounds of {PERIOD} steps, 2 workers, 4.5 MB", fontsize=10)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(speeds), frameon=False)
    figure.savefig(PICTURE, dpi=140)
    print(f"\nwrote {PICTURE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speeds", type=float, nargs="+", default=[100, 1000, 10], help="of the links, in Mbit/s")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4], help="of the averages")
    parser.add_argument("--wires", nargs="+", default=list(WIRES), choices=WIRES, help="float32 is one of them")
    parser.add_argument("--megabytes", type=float, default=20, help="of the averages' model, 10^6 bytes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--repeats-at-10", type=int, default=3, help="where a link has 10 Mbit/s or less")
    parser.add_argument("--only", choices=("averages", "training"), help="and no picture")
    parser.add_argument("--quick", action="store_true", help="100 Mbit/s, 2 workers, 4 MB, 3 wires, once, no picture")
    args = parser.parse_args()
    if lacks := missing():
        print(f"skipped: {lacks}")
        return
    if args.quick:
        args.speeds, args.workers, args.megabytes, args.repeats = [100], [2], 4, 1
        args.wires = ["float32", "bfloat16", "int8"]
    repeats = {mbit: min(args.repeats, args.repeats_at_10) if mbit <= 10 else args.repeats for mbit in args.speeds}
    found = {}
    if args.only != "training":
        for size in args.workers:
            speeds = [mbit for mbit in args.speeds if mbit > 10 or size == 2]
            found[size] = measure_averages(size, speeds, args.wires, args.megabytes, repeats)
            print(f"\n{table_of_averages(size, found[size], args.wires)}", flush=True)
            print(f"\nload average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores", flush=True)
    if args.only == "averages":
        return
    ways: list[Way] = [CEILING, DDP, *((wire, delay) for wire in args.wires for delay in DELAYS)]
    training = measure_training(args.speeds, ways, 1 if args.quick else 3, repeats)
    print(f"\n{table_of_training(training, ways)}\n\nload average {os.getloadavg()[0]:.1f}", flush=True)
    if not args.quick and found:
        draw(args.workers[0], found[args.workers[0]], training, ways)


if __name__ == "__main__":
    main()

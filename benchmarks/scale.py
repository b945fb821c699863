"""What an average costs with more workers: measured for 2 to 16, fitted by an alpha-beta model, predicted for 4,096.

    sudo python benchmarks/scale.py

Hosts are network namespaces joined by a bridge, one worker of one thread each, with links of 50 Mbit/s: so slow that
the links and not the cores, which all share, decide. Measured is a blocking average in float32 as a round takes it, of
four sizes of model, and the header before it (an `all_gather` of a few numbers), in turns; medians count, of the
slowest worker. Gloo sends in a ring. Two numbers, seconds a message and seconds a byte, are fitted to all measurements
of averages by least squares of the relative error:

    ring:  T = alpha 2 (N - 1) + beta 2 (N - 1) / N P        header:  T = alpha (N - 1)

How well they fit is shown for each measurement, and how well the fit to fewer workers than 16 predicts 16. For 64 to
4,096 workers they predict the ring, and two pipelined binary trees (Sanders, Speck, Traeff, Parallel Computing 35,
2009; NCCL has them, Gloo has not), which were not measured here:

    tree:  T = alpha 2 log2 N + beta 2 P

alpha is that of namespaces on one machine; `--latency` adds that of a real link, which the kernel here cannot shape.

Prints tables, which `docs/performance.md` shows, and writes the picture `docs/scale.png`.

Needs: Linux, root, `ip` and `tc` (Debian: iproute2), matplotlib; about 4 minutes (`--quick`: half a one, no picture).
"""

import argparse
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from hosts import hosts, missing
from workers import ask, workers

from lightning_localsgd import Mean
from lightning_localsgd.links import Links

PICTURE = Path(__file__).parent.parent / "docs" / "scale.png"
MANY = (64, 256, 1024, 4096)
HEADER = 0.0  # in place of a size
Times = dict[tuple[int, float], list[float]]  # seconds, by workers and MB


def work(pipe: Connection, rank: int, size: int) -> None:
    """Average as the parent says, time after time: receives MB, sends the seconds of an average."""
    dist.init_process_group("gloo", rank=rank, world_size=size)
    header = torch.zeros(32)
    headers = [torch.empty_like(header) for _ in range(size)]
    while (megabytes := pipe.recv()) is not None:
        tensors = list(torch.full((round(megabytes * 1e6 / 4),), float(rank)).tensor_split(10))
        turns = 20 if megabytes == HEADER else math.ceil(0.5 / megabytes)
        for turn in range(turns + 1):
            if turn <= 1:  # the first one uses up what the shaper has let gather; then many small ones in a row
                dist.barrier()
                start = time.perf_counter()
            if megabytes == HEADER:
                dist.all_gather(headers, header)
            else:
                Mean().average(tensors, [1] * size, Links(rank, size), modest=True)
        seconds = time.perf_counter() - start
        if megabytes and abs(float(tensors[0][0]) - (size - 1) / 2) > 1e-5:
            raise RuntimeError("The mean is wrong.")
        pipe.send(seconds / turns)
    dist.destroy_process_group()


def measure(sizes: Sequence[int], megabytes: Sequence[float], mbit: float, repeats: int) -> Times:
    """Return the seconds of the slowest worker."""
    times = defaultdict(list)
    for size in sizes:
        with hosts(size) as lab, workers(size, work, size, job=lab.enter) as pipes:
            lab.shape(1000)
            ask(pipes, megabytes[0])  # connects
            lab.shape(mbit, burst="32kb")
            for _ in range(repeats):
                for of in random.sample(megabytes, len(megabytes)):
                    times[size, of].append(max(ask(pipes, of, timeout=300)))
            for pipe in pipes:
                pipe.send(None)
    return times


class Fit(NamedTuple):
    """The two numbers of the model.

    Args:
        alpha: seconds a message.
        beta: seconds a byte.
    """

    alpha: float
    beta: float

    def ring(self, size: int, bytes_: float) -> float:
        """Return the seconds of an average."""
        return 2 * (size - 1) * (self.alpha + self.beta * bytes_ / size)

    def header(self, size: int) -> float:
        """Return the seconds of a header."""
        return self.alpha * (size - 1)

    def tree(self, size: int, bytes_: float) -> float:
        """Return the seconds of an average by two pipelined binary trees."""
        return 2 * (self.alpha * math.ceil(math.log2(size)) + self.beta * bytes_)


def fit(seconds: dict[tuple[int, float], float]) -> Fit:
    """Return the numbers, none below 0, with which the squares of the relative errors of averages are the least."""
    places = [(size, megabytes) for size, megabytes in seconds if megabytes != HEADER]
    rows = [[2 * (n - 1) / seconds[n, mb], 2 * (n - 1) / n * mb * 1e6 / seconds[n, mb]] for n, mb in places]
    scaled = torch.tensor(rows, dtype=torch.float64)
    scale = scaled.amax(0)  # the two columns differ by a factor of many thousand
    found = torch.linalg.lstsq(scaled / scale, torch.ones(len(places), 1, dtype=torch.float64)).solution[:, 0] / scale
    if found[0] < 0:  # bytes alone
        found = torch.tensor([0.0, float(scaled[:, 1].sum() / (scaled[:, 1] ** 2).sum())])
    return Fit(*found.tolist())


def errors(of: Fit, seconds: dict[tuple[int, float], float]) -> dict[tuple[int, float], float]:
    """Return by how much the model is off, relative to what was measured."""
    return {
        (size, mb): (of.header(size) if mb == HEADER else of.ring(size, mb * 1e6)) / measured - 1
        for (size, mb), measured in seconds.items()
    }


def table_of_fit(times: Times, of: Fit, mbit: float) -> str:
    seconds = {place: median(values) for place, values in times.items()}
    off = errors(of, seconds)
    lines = ["| workers | model, MB | ms | lowest to highest | fit, ms | fit is off by |", "|" + "---|" * 6]
    for (size, mb), values in sorted(times.items()):
        expected = seconds[size, mb] * (1 + off[size, mb])
        lines.append(
            f"| {size} | {f'{mb:g}' if mb != HEADER else 'header'} | {1000 * seconds[size, mb]:.1f} | "
            f"{1000 * min(values):.1f} to {1000 * max(values):.1f} | {1000 * expected:.1f} | "
            f"{round(100 * off[size, mb]):+d} % |"
        )
    averages = {place: error for place, error in off.items() if place[1] != HEADER}
    most = max(size for size, _ in seconds)
    before = {place: value for place, value in seconds.items() if place[0] < most}
    lines.append(
        f"\nalpha {1000 * of.alpha:.3f} ms a message, beta {1e9 * of.beta:.1f} ns a byte ({8e-6 / of.beta:.1f} Mbit/s, "
        f"of links of {mbit:g}); an average is off by {100 * _rms(averages.values()):.1f} % (root of the mean square), "
        f"{100 * max(map(abs, averages.values())):.1f} % at most"
    )
    if before:
        off = errors(fit(before), {place: value for place, value in seconds.items() if place[0] == most})
        off = {place: error for place, error in off.items() if place[1] != HEADER}
        lines[-1] += (
            f"; fitted without {most} workers, these by {100 * _rms(off.values()):.1f} %, "
            f"{100 * max(map(abs, off.values())):.1f} % at most"
        )
    return "\n".join(lines)


def _rms(values: Collection[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))


def table_of_many(of: Fit, megabytes: Sequence[float], latencies: Sequence[float]) -> str:
    lines = ["| model, MB | ms added to alpha | workers | ring, s | header, s | tree, s |", "|" + "---|" * 6]
    for mb in megabytes:
        for latency in latencies:
            with_latency = Fit(of.alpha + latency / 1000, of.beta)
            for size in MANY:
                costs = with_latency.ring(size, mb * 1e6), with_latency.header(size), with_latency.tree(size, mb * 1e6)
                lines.append(f"| {mb:g} | {latency:g} | {size} | " + " | ".join(f"{cost:.2f}" for cost in costs) + " |")
    return "\n".join(lines)


def draw(times: Times, of: Fit, predicted: Sequence[float], latencies: Sequence[float], mbit: float) -> None:
    import matplotlib.pyplot as plt  # an extra

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 4), layout="constrained")
    sizes = sorted({size for size, _ in times})
    for number, mb in enumerate(sorted({mb for _, mb in times if mb != HEADER}, reverse=True)):
        left.plot(sizes, [median(times[size, mb]) for size in sizes], f"C{number}o", label=f"{mb:g} MB")
        left.plot(sizes, [of.ring(size, mb * 1e6) for size in sizes], f"C{number}-", linewidth=1)
    left.set_title(f"measured, links of {mbit:g} Mbit/s; lines: the fit", fontsize=10)
    many = [2**power for power in range(1, 13)]
    for number, mb in enumerate(predicted):
        for latency, style in zip(latencies, ("-", "--", ":", "-."), strict=False):
            with_latency = Fit(of.alpha + latency / 1000, of.beta)
            curves: tuple[tuple[str, Callable[[int, float], float]], ...] = (
                ("ring", with_latency.ring),
                ("tree", with_latency.tree),
            )
            for place, (name, curve) in enumerate(curves):
                label = f"{name}, {mb:g} MB" + (f", {latency:g} ms more a message" if latency else "")
                values = [curve(size, mb * 1e6) for size in many]
                right.plot(many, values, style, color=f"C{2 * number + place}", linewidth=1.2, label=label)
    right.set_title("predicted", fontsize=10)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("workers")
        axes.set_ylabel("s of an average")
        axes.legend(frameon=False, fontsize=8)
    left.set_xticks(sizes, [str(size) for size in sizes])
    figure.savefig(PICTURE, dpi=140)
    print(f"\nwrote {PICTURE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[0.01, 0.1, 1, 4], help="of the models measured")
    parser.add_argument("--mbit", type=float, default=50, help="of the links, in Mbit/s")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--predict", type=float, nargs="+", default=[4, 400], help="MB of the models predicted")
    parser.add_argument("--latency", type=float, nargs="+", default=[0, 10], help="ms added to each message")
    parser.add_argument("--quick", action="store_true", help="2, 3 and 4 workers, 0.01 and 0.5 MB, once, no picture")
    args = parser.parse_args()
    if lacks := missing():
        print(f"skipped: {lacks}")
        return
    if args.quick:
        args.workers, args.megabytes, args.repeats = [2, 3, 4], [0.01, 0.5], 1
    times = measure(args.workers, [HEADER, *args.megabytes], args.mbit, args.repeats)
    found = fit({place: median(values) for place, values in times.items()})
    print(f"{table_of_fit(times, found, args.mbit)}\n\n{table_of_many(found, args.predict, args.latency)}")
    print(f"\nload average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores", flush=True)
    if not args.quick:
        draw(times, found, args.predict, args.latency, args.mbit)


if __name__ == "__main__":
    main()

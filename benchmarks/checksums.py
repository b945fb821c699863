"""What it costs that checkpoints carry checksums, and that they are verified, in seconds per GB (10^9 bytes).

    python benchmarks/checksums.py [--gb 1] [--tensors 100] [--repeats 5]

Saves tensors as a checkpoint is saved, without and with checksums, and loads them as `torch.load` does and as our
strategy does; the file is in the page cache. Shown: the medians of the repeats, by the clock and by the process's own
CPU time, which other programs on the machine disturb less. Needs: twice the size in memory, once on
the disk of the temporary folder; on quiet cores some seconds.
"""

import argparse
import os
import time
from collections.abc import Callable
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch.serialization import set_crc32_options

from lightning_localsgd.intact import load


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gb", type=float, default=1.0)
    options.add_argument("--tensors", type=int, default=100)
    options.add_argument("--repeats", type=int, default=5)
    args = options.parse_args()
    size = int(args.gb * 1e9 / 4 / args.tensors)
    content = {"state_dict": {f"layer{i}.weight": torch.randn(size) for i in range(args.tensors)}}
    with TemporaryDirectory() as folder:
        path = os.path.join(folder, "file.ckpt")

        def save(checksums: bool) -> None:
            set_crc32_options(checksums)
            torch.save(content, path)

        ways: dict[str, Callable[[], object]] = {
            "save without checksums": lambda: save(False),
            "save": lambda: save(True),
            "load unverified": lambda: torch.load(path, weights_only=True),
            "load": lambda: load(path),
        }
        seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(args.repeats):
            for way, act in ways.items():
                start, cpu = time.perf_counter(), time.process_time()
                act()
                seconds[way].append((time.perf_counter() - start, time.process_time() - cpu))
        size_in_gb = os.path.getsize(path) / 1e9
    print(f"{size_in_gb:.2f} GB, {args.tensors} tensors; seconds per GB by the clock, and of the CPU:")
    for way, taken in seconds.items():
        clock, cpu = (median(column) / args.gb for column in zip(*taken, strict=True))
        print(f"  {way:24}{clock:5.2f} {cpu:5.2f}")


if __name__ == "__main__":
    main()

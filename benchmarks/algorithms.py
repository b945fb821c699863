"""What each algorithm in `configs/algorithms` learns on the digits example, and what it sends.

    sudo python benchmarks/algorithms.py [NAME ...]

Two workers train `configs/digits.yaml` (20 epochs) with each file in turn, from three seeds, in a network namespace of
their own, whose kernel counts the bytes of both. The learning rate and all else are the example's, the same for each:
the table compares the algorithms as they are, not as they could be tuned.

Needs: Linux, root, `ip` and `unshare` (Debian: iproute2, util-linux), scikit-learn; about a quarter of an hour for all.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SEEDS = (0, 1, 2)
CONFIGS = ROOT / "configs" / "algorithms"
MARK = "measured: "


def train(name: str, seed: int) -> None:
    """Train and test; rank 0 prints the accuracy, the number of averages and how many steps there were."""
    from lightning.pytorch.cli import LightningCLI

    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = [f"--trainer.{option}=false" for option in quiet] + ["--trainer.limit_val_batches=0"]
    files = ["--config", str(ROOT / "configs" / "digits.yaml"), "--config", str(CONFIGS / f"{name}.yaml")]
    cli = LightningCLI(args=[*files, f"--seed_everything={seed}", *options], run=False, save_config_callback=None)
    cli.trainer.fit(cli.model, cli.datamodule)
    clock = cli.trainer.strategy._last.clock
    (found,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    if cli.trainer.is_global_zero:
        print(MARK + json.dumps({"accuracy": found["test_accuracy"], "rounds": clock.round, "steps": clock.step}))


def measure(name: str, seed: int) -> dict[str, float]:
    """Run :func:`train` in a namespace; return what it printed, and the bytes that were sent."""
    script = f"ip link set lo up && {sys.executable} {__file__} --train {name} {seed} && ip -s -j link show lo"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "JSONARGPARSE_DEPRECATION_WARNINGS": "off"}
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    lines = done.stdout.splitlines()
    (printed,) = (line.removeprefix(MARK) for line in lines if line.startswith(MARK))
    counters = json.loads(done.stdout[done.stdout.rindex("[{") :])
    return json.loads(printed) | {"bytes": counters[0]["stats64"]["tx"]["bytes"]}


def main(names: list[str]) -> None:
    print("| configuration | test accuracy, mean (lowest to highest) | rounds | MB sent | % of DDP's |")
    print("|---|---|---|---|---|")
    ddp = None
    for name in ["ddp", *(name for name in names if name != "ddp")]:
        runs = [measure(name, seed) for seed in SEEDS]
        accuracies = [100 * run["accuracy"] for run in runs]
        megabytes = statistics.mean(run["bytes"] for run in runs) / 1e6
        ddp = ddp or megabytes
        rounds = statistics.mean(run["rounds"] for run in runs)
        spread = f"{statistics.mean(accuracies):.1f} ({min(accuracies):.1f} to {max(accuracies):.1f})"
        print(f"| `{name}` | {spread} | {rounds:.0f} | {megabytes:.1f} | {100 * megabytes / ddp:.1f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(sys.argv[2], int(sys.argv[3]))
    else:
        main(sys.argv[1:] or sorted(path.stem for path in CONFIGS.glob("*.yaml")))

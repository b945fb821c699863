"""WHERE it runs: versions, machine, devices, network and launcher, as text to paste into an issue."""

import argparse
import os
import platform
import socket
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from lightning_localsgd.start import addresses_of_interfaces

Rows = list[tuple[str, str]]  # of a section: a name, and what is to be said of it

PACKAGES = (
    "lightning-localsgd", "torch", "lightning", "pytorch-lightning", "torchmetrics", "jsonargparse", "numpy",
)  # fmt: skip
# What tells ranks of each other, and what decides on devices and threads. Of all other variables nothing is said: they
# may be secrets.
VARIABLES = (
    "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK",
    "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
    "SLURM_JOB_NAME", "SLURM_NNODES", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NODELIST", "SLURM_NODEID",
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_CPUS_PER_TASK", "SLURM_GPUS_ON_NODE", "SLURM_RESTART_COUNT",
    "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_DEBUG", "TORCH_DISTRIBUTED_DEBUG",
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
)  # fmt: skip
TRAINER = ("strategy", "accelerator", "devices", "num_nodes", "precision")  # what is shown of a configuration
_INTERFACES = Path("/sys/class/net")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print where this runs. Started by ``srun`` or ``torchrun``, one process of each host prints.

    Nothing is sent, and nothing waits. Of the environment only the variables are shown that tell ranks of each other
    or decide on devices and threads; of a configuration only the strategy and on what it runs.

    Args:
        arguments: the words after ``lightning-localsgd env``.

    Example:
        ``lightning-localsgd env --config configs/digits.yaml``
    """
    parser = argparse.ArgumentParser(
        prog="lightning-localsgd env",
        description="Print where this runs, as text to paste into an issue: versions, machine, devices, backends, "
        "network, what a launcher has told, and the strategy of a configuration. Read it before you paste it: it names "
        "hosts. With srun or torchrun, one process of each host prints.",
    )
    parser.add_argument("--config", type=Path, help="a configuration of `lightning-localsgd fit`, as run.yaml")
    options = parser.parse_args(arguments)
    try:
        chosen = strategy_of(options.config) if options.config is not None else None
    except ValueError as error:
        parser.error(str(error))
    if is_first_of_host(os.environ):
        found = sections(os.environ)
        if chosen is not None:
            found[f"configuration {options.config}"] = chosen
        sys.stdout.write(text(found))  # at once, so that the texts of several hosts stay apart
        sys.stdout.flush()


def is_first_of_host(environ: Mapping[str, str]) -> bool:
    """Return whether this process is the only one of its host, or the first, by what a launcher has told it.

    Example:
        >>> [is_first_of_host(told) for told in ({}, {"LOCAL_RANK": "1"}, {"SLURM_LOCALID": "0"})]
        [True, False, True]
    """
    return environ.get("LOCAL_RANK", environ.get("SLURM_LOCALID", "0")) == "0"


def sections(environ: Mapping[str, str]) -> dict[str, Rows]:
    """Return all that is said, by section."""
    return {
        "versions": _versions(),
        "machine": _machine(),
        "devices": _devices(),
        "backends": _backends(),
        "network": [("host", _host()), *interfaces(_INTERFACES, addresses_of_interfaces())],
        "launcher": told(environ),
    }


def text(found: Mapping[str, Rows]) -> str:
    """Write the sections with their rows in columns.

    Example:
        >>> print(text({"machine": [("cpu", "one"), ("memory", "1.0 GiB")], "launcher": []}), end="")
        machine
          cpu     one
          memory  1.0 GiB
        launcher
          none
    """
    lines: list[str] = []
    for title, rows in found.items():
        lines.append(title)
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows or [("none", "")]:
            first, *more = value.splitlines() or [""]
            lines.append(f"  {name:{width}}  {first}".rstrip())
            lines += textwrap.indent("\n".join(more), " " * 6).splitlines()
    return "\n".join(lines) + "\n"


def told(environ: Mapping[str, str]) -> Rows:
    """Return the known variables that are set.

    Example:
        >>> told({"MASTER_ADDR": "n0", "RANK": "1", "PASSWORD": "secret"})
        [('MASTER_ADDR', 'n0'), ('RANK', '1')]
    """
    return [(name, environ[name]) for name in VARIABLES if name in environ]


def strategy_of(config: Path) -> Rows:
    """Return what a configuration says of the strategy, and on what it runs.

    Raises:
        ValueError: if it is no configuration that can be read.
    """
    try:
        read = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"`--config` must be a YAML file that can be read, got {str(config)!r}: {error}") from None
    trainer = read.get("trainer", {}) if isinstance(read, dict) else None
    if not isinstance(trainer, dict):
        raise ValueError(f"`--config` must have a mapping `trainer`, or none, got {str(config)!r}.")
    rows = [(f"trainer.{name}", _as_yaml(trainer[name])) for name in TRAINER if name in trainer]
    return rows if "strategy" in trainer else [("trainer.strategy", "none: this command's default"), *rows]


def _as_yaml(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"\n{yaml.safe_dump(value, sort_keys=False).rstrip()}"
    return str(value)


def _host() -> str:
    """Return this host's name, with the address for which it stands: others look for it there."""
    name = socket.gethostname()
    try:
        return f"{name}, which stands for {socket.gethostbyname(name)}"
    except OSError:
        return f"{name}, which stands for no address"


def interfaces(folder: Path, addresses: Mapping[str, str]) -> Rows:
    """Return the network interfaces by name: whether they are up, how fast where Linux says so, and their address."""
    rows: Rows = []
    for interface in sorted(folder.iterdir()) if folder.is_dir() else []:
        state, speed, mtu = (_first_line(interface / name) for name in ("operstate", "speed", "mtu"))
        if state is None:  # a file beside the interfaces, such as bonding_masters
            continue
        # Loopback and most virtual interfaces have no speed: the kernel refuses to say, or says -1.
        known = f"{speed} Mbit/s" if speed is not None and speed.isdecimal() else "speed unknown"
        at = f", address {addresses[interface.name]}" if interface.name in addresses else ""
        rows.append((interface.name, f"{state}, {known}, MTU {mtu}{at}"))
    return rows


def _first_line(file: Path) -> str | None:
    with suppress(OSError):
        return file.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
    return None


def _versions() -> Rows:
    rows: Rows = [("python", f"{platform.python_version()} ({platform.python_implementation()})")]
    for name in PACKAGES:
        try:
            rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def _machine() -> Rows:
    may_use = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model = next(_values("/proc/cpuinfo", "model name"), platform.processor() or "unknown")
    rows = [
        ("system", platform.platform()),
        ("processor", f"{model}, {platform.machine()}"),
        ("cores", f"{may_use} of {os.cpu_count()} may be used, torch takes {torch.get_num_threads()} threads"),
    ]
    memory = next(_values("/proc/meminfo", "MemTotal"), None)
    if memory is not None:
        rows.append(("memory", f"{int(memory.split()[0]) / 2**20:.1f} GiB"))
    return rows


def _values(file: str, name: str) -> Iterator[str]:
    """Yield what stands behind ``name:`` in a file of the kernel's."""
    with suppress(OSError):
        for line in Path(file).read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                yield value.strip()


def _devices() -> Rows:
    rows: Rows = []
    for index in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(index)
        rows.append((f"cuda:{index}", f"{of.name}, {of.total_memory / 2**30:.1f} GiB"))
    if rows:
        rows.append(("cuda", f"torch is built for {torch.version.cuda or torch.version.hip}"))
    if torch.backends.mps.is_available():
        rows.append(("mps", "available"))
    return rows or [("cpu", "no accelerator that torch knows")]


def _backends() -> Rows:
    if not dist.is_available():
        return [("torch.distributed", "not in this build of torch")]
    rows: Rows = []
    for name in ("gloo", "nccl", "mpi", "ucc", "xccl"):
        knows = getattr(dist, f"is_{name}_available", None)  # an older torch does not know of each
        rows.append((name, "available" if knows is not None and knows() else "no"))
    return rows

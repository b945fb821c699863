"""What an average costs by other packages, and by ours: time, bytes and memory; and what is left out of it.

    sudo python benchmarks/peers.py

The same networks, data, optimizer and rounds of 4 steps, on the digits, with 2 and with 4 workers of one thread each,
on hosts that are network namespaces with links of 1000 Mbit/s: slow enough that the bytes count, and fast enough that
what a package does beside sending them shows, which on slower links is lost in the time of the link. Three networks: 8
tensors of 8.7 MB together, 2,000 small ones of 4.2 MB, and one with BatchNorm. Every way to train takes its turn in
each repeat, in fresh processes; medians count. Columns:

- *s*: the training of 24 steps, with its 6 averages.
- *blocked*: ms that a worker is held up at the end of a round: waiting for the slowest, then in the average.
- *average*: ms of the average alone, all workers having come to it (a barrier before each sees to that), of the slowest
  worker; the first one is left out, in which memory is allocated and connections are made.
- */ fastest*: that, relative to the fastest peer that averages the same tensors, median of the ratios in one repeat.
- *MB*: sent by a host in the whole training, by the kernel's counter, headers of packets included.
- *MiB*: by how much an average raises the resident memory of a process, by the kernel's high-water mark, in a run of
  its own in which freed memory goes back at once.
- *spread*: how far apart the replicas are at the end, the largest difference of a parameter (of a buffer) to the mean.
- *accuracy*: on held-out digits, of the mean of all parameters with the buffers of rank 0.

The peers are installed into an environment of their own in ~/.cache/lightning-localsgd, layered over this one. What
cannot be installed, or fails, is listed with the reason. Without root all run on the loopback device, whose bytes are
not counted. Prints tables, which `docs/performance.md` shows, and writes the picture `docs/peers.png`.

Needs: Linux; scikit-learn, matplotlib, pip with a package index; for hosts root, `ip` and `tc` (Debian: iproute2);
about 10 minutes (`--quick`: one or two, 2 workers, one repeat, and no picture).
"""

import argparse
import ctypes
import os
import random
import re
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from multiprocessing import current_process, set_start_method
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import workers as processes
from accuracy import data
from hosts import Hosts, address, hosts, missing, sent
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_localsgd import DiLoCo, LocalSGDStrategy
from lightning_localsgd.worker import Worker

PERIOD, STEPS, BATCH, RATE = 4, 24, 32, 0.05
ENVIRONMENT = Path.home() / ".cache" / "lightning-localsgd" / "peers"
PACKAGES = {
    "accelerate": "accelerate==1.15.0",
    "torchft": "torchft-nightly==2026.10.26",
    "hivemind": "hivemind==1.1.12",
    "fairscale": "fairscale==0.4.13",  # a source, built here
}
PICTURE = Path(__file__).parent.parent / "docs" / "peers.png"


# --------------------------------------------------------------------------------------------------------- the networks


def large() -> nn.Module:
    """Return a network of 8 tensors."""
    inner = [layer for _ in range(2) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
    return nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), *inner, nn.Linear(1024, 10))


class Small(nn.Module):
    """A network of 2,000 tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 32), nn.Linear(32, 10)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(998))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x).tanh() / 32
        return self.last(x)


def normed() -> nn.Module:
    """Return a network with BatchNorm."""
    layers = [layer for size in (64, 512) for layer in (nn.Linear(size, 512), nn.BatchNorm1d(512), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(512, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "8 large tensors": large,
    "2,000 small tensors": Small,
    "BatchNorm": normed,
}


# ----------------------------------------------------------------------------------------------------------- one worker


class Average(NamedTuple):
    """What one average took of this worker."""

    waited: float  # seconds
    seconds: float
    memory: int  # bytes


class Note(NamedTuple):
    """What is left of a training."""

    seconds: float
    bytes: int
    averages: list[Average]
    spread: float
    spread_of_buffers: float
    accuracy: float


class Job:
    """One training on this worker: what all ways have in common, and what is measured.

    Args:
        network: its name.
        rank: of this worker.
        size: the number of workers.
        on_hosts: whether each has a host of its own.
        steps: to train.
        memory: whether memory is measured, which takes time.
    """

    def __init__(self, network: str, rank: int, size: int, on_hosts: bool, steps: int, memory: bool) -> None:
        self.rank, self.size, self.on_hosts, self.memory = rank, size, on_hosts, memory
        self.address = address(rank) if on_hosts else "127.0.0.1"
        torch.manual_seed(0)
        self.network = NETWORKS[network]()
        train, self.test = data()
        places = torch.randint(len(train), (steps, BATCH), generator=torch.Generator().manual_seed(rank))
        self.batches = [train[of] for of in places]
        self.averages: list[Average] = []

    def sgd(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.network.parameters(), lr=RATE, momentum=0.9)

    def start(self) -> None:
        dist.barrier()
        self._start = time.perf_counter(), self._sent()

    def end(self) -> None:
        self._end = time.perf_counter(), self._sent()

    def _sent(self) -> int:
        return sent() if self.on_hosts else 0

    def loop(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, after: Callable[[], object] = lambda: None
    ) -> None:
        """Train, with a call ``after`` each step."""
        self.start()
        for images, labels in self.batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            after()
        self.end()

    def timed(self, average: Callable[..., Any], first: int | None = None) -> Callable[..., Any]:
        """Return ``average``, timed in each call, or in those where it averages: the ``first``, and each 4 later."""
        calls = 0

        def call(*args: Any, **settings: Any) -> Any:
            nonlocal calls
            calls += 1
            if first is not None and (calls - first) % PERIOD:
                return average(*args, **settings)
            came = time.perf_counter()
            dist.barrier()
            before = self._resident("VmRSS")
            start = time.perf_counter()
            result = average(*args, **settings)
            end = time.perf_counter()
            self.averages.append(Average(start - came, end - start, self._resident("VmHWM") - before))
            return result

        return call

    def _resident(self, key: str) -> int:
        if not self.memory:
            return 0
        if key == "VmRSS":
            Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
        return 1024 * int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text())[1])

    @torch.no_grad()
    def note(self) -> Note:
        """See what the training has come to; all workers together."""
        mean, spread = self._mean(self.network.parameters())
        _, spread_of_buffers = self._mean(b for b in self.network.buffers() if b.is_floating_point())
        torch.nn.utils.vector_to_parameters(mean, self.network.parameters())
        images, labels = self.test.tensors
        accuracy = (self.network.eval()(images).argmax(1) == labels).float().mean()
        seconds, bytes_ = (after - before for before, after in zip(self._start, self._end, strict=True))
        return Note(seconds, bytes_, self.averages, spread, spread_of_buffers, float(accuracy))

    def _mean(self, tensors: Iterable[Tensor]) -> tuple[Tensor, float]:
        line = torch.cat([torch.empty(0), *(tensor.detach().flatten() for tensor in tensors)])
        lines = [torch.empty_like(line) for _ in range(self.size)]
        dist.all_gather(lines, line)
        mean = torch.stack(lines).mean(0)
        return mean, max(float((one - mean).abs().max()) if len(line) else 0.0 for one in lines)


# -------------------------------------------------------------------------------------------------------- ways to train


def ddp(job: Job) -> None:
    job.loop(DistributedDataParallel(job.network), job.sgd())


def _alone() -> PostLocalSGDState:
    """Return a state with which no gradients are sent."""
    alone, _ = dist.new_subgroups(group_size=1)
    return PostLocalSGDState(None, alone, start_localSGD_iter=0, post_local_gradient_allreduce=False)


def _hooked(job: Job) -> DistributedDataParallel:
    model = DistributedDataParallel(job.network)
    model.register_comm_hook(_alone(), post_localSGD_hook)
    return model


def periodic(job: Job) -> None:
    model = _hooked(job)
    average = job.timed(PeriodicModelAverager(PERIOD).average_parameters, first=1)
    job.loop(model, job.sgd(), lambda: average(model.parameters()))


def post_local(job: Job) -> None:
    averager = PeriodicModelAverager(PERIOD)
    averager.average_parameters = job.timed(averager.average_parameters, first=1)
    job.loop(_hooked(job), PostLocalSGDOptimizer(job.sgd(), averager))


def by_accelerate(job: Job) -> None:
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD
    from accelerate.state import AcceleratorState

    ranks = {"WORLD_SIZE": job.size, "RANK": job.rank, "LOCAL_WORLD_SIZE": 1 if job.on_hosts else job.size}
    os.environ.update({name: str(value) for name, value in ranks.items()}, ACCELERATE_USE_CPU="1")
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(job.network, job.sgd())
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=PERIOD) as local:
        job.loop(model, optimizer, job.timed(local.step, first=PERIOD))
    job.end()  # which has averaged once more


@contextmanager
def _manager(job: Job) -> Iterator[Any]:
    """What torchft's workers find one another by; each is a replica group of its own."""
    from torchft import Manager, ProcessGroupGloo
    from torchft.coordination import LighthouseServer

    lighthouse = LighthouseServer(bind=f"{job.address}:0", min_replicas=job.size) if job.rank == 0 else None
    port = [lighthouse.address().rsplit(":", 1)[1] if lighthouse else None]
    dist.broadcast_object_list(port)
    store = dist.TCPStore(job.address, 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=30)),
        load_state_dict=job.network.load_state_dict,
        state_dict=job.network.state_dict,
        min_replica_size=job.size,
        use_async_quorum=False,
        rank=0,
        world_size=1,
        store_addr=job.address,
        store_port=store.port,
        lighthouse_addr=f"http://{os.environ['MASTER_ADDR']}:{port[0]}",
        replica_id=f"worker{job.rank}",
        hostname=job.address,
    )
    with mock.patch("socket.gethostname", return_value=job.address):  # a name that the others can resolve
        yield manager
    dist.barrier()
    manager.shutdown(wait=False)
    if lighthouse:
        lighthouse.shutdown()


def by_torchft(job: Job) -> None:
    from torchft.local_sgd import LocalSGD

    optimizer = job.sgd()
    with _manager(job) as manager:
        local = LocalSGD(manager, job.network, optimizer, sync_every=PERIOD)
        local.sync = job.timed(local.sync)
        with local:
            job.loop(job.network, optimizer)


def diloco_by_torchft(job: Job) -> None:
    from torchft import local_sgd

    optimizer = job.sgd()
    outer = torch.optim.SGD(job.network.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    with _manager(job) as manager:
        diloco = local_sgd.DiLoCo(manager, [job.network], optimizer, outer, sync_every=PERIOD, pin_memory=False)
        diloco._step_post_hook = job.timed(diloco._step_post_hook, first=PERIOD)
        with diloco:
            job.loop(job.network, optimizer)


def slowmo_by_fairscale(job: Job) -> None:
    from fairscale.experimental.nn.data_parallel import SlowMoDistributedDataParallel

    with mock.patch("torch.cuda.synchronize"):  # else it fails without a GPU
        model = SlowMoDistributedDataParallel(
            job.network, nprocs_per_node=1, localsgd_frequency=PERIOD, slowmo_frequency=PERIOD
        )
        optimizer, average = job.sgd(), job.timed(model.perform_slowmo, first=PERIOD)
        job.loop(model, optimizer, lambda: average(optimizer))


def by_hivemind(job: Job) -> None:
    import hivemind

    current_process()._config["daemon"] = False  # it starts processes of its own, and by `fork`
    set_start_method("fork", force=True)
    place = [f"/ip4/{job.address}/tcp/0"]
    table = hivemind.DHT(host_maddrs=place, start=True) if job.rank == 0 else None
    peers = [[str(of) for of in table.get_visible_maddrs()] if table else None]
    dist.broadcast_object_list(peers)
    table = table or hivemind.DHT(host_maddrs=place, initial_peers=peers[0], start=True)
    optimizer = hivemind.Optimizer(
        dht=table,
        run_id="peers",
        batch_size_per_step=BATCH,
        target_batch_size=BATCH * PERIOD * job.size,
        params=job.network.parameters(),
        optimizer=partial(torch.optim.SGD, lr=RATE, momentum=0.9),
        use_local_updates=True,
        matchmaking_time=2.0,
        averaging_timeout=20.0,
    )
    job.loop(job.network, optimizer)


class Module(LightningModule):
    """The network of a job."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.network, self.sgd = job.network, job.sgd

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.sgd()


class StartAndEnd(Callback):
    """Tells a job."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def on_train_start(self, *_: Any) -> None:
        self.job.start()

    def on_train_end(self, *_: Any) -> None:
        self.job.end()


def _fit(job: Job, strategy: Strategy) -> None:
    trainer = Trainer(
        strategy=strategy,
        devices=1 if job.on_hosts else job.size,
        num_nodes=job.size if job.on_hosts else 1,
        max_epochs=1,
        use_distributed_sampler=False,
        callbacks=StartAndEnd(job),
        **processes.QUIET,
    )
    trainer.fit(Module(job), DataLoader(job.batches, batch_size=None))


def by_lightning(job: Job, forced: bool) -> None:
    class Averaging(DDPStrategy):
        def _enable_model_averaging(self) -> None:
            super()._enable_model_averaging()
            self._model_averager.average_parameters = job.timed(self._model_averager.average_parameters, first=1)

        def _register_ddp_hooks(self) -> None:
            if forced:  # else for GPUs alone
                self.model.register_comm_hook(self._ddp_comm_state, self._ddp_comm_hook)

    settings = {"ddp_comm_state": _alone(), "ddp_comm_hook": post_localSGD_hook}
    _fit(job, Averaging(model_averaging_period=PERIOD, **settings))


def by_us(job: Job, **settings: Any) -> None:
    with mock.patch.object(Worker, "end_step", job.timed(Worker.end_step, first=PERIOD)):
        _fit(job, LocalSGDStrategy(PERIOD, **settings))


class Way(NamedTuple):
    """A way to train.

    Args:
        train: does it.
        averages: of what means are taken.
        package: without which it cannot be.
        turns: whether it takes its turn in each repeat; else once, and its averages are not timed.
    """

    train: Callable[[Job], None]
    averages: str = "parameters"
    package: str | None = None
    turns: bool = True


OURS = "ours"
WAYS = {
    "DDP": Way(ddp, "gradients, each step"),
    "Lightning, `model_averaging_period`": Way(partial(by_lightning, forced=False), "parameters; gradients, each step"),
    "the same, its hook forced on": Way(partial(by_lightning, forced=True)),
    "torch `PeriodicModelAverager`": Way(periodic),
    "torch `PostLocalSGDOptimizer`": Way(post_local),
    "accelerate `LocalSGD`": Way(by_accelerate, package="accelerate"),
    "torchft `LocalSGD`": Way(by_torchft, package="torchft"),
    "torchft `DiLoCo`": Way(diloco_by_torchft, package="torchft"),
    "fairscale `SlowMo`": Way(slowmo_by_fairscale, package="fairscale"),
    "hivemind, local updates": Way(by_hivemind, "parameters, in the background", "hivemind", turns=False),
    OURS: Way(by_us, "parameters and buffers"),
    "ours, `DiLoCo`": Way(partial(by_us, outer=DiLoCo()), "parameters and buffers"),
}


# ------------------------------------------------------------------------------------------------------------ measuring


def work(
    pipe: Connection,
    rank: int,
    size: int,
    way: str,
    networks: Sequence[str],
    on_hosts: bool,
    steps: int,
    memory: bool,
) -> None:
    """Train each network by a way: send the process's number, and for each a note, or what went wrong."""
    os.setpgid(0, 0)
    pipe.send(os.getpid())
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what goes wrong is sent
    if memory:
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: what is freed goes back to the system
            ctypes.CDLL(None).mallopt(option, 1 << 17)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=size)
        for network in networks:
            job = Job(network, rank, size, on_hosts, steps, memory)
            WAYS[way].train(job)
            pipe.send(job.note())
    except Exception as error:  # of a package that is not ours
        pipe.send(f"{type(error).__name__}: {error}".strip().splitlines()[0])


Turn = dict[str, list[Note]]  # by network, one of each worker


def take_turn(lab: Hosts | None, size: int, way: str, networks: Sequence[str], steps: int, memory: bool) -> Turn | str:
    """Train each network by a way, in fresh processes; or return why that is not possible."""
    found: Turn = {}
    settings = size, way, networks, lab is not None, steps, memory
    with processes.workers(size, work, *settings, job=lab.enter if lab else None) as pipes:
        pids = processes.listen(pipes)
        try:
            for network in networks:
                notes = processes.listen(pipes, timeout=120 if WAYS[way].turns else 60)
                wrong = [note for note in notes if isinstance(note, str)]
                if wrong:
                    return f"{network}: {wrong[0]}"
                found[network] = notes
        except (TimeoutError, EOFError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            for pid in pids:  # with all that they have started
                os.killpg(pid, signal.SIGKILL)
    return found


class Costs(NamedTuple):
    """What has been measured with one number of workers.

    Args:
        turns: of each way, in the order of the repeats.
        memory: of each way, in its run for that.
        reasons: of each way that is missing, why.
    """

    turns: dict[str, list[Turn]]
    memory: dict[str, Turn]
    reasons: dict[str, str]


def measure(size: int, ways: Sequence[str], networks: Sequence[str], steps: int, repeats: int, mbit: float) -> Costs:
    costs = Costs(defaultdict(list), {}, {way: reason for way in ways if (reason := _absent(way))})
    with nullcontext() if missing() else hosts(size) as lab:
        if lab:
            lab.shape(mbit)
        for turn in range(repeats + 1):
            for way in random.sample(ways, len(ways)):
                if way in costs.reasons or (turn and not WAYS[way].turns):
                    continue
                found = take_turn(lab, size, way, networks, steps, memory=not turn)
                print(
                    f"turn {turn} of {way}: {found if isinstance(found, str) else 'done'}", file=sys.stderr, flush=True
                )
                if isinstance(found, str):
                    costs.reasons[way] = found
                elif turn:
                    costs.turns[way].append(found)
                else:
                    costs.memory[way] = found
    return costs


def _absent(way: str) -> str | None:
    reason = ENVIRONMENT / f"{WAYS[way].package}.reason"
    return f"not installed: {reason.read_text()}" if reason.exists() else None


# -------------------------------------------------------------------------------------------------------------- results


class Row(NamedTuple):
    """Of a table; None where there is nothing to measure."""

    seconds: float
    blocked: float | None
    average: float | None
    to_fastest: float | None
    bytes: float
    memory: float | None
    spread: float
    spread_of_buffers: float
    accuracy: float


def seconds_of_average(notes: list[Note]) -> float | None:
    """Return the median over rounds of the slowest worker's seconds, in one turn."""
    rounds = list(zip(*(note.averages for note in notes), strict=True))
    return median(max(of.seconds for of in average) for average in rounds[1:] or rounds) if rounds else None


def fastest(costs: Costs, network: str, same: Callable[[str], bool]) -> str | None:
    """Return the peer with the shortest average of those that average the ``same`` as we."""
    times = {
        way: median(seconds_of_average(turn[network]) or 0.0 for turn in turns)
        for way, turns in costs.turns.items()
        if turns and turns[0][network][0].averages and not way.startswith(OURS) and same(way)
    }
    return min(times, key=lambda way: times[way]) if times else None


def averages_the_same(way: str, network: str) -> bool:
    return network != "BatchNorm" or "buffers" in WAYS[way].averages


def row(costs: Costs, network: str, way: str) -> Row:
    turns = [turn[network] for turn in costs.turns.get(way) or [costs.memory[way]]]
    averages = [seconds_of_average(notes) for notes in turns]
    blocked = [
        sum(of.waited + of.seconds for of in note.averages) / len(note.averages)
        for notes in turns
        for note in notes
        if note.averages
    ]
    best = fastest(costs, network, lambda other: averages_the_same(other, network))
    ratio = None
    if best and averages[0] is not None and averages_the_same(way, network):
        others = [seconds_of_average(turn[network]) or 0.0 for turn in costs.turns[best]]
        ratio = median(own / other for own, other in zip(averages, others, strict=False) if own is not None)
    peaks = [of.memory for note in costs.memory[way][network] for of in note.averages]
    return Row(
        seconds=median(max(note.seconds for note in notes) for notes in turns),
        blocked=median(blocked) if blocked else None,
        average=None if averages[0] is None else median(of for of in averages if of is not None),
        to_fastest=ratio,
        bytes=median(max(note.bytes for note in notes) for notes in turns),
        memory=max(peaks) if peaks else None,
        spread=max(note.spread for notes in turns for note in notes),
        spread_of_buffers=max(note.spread_of_buffers for notes in turns for note in notes),
        accuracy=median(notes[0].accuracy for notes in turns),
    )


def table(size: int, costs: Costs, networks: Sequence[str]) -> str:
    lines = []
    for network in networks:
        lines += [
            f"\n{network}, {size} workers\n",
            "| | means of | s | blocked, ms | average, ms | / fastest | MB | MiB | spread (buffers) | accuracy, % |",
            "|" + "---|" * 10,
        ]
        for way in WAYS:
            if way not in costs.memory or way in costs.reasons:
                continue
            of = row(costs, network, way)
            blocked, average = ("" if x is None else f"{1000 * x:.1f}" for x in (of.blocked, of.average))
            ratio = "" if of.to_fastest is None else f"{of.to_fastest:.2f}"
            memory = "" if of.memory is None else f"{of.memory / 2**20:.1f}"
            spread = f"{of.spread:.2g}" + (f" ({of.spread_of_buffers:.2g})" if network == "BatchNorm" else "")
            lines.append(
                f"| {way} | {WAYS[way].averages} | {of.seconds:.2f} | {blocked} | {average} | {ratio} | "
                f"{of.bytes / 1e6:.1f} | {memory} | {spread} | {100 * of.accuracy:.1f} |"
            )
    lines += [f"\nnot measured: {way}: {reason}" for way, reason in costs.reasons.items()]
    return "\n".join(lines)


def draw(found: dict[int, Costs], networks: Sequence[str], mbit: float) -> None:
    import matplotlib.pyplot as plt  # an extra

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, len(networks), figsize=(10, 3.6), sharey=True, layout="constrained")
    ways = [way for way in WAYS if any(costs.turns.get(way) for costs in found.values()) and way != "DDP"][::-1]
    height = 0.5 / len(found)
    for axis, network in zip(axes, networks, strict=True):
        for number, (size, costs) in enumerate(found.items()):
            drawn = [(place, way) for place, way in enumerate(ways) if costs.turns.get(way)]
            values = [1000 * (row(costs, network, way).average or 0.0) for _, way in drawn]
            places = [place + height * ((len(found) - 1) / 2 - number) for place, _ in drawn]
            axis.plot(values, places, "o", color=f"C{number}", label=f"{size} workers")
            for value, place in zip(values, places, strict=True):
                axis.annotate(f"{value:.4g}", (value, place), (5, 3), textcoords="offset points", fontsize=7)
        axis.set_xscale("log")  # on which a bar would have no beginning
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.grid(alpha=0.3)
        axis.set_title(network, fontsize=9)
        axis.set_xlabel("ms of an average")
    axes[0].set_yticks(range(len(ways)), [way.replace("`", "") for way in ways])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(found), frameon=False)
    figure.suptitle(f"Rounds of {PERIOD} steps, links of {mbit:g} Mbit/s", fontsize=10)
    figure.savefig(PICTURE, dpi=140)
    print(f"\nwrote {PICTURE}")


def enter_environment() -> None:
    """Go on in the peers' own environment, in which what is installed here is found as well."""
    python = ENVIRONMENT / "bin" / "python"
    if Path(sys.prefix) == ENVIRONMENT:
        return
    if not python.exists():
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
    own = Path(sysconfig.get_path("purelib", "venv", {"base": str(ENVIRONMENT)}))
    here = sysconfig.get_path("purelib")
    (own / "layered.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    for package, requirement in PACKAGES.items():
        done, reason = ENVIRONMENT / f"{package}.{requirement}", ENVIRONMENT / f"{package}.reason"
        if done.exists():
            continue
        print(f"installing {requirement} into {ENVIRONMENT}", flush=True)
        command = [python, "-m", "pip", "install", "--quiet", "--no-build-isolation", requirement]
        result = subprocess.run([*command, f"torch=={torch.__version__}"], capture_output=True, text=True)
        reason.unlink(missing_ok=True)
        if result.returncode:
            reason.write_text((result.stderr.strip().splitlines() or ["pip failed"])[-1])
        else:
            done.touch()
    os.execv(python, [python, *sys.argv])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--mbit", type=float, default=1000, help="of the links, in Mbit/s")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--quick", action="store_true", help="2 workers, 12 steps, one repeat, no picture")
    args = parser.parse_args()
    enter_environment()
    steps = STEPS
    if args.quick:
        args.workers, args.repeats, steps = [2], 1, 3 * PERIOD
    os.environ.update(RUST_LOG="error", HIVEMIND_LOGLEVEL="CRITICAL")
    lacks = missing()
    print(f"on the loopback device, bytes are not counted: {lacks}" if lacks else f"links of {args.mbit:g} Mbit/s")
    preload = ["lightning.pytorch", "torchmetrics", "sklearn.datasets", "lightning_localsgd", "accelerate.local_sgd"]
    processes._CONTEXT.set_forkserver_preload([*preload, "torchft.local_sgd"])
    found = {}
    for size in args.workers:
        start = time.perf_counter()
        found[size] = measure(size, args.ways, args.networks, steps, args.repeats, args.mbit)
        print(table(size, found[size], args.networks))
        load, seconds = os.getloadavg()[0], time.perf_counter() - start
        print(f"\n{seconds:.0f} s, load average {load:.1f}, {os.cpu_count()} cores", flush=True)
    if not args.quick:
        draw(found, args.networks, args.mbit)


if __name__ == "__main__":
    main()

"""A cluster on this machine: hosts of one bridge, each with its own name and network, and a real SLURM on them.

    with cluster(2) as lab:
        lab.hosts[0].run("hostname")
        job = lab.submit("examples/slurm/cpu.sbatch", ...)

Needs Linux, root, and what `packages.sh` installs. No file of the system is changed: names, configuration and sockets
are seen by the hosts alone, so that the lab runs beside another one and beside a SLURM of the machine's own.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.shell import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from hosts import Hosts, address, hosts
from hosts import missing as missing_for_hosts

TOOLS = ("slurmctld", "slurmd", "srun", "munged", "nsenter")
COMMAND = str(Path(sys.executable).with_name("lightning-localsgd"))

CONFIGURATION = """\
ClusterName=lab
SlurmctldHost=ctl({controller})
SlurmUser=root
AuthType=auth/munge
# A job that is requeued waits until its old credentials have expired: 120 s unless told otherwise.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str | None:
    """Return what this machine lacks for :func:`cluster`, or None."""
    lacks = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacks:
        return f"this needs {', '.join(lacks)} (Debian, as root: sh tests/lab/packages.sh)"
    return missing_for_hosts()


@dataclass(frozen=True)
class Host:
    """One host.

    Args:
        name: its name, for all hosts.
        holder: the process that holds its namespaces.
        env: what is in the environment of all that runs there.
        started: processes that run there, which end with the host.
    """

    name: str
    holder: subprocess.Popen
    env: dict[str, str]
    started: list[subprocess.Popen] = field(default_factory=list, compare=False, repr=False)

    def start(self, *command: object, cwd: Path = ROOT, **options: object) -> subprocess.Popen:
        """Start a command there."""
        into = ["nsenter", f"--target={self.holder.pid}", "--net", "--uts", "--mount", "env", f"--chdir={cwd}"]
        env = {**os.environ, **self.env, **options.pop("env", {})}
        process = subprocess.Popen([*into, *map(str, command)], stdin=subprocess.DEVNULL, env=env, **options)
        self.started.append(process)
        return process

    def run(self, *command: object, timeout: float = 60, **options: object) -> str:
        """Run a command there, see it succeed, and return what it printed."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = self.start(*command, **pipes, **options)
        try:
            printed, _ = process.communicate(timeout=timeout)
        finally:
            process.kill()
            process.wait()
            self.started.remove(process)
        assert process.returncode == 0, f"{self.name}: {command}: {printed}"
        return printed


@dataclass(frozen=True)
class Cluster:
    """Hosts and the SLURM on them.

    Args:
        network: their links.
        hosts: where jobs run.
        controller: where they are submitted.
        folder: with the logs.
    """

    network: Hosts
    hosts: tuple[Host, ...]
    controller: Host
    folder: Path

    def submit(self, *words: object, **options: object) -> int:
        """Call ``sbatch`` with these words; return the job's number."""
        return int(self.controller.run("sbatch", "--parsable", *words, **options).split(";")[0].split()[-1])

    def state(self, job: int) -> str:
        """Return the job's state as ``scontrol`` names it."""
        shown = self.controller.run("scontrol", "--oneliner", "show", "job", job).splitlines()[0]
        return shown.split("JobState=")[1].split()[0]

    def wait(self, job: int, timeout: float = 120) -> str:
        """Wait until a job has ended for good; return its state."""
        deadline = time.monotonic() + timeout
        while (state := self.state(job)) in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is still {state} after {timeout:.0f} s")
            time.sleep(0.2)
        return state

    def sent(self, rank: int) -> int:
        """Return the bytes that a host has sent so far, by the kernel's counter."""
        lines = self.hosts[rank].run("cat", "/proc/self/net/dev").splitlines()
        return int(next(line for line in lines if "eth0:" in line).split(":")[1].split()[8])


@contextmanager
def cluster(number: int = 2, nodes: int = 2) -> Iterator[Cluster]:
    """Give hosts, named n0 and so on, and one more for the controller, named ctl; they share this machine's disk.

    Args:
        number: of hosts.
        nodes: how many of them are SLURM's.
    """
    with ExitStack() as undo:
        folder = Path(tempfile.mkdtemp(prefix="lsgd-lab-"))
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.chmod(0o755)
        names = [*(f"n{rank}" for rank in range(number)), "ctl"]
        known = "".join(f"{address(rank)} {name}\n" for rank, name in enumerate(names))
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + known)
        (folder / "state").mkdir()
        lines = (f"NodeName=n{rank} NodeAddr={address(rank)} CPUs=6 Gres=gpu:2" for rank in range(nodes))
        text = CONFIGURATION.format(controller=address(number), folder=folder, nodes="\n".join(lines))
        (folder / "slurm.conf").write_text(text)
        unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
        (folder / "cgroup.conf").write_text(f"CgroupPlugin={'autodetect' if unified else 'cgroup/v1'}\n")
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")  # none in truth
        network = undo.enter_context(hosts(len(names)))
        made: list[Host] = []
        undo.callback(_end_all, network, made)
        for rank, name in enumerate(names):
            made.append(_host(name, network.names[rank], folder))
        lab = Cluster(network, tuple(made[:-1]), made[-1], folder)
        if nodes:
            _start_slurm(lab, lab.hosts[:nodes])
        yield lab


def _host(name: str, namespace: str, folder: Path) -> Host:
    start = f"hostname {name} && mount --bind {folder}/hosts /etc/hosts && echo up && exec sleep infinity"
    own = ["unshare", "--uts", "--mount", "--propagation", "private", "sh", "-c", start]
    holder = subprocess.Popen(["nsenter", f"--net=/run/netns/{namespace}", *own], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "up\n", name
    return Host(name, holder, {"SLURM_CONF": f"{folder}/slurm.conf", "GLOO_SOCKET_IFNAME": "eth0"})


def _start_slurm(lab: Cluster, nodes: tuple[Host, ...]) -> None:
    key = lab.folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    with (lab.folder / "out").open("w") as out:
        munge = {"socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "munge.seed"}
        places = [f"--{option}={lab.folder}/{name}" for option, name in munge.items()]
        lab.controller.start("munged", "--foreground", f"--key-file={key}", *places, stdout=out, stderr=out)
        _until(lambda: (lab.folder / "munge.socket").exists(), lab, "munged")
        lab.controller.start("slurmctld", "-D", stdout=out, stderr=out)
        for host in nodes:
            host.start("slurmd", "-D", "-N", host.name, stdout=out, stderr=out)
    _until(lambda: _idle(lab) == len(nodes), lab, "SLURM")


def _idle(lab: Cluster) -> int:
    with suppress(AssertionError):  # it is not there yet
        return lab.controller.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T").count("idle")
    return 0


def _until(there: object, lab: Cluster, what: str) -> None:
    deadline = time.monotonic() + 30
    while not there():
        if time.monotonic() > deadline:
            logs = "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in lab.folder.glob("*.log"))
            raise TimeoutError(f"{what} has not started within 30 s:\n{logs}")
        time.sleep(0.1)


def _end_all(network: Hosts, made: list[Host]) -> None:
    """End all that runs in the hosts, whatever started it."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        for name in network.names:
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True).stdout
            for pid in map(int, listed.split()):
                with suppress(ProcessLookupError):
                    os.kill(pid, how)
        time.sleep(0.3)
    for host in made:
        for process in (host.holder, *host.started):
            process.wait()
            for pipe in filter(None, (process.stdout, process.stderr)):
                pipe.close()

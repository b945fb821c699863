"""What fails, and in which phase: all workers end soon, each with a sentence that says who, where and in what."""

import ctypes
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab.cluster import address
from tests.lab.faulty import PHASES, process
from tests.shell import ROOT

TIMEOUT = 6.0  # the strategy's, here
GRACE = 8.0  # seconds for a process to end once it has given up; the machine is busy with the other cells
BEFORE = ("full disk", "read-only", "port in use", "no such name", "one is missing")  # so from the start
LISTENS = "import socket, time; s = socket.create_server(('', 29500)); time.sleep(60)"
TABLE = Path(tempfile.gettempdir(), "lsgd-faults.md")
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["lightning.pytorch", "lightning_localsgd", "tests.lab.faulty"])
_ERROR = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Exit)\b.*", re.MULTILINE)


@dataclass(frozen=True)
class Fault:
    """What is done to which rank, and where."""

    what: str
    phase: str
    rank: int = 1


@dataclass
class Ended:
    """How each rank has ended, None being one that was killed, and after how many seconds all had."""

    codes: list[int]
    said: list[str]
    seconds: float


@dataclass(frozen=True)
class Pair:
    """Two hosts of the lab that others leave alone."""

    lab: object
    first: int

    def start(self, rank, log, port=29500, to=None, **options):
        """Start a rank of a training on its host."""
        host = self.lab.hosts[self.first + rank]
        env = {
            "MASTER_ADDR": to or address(self.first), "MASTER_PORT": str(port), "NODE_RANK": str(rank),
            "LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "eth0",
        }  # fmt: skip
        given = {"phase": "", "timeout": TIMEOUT, "workers": 2, "resume": None} | options
        one = _CONTEXT.Process(
            target=process, args=(enter, f"/proc/{host.holder.pid}/ns", str(log), env, given | {"rank": rank})
        )
        one.start()
        return one


def enter(namespaces):
    """Move this process to a host, name and network."""
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in ("net", "uts"):
        with open(f"{namespaces}/{kind}") as namespace:
            if libc.setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), kind)


def wait_for(path, processes, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} is not there"
        assert any(one.is_alive() for one in processes), f"all have ended before {path}"
        time.sleep(0.01)


def inflict(pair, fault, processes, saves):
    """Do it."""
    if fault.what == "killed":
        os.kill(processes[fault.rank].pid, signal.SIGKILL)
    elif fault.what == "cut off":
        pair.lab.network.cut(pair.first + fault.rank)
    elif fault.what == "cut off for 2 s":
        pair.lab.network.cut(pair.first + fault.rank)
        time.sleep(2)
        pair.lab.network.mend(pair.first + fault.rank)
    elif fault.what == "stalled":
        pair.lab.network.stall(pair.first + fault.rank)
    elif fault.what == "full disk":
        mount(saves, "size=300k")
    elif fault.what == "read-only":
        mount(saves, "ro")
    elif fault.what == "folder removed":
        shutil.rmtree(saves)
    elif fault.what == "port in use":
        pair.lab.hosts[pair.first].start(sys.executable, "-c", LISTENS)
        time.sleep(2)


def mount(saves, options):
    saves.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", saves], check=True)


@contextmanager
def nothing_left(pair, saves):
    try:
        yield
    finally:
        for rank in range(2):
            for started in pair.lab.hosts[pair.first + rank].started:
                started.kill()
            pair.lab.network.mend(pair.first + rank)
            pair.lab.network.shape(1000, pair.first + rank)
        if saves.is_mount():
            subprocess.run(["umount", "-l", saves], check=True)


def run(pair, fault, folder):
    """Train on the pair, let the fault happen, and return how it ended."""
    folder.mkdir()
    saves, logs = folder / "saves", [folder / f"log-{rank}" for rank in range(2)]
    with nothing_left(pair, saves):
        for rank in range(2):
            pair.lab.network.shape(10, pair.first + rank)
        if fault.what in BEFORE:
            inflict(pair, fault, [], saves)
        who, to = [0] if fault.what == "one is missing" else [0, 1], "nowhere" if fault.what == "no such name" else None
        given = {"folder": folder, "phase": fault.phase, "saves": saves, "to": to}
        begun = time.time()
        processes = [pair.start(rank, logs[rank], **given) for rank in who]
        try:
            if fault.what not in BEFORE:
                wait_for(folder / f"there-{fault.rank}", processes)
                time.sleep(0.3 if fault.phase == "average" else 0.1)
            start = time.monotonic()
            if fault.what not in BEFORE:
                inflict(pair, fault, processes, saves)
            limit = 60 if fault.what in (*BEFORE, "cut off for 2 s") else 2 * TIMEOUT + GRACE
            for one in processes:
                one.join(max(0, start + limit - time.monotonic()))
            seconds = time.monotonic() - start
            if fault.what in BEFORE:
                seen = [path.stat().st_mtime for path in [folder / "there-0"] if path.exists()]
                seconds = max(log.stat().st_mtime for log in logs if log.exists()) - (seen or [begun])[0]
            alive = [rank for rank, one in enumerate(processes) if one.is_alive()]
            said = [said_by(logs[rank]) for rank in who]
            assert not alive, f"{fault}: ranks {alive} have not ended after {seconds:.0f} s: {said}"
            return Ended([one.exitcode for one in processes], said, seconds)
        finally:
            for one in processes:
                one.kill()
                one.join()


def said_by(log):
    """Return the last error that a rank has shown."""
    printed = log.read_text() if log.exists() else ""
    errors = _ERROR.findall(printed)
    return errors[-1] if errors else printed[-2000:]


def name_of(cell):
    return f"{cell.what}-{cell.phase}-{cell.rank}".replace(" ", "-")


CELLS = [
    *(Fault(what, phase, rank) for what, rank in (("killed", 1), ("killed", 0)) for phase in PHASES),
    *(Fault(what, phase) for what in ("cut off", "stalled") for phase in PHASES),
    Fault("full disk", "save"),
    Fault("read-only", "save"),
    *(Fault(what, "start") for what in ("port in use", "no such name", "one is missing")),
]
NO_FAULTS = [Fault("none", "local step"), Fault("cut off for 2 s", "average"), Fault("folder removed", "validation")]


@pytest.fixture(scope="module")
def ended(lab, tmp_path_factory):
    """Return how each cell ended; five at a time, each on two hosts of its own."""
    folder = tmp_path_factory.mktemp("faults")
    pairs, cells = [Pair(lab, first) for first in range(2, 12, 2)], [*CELLS, *NO_FAULTS]
    lock = threading.Lock()

    def one(cell):
        with lock:
            pair = pairs.pop()
        try:
            return run(pair, cell, folder / name_of(cell))
        except (AssertionError, subprocess.CalledProcessError) as error:
            return error
        finally:
            with lock:
                pairs.append(pair)

    with ThreadPoolExecutor(len(pairs)) as pool:
        found = dict(zip(cells, pool.map(one, cells), strict=True))
    TABLE.write_text("| fault | rank | phase | seconds | exit codes | said |\n|---|---|---|---|---|---|\n")
    for cell, end in found.items():
        if isinstance(end, Ended):
            tell(cell.what, cell.rank, cell.phase, f"{end.seconds:.1f}", end.codes, end.said)
        else:
            tell(cell.what, cell.rank, cell.phase, end)
    return found, folder


def tell(*cells):
    """Add a line to the table; of what was said, the last one."""
    cells = [str(cell).strip().rpartition("\n")[2] for cell in cells]
    with TABLE.open("a") as table:
        table.write(f"| {' | '.join(cells)} |\n")


@pytest.mark.parametrize("cell", CELLS, ids=name_of)
def test_all_end_soon_and_say_who_where_and_in_what(ended, lab, cell):
    end = ended[0][cell]
    if isinstance(end, Exception):
        raise end
    for rank, (code, said) in enumerate(zip(end.codes, end.said, strict=True)):
        if cell.what == "killed" and rank == cell.rank:
            assert code == -signal.SIGKILL
            continue
        assert code not in (0, -signal.SIGKILL), said
        assert re.search(r"Rank [01] on host n\d+\b", said), said
        assert any(word in said for word in WORDS[cell.phase]), said
    assert end.seconds < TIMEOUT * (2 if cell.phase == "start" else 1) + GRACE


def test_a_link_that_comes_back_and_a_folder_that_is_gone_change_nothing(ended):
    found, folder = ended
    for cell in NO_FAULTS:
        if isinstance(found[cell], Exception):
            raise found[cell]
        assert found[cell].codes == [0, 0]
    first, *others = (digests(folder / name_of(cell)) for cell in NO_FAULTS)
    assert others == [first, first]
    assert list((folder / name_of(NO_FAULTS[2]) / "saves").glob("*.ckpt"))  # it is made anew


@pytest.mark.parametrize(
    "cell", [Fault("killed", "average"), Fault("killed", "save", 0), Fault("stalled", "validation")]
)
def test_a_restart_goes_on_exactly_from_the_newest_checkpoint(ended, lab, tmp_path, cell):
    _, folder = ended
    saves = folder / name_of(cell) / "saves"
    newest = max(saves.glob("*.ckpt"), key=os.path.getmtime, default=None)
    given = {"saves": tmp_path / "saves", "resume": newest and str(newest)}
    codes, said = together(lab, tmp_path, 2, **given)
    assert codes == [0, 0], said
    assert digests(tmp_path) == digests(folder / name_of(NO_FAULTS[0]))


START = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[2]]
from tests.lab.faulty import Model, train
{change}
given = dict(folder=Path(sys.argv[1]), saves=Path(sys.argv[1]) / "saves", timeout=float(sys.argv[4]))
train(phase="", rank=int(sys.argv[3]), workers=2, resume=None, **given)
"""
STRANGERS = {
    "version": ("", "All workers must speak one protocol, .* rank 1's protocol is 1000 where rank 0's is"),
    "model": (
        "made = Model.__init__\n"
        "def other(self, told): made(self, told); self.net[0].register_buffer('more', self.net[0].bias.new_zeros(3))\n"
        "Model.__init__ = other",
        "All workers must train the same model, .* rank 1 differ from those of rank 0: .*`net.0.more`",
    ),
}


@pytest.mark.parametrize("what", STRANGERS)
def test_another_version_of_the_code_and_another_model_are_refused_on_both_hosts(lab, tmp_path, what):
    change, expected = STRANGERS[what]
    packages = [ROOT, ROOT]
    if what == "version":  # really installed elsewhere
        packages[1] = tmp_path / "other"
        shutil.copytree(ROOT / "lightning_localsgd", packages[1] / "lightning_localsgd")
        header = packages[1] / "lightning_localsgd" / "header.py"
        header.write_text(re.sub(r"(?m)^PROTOCOL = \d+$", "PROTOCOL = 1000", header.read_text()))
    started, logs, begun = [], [tmp_path / f"log-{rank}" for rank in range(2)], time.monotonic()
    for rank, (host, package) in enumerate(zip(lab.hosts[2:4], packages, strict=True)):
        env = {"MASTER_ADDR": address(2), "MASTER_PORT": "29500", "NODE_RANK": str(rank), "LOCAL_RANK": "0"}
        code = START.format(change=change if rank else "")
        with logs[rank].open("w") as log:
            words = [sys.executable, "-c", code, tmp_path, package, rank, TIMEOUT]
            started.append(host.start(*words, env=env, stdout=log, stderr=log))
    for one, log in zip(started, logs, strict=True):
        assert one.wait(60) not in (0, -signal.SIGKILL), log.read_text()
        assert re.search(expected, said_by(log)), log.read_text()
    tell(f"another {what}", 1, "start", f"{time.monotonic() - begun:.1f}", "", said_by(logs[0]))
    assert not (tmp_path / "saves").exists()


@pytest.mark.parametrize("meets_at", [address(2), "n2"])
def test_hosts_whose_own_names_are_loopback_addresses_find_each_other(lab, tmp_path, meets_at):
    started, logs = [], [tmp_path / f"log-{rank}" for rank in range(2)]
    for rank, host in enumerate(lab.hosts[2:4]):  # as Debian has it
        known = tmp_path / f"hosts-{rank}"
        known.write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n{address(2)} n2\n{address(3)} n3\n")
        env = {"MASTER_ADDR": meets_at, "MASTER_PORT": "29500", "NODE_RANK": str(rank), "LOCAL_RANK": "0"}
        words = [sys.executable, "-c", START.format(change=""), tmp_path, ROOT, str(rank), str(TIMEOUT)]
        own = f'mount --bind {known} /etc/hosts && unset GLOO_SOCKET_IFNAME && exec "$@"'
        with logs[rank].open("w") as log:
            unshared = ["unshare", "--mount", "sh", "-c", own, "sh", *words]
            started.append(host.start(*unshared, env=env, stdout=log, stderr=log))
    for one, log in zip(started, logs, strict=True):
        assert one.wait(60) == 0, log.read_text()
    assert f"Gloo uses the interface eth0 ({address(2)})" in logs[0].read_text()
    first, second = digests(tmp_path)
    assert first == second


def saved(ended, where):
    """Copy what the run without a fault has saved; return its newest checkpoint there."""
    shutil.copytree(ended[1] / name_of(NO_FAULTS[0]) / "saves", where)
    return max(where.glob("*.ckpt"), key=os.path.getmtime)


def together(lab, folder, workers, **given):
    """Train on as many hosts as workers; return exit codes and what each said last, when all have ended."""
    given = {"folder": folder, "saves": folder / "more", "workers": workers} | given
    processes = [Pair(lab, 2).start(rank, folder / f"log-{rank}", **given) for rank in range(workers)]
    try:
        for one in processes:
            one.join(60)
        return [one.exitcode for one in processes], [said_by(folder / f"log-{rank}") for rank in range(workers)]
    finally:
        for one in processes:
            one.kill()
            one.join()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda whole: whole[:-1000], "is damaged, or none: it is no whole file"),
        (lambda whole: whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:], r"is damaged: .*is not as saved"),
    ],
    ids=["truncated", "one bit"],
)
def test_a_damaged_checkpoint_is_refused_on_both_hosts(ended, lab, tmp_path, damage, expected):
    newest = saved(ended, tmp_path / "saves")
    newest.write_bytes(damage(newest.read_bytes()))
    begun = time.monotonic()
    codes, said = together(lab, tmp_path, 2, resume=str(newest))
    tell("a damaged checkpoint", "both", "start", f"{time.monotonic() - begun:.1f}", codes, said[0])
    for code, one in zip(codes, said, strict=True):
        assert code not in (None, 0, -signal.SIGKILL), one
        assert re.search(f"{re.escape(newest.name)}.* {expected}", one), one
    assert not (tmp_path / "more").exists()


def test_another_number_of_workers_goes_on(ended, lab, tmp_path):
    newest = saved(ended, tmp_path / "saves")
    codes, said = together(lab, tmp_path, 3, resume=str(newest))
    assert codes == [0, 0, 0], said
    assert len({(tmp_path / f"digest-{rank}").read_text() for rank in range(3)}) == 1


def digests(folder):
    return [(folder / f"digest-{rank}").read_text() for rank in range(2)]


WORDS = {
    "start": ["starts"],
    "local step": ["ends a round at its step", "at its step", "averages its model"],
    "average": ["averages its model", "ends a round at its step"],
    "save": ["saves or removes a checkpoint", "must succeed", "looks at"],
    "validation": ["validat", "reduces a value"],
}

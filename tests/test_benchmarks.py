"""The benchmarks: those that need no particular machine run, and find what the documentation says; parts of others."""

import sys
from shutil import which

import pytest

from tests.shell import ROOT, ok, run

BENCHMARKS = ROOT / "benchmarks"


def test_the_theory_holds():
    printed = ok(sys.executable, "-W", "error", BENCHMARKS / "theory.py", "--quick")  # exits with 1 if not
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith(("| a ", "| b ", "| c ", "| d "))]
    assert len(rows) == 9
    assert all(row[-1] == "yes |" for row in rows), printed


PARTS = """
import math
import torch
from comm_budget import Round, Run, beyond_steps, farthest, settled, share, share_if_shorter
from paper import BATCH, Epoch, ResNet20, digits, table
from paper import Run as Trained

# A period has settled when the later ones, 10 of them at least, are within a tenth of their median, or within a step.
assert settled([8, 16, 32] + [40] * 10) == 3
assert settled([8, 16, 32] + [40] * 9) is None
assert settled([8, 37, 32] + [40] * 10) == 3 and settled([8, 37] + [40] * 10) == 1
assert settled([2] + [3, 4] * 10) == 0 and settled([20, 30] * 10) is None
assert farthest([40, 41, 30], 40) == 0.25 and farthest([1, 2], 1) == 0

# Rounds of 10 steps of 0.09 s, an average of 0.08 s, and 0.02 s of waiting: 1 s.
rounds = [Round(10, 1.0, 0.08, 0.02, 0.09)] * 3
assert math.isclose(share(rounds), 0.08)
assert math.isclose(beyond_steps(rounds), 0.1)
assert math.isclose(share_if_shorter(rounds), 0.08 / (0.08 + 0.92 * 0.9))
assert share_if_shorter([Round(1, 1.0, 0.5, 0.0, math.nan)]) == 1 and math.isnan(beyond_steps(rounds[:0]))
phases = Run(2.0, 1000, slows_to=200).phases()
assert [(phase.rounds, phase.mbit, phase.slower) for phase in phases] == [(30, 1000, 1), (12, 1000, 1.5), (30, 200, 1)]

data, model = digits(), ResNet20()
assert sum(parameter.numel() for parameter in model.parameters()) == 269_722  # as in the table of He et al.: 0.27 M
assert (len(data.train), len(data.test)) == (1438, 359)
images, labels = data.train[:BATCH]
assert images.shape == (BATCH, 3, 16, 16) and model.network(images).shape == (BATCH, 10)
assert abs(data.train.tensors[0].mean()) < 1e-5 and abs(data.train.tensors[0].std() - 1) < 1e-4
loss = model.training_step([images, labels], 0)
loss.backward()
assert abs(loss.item()) < 10 and all(parameter.grad.norm() > 0 for parameter in model.parameters())
fast, slow = ([Epoch(1.0, 0.5, s, 4.0), Epoch(0.5, best, 2 * s, 8.0)] for s, best in ((10.0, 0.9), (40.0, 0.95)))
assert table({1: Trained(88, slow), 8: Trained(88, fast)}).splitlines()[2:] == [
    "| 1 | 88 | 0.5000 | 95.0 | 40.00 | 1.00 | 4.00 |",
    "| 8 | 11 | 0.5000 | 90.0 | 10.00 | 4.00 | 4.00 |",
]
"""


def test_the_parts_without_a_network():
    ok(sys.executable, "-c", PARTS, cwd=BENCHMARKS)


@pytest.mark.parametrize("script", ["slow_link", "comm_budget", "paper"])
def test_a_machine_without_the_tools_is_told_what_they_are(script):
    printed = ok(which("env"), "PATH=/nowhere", sys.executable, BENCHMARKS / f"{script}.py", "--quick")
    assert printed == "skipped: this needs Linux, root, and `ip` and `tc` (Debian: apt-get install iproute2)\n"


HOSTS = """
import subprocess, sys
from multiprocessing import get_context
from pathlib import Path
from hosts import address, hosts, missing, sent

def in_host(lab):
    lab.enter(1)
    assert sent() == int(Path("/proc/self/net/dev").read_text().split("eth0:")[1].split()[8])

def there(names):
    links = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout
    return [name for name in names if Path("/run/netns", name).exists() or f"{name}@" in links or f"{name} " in links]

assert address(1) == "10.77.0.2"
assert sent("lo: 5 0 0 0 0 0 0 0 6 0\\n  eth0:1 2 3 4 5 6 7 8 99 10\\n veth0: 0 0 0 0 0 0 0 0 7 0") == 99
for number in (0, 100):
    try:
        with hosts(number):
            raise AssertionError
    except ValueError as error:
        assert f"got {number}" in str(error)
if "real" in sys.argv:
    assert missing() is None
    try:
        with hosts(3) as lab:
            bridge = lab.names[0].split("-")[0]
            names = [bridge, *lab.names]
            assert there(names) == names and len(set(lab.names)) == 3
            lab.shape(50)
            lab.shape(0.5, rank=2)
            for name, rate in zip(lab.names, ("50Mbit", "50Mbit", "500Kbit")):
                for place in ("-n", name, "qdisc", "show", "dev", "eth0"), ("qdisc", "show", "dev", name):
                    shown = subprocess.run(["tc", *place], capture_output=True, text=True, check=True).stdout
                    assert f"rate {rate} " in shown, shown
            child = get_context("fork").Process(target=in_host, args=(lab,))
            child.start()
            child.join()
            assert child.exitcode == 0
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert there(names) == []
"""


def may_make_hosts():
    return bool(which("ip") and which("tc") and which("unshare")) and run("unshare", "--net", "true").code == 0


@pytest.mark.parametrize("how", ["arithmetic", "real"])
def test_hosts_are_set_up_and_removed_also_on_failure(how):
    if how == "real" and not may_make_hosts():
        pytest.skip("needs root, ip and tc")
    ok(sys.executable, "-c", HOSTS, how, cwd=BENCHMARKS)

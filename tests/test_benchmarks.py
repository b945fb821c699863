"""The benchmarks: those that need no particular machine run, and find what the documentation says; parts of others."""

import math
import sys
from shutil import which

import pytest

from tests.shell import ROOT, ok, run

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def rates():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import learning_rates

        yield learning_rates


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


FAST = """
import math
from accuracy import Run, data, time_to
from accuracy import table as of_accuracy
from network import CEILING, Cost, row, share, table_of_averages, theory

# Two workers send the model once, four 1.5 times; 128 elements of int8 have a scale of 16 bits, and 64 of int4.
assert theory(128_000, 2, "float32") == 512_000 and theory(128_000, 4, "float32") == 768_000
assert theory(128_000, 2, "bfloat16") == 256_000
assert theory(128_000, 2, "int8") == 130_000 and theory(128_000, 2, "int4") == 68_000

# Ratios are within a repeat, and then their median: 4 / 2, 9 / 3 and 1 / 1.
costs = {
    (100.0, "average", "float32"): [Cost(4.0, 100), Cost(9.0, 100), Cost(1.0, 100)],
    (100.0, "stream", "float32"): [Cost(2.0, 90), Cost(3.0, 90), Cost(1.0, 90)],
    (100.0, "bare", "float32"): [Cost(2.0, 50), Cost(3.0, 50), Cost(1.0, 50)],
    (100.0, "average", "int8"): [Cost(1.0, 26), Cost(1.0, 26), Cost(1.0, 26)],
    (100.0, "stream", "int8"): [Cost(1.0, 25), Cost(0.5, 25), Cost(2.0, 25)],
}
assert row(costs, 100.0, "float32") == (4.0, 2.0, 1.0, 100, 2.0, 1.0)
assert row(costs, 100.0, "int8") == (1.0, 1.0, None, 26, None, 0.26)
assert table_of_averages(2, costs, ["int8"]).endswith("| 2 | 100 | int8 | 1000 | 1.000 |  | 0.000 |  | 0.2600 |")
training = {(100, CEILING): [Cost(1.0, 0), Cost(2.0, 0)], (100, ("int8", 0)): [Cost(2.0, 0), Cost(2.0, 0)]}
assert share(training, 100, ("int8", 0)) == 0.75

# What the end of `fit` takes counts; 0.5 points less than DDP's end is 0.895.
ddp, ours = Run([10.0, 20.0, 30.0], [0.5, 0.896, 0.9], 0.0, 9.0), Run([1.0, 2.0, 3.0], [0.8, 0.7, 0.895], 0.5, 1.0)
assert time_to(ours, 0.895) == 3.5 and math.isinf(time_to(ours, 0.91)) and time_to(ddp, 0.895) == 20
assert of_accuracy({"DDP": 0.2, "ours": 0.1}, {"DDP": [ddp], "ours": [ours]}).splitlines()[2:] == [
    "| DDP | 0.2 | 90.00 | 20.00 | 1.0; median 1.0 | 30.00 | 9.0 |",
    "| ours | 0.1 | 89.50 | 3.50 | 5.7; median 5.7 | 3.50 | 1.0 |",
]
train, test = data()
assert (len(train), len(test)) == (1198, 599)
"""


BESIDE = """
import math
from peers import NETWORKS, Average, Costs, Job, Note, fastest, row, table, averages_the_same
from scale import HEADER, Fit, errors, fit, table_of_fit, table_of_many

# The slowest worker counts, the first average does not; ratios are within a repeat: 2 / 1, 6 / 2, 4 / 4.
def turn(*seconds, at=0.0):
    ones = [[Average(0.0, 9.0, 1 << 20), Average(1.0, s, 2 << 20), Average(1.0, s, 1 << 20)] for s in seconds]
    return {name: [Note(s, 10**6, averages, 0.25, 0.5, 0.9) for s, averages in zip(seconds, ones)] for name in NETWORKS}

ours, slow, peer = "ours", "accelerate `LocalSGD`", "torch `PeriodicModelAverager`"
costs = Costs(
    {ours: [turn(1.0, 2.0), turn(6.0, 5.0), turn(4.0, 4.0)], slow: [turn(7.0, 8.0)] * 3,
     peer: [turn(1.0, 0.5), turn(2.0, 2.0), turn(3.0, 4.0)]},
    {ours: turn(1.0, 1.0), slow: turn(1.0, 1.0), peer: turn(1.0, 1.0)},
    {"torchft `DiLoCo`": "none"},
)
assert fastest(costs, "8 large tensors", lambda way: True) == peer
assert fastest(costs, "8 large tensors", lambda way: way == slow) == slow
of = row(costs, "8 large tensors", ours)
assert (of.seconds, of.average, of.to_fastest, of.bytes, of.memory, of.accuracy) == (4.0, 4.0, 2.0, 10**6, 2 << 20, 0.9)
assert math.isclose(of.blocked, (9 + 2 * 4 + 2) / 3)
assert row(costs, "8 large tensors", peer).to_fastest == 1.0
assert averages_the_same(ours, "BatchNorm") and not averages_the_same(peer, "BatchNorm")
assert row(costs, "BatchNorm", ours).to_fastest is None  # no peer averages the buffers
printed = table(2, costs, ["BatchNorm"])
assert f"| {peer} | parameters | 2.00 | 5000.0 | 2000.0 |  | 1.0 | 2.0 | 0.25 (0.5) | 90.0 |" in printed, printed
assert printed.endswith("not measured: torchft `DiLoCo`: none")
sizes = {name: [parameter.numel() for parameter in make().parameters()] for name, make in NETWORKS.items()}
assert [len(of) for of in sizes.values()] == [8, 2000, 10]
assert [sum(of) for of in sizes.values()] == [2_176_010, 1_056_298, 303_114]

# What is timed is what averages: calls 4, 8, ... or 1, 5, ... of 4 in a round, or all.
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for first, due in (4, 2), (1, 3), (None, 10):
    job, calls = Job("BatchNorm", 0, 1, False, 4, True), []
    average = job.timed(lambda x, y=0: calls.append(x) or x + y, first)
    assert [average(x, y=1) for x in range(10)] == list(range(1, 11)) and calls == list(range(10))
    assert len(job.averages) == due and all(one.memory >= 0 for one in job.averages)
job.loop(job.network, job.sgd())
note = job.note()
assert note.seconds > 0 and note.spread == note.spread_of_buffers == 0 and 0.05 < note.accuracy < 0.9

known = Fit(alpha=0.002, beta=1e-7)
assert math.isclose(known.ring(4, 4e6), 6 * 0.002 + 1.5 * 0.4) and known.header(4) == 0.006
assert math.isclose(known.tree(1000, 1e6), 2 * 10 * 0.002 + 0.2)
seconds = {(size, mb): known.ring(size, mb * 1e6) for size in (2, 4, 8) for mb in (0.1, 1.0)}
found = fit(seconds | {(2, HEADER): 0.004})
assert math.isclose(found.alpha, 0.002) and math.isclose(found.beta, 1e-7)
off = errors(found, seconds | {(2, HEADER): 0.004})
assert math.isclose(off.pop((2, HEADER)), -0.5) and all(abs(error) < 1e-9 for error in off.values())
assert fit({(2, 1.0): 1.0, (2, 2.0): 3.0}).alpha == 0  # not below
printed = table_of_fit({place: [0.5 * s, s, 9 * s] for place, s in seconds.items()}, found, 80)
assert "| 4 | 1 | 162.0 | 81.0 to 1458.0 | 162.0 | +0 % |" in printed, printed
assert "(80.0 Mbit/s, of links of 80)" in printed and "fitted without 8 workers, these by 0.0 %" in printed, printed
assert "| 1 | 0 | 64 | 0.45 | 0.13 | 0.22 |" in table_of_many(found, [1], [0, 10])
"""


def test_the_parts_of_what_is_measured_on_links():
    ok(sys.executable, "-c", FAST, cwd=BENCHMARKS)


def test_the_parts_of_what_is_measured_beside_others():
    ok(sys.executable, "-c", BESIDE, cwd=BENCHMARKS)


@pytest.mark.soak
def test_what_is_measured_beside_others_runs():
    printed = ok(sys.executable, BENCHMARKS / "peers.py", "--quick", "--networks", "BatchNorm")
    ways = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    missing = [line for line in printed.splitlines() if line.startswith("not measured: ")]
    assert {"ours", "DDP", "torch `PeriodicModelAverager`"} <= set(ways), printed
    assert len(ways) + len(missing) == 1 + 12, printed


@pytest.mark.soak
def test_the_cost_of_more_workers_is_measured():
    if not may_make_hosts():
        pytest.skip("needs root, ip and tc")
    printed = ok(sys.executable, BENCHMARKS / "scale.py", "--quick")
    assert "| 4 | 0.5 | " in printed, printed
    assert "| 400 | 10 | 4096 | " in printed, printed


@pytest.mark.soak
@pytest.mark.parametrize("script", ["network", "accuracy"])
def test_what_is_measured_on_links_runs(script):
    if not may_make_hosts():
        pytest.skip("needs root, ip and tc")
    printed = ok(sys.executable, BENCHMARKS / f"{script}.py", "--quick")
    assert "float32, delay 31 |" in printed, printed


def test_the_parts_without_a_network():
    ok(sys.executable, "-c", PARTS, cwd=BENCHMARKS)


@pytest.mark.parametrize("script", ["slow_link", "comm_budget", "paper", "network", "accuracy", "scale"])
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


@pytest.mark.parametrize(
    ("at", "best", "asked"),
    [
        (1.0, 1.0, [1.0, 2.0, 0.5]),
        (2.0, 2.0, [1.0, 2.0, 4.0]),
        (8.0, 8.0, [1.0, 2.0, 4.0, 8.0, 16.0]),
        (0.25, 0.25, [1.0, 2.0, 0.5, 0.25, 0.125]),
        (1000.0, 16.0, [1.0, 2.0, 4.0, 8.0, 16.0]),  # no further than the limits
        (0.001, 0.125, [1.0, 2.0, 0.5, 0.25, 0.125]),
    ],
)
def test_the_search_climbs_to_the_best_multiple(rates, at, best, asked):
    seen = []

    def losses(multiple):
        seen.append(multiple)
        return [math.log2(multiple / at) ** 2 + noise for noise in (-0.1, 0.1)]

    assert rates.climb(losses, (1 / 8, 16)) == best
    assert seen == asked


def test_what_diverges_is_not_the_best(rates):
    assert rates.climb(lambda multiple: [math.inf if multiple > 1 else 1.0, 0.1], (1 / 2, 2)) == 1


def test_a_row_says_what_is_best_and_what_is_as_good(rates):
    scores = {
        multiple: [rates.Score(loss - 0.3, 10.0), rates.Score(loss + 0.3, 20.0)]
        for multiple, loss in ((0.5, 0.9), (1.0, 0.52), (2.0, 0.5), (4.0, 0.53), (8.0, 0.51))
    }
    assert rates.choice(scores, within=0.025) == (2, 1, 2)  # 8 is not next to those that are as good
    assert rates.choice(scores, within=0.0) == (2, 2, 2)
    assert rates.cells(scores, within=0.04) == ["2 (1 to 8)", "0.520; 15.00", "0.500; 15.00"]
    diverged = [rates.Score(math.inf, math.nan), rates.Score(0.4, 9.0)]
    assert rates.cells({1.0: diverged, 0.5: scores[0.5]}, within=0.0)[:2] == ["1/2", "diverged"]
    assert rates.cells({}, within=0.0) == ["-", "-", "-"]


def test_what_a_seed_does_to_all_rates_is_not_noise(rates):
    scores = {multiple: [rates.Score(loss, 1.0) for loss in (multiple, multiple + 5)] for multiple in (1.0, 2.0)}
    assert rates.noise([scores]) == 0
    scores[4.0] = [rates.Score(4.0, 1.0), rates.Score(9.2, 1.0)]  # the differences to multiple 1 are 3 and 3.2
    assert rates.noise([{1.0: scores[1.0], 4.0: scores[4.0]}]) == pytest.approx(0.1)
    scores[4.0][0] = rates.Score(math.inf, math.nan)
    assert rates.noise([scores]) == 0


def test_a_search_that_was_broken_off_goes_on(rates, tmp_path):
    def run(trial):
        return rates.Score(loss=abs(math.log2(trial.rate / 0.1)) + trial.seed, shown=1.0)

    found = rates.search("digits", quick=False, run=run)
    assert len(found) == 15 + 3
    for scores in found.values():
        assert list(scores) == [1.0, 2.0, 0.5]
        assert scores[2.0] == [rates.Score(1.0, 1.0), rates.Score(2.0, 1.0)]
    kept = rates.Kept(tmp_path / "kept")
    trial = rates.Trial("digits", rates.Setting(4, 8, "mean"), 0.1, True, 0, 8)
    assert kept.get(trial) is None
    kept.add(trial, rates.Score(math.inf, 2.0))
    again = rates.Kept(tmp_path / "kept")
    assert again.get(trial) == rates.Score(math.inf, 2.0)
    assert again.get(trial._replace(seed=1)) is None


def test_each_worker_takes_its_part_of_the_steps(rates):
    settings = rates.settings(quick=False)
    assert len(settings) == len(set(settings)) == 15
    assert set(rates.settings(quick=True)) <= set(settings)
    # Of 1,257 images 4 workers have 315 each, one of them twice; which are 21 batches of 15, in each of 8 passes.
    assert rates.steps_of(1257, rates.Setting(4, 8, "mean"), 15, 8) == 168
    trial = rates.Trial("digits", rates.Setting(4, 8, "post-local"), 0.1, True, 0, 8)
    assert rates.strategy(trial).schedule == rates.PostLocal(38, then=8)

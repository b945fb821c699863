"""Jobs that are interrupted and requeued by a real SLURM end as if nobody had interrupted them."""

import time

import torch

from tests.lab.preemption import ENV, SCRIPT, _file, soak, undisturbed, words


def test_ten_runs_interrupted_at_random_moments(lab):
    outcomes = soak(lab, range(10), at_once=4)
    assert sum(outcome.turns for outcome in outcomes) >= 8
    assert max(second for outcome in outcomes for second in outcome.seconds) < 10


def test_a_job_that_a_more_urgent_one_displaces_goes_on(lab, tmp_path):
    given = words("AtEnd", (0.1, 0.1), 0, tmp_path)
    options = [f"--output={tmp_path}/job.out", "--time=10"]
    job = lab.submit(*options, SCRIPT, *given, env=ENV)
    assert _file(lab, job, tmp_path / "step-0-0") is not None
    (tmp_path / "urgent").write_text("#!/bin/bash\nsleep 1\n")
    urgent = ["--partition=urgent", "--nodes=2", "--ntasks-per-node=1", "--exclusive", "--output=/dev/null"]
    at = time.time()
    lab.submit(*urgent, tmp_path / "urgent")
    assert _file(lab, job, tmp_path / "pid-1-0") is not None, (tmp_path / "job.out").read_text()
    saved = tmp_path / "hpc_ckpt_1.ckpt"
    assert saved.stat().st_mtime - at < 15
    assert lab.wait(job, 120) == "COMPLETED"
    assert [(tmp_path / f"digest-{rank}").read_text() for rank in range(2)] == [undisturbed("AtEnd")] * 2
    assert sorted(path.name for path in tmp_path.glob("hpc_ckpt_*")) == [saved.name]
    assert torch.load(saved, weights_only=True)["lightning_localsgd"]["workers"] == 2


def test_a_job_that_is_cancelled_saves_and_does_not_come_back(lab, tmp_path):
    job = lab.submit(f"--output={tmp_path}/job.out", SCRIPT, *words("AtEnd", (0.1, 0.1), 0, tmp_path), env=ENV)
    assert _file(lab, job, tmp_path / "step-0-0") is not None
    lab.controller.run("scancel", job)
    assert lab.wait(job, 60) == "CANCELLED"
    time.sleep(8)  # longer than a requeued one would wait
    assert lab.state(job) == "CANCELLED"
    assert [path.name for path in tmp_path.glob("hpc_ckpt_*")] == ["hpc_ckpt_1.ckpt"]

"""How a run starts, and what is refused before it does."""

import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import nn

from lightning_localsgd import DiLoCo, Every, LocalSGDStrategy, Mean, Schedule
from tests.models import Regression, loader, same, state_of, trainer
from tests.workers import run_workers


def test_defaults_that_a_newcomer_can_leave_alone():
    strategy = LocalSGDStrategy()
    assert strategy.schedule == Every(8)
    assert strategy.mean == Mean(bucket_mb=64)


@pytest.mark.parametrize("period", [0, -3, 1.0, "8", True, None])
def test_a_period_that_is_no_count_is_refused(period):
    with pytest.raises(ValueError, match=f"`period` must be an int of at least 1, got {period!r}"):
        LocalSGDStrategy(period=period)


def test_a_mean_that_is_none_is_refused():
    with pytest.raises(ValueError, match="`mean` must be a `Mean`, got 25"):
        LocalSGDStrategy(mean=25)


@pytest.mark.parametrize(
    "option", ["ddp_comm_hook", "ddp_comm_state", "model_averaging_period", "find_unused_parameters", "static_graph"]
)
def test_ddp_options_that_would_do_nothing_are_refused(option):
    with pytest.raises(TypeError, match=option):
        LocalSGDStrategy(**{option: None})


def test_sync_batchnorm_is_refused_by_the_trainer():
    with pytest.raises(ValueError, match="`sync_batchnorm` must be False with `LocalSGDStrategy`, got True"):
        trainer(2, 8, sync_batchnorm=True)


def fit(module, period):
    trainer(2, period).fit(module, loader([4, 4]))


class WithSyncBatchNorm(Regression):
    def __init__(self):
        super().__init__()
        self.extra = nn.SyncBatchNorm(3)


class Sharded(Regression):
    def configure_optimizers(self):
        from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when it is imported

        return ZeroRedundancyOptimizer(self.parameters(), optimizer_class=torch.optim.SGD, lr=0.1)


class OtherModels(Regression):
    def __init__(self):
        super().__init__()
        if os.environ["LOCAL_RANK"] == "1":
            self.extra = nn.Linear(1, 1)


class Wrong(Schedule):
    def length(self, progress):
        return 0


@pytest.mark.parametrize(
    ("module", "period", "error", "says"),
    [
        (
            WithSyncBatchNorm,
            8,
            "ValueError",
            "must not contain SyncBatchNorm with `LocalSGDStrategy`, got one as 'extra'",
        ),
        (Sharded, 8, "ValueError", "communicates in every step and needs a `period` of 1, got Every(period=8)"),
        (OtherModels, 8, "RuntimeError", "the parameters and buffers of rank 1 differ from those of rank 0"),
        (Regression, Wrong(), "ValueError", "`Wrong.length` must return an int of at least 1 or `Epochs`, got 0"),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit")  # by torch's own distributed optimizers
def test_bad_input_is_the_same_error_on_all_ranks(module, period, error, says):
    ends = run_workers(build_and_fit, 2, module, period, catch=True, timeout=60)
    assert {end.type for end in ends} == {error}
    assert all(says in end.message for end in ends)


def build_and_fit(module, period):
    trainer(2, LocalSGDStrategy(period) if isinstance(period, Schedule) else period).fit(module(), loader([4, 4]))


def fit_lbfgs():
    trainer(2, 1).fit(Regression("lbfgs"), loader([4, 4]))


def test_lbfgs_is_refused_while_gradients_are_averaged():
    ends = run_workers(fit_lbfgs, 2, catch=True, timeout=60)
    assert {end.type for end in ends} == {"ValueError"}
    assert all("LBFGS needs rounds of at least 2 steps, got a `period` of 1" in end.message for end in ends)


def alone(*means):
    told = []
    for mean, outer in means:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(1, LocalSGDStrategy(3, mean=mean, outer=outer)).fit(Regression(), loader([4]))
        told.append([str(one.message) for one in caught if "nothing to average" in str(one.message)])
    return told


def test_one_worker_is_told_that_it_sends_nothing():
    wire, delay = Mean(wire="int8"), Mean(delay=2)
    (told,) = run_workers(alone, 1, (Mean(), None), (wire, None), (delay, None), (delay, DiLoCo()), (wire, DiLoCo()))
    assert [len(one) for one in told] == [0, 1, 1, 0, 1]
    assert told[1] == [f"One worker has nothing to average, and sends nothing: {wire!r} has no effect."]


def test_the_registered_name():
    assert "localsgd" in StrategyRegistry
    assert isinstance(
        Trainer(strategy="localsgd", accelerator="cpu", devices=1, logger=False).strategy, LocalSGDStrategy
    )
    LocalSGDStrategy.register_strategies(StrategyRegistry)  # a second time does nothing
    assert "ddp" in StrategyRegistry
    assert type(Trainer(strategy="ddp", accelerator="cpu", devices=1, logger=False).strategy) is DDPStrategy


def test_the_strategy_pickles():
    again = pickle.loads(pickle.dumps(LocalSGDStrategy(Every(3), mean=Mean(8))))
    assert (again.schedule, again.mean) == (Every(3), Mean(8))


def all_start_equal(period):
    model = Regression(norm=True)
    model.net[1].running_mean.fill_(float(os.environ["LOCAL_RANK"]))
    model.frozen = nn.Parameter(torch.full((2,), float(os.environ["LOCAL_RANK"])), requires_grad=False)
    model._ddp_params_and_buffers_to_ignore = ["net.0.weight"]
    run = trainer(2, period, limit_train_batches=0)
    run.fit(model, loader([1, 1]))
    return state_of(model)


@pytest.mark.parametrize("period", [1, 4])
def test_all_workers_start_from_rank_0s_model(period):
    first, second = run_workers(all_start_equal, 2, period)
    assert same([first, second])
    assert first["frozen"].tolist() == [0, 0]
    assert first["net.1.running_mean"].abs().max() == 0


SCRIPT = """
import sys, torch
from lightning.pytorch import Trainer
from lightning_localsgd import LocalSGDStrategy
from tests.models import Regression, loader, trainer, rank

if __name__ == "__main__":
    model = Regression("adamw", norm=True)
    run = trainer(2, LocalSGDStrategy(period=4, start_method=sys.argv[1]), enable_progress_bar=False)
    run.fit(model, loader([6, 6]))
    if run.strategy.start_method != "popen" or run.is_global_zero:
        torch.save(model.state_dict(), sys.argv[2])
""".replace("run.strategy.start_method", "sys.argv[1]")


def reference_state():
    model = Regression("adamw", norm=True)
    trainer(2, 4).fit(model, loader([6, 6]))
    return state_of(model)


@pytest.fixture(scope="module")
def expected():
    return run_workers(reference_state, 2)[0]


@pytest.mark.parametrize("start", ["popen", "spawn", "fork", "torchrun"])
def test_every_way_to_start_the_processes(start, tmp_path, expected):
    script, result = tmp_path / "train.py", tmp_path / "model.pt"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), start, str(result)]
    if start == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", str(script), "popen", str(result)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert same([torch.load(result, weights_only=True), expected])

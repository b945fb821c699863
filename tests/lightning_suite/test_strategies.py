"""What the strategy itself shows: how it is started, what it says of itself, what it refuses."""

import json
import subprocess
import sys

import pytest
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy

from lightning_localsgd import LocalSGDStrategy
from tests.lightning_suite.compare import PERIODS, Setting, catch, loader, same_as_ddp
from tests.lightning_suite.recorder import WithData
from tests.models import Regression, state_of
from tests.workers import run_workers

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.parametrize("how", ["popen", "fork", "torchrun"])
def test_started_from_a_script(how, tmp_path):
    seen = launch(how, tmp_path, None, *PERIODS)
    for rank in (0, 1):
        ddps = seen[f"None-{rank}"]
        assert ddps == [rank, 2, 4, ["val_loss"], rank == 0]
        assert seen[f"1-{rank}"] == seen[f"2-{rank}"] == ddps
    assert seen["1-main"] == seen["None-main"]  # down to the weights and metrics that come back from the workers
    assert seen["2-main"][0] == seen["None-main"][0]


def test_spawned(tmp_path):  # which takes long: every process imports everything
    seen = launch("spawn", tmp_path, 2)
    for rank in (0, 1):
        assert seen[f"2-{rank}"] == [rank, 2, 4, ["val_loss"], rank == 0]
    state, weights, metrics = seen["2-main"]
    assert "FINISHED" in state
    assert list(metrics) == ["val_loss"]
    assert len(weights) == len(WithData().state_dict())


def launch(how, path, *periods):
    """Run a script that fits with each period and return what it wrote."""
    start = TORCHRUN if how == "torchrun" else []
    script = ["-m", "tests.lightning_suite.launched", how, str(path), *map(json.dumps, periods)]
    subprocess.run([sys.executable, *start, *script], check=True, timeout=150, capture_output=True)
    return {file.stem: json.loads(file.read_text()) for file in path.iterdir()}


@same_as_ddp
def test_what_a_strategy_says_of_itself(setting):
    model = WithData()
    seen = []

    def ask():
        strategy = trainer.strategy
        seen.append(
            {
                "kind": (isinstance(strategy, DDPStrategy), isinstance(strategy, ParallelStrategy)),
                "ranks": (strategy.global_rank, strategy.local_rank, strategy.node_rank),
                "sizes": (strategy.world_size, strategy.num_nodes, strategy.num_processes),
                "zero": strategy.is_global_zero,
                "device": str(strategy.root_device),
                "sampler": strategy.distributed_sampler_kwargs,
                "backend": strategy.process_group_backend,
                "distributed": trainer._accelerator_connector.is_distributed,
                "launcher": type(strategy.launcher).__name__,
                "module": strategy.lightning_module is model,
                "optimizers": len(strategy.optimizers),
                "gives": (strategy.handles_gradient_accumulation, strategy.restore_checkpoint_after_setup),
                "whole": (strategy.lightning_restore_optimizer, isinstance(strategy.checkpoint_io, TorchCheckpointIO)),
            }
        )

    trainer = setting.trainer()
    model.on_train_start = model.on_train_end = model.on_validation_start = ask
    trainer.fit(model)
    ask()
    return seen


@same_as_ddp
def test_what_is_refused(setting):
    return [
        catch(setting.trainer, devices=3, accelerator="nowhere"),
        catch(setting.trainer().fit, torch.nn.Linear(1, 1)),
        catch(setting.trainer().validate, Regression(), ckpt_path="nowhere.ckpt", dataloaders=loader(1)),
    ]


@same_as_ddp
def test_evaluation_alone_starts_from_rank_0s_weights(setting):
    model = WithData()  # which every rank makes differently
    trainer = setting.trainer()
    seen = [trainer.validate(model, verbose=False), trainer.test(model, verbose=False), trainer.predict(model)]
    return {"seen": seen, "model": state_of(model)}


def lbfgs(period):
    trainer = Setting(period, "/nowhere").trainer(max_epochs=1)
    if period == 1:
        return catch(trainer.fit, Regression("lbfgs"), loader())
    calls = []
    model = Regression("lbfgs")
    model.on_after_backward = lambda: calls.append(trainer.global_step)
    trainer.fit(model, loader())
    return trainer.global_step, len(calls) > trainer.global_step


def test_lbfgs():
    assert run_workers(lbfgs, 2, 2) == [(4, True)] * 2
    for kind, message in run_workers(lbfgs, 2, 1):  # DDP hangs if one worker's line search ends before another's
        assert kind == "ValueError"
        assert "LBFGS" in message


def test_is_a_ddp_strategy_by_another_name():
    assert issubclass(LocalSGDStrategy, DDPStrategy)
    assert LocalSGDStrategy.strategy_name == "localsgd"

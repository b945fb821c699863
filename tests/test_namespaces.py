"""`lightning.pytorch` and `pytorch_lightning`: two class trees, one implementation, the same runs bit for bit."""

import ast
import os
import pickle
import re
import signal
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import lightning.pytorch
import pytest
import pytorch_lightning
import torch

import lightning_localsgd
from tests.models import loader, network, optimizer, rank, same, state_of
from tests.workers import run_workers

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
OURS = {"lightning.pytorch": "lightning_localsgd", "pytorch_lightning": "lightning_localsgd.pytorch_lightning"}
FABRIC = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}
ROOT = Path(__file__).parent.parent

# as for `lightning` in pyproject.toml
pytestmark = pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning")


def strategy_of(package):
    return import_module(OURS[package]).LocalSGDStrategy


def trainer_of(package, strategy, **options):
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    chosen = {"devices": 2, "max_epochs": 1, "enable_checkpointing": False, "use_distributed_sampler": False}
    return import_module(package).Trainer(strategy=strategy, **(quiet | chosen | options))


class Model:
    """A module of either package, but for its base class."""

    def __init__(self):
        super().__init__()
        self.net = network()
        self.rises = 0.0

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = ((self.net(x) - y) ** 2).mean()
        if self.current_epoch == 1:
            self.log("loss", loss, on_step=True, sync_dist=True)  # which is warned about
        return loss

    def validation_step(self, batch, batch_idx):
        self.rises += 1
        self.log("score", self.rises, sync_dist=True)
        self.log("weight", self.net[0].weight.sum().double(), sync_dist=True)

    def configure_optimizers(self):
        return optimizer("adamw", self.parameters())


class LightningModel(Model, lightning.pytorch.LightningModule):
    pass


class PyTorchLightningModel(Model, pytorch_lightning.LightningModule):
    pass


def model_of(package):
    return {"lightning.pytorch": LightningModel, "pytorch_lightning": PyTorchLightningModel}[package]()


def trajectory_of(package):
    class Trajectory(import_module(package).Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.states.append(state_of(pl_module))

        def on_validation_end(self, trainer, pl_module):
            metrics = {name: trainer.callback_metrics[name] for name in ("score", "weight")}
            self.states.append(state_of(pl_module) | metrics)

    trajectory = Trajectory()
    trajectory.states = []
    return trajectory


def train_and_resume(package, folder):
    """Validate when the data of both has ended, save, be stopped by EarlyStopping, and go on from the first file."""
    callbacks = import_module(f"{package}.callbacks")
    ends, said = [], []
    for resumes in (False, True):
        trajectory = trajectory_of(package)
        stop, save = callbacks.EarlyStopping("score", patience=2), callbacks.ModelCheckpoint(folder, save_top_k=-1)
        run = trainer_of(
            package,
            strategy_of(package)(period=3),
            max_epochs=5,
            callbacks=[trajectory, stop, save],
            enable_checkpointing=True,
            val_check_interval=6,  # which rank 1 does not reach
            num_sanity_val_steps=0,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.fit(
                model_of(package),
                loader([7, 5]),
                loader([1, 1]),
                ckpt_path=next(Path(folder).glob("epoch=0*")) if resumes else None,
            )
        said.append([str(warning.message) for warning in caught])
        ends.append({"states": trajectory.states, "step": run.global_step, "epochs": run.current_epoch})
    return ends, said


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What two workers see, with each package."""
    folders = {package: str(tmp_path_factory.mktemp(package)) for package in PACKAGES}
    return {package: run_workers(train_and_resume, 2, package, folder) for package, folder in folders.items()}


@pytest.mark.parametrize("resumed", [0, 1])
def test_both_packages_train_the_same_bit_for_bit(runs, resumed):
    lightning, pytorch_lightning = ([ends[resumed] for ends, _ in runs[package]] for package in PACKAGES)
    for one, other in zip(lightning, pytorch_lightning, strict=True):  # on each rank
        assert (one["step"], one["epochs"]) == (other["step"], other["epochs"])
        assert one["epochs"] < 5  # the score has risen twice: `EarlyStopping` has ended it
        assert len(one["states"]) == len(other["states"])
        assert all(same(pair) for pair in zip(one["states"], other["states"], strict=True))
    assert same([rank["states"][-1] for rank in lightning])  # the last validation is of the mean of both


def test_warnings_are_said_once_with_each_package(runs):
    for ends in runs.values():
        (first, resumed), (first_of_1, resumed_of_1) = (said for _, said in ends)
        for said in (first, resumed, first_of_1, resumed_of_1):
            assert sum("self.log('loss', on_step=True, sync_dist=True)` makes the workers wait" in s for s in said) == 1
        assert sum("Rank 0 reached a validation in mid-epoch" in text for text in first) == 3  # one for each
        assert not any("Rank 0 reached a validation" in text for text in first_of_1)  # rank 0 speaks for all


def stop_by_sigterm():
    package = "pytorch_lightning"
    trajectory = trajectory_of(package)

    class Sends(import_module(package).Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if rank() == 1 and batch_idx == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    run = trainer_of(package, strategy_of(package)(period=4), callbacks=[trajectory, Sends()])
    try:
        run.fit(model_of(package), loader([12, 12]))
    except SystemExit as error:
        return f"{type(error).__module__}.{type(error).__name__}", len(trajectory.states)


def test_sigterm_stops_all_at_the_same_step():
    assert run_workers(stop_by_sigterm, 2) == [("pytorch_lightning.utilities.exceptions.SIGTERMException", 4)] * 2


SCRIPT = """
import sys, torch
from tests.test_namespaces import loader, model_of, strategy_of, trainer_of

if __name__ == "__main__":
    package, start, path = sys.argv[1:]
    model = model_of(package)
    run = trainer_of(package, strategy_of(package)(period=3, start_method=start))
    run.fit(model, loader([4, 4]))
    if run.is_global_zero:
        torch.save(model.state_dict(), path)
"""


@pytest.mark.parametrize("start", ["popen", "spawn"])
def test_the_processes_are_started_by_either(start, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for package in PACKAGES:
        command = [sys.executable, str(script), package, start, str(tmp_path / package)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
    assert same([torch.load(tmp_path / package, weights_only=True) for package in PACKAGES])


@pytest.mark.parametrize(
    ("trainers", "ours", "told"),
    [
        ("lightning.pytorch", "pytorch_lightning", "for `lightning` take `lightning_localsgd.LocalSGDStrategy`"),
        (
            "pytorch_lightning",
            "lightning.pytorch",
            "for `pytorch_lightning` take `lightning_localsgd.pytorch_lightning.LocalSGDStrategy`",
        ),
    ],
)
def test_a_trainer_of_the_other_package_says_what_to_import(trainers, ours, told):
    with pytest.raises(ValueError, match=re.escape(f"<LocalSGDStrategy for `{ours.split('.')[0]}`; {told}>")):
        trainer_of(trainers, strategy_of(ours)(period=3))


@pytest.mark.parametrize("package", PACKAGES)
def test_each_strategy_is_its_packages_own(package):
    strategy = strategy_of(package)(lightning_localsgd.Every(3), mean=lightning_localsgd.Mean(8))
    assert isinstance(strategy, import_module(f"{package}.strategies").DDPStrategy)
    again = pickle.loads(pickle.dumps(strategy))
    assert type(again) is strategy_of(package)
    assert (again.schedule, again.mean) == (lightning_localsgd.Every(3), lightning_localsgd.Mean(8))
    named = trainer_of(package, "localsgd", devices=1)
    assert type(named.strategy) is strategy_of(package)


@pytest.mark.parametrize("package", PACKAGES)
def test_each_command_line_knows_its_own(package, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning calls
    cli = import_module(f"{package}.cli").LightningCLI(
        import_module(f"{package}.demos.boring_classes").BoringModel,
        run=False,
        seed_everything_default=False,
        args={
            "trainer": {
                "accelerator": "cpu",
                "devices": 2,
                "logger": False,
                "strategy": {
                    "class_path": f"{OURS[package]}.LocalSGDStrategy",
                    "init_args": {
                        "period": 5,
                        "checkpoint_io": {"class_path": f"{package}.plugins.io.AsyncCheckpointIO"},
                        "cluster_environment": f"{FABRIC[package]}.plugins.environments.LightningEnvironment",
                    },
                },
            }
        },
    )
    strategy = cli.trainer.strategy
    assert type(strategy) is strategy_of(package)
    assert strategy.schedule == lightning_localsgd.Every(5)
    assert type(strategy.checkpoint_io) is import_module(f"{package}.plugins.io").AsyncCheckpointIO


def test_only_one_module_imports_pytorch_lightning():
    """So that nobody pays for the package that they do not use."""
    for path in Path(lightning_localsgd.__file__).parent.glob("*.py"):
        imports = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in imports if isinstance(node, ast.ImportFrom)}
        theirs = any(name.split(".")[0] in ("pytorch_lightning", "lightning_fabric") for name in names)
        assert theirs == (path.name == "pytorch_lightning.py"), path

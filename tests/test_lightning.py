"""The private places of Lightning that we touch: each is there, is called, and is put back."""

import ast
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import __version__ as version
from lightning.pytorch.callbacks import Callback

from lightning_localsgd import _lightning
from tests.models import Regression, Trajectory, loader, rank, same, state_of, trainer
from tests.workers import run_workers


def attributes(run):
    loop = run.fit_loop
    owners = (loop, loop.epoch_loop, loop.epoch_loop.val_loop, run._signal_connector)
    return [{name for name, value in vars(owner).items() if callable(value)} for owner in owners]


AFTER_BATCHES = ("checks_validation", "steps_schedulers")


def fit_and_trace():
    calls = []

    class Traces(Callback):
        def setup(self, trainer, pl_module, stage):
            for name in ("starts_epoch", "ends_epoch", "validates", "ends_fit", "has_data_somewhere", *AFTER_BATCHES):
                self.trace(trainer.strategy, name)

        def trace(self, strategy, name):
            method = getattr(strategy, name)

            def traced(*args):
                calls.append(name)
                return method(*args)

            setattr(strategy, name, traced)

    class Lenient(Regression):
        allow_zero_length_dataloader_with_multiple_devices = True

    run = trainer(2, 4, callbacks=[Traces()], max_epochs=2)
    before = attributes(run)
    model = Lenient()
    model.allow_zero_length_dataloader_with_multiple_devices = True
    run.fit(model, loader([2, 2]), loader([1, 1]))
    assert attributes(run) == before
    return calls


def test_each_wrapped_method_is_called_and_put_back():
    epoch = ["starts_epoch", "validates", "ends_epoch"]
    for calls in run_workers(fit_and_trace, 2):
        # the first `validates` is the sanity check
        once = [name for name in calls if name not in AFTER_BATCHES]
        assert once == ["validates", "has_data_somewhere", *epoch, *epoch, "ends_fit"]
        assert [calls.count(name) for name in AFTER_BATCHES] == [4, 4 * 2 + 2 * 2]


def without(owner, name, attach):
    """Call ``attach`` with a trainer whose part ``owner`` lacks ``name``, as another version of Lightning might."""
    run = trainer(1, 4)
    parts = {"loop": run.fit_loop, "epoch_loop": run.fit_loop.epoch_loop, "val_loop": run.fit_loop.epoch_loop.val_loop}
    part = parts.get(owner, run._signal_connector)
    kind = type(part)
    hidden = type(kind.__name__, (kind,), {name: property()})  # raises AttributeError when it is read
    part.__class__ = hidden
    before = attributes(run)
    attach(run)
    return before, attributes(run)


@pytest.mark.parametrize(
    ("owner", "name", "told"),
    [
        ("loop", "on_advance_start", "start each epoch together"),
        ("epoch_loop", "run", "answer each other when the data of one has ended"),
        ("val_loop", "run", "validate the mean of their models"),
        ("loop", "on_run_end", "end the fit together"),
    ],
)
def test_a_lightning_without_these_methods_is_refused(owner, name, told):
    def attach(run):
        says = f"^lightning.pytorch {version} has no `{name}`, which the workers need to {told}: install a version"
        with pytest.raises(RuntimeError, match=says):
            _lightning.attach(run, run.strategy)

    before, after = without(owner, name, attach)
    assert after == before  # nothing is left half wrapped


@pytest.mark.parametrize(
    ("owner", "name", "told"),
    [
        ("loop", "setup_data", "wait for each other when one has no data at all"),
        ("signals", "_sigterm_notifier_fn", "stop together on SIGTERM"),
        ("signals", "_slurm_sigusr_handler_fn", "requeue together on SLURM's signal"),
    ],
)
def test_a_lightning_without_these_methods_is_warned_about(owner, name, told):
    def attach(run):
        says = f"^lightning.pytorch {version} has no `{name}`: the workers will not {told}"
        with pytest.warns(UserWarning, match=says):
            _lightning.attach(run, run.strategy).close()

    before, after = without(owner, name, attach)
    assert after == before


def test_nothing_is_lost_without_a_broadcast_before_each_batch():
    def attach(run):
        _lightning.attach(run, run.strategy).close()  # a warning would be an error

    without("epoch_loop", "_broadcast_sigterm_tensor", attach)


PACKAGE = sorted(Path(_lightning.__file__).parent.parent.rglob("*.py"))
PRIVATE_MODULES = re.compile(r"(lightning\.pytorch|pytorch_lightning)\.(trainer\.(call|connectors)|loops)")
LOOPS = {"fit_loop", "epoch_loop", "val_loop"}
# The strategy's own, from `DDPStrategy`.
INHERITED = {"_ddp_kwargs", "_layer_sync", "_timeout", "_setup_model", "_process_group_backend"}
# Python's, torch's and torchmetrics'.
NOT_LIGHTNINGS = {
    "_asdict",
    "_getframe",
    "_replace",
    "_version",
    "_foreach_copy_",
    "_foreach_norm",
    "_update_count",
    "_computed",
    "_last_lr",
}


def nodes_of(path):
    return list(ast.walk(ast.parse(path.read_text())))


def names_defined(nodes):
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self" and isinstance(node.ctx, ast.Store):
            yield node.attr


def private_parts(nodes, known):
    for node in nodes:
        if isinstance(node, ast.Attribute):
            private = node.attr.startswith("_") and not node.attr.endswith("__")
            if (private and node.attr not in known) or node.attr in LOOPS:
                yield node.attr
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            names = [f"{module}.{alias.name}" if module else alias.name for alias in node.names]
            yield from filter(PRIVATE_MODULES.match, names)


def test_only_one_package_touches_lightnings_private_parts():
    known = {name for path in PACKAGE for name in names_defined(nodes_of(path))} | INHERITED | NOT_LIGHTNINGS
    for path in PACKAGE:
        found = list(private_parts(nodes_of(path), known))
        assert not found or path.parent.name == "_lightning", (path.name, found)


def raise_and_look():
    class Fails(Regression):
        def training_step(self, batch, batch_idx):
            raise ZeroDivisionError

    run = trainer(1, 4)
    before = attributes(run)
    with pytest.raises(ZeroDivisionError):
        run.fit(Fails(), loader([2]))
    return attributes(run) == before


def test_an_exception_puts_everything_back():
    assert run_workers(raise_and_look, 1) == [True]


class Signals(Callback):
    """Sends its own process a signal after some batches."""

    def __init__(self, who, signum, after=2):
        self.who, self.signum, self.after = who, signum, after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if rank() in self.who and batch_idx + 1 == self.after:
            os.kill(os.getpid(), self.signum)


def fit_and_signal(who, lengths, period):
    trajectory, raised = Trajectory(), None
    run = trainer(len(lengths), period, callbacks=[trajectory, Signals(who, signal.SIGTERM)])
    model = Regression()
    try:
        run.fit(model, loader(lengths))
    except SystemExit as error:
        raised = type(error).__name__
    return raised, len(trajectory.states), state_of(model)


@pytest.mark.parametrize(
    ("who", "lengths", "period", "steps"),
    [
        ([0], [12, 12], 4, [4, 4]),  # told with the header after step 4
        ([1], [12, 12], 4, [4, 4]),
        ([0, 1], [12, 12], 4, [4, 4]),
        ([0], [12, 12], 1, [3, 3]),  # told with the header of the third step
        ([1], [12, 12], 1, [3, 3]),
        ([0], [12, 2], 4, [4, 2]),  # rank 1 is waiting at the end of its data
        ([1], [12, 2], 4, [4, 2]),
        ([0, 1], [3, 3], 50, [3, 3]),  # told at the end of the epoch
        ([0], [3], 50, [2]),
    ],
)
def test_sigterm_to_any_rank_stops_all_at_the_same_step(who, lengths, period, steps):
    ends = run_workers(fit_and_signal, len(lengths), who, lengths, period, timeout=60)
    assert [(raised, taken) for raised, taken, _ in ends] == [("SIGTERMException", taken) for taken in steps]


def fit_and_requeue(folder, who):
    os.environ.update(
        SLURM_NTASKS="2", SLURM_PROCID=os.environ["LOCAL_RANK"], SLURM_LOCALID=os.environ["LOCAL_RANK"],
        SLURM_NODEID="0", SLURM_NNODES="1", SLURM_NTASKS_PER_NODE="2", SLURM_JOB_NAME="train", SLURM_JOB_ID="77",
        PATH=f"{folder}:{os.environ['PATH']}",
    )  # fmt: skip
    trajectory = Trajectory()
    run = trainer(2, 4, callbacks=[Signals(who, signal.SIGUSR1), trajectory], default_root_dir=folder)
    model = Regression()
    run.fit(model, loader([8, 8]))
    return len(trajectory.states), state_of(model)


@pytest.mark.parametrize("who", [[0], [1]])
def test_slurms_signal_saves_once_outside_of_the_handler_and_requeues(who, tmp_path):
    scontrol = tmp_path / "scontrol"  # a real SLURM is the lab's; here its command only notes that it was called
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    scontrol.chmod(0o755)
    ends = run_workers(fit_and_requeue, 2, str(tmp_path), who, timeout=60)
    assert [steps for steps, _ in ends] == [8, 8]
    assert same([state for _, state in ends])
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    (saved,) = Path(tmp_path).glob("*.ckpt")
    assert torch.load(saved, weights_only=True)["global_step"] == 4

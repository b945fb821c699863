"""Validation, checkpoints and logging see the consensus and leave the training as it was, bit for bit."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_localsgd import LocalSGDStrategy
from tests.models import Constant, Regression, Trajectory, loader, rank, same, state_of, trainer
from tests.versions import WEIGHTS_ONLY, since
from tests.workers import run_workers

# Resuming here goes without the callback that saved.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Plain(Regression):
    """Draws no random number in training; BatchNorm, so that buffers differ between workers too."""

    def __init__(self):
        super().__init__("momentum", norm=True)
        self.register_buffer("validations", torch.zeros((), dtype=torch.int64))

    def on_validation_end(self):
        self.validations += 1


class WithDropout(Regression):
    def __init__(self):
        super().__init__("adamw")
        self.net.insert(2, nn.Dropout(0.3))


def fit(module, period, validate, checkpoint, log, folder, workers=2):
    torch.manual_seed(rank())
    model, trajectory = module(), Trajectory()
    callbacks = [trajectory]
    if checkpoint:
        callbacks.append(ModelCheckpoint(f"{folder}/saved", every_n_train_steps=3, save_top_k=-1))
    run = trainer(
        workers,
        period,
        max_epochs=2,
        callbacks=callbacks,
        enable_checkpointing=checkpoint,
        logger=CSVLogger(folder) if log else False,
        log_every_n_steps=1,
        default_root_dir=folder,
        val_check_interval=2 if validate else None,
        num_sanity_val_steps=0,
    )
    run.fit(model, loader([7] * workers), loader([2] * workers) if validate else None)
    for state in trajectory.states:
        state.pop("validations", None)
    return trajectory.states, [param.detach() for param in model.parameters()], getattr(model, "validations", None)


@pytest.mark.parametrize("period", [1, 4, 100])
def test_validating_saving_and_logging_do_not_change_the_trajectory(period, tmp_path):
    quiet = run_workers(fit, 2, Plain, period, False, False, False, str(tmp_path / "quiet"))
    busy = run_workers(fit, 2, Plain, period, True, True, True, str(tmp_path / "busy"))
    for (quiet_states, quiet_end, _), (busy_states, busy_end, validations) in zip(quiet, busy, strict=True):
        assert len(quiet_states) == len(busy_states) == 14
        for one, other in zip(quiet_states, busy_states, strict=True):
            assert same([one, other])
        assert all(torch.equal(one, other) for one, other in zip(quiet_end, busy_end, strict=True))
        assert validations == 6  # what the user's own hook wrote into a buffer stays
    assert len(list((tmp_path / "busy" / "saved").iterdir())) == 4


def test_with_dropout_one_worker_equals_one_device_with_validation_in_both(tmp_path):
    ours, _, _ = run_workers(fit, 1, WithDropout, 4, True, True, False, str(tmp_path / "ours"), 1)[0]
    plain, _, _ = run_workers(fit, 1, WithDropout, "auto", True, True, False, str(tmp_path / "plain"), 1)[0]
    for one, other in zip(ours, plain, strict=True):
        assert same([one, other])


def look(period, steps):
    """Look at the consensus after every step; return what every rank saw, and its own weights before and after."""
    seen = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            before = state_of(pl_module)
            with trainer.strategy.consensus():
                first = state_of(pl_module)
                with trainer.strategy.consensus():
                    assert same([first, state_of(pl_module)])
                assert same([first, state_of(pl_module)])
            assert same([before, state_of(pl_module)])
            seen.append((before, first))

    model = Plain()
    run = trainer(3, period, callbacks=[Looks()])
    with run.strategy.consensus():  # outside of fit: nothing to do
        pass
    run.fit(model, loader([steps] * 3))
    return seen


@pytest.mark.parametrize("period", [1, 4])
def test_the_consensus_is_the_mean_of_all_replicas(period):
    ranks = run_workers(look, 3, period, 6)
    for views in zip(*ranks, strict=True):
        own, consensus = zip(*views, strict=True)
        assert same(list(consensus))
        for name, value in consensus[0].items():
            if value.is_floating_point():
                mean = torch.stack([state[name].double() for state in own]).mean(0)
                torch.testing.assert_close(value.double(), mean, atol=1e-6, rtol=0)


class SeesConsensus(Regression):
    """Keeps the weights that validation and its hooks see."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_validation_start(self):
        self.seen.append(("start", state_of(self.net)))

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.seen.append(("step", state_of(self.net)))

    def on_validation_end(self):
        self.seen.append(("end", state_of(self.net)))


class SeesEnd(Callback):
    def on_train_end(self, trainer, pl_module):
        pl_module.seen.append(("train_end", state_of(pl_module.net)))


def validate_in_fit():
    model = SeesConsensus()
    run = trainer(2, 50, callbacks=[SeesEnd()], num_sanity_val_steps=0, val_check_interval=2)
    run.fit(model, loader([4, 4]), loader([1, 1]))
    return model.seen, state_of(model.net)


def test_validation_and_the_end_of_the_fit_see_one_model_everywhere():
    (first, end), (second, other_end) = run_workers(validate_in_fit, 2)
    assert [name for name, _ in first] == ["start", "step", "end"] * 2 + ["train_end"]
    for (_, one), (_, other) in zip(first, second, strict=True):
        assert same([one, other])
    assert same([first[0][1], first[1][1], first[2][1]])
    assert not same([first[0][1], first[3][1]])
    assert same([first[-1][1], end, other_end])


class Averages(Callback):
    """Keeps a moving average of this worker's own weights and writes it into the module in the end, as EMA does."""

    def __init__(self):
        self.mean = None

    def on_train_batch_end(self, trainer, pl_module, *_):
        now = [param.detach().clone() for param in pl_module.parameters()]
        self.mean = now if self.mean is None else [0.5 * a + 0.5 * b for a, b in zip(self.mean, now, strict=True)]

    def on_train_end(self, trainer, pl_module):
        for param, mean in zip(pl_module.parameters(), self.mean, strict=True):
            param.data.copy_(mean)


def fit_with_moving_average():
    model, averages = Regression(), Averages()
    trainer(2, 4, callbacks=[averages]).fit(model, loader([6, 6]))
    return [param.detach() for param in model.parameters()], averages.mean


def test_what_callbacks_write_at_the_end_is_averaged_too():
    (first, mean), (second, other_mean) = run_workers(fit_with_moving_average, 2)
    for one, other, a, b in zip(first, second, mean, other_mean, strict=True):
        assert not torch.equal(a, b)
        assert torch.equal(one, other)
        torch.testing.assert_close(one, (a + b) / 2)


class Synchronizes(Callback):
    def __init__(self, at):
        self.at = at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx + 1 in self.at:
            trainer.strategy.synchronize()
            with trainer.strategy.consensus(), pytest.raises(RuntimeError, match="inside `consensus"):
                trainer.strategy.synchronize()


def fit_and_synchronize(period, at):
    model, trajectory = Constant(), Trajectory()
    trainer(2, period, callbacks=[Synchronizes(at), trajectory]).fit(model, loader([7, 7]))
    return trajectory.column("weight")


def test_synchronize_is_an_ordinary_end_of_the_round():
    # period 3, gradients 1 and 2: synchronized after step 2 at -3, the next rounds end after steps 5 and 8
    first, second = run_workers(fit_and_synchronize, 2, 3, [2])
    assert first == [-1, -3, -4, -5, -7.5, -8.5, -9.5]
    assert second == [-2, -3, -5, -7, -7.5, -9.5, -11.5]


def test_synchronize_while_gradients_are_averaged_has_nothing_to_do():
    first, second = run_workers(fit_and_synchronize, 2, 1, [2])
    assert first == second == [-1.5 * t for t in range(1, 8)]


def save_and_load(folder, period):
    model = Regression("adamw", norm=True)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    consensus = []

    class Keeps(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 5:
                with trainer.strategy.consensus():
                    consensus.append(state_of(pl_module))

    run = trainer(2, period, callbacks=[saver, Keeps()], enable_checkpointing=True)
    run.fit(model, loader([8, 8]))
    return consensus[0]


@pytest.mark.parametrize("period", [1, 4])
def test_a_checkpoint_is_a_plain_one_of_the_consensus(period, tmp_path):
    first, second = run_workers(save_and_load, 2, str(tmp_path), period)
    assert same([first, second])
    path = tmp_path / "step=6.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert same([checkpoint["state_dict"], first])
    assert checkpoint["global_step"] == 6
    loaded = Regression.load_from_checkpoint(path, optimizer="adamw", norm=True, weights_only=True)
    assert same([state_of(loaded), first])
    alone = trainer(1, "auto", max_steps=10)
    alone.fit(Regression("adamw", norm=True), loader([8]), ckpt_path=path, **WEIGHTS_ONLY)
    assert alone.global_step == 10


def averages_at(folder, period, resume):
    """Return the steps after which all weights are equal."""
    model, trajectory = Regression("momentum"), Trajectory()
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    callbacks = [trajectory] if resume else [trajectory, saver]
    run = trainer(2, period, callbacks=callbacks, enable_checkpointing=not resume, max_epochs=2, max_steps=16)
    run.fit(model, loader([10, 10]), ckpt_path=f"{folder}/step=6.ckpt" if resume else None, **WEIGHTS_ONLY)
    return trajectory.states, run.strategy._last.clock.state_dict()


def test_resuming_starts_a_new_round(tmp_path):
    run_workers(averages_at, 2, str(tmp_path), 4, False)
    (first, clock), (second, other) = run_workers(averages_at, 2, str(tmp_path), 4, True)
    equal = [7 + i for i, states in enumerate(zip(first, second, strict=True)) if same(list(states))]
    assert equal == [10, 14]  # saved after step 6 with period 4
    assert clock == other
    assert (clock["start"], clock["round"]) == (16, 5)  # the rounds that ended at 4, 6, 10, 14 and with the fit


def test_resuming_does_not_go_back_to_averaging_gradients(tmp_path):
    run_workers(averages_at, 2, str(tmp_path), 4, False)
    (_, clock), _ = run_workers(averages_at, 2, str(tmp_path), 1, True)
    assert clock["averages_models"] == 1


def fail_and_save(folder):
    class Fails(Regression):
        def training_step(self, batch, batch_idx):
            if rank() == 1 and batch_idx == 2:
                raise ZeroDivisionError("on purpose")
            return super().training_step(batch, batch_idx)

    saver = ModelCheckpoint(folder, save_on_exception=True)
    strategy = LocalSGDStrategy(period=4)
    trainer(2, strategy, callbacks=[saver], enable_checkpointing=True).fit(Fails(), loader([8, 8]))


@since("2.5.3")  # `save_on_exception`
def test_a_rank_that_raises_goes_without_a_collective_and_the_others_hear_of_it(tmp_path):
    ends = run_workers(fail_and_save, 2, str(tmp_path), catch=True, timeout=60)
    assert ends[1].type == "ZeroDivisionError"
    assert ends[0].type == "RuntimeError"
    assert "another worker has left" in ends[0].message

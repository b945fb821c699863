"""An average kept by Lightning's `WeightAveraging` is one over the consensus, the same on every worker."""

import os

import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lightning_localsgd import LocalSGDStrategy, Schedule
from tests.models import Constant, Regression, Trajectory, batch, loader, network, optimizer, same, state_of, trainer
from tests.reference import pr_sgd
from tests.test_communication import difference
from tests.workers import run_workers

if not hasattr(callbacks, "WeightAveraging"):
    pytest.skip("WeightAveraging is there since lightning 2.6", allow_module_level=True)

# Resuming here goes without the callback that saved.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Doubling(Schedule):
    def length(self, progress):
        return 2**progress.round


class AtEpochEnds(callbacks.WeightAveraging):
    """The plain mean of the models at the end of each epoch."""

    def should_update(self, step_idx=None, epoch_idx=None):
        return epoch_idx is not None


def ema(**options):
    return callbacks.EMAWeightAveraging(decay=0.5, **options)


class Keeps(Callback):
    """Keeps the average as it is when training ends."""

    def on_train_end(self, trainer, pl_module):
        (average,) = (each for each in trainer.callbacks if isinstance(each, callbacks.WeightAveraging))
        self.updates = average._average_model.n_averaged.item()
        self.average = state_of(average._average_model.module)


def constant(average, period, lengths, epochs=1):
    model, keeps = Constant(), Keeps()
    average = average()
    before = set(vars(average))
    strategy = LocalSGDStrategy(period)
    trainer(len(lengths), strategy, callbacks=[average, keeps], max_epochs=epochs).fit(model, loader(lengths))
    assert set(vars(average)) - before == {"log", "log_dict"}  # which Lightning leaves; ours are gone
    return keeps.average["weight"].item(), model.weight.item(), keeps.updates


def every_second_from_four():
    return ema(update_every_n_steps=2, update_starting_at_step=3)


@pytest.mark.parametrize(
    ("average", "period", "lengths", "epochs", "expected", "updates"),
    [
        # Gradients 1 and 2, lr 1: the consensus after t steps is -1.5 t. Each round ends with as many updates as it had
        # steps, the first of all a copy. Period 3, 8 steps: -4.5; then -9 + 4.5 / 2^3 = -8.4375; then, at the end of
        # the fit, -12 + 3.5625 / 2^2.
        (ema, 3, [8, 8], 1, -11.109375, 8),
        (ema, 3, [4, 4], 2, -11.109375, 8),  # rounds run on over the end of an epoch
        # The fifth and the seventh step only: a copy of -9 after the second round, then halfway to -12.
        (every_second_from_four, 3, [8, 8], 1, -10.5, 2),
        # Rank 1's data ends after one step (see test_uneven.py): the consensus is -2, -4 and -5 after steps 2, 4 and 5.
        # -2; then -4 + 2 / 2^2 = -3.5; then halfway to -5.
        (ema, 2, [5, 1], 1, -4.25, 5),
        # Rounds of 1, 2 and 4 steps: a copy of -1.5; -4.5 + 3 / 2^2 = -3.75; -10.5 + 6.75 / 2^4.
        (ema, Doubling(), [7, 7], 1, -10.078125, 7),
        # In mid-round at the end of each epoch: the mean of -6, -12 and -18.
        (AtEpochEnds, 3, [4, 4], 3, -12.0, 3),
        # Uneven, 3 steps and 1 an epoch. First epoch: -2 and -2 at step 2, then rank 0 alone to -3. Second epoch: -4
        # and -4 at step 4, then rank 0 alone to -6.
        (AtEpochEnds, 2, [3, 1], 2, -4.5, 2),
    ],
)  # fmt: skip
def test_on_paper(average, period, lengths, epochs, expected, updates):
    for ended in run_workers(constant, 2, average, period, lengths, epochs):
        assert ended == (expected, expected, updates)


STEPS, PERIOD, DECAY = 11, 4, 0.9


def train(norm):
    model, keeps = Regression("momentum", norm=norm), Keeps()
    average = callbacks.EMAWeightAveraging(decay=DECAY)
    trainer(2, PERIOD, callbacks=[average, keeps]).fit(model, loader([STEPS, STEPS]))
    return keeps.average, state_of(model), keeps.updates


@pytest.mark.parametrize("norm", [False, True])
def test_it_equals_the_serial_algorithm(norm):
    def loss(model, worker, step):
        x, y = batch(worker, step - 1)
        return ((model(x) - y) ** 2).mean()

    models = pr_sgd(network(norm=norm), 2, PERIOD, STEPS, lambda model: optimizer("momentum", model.parameters()), loss)
    average, due = None, 0
    for step, (consensus, _) in enumerate(models, start=1):
        due += 1
        if step % PERIOD == 0 or step == STEPS:
            for _ in range(due):
                new = {name: value.detach().clone() for name, value in consensus.state_dict().items()}
                average = {name: DECAY * average[name] + (1 - DECAY) * new[name] for name in new} if average else new
            due = 0

    (mine, model, updates), (other, other_model, _) = run_workers(train, 2, norm)
    assert updates == STEPS
    assert same([mine, other, model, other_model])
    for name, value in average.items():
        if mine[f"net.{name}"].is_floating_point():
            torch.testing.assert_close(mine[f"net.{name}"], value, atol=1e-5, rtol=0)


class Sees(Regression):
    """Keeps the model that is validated."""

    def __init__(self):
        super().__init__("momentum", norm=True)
        self.net = network(seed=int(os.environ["LOCAL_RANK"]), norm=True)
        self.seen = []

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.seen.append(state_of(self.net))


def train_and_validate(busy):
    model, trajectory = Sees(), Trajectory()
    average = [callbacks.EMAWeightAveraging(decay=DECAY, device="cpu")] if busy else []
    run = trainer(2, 5, callbacks=[trajectory, *average], max_epochs=2, val_check_interval=2 if busy else None)
    run.fit(model, loader([6, 6]), loader([1, 1]) if busy else None)
    return trajectory.states, model.seen


def test_validation_sees_the_average_and_the_training_is_as_without_it():
    quiet, busy = run_workers(train_and_validate, 2, False), run_workers(train_and_validate, 2, True)
    for (states, _), (busy_states, _) in zip(quiet, busy, strict=True):
        assert all(same([one, other]) for one, other in zip(states, busy_states, strict=True))
    (_, seen), (_, other_seen) = busy
    assert len(seen) == 7  # the sanity check, and three in each epoch
    # In the first round, before the first update, it is still the first model: rank 0's.
    assert same([seen[1], seen[2], state_of(network(0, norm=True))])
    for one, other in zip(seen, other_seen, strict=True):
        assert same([one, other])
    assert not same(seen[2:4])  # the round has ended at step 5, and the next one at step 10
    assert same(seen[3:5])
    assert not same(seen[4:6])


def test_it_adds_nothing_to_what_is_sent():
    average = callbacks.WeightAveraging()
    for calls in difference(Regression, (), 4, (4, 12), callbacks=[average]):
        assert calls == {"gloo:all_gather": 2, "gloo:all_reduce": 2}  # two rounds more


def save_and_resume(folder, save_at, steps, checkpoint):
    model, keeps = Constant(), Keeps()

    def strategy():
        return LocalSGDStrategy(4, checkpoint=checkpoint)

    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=save_at, save_top_k=-1)
    run = trainer(2, strategy(), callbacks=[ema(), saver], max_steps=save_at, max_epochs=-1, enable_checkpointing=True)
    run.fit(model, loader([steps, steps]))
    run = trainer(2, strategy(), callbacks=[ema(), keeps], max_steps=steps, max_epochs=-1)
    run.fit(Constant(), loader([steps, steps]), ckpt_path=f"{folder}/step={save_at}.ckpt", weights_only=True)
    return keeps.average["weight"].item(), keeps.updates


@pytest.mark.filterwarnings("ignore:The run does not go on exactly")  # the data here have no state
@pytest.mark.parametrize(("checkpoint", "average"), [("consensus", -11.0625), ("exact", -11.625)])
def test_a_checkpoint_in_mid_round_keeps_the_average_and_the_consensus(checkpoint, average, tmp_path):
    # Period 4: a copy of -6 at step 4, saved at 6, where the consensus is -9 and two updates are due. A new round
    # starts there with them, and two more come with -12 at the end of the fit: -12 + (3 + 3 / 2^2) / 2^2. Where the
    # round goes on, all four are done at step 8: -12 + 6 / 2^4.
    assert run_workers(save_and_resume, 2, str(tmp_path), 6, 8, checkpoint) == [(average, 8)] * 2
    saved = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    assert saved["state_dict"]["weight"] == -6
    assert saved["current_model_state"]["weight"] == -9
    assert saved["averaging_state"]["n_averaged"] == 4


class Two(Constant):
    """Two optimizers step in each batch, so that Lightning counts two steps where we count one."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for each in (first, second):
            each.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        first.step()
        second.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=rate) for rate in (1.0, 0.0)]


def save_and_resume_two(folder):
    from_seventh, keeps = ema(update_starting_at_step=6), Keeps()
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=12, save_top_k=-1)
    run = trainer(2, 4, callbacks=[from_seventh, saver], max_steps=12, max_epochs=-1, enable_checkpointing=True)
    run.fit(Two(), loader([8, 8]))
    run = trainer(2, 4, callbacks=[ema(update_starting_at_step=6), keeps], max_steps=16, max_epochs=-1)
    run.fit(Two(), loader([8, 8]), ckpt_path=f"{folder}/step=12.ckpt", weights_only=True)
    return keeps.average["weight"].item(), keeps.updates


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_the_index_of_a_step_counts_as_rounds_do_and_survives_a_resume(tmp_path):
    # Resumed after six steps (twelve for Lightning): the seventh and eighth update, by -12, the first of them a copy.
    assert run_workers(save_and_resume_two, 2, str(tmp_path)) == [(-12, 2)] * 2


def begin_with_ddp(folder):
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    thirds = ema(update_every_n_steps=3)
    run = trainer(2, DDPStrategy(), callbacks=[thirds, saver], max_steps=4, max_epochs=-1, enable_checkpointing=True)
    run.fit(Constant(), loader([8, 8]))
    thirds, keeps = ema(update_every_n_steps=3), Keeps()
    run = trainer(2, 3, callbacks=[thirds, keeps], max_steps=8, max_epochs=-1)
    run.fit(Constant(), loader([8, 8]), ckpt_path=f"{folder}/step=4.ckpt", weights_only=True)
    return keeps.average["weight"].item(), keeps.updates


def test_it_goes_on_from_a_checkpoint_of_ddp(tmp_path):
    # Updates after steps 1 and 4: a copy of -1.5, then halfway to -6. Resumed there, the first round ends after step 7,
    # with the update of that step: halfway to -10.5.
    assert run_workers(begin_with_ddp, 2, str(tmp_path)) == [(-7.125, 3)] * 2


def alone(strategy):
    model, keeps = Regression("momentum"), Keeps()
    trainer(1, strategy, callbacks=[ema(), keeps]).fit(model, loader([6]))
    return keeps.average, state_of(model)


def test_one_worker_is_plain_training():
    ((average, model),) = run_workers(alone, 1, 4)
    ((plain_average, plain_model),) = run_workers(alone, 1, "auto")
    assert same([average, plain_average, model, plain_model])

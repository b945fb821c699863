"""Outer steps and optimizer states: on paper, by identities, where they apply, and what they cost."""

import itertools
import math
import warnings
from copy import deepcopy
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_localsgd import (
    AverageState,
    DiLoCo,
    Every,
    LocalSGDStrategy,
    Mean,
    Outer,
    PostLocal,
    RoundLR,
    Schedule,
    SlowMo,
    Stages,
    TimeVarying,
)
from lightning_localsgd.anchor import Anchor
from lightning_localsgd.clock import Clock
from lightning_localsgd.replica import pieces
from tests.models import Constant, Regression, Trajectory, loader, rank, same, state_of, trainer
from tests.versions import since
from tests.workers import run_workers

SGD = torch.optim.SGD


def fit(module, arguments, strategies, steps=12, **options):
    """Train with each strategy; return the trajectory of each."""
    found = []
    for strategy in strategies:
        model, trajectory = module(*arguments), Trajectory()
        run = trainer(2, deepcopy(strategy), callbacks=[trajectory], max_epochs=-1, max_steps=steps, **options)
        run.fit(model, loader([steps] * 2))
        found.append([*trajectory.states, state_of(model)])
    return found


def paper(strategies, steps):
    return [[state["weight"].item() for state in states] for states in fit(Constant, (), strategies, steps)]


def test_outer_steps_on_paper():
    # Gradients 1 and 2 at learning rate 1, period 2: each round moves the mean by -3 from its anchor.
    half = LocalSGDStrategy(2, outer=Outer(partial(SGD, lr=0.5)))  # -1.5 a round
    nesterov = LocalSGDStrategy(2, outer=DiLoCo(lr=1.0, momentum=0.5))  # v = 3, 4.5; steps 3 + 1.5, 3 + 2.25
    slow = LocalSGDStrategy(2, outer=SlowMo(alpha=1.0, beta=0.5))  # u = 3, 4.5
    first, second = run_workers(paper, 2, [half, nesterov, slow], 4)
    assert first == [[-1, -1.5, -2.5, -3, -3], [-1, -4.5, -5.5, -9.75, -9.75], [-1, -3, -4, -7.5, -7.5]]
    assert second == [[-2, -1.5, -3.5, -3, -3], [-2, -4.5, -6.5, -9.75, -9.75], [-2, -3, -5, -7.5, -7.5]]


def test_degenerate_outer_steps_are_the_mean():
    outers = [None, SlowMo(alpha=1.0, beta=0.0), Outer(partial(SGD, lr=1.0)), DiLoCo(lr=1.0, momentum=0.0)]
    strategies = [LocalSGDStrategy(4, outer=outer) for outer in outers]
    for found in run_workers(fit, 2, Regression, ("momentum", True), strategies):
        for states in found[1:]:
            for one, other in zip(found[0], states, strict=True):
                torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
        assert not same([found[0][0], found[0][4]])


@pytest.mark.parametrize("warmup", [12, 99])
def test_a_warm_up_to_the_end_is_ddp(warmup):
    strategies = [LocalSGDStrategy(PostLocal(warmup, then=4), outer=DiLoCo()), DDPStrategy()]
    for ours, theirs in run_workers(fit, 2, Regression, ("adamw",), strategies):
        for one, other in zip(ours, theirs, strict=True):
            assert same([one, other])


class Models(Schedule):
    """Rounds of one step that average models: the first one is said to be longer, and ended by hand."""

    def length(self, progress):
        return 2 if progress.round == 0 else 1


class EndsFirst(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 1:
            trainer.strategy.synchronize()


def momentum(strategies, steps):
    found = []
    for strategy in strategies:
        model, trajectory = Regression("momentum"), Trajectory()
        callbacks = [EndsFirst(), trajectory] if isinstance(strategy, LocalSGDStrategy) else [trajectory]
        run = trainer(2, deepcopy(strategy), callbacks=callbacks, max_epochs=-1, max_steps=steps)
        run.fit(model, loader([steps] * 2))
        found.append(trajectory.states)
    return found


def test_models_and_momentum_averaged_after_each_step_are_ddp():
    average, keep = LocalSGDStrategy(Models(), optimizer_state="average"), LocalSGDStrategy(Models())
    for both, theirs, models in run_workers(momentum, 2, [average, DDPStrategy(), keep], 12):
        for one, other in zip(both, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
        # The step is linear in gradients and momenta, so that the mean of the models is the same either way.
        torch.testing.assert_close(models[-1], theirs[-1], atol=1e-6, rtol=0)


def test_keep_average_and_reset_differ_in_longer_rounds():
    strategies = [LocalSGDStrategy(4, optimizer_state=state) for state in ("keep", "average", "reset")]
    for found in run_workers(fit, 2, Regression, ("adamw",), strategies):
        ends = [states[-1]["net.0.weight"] for states in found]
        distances = [float((ends[i] - ends[j]).abs().max()) for i, j in ((0, 1), (0, 2), (1, 2))]
        assert min(distances) > 1e-4


# ------------------------------------------------------------------------------------------------------ optimizer state


class Halves(Regression):
    """Its second half is used by rank 1 alone, whose optimizer alone makes a state for it."""

    def __init__(self, name="adamw"):
        super().__init__(name)
        self.extra = nn.Linear(6, 1)
        nn.init.zeros_(self.extra.weight)
        nn.init.zeros_(self.extra.bias)

    def loss(self, batch):
        x, y = batch
        return ((self.net(x) + (self.extra(x) if rank() == 1 else 0) - y) ** 2).mean()


def states_after(state, steps, module=Halves):
    model = module()
    run = trainer(2, LocalSGDStrategy(4, optimizer_state=state), max_epochs=-1, max_steps=steps)
    seen = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step in (3, 4):
                (one,) = trainer.optimizers
                seen.append([deepcopy(dict(one.state.get(p, {}))) for p in pl_module.parameters()])

    run.callbacks.append(Looks())
    run.fit(model, loader([steps] * 2))
    return seen


def test_a_worker_without_a_state_gets_the_mean_of_the_others():
    (before, after), (other_before, other_after) = run_workers(states_after, 2, "average", 5)
    assert before[-1] == {}  # rank 0 has never used it
    assert other_before[-1]["step"] == 3
    for mine, others in zip(after, other_after, strict=True):
        assert mine.keys() == others.keys()
        assert all(torch.equal(mine[key], others[key]) for key in mine)
    assert after[-1]["step"] == 4
    assert after[-1]["exp_avg"].abs().sum() > 0


def test_moments_with_periods_of_their_own():
    one, other = run_workers(states_after, 2, AverageState({"exp_avg": 1, "exp_avg_sq": 2}), 5)
    assert torch.equal(one[1][0]["exp_avg"], other[1][0]["exp_avg"])
    assert not torch.equal(one[1][0]["exp_avg_sq"], other[1][0]["exp_avg_sq"])
    assert one[1][-1] == {}  # half a state would be taken for a whole one
    assert other[1][-1]["step"] == 4


def raises(strategies, module=Regression, arguments=("sgd",)):
    found = []
    for strategy in strategies:
        with pytest.raises((ValueError, RuntimeError)) as error, warnings.catch_warnings():
            trainer(2, strategy, max_steps=9, max_epochs=-1).fit(module(*arguments), loader([9] * 2))
        found.append(str(error.value))
    return found


NOTHING = [
    ("average", 'must be "keep" where no optimizer keeps moments to average'),
    ("reset", 'must be "keep" where no optimizer keeps a state to reset'),
    (AverageState({"exp_avg": 1}), "no optimizer keeps `exp_avg` to average"),
]


@pytest.mark.parametrize(("state", "told"), NOTHING)
def test_a_state_that_is_not_there_is_said(state, told):
    for found in run_workers(raises, 2, [LocalSGDStrategy(2, optimizer_state=state)]):
        assert told in found[0]


def uneven(states):
    found = []
    for state in states:
        model = Regression("momentum")
        run = trainer(2, LocalSGDStrategy(2, optimizer_state=state), max_epochs=2)
        run.fit(model, loader([2, 9]))
        found.append(state_of(model))
    return found


def test_a_worker_that_takes_no_step_in_a_round_has_no_state_to_reset():
    for one, other in zip(
        *run_workers(uneven, 2, ["reset", "average", AverageState({"momentum_buffer": 2})]), strict=True
    ):
        assert same([one, other])


class Overflows(Constant):
    """The first three steps are skipped by the GradScaler on all workers."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (math.inf if batch_idx < 3 else 1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0, momentum=0.5)


def skips(states):
    found = []
    for state in states:
        model = Overflows()
        precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024))
        run = trainer(2, LocalSGDStrategy(2, optimizer_state=state), plugins=[precision])
        run.fit(model, loader([5, 5]))
        found.append(model.weight.item())
    return found


def test_a_round_in_which_all_steps_were_skipped_has_no_state_yet():
    # Steps 4 and 5 by -1 and -2: the mean -1.5 at step 4, then momenta of 1.5 and 3, or of 1 + 1.5 / 2 and 2 + 1.5 / 2.
    reset, average = -1.5 - 1.5, -1.5 - (1.75 + 2.75) / 2
    assert run_workers(skips, 2, ["reset", "average"]) == [[reset, average]] * 2


# -------------------------------------------------------------------------------------------------------- where applied


class Looks(Callback):
    """Keeps the weight in validation, in checkpoints and after `synchronize`."""

    def __init__(self, folder):
        self.folder, self.seen = folder, []

    def on_validation_start(self, trainer, pl_module):
        self.seen.append(("validation", pl_module.weight.item()))

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 2:
            trainer.save_checkpoint(f"{self.folder}/two.ckpt")
        if trainer.global_step == 6:
            trainer.strategy.synchronize()
            self.seen.append(("synchronize", pl_module.weight.item()))


class Validates(Constant):
    def validation_step(self, batch, batch_idx): ...


def look(folder):
    looks, model = Looks(folder), Validates()
    strategy = LocalSGDStrategy(4, outer=Outer(partial(SGD, lr=0.5)))
    run = trainer(2, strategy, callbacks=[looks], max_epochs=-1, max_steps=7, val_check_interval=3)
    run.fit(model, loader([7] * 2), loader([1] * 2))
    return looks.seen, model.weight.item()


def test_validation_and_checkpoints_see_the_mean_without_the_outer_step(tmp_path):
    # Rounds of 4, 2 (ended by hand at 6) and 1 steps (the end): the mean moves by -1.5 a step, the anchor by half of
    # that. After step 3 the mean is -4.5; after 4 the start is -3; after 6 the mean is -6 and the start, which the
    # validation after it sees, -4.5; after 7 it is -4.5 - 0.75.
    for seen, end in run_workers(look, 2, str(tmp_path)):
        assert seen[-3:] == [("validation", -4.5), ("synchronize", -4.5), ("validation", -4.5)]
        assert end == -5.25
    assert torch.load(tmp_path / "two.ckpt", weights_only=True)["state_dict"]["weight"] == -3


def save_after(folder):
    model = Constant()
    strategy = LocalSGDStrategy(2, outer=DiLoCo(lr=1.0, momentum=0.5))
    run = trainer(2, strategy, max_epochs=-1, max_steps=4)
    run.fit(model, loader([8] * 2))
    run.save_checkpoint(f"{folder}/after.ckpt")
    more = trainer(2, LocalSGDStrategy(2, outer=DiLoCo(lr=1.0, momentum=0.5)), max_epochs=-1, max_steps=6)
    more.fit(Constant(), loader([8] * 2), ckpt_path=f"{folder}/after.ckpt")
    return more.lightning_module.weight.item()


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_the_outer_momentum_is_in_a_checkpoint_after_the_fit(tmp_path):
    # v = 3, 4.5, 5.25: steps of 4.5, 5.25 and 3 + 2.625.
    assert run_workers(save_after, 2, str(tmp_path)) == [-4.5 - 5.25 - 5.625] * 2


def go_on_with_another(folder):
    first = trainer(2, LocalSGDStrategy(2, outer=DiLoCo()), max_epochs=-1, max_steps=4)
    first.fit(Constant(), loader([8] * 2))
    first.save_checkpoint(f"{folder}/after.ckpt")
    second = trainer(2, LocalSGDStrategy(2, outer=SlowMo()), max_epochs=-1, max_steps=6)
    if rank() == 0:
        with pytest.warns(UserWarning, match="the state of another outer step, DiLoCo, which is left behind"):
            second.fit(Constant(), loader([8] * 2), ckpt_path=f"{folder}/after.ckpt")
    else:
        second.fit(Constant(), loader([8] * 2), ckpt_path=f"{folder}/after.ckpt")
    return second.global_step


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_the_state_of_another_outer_step_is_left_behind_aloud(tmp_path):
    assert run_workers(go_on_with_another, 2, str(tmp_path)) == [6, 6]


class WithRate(Constant):
    def __init__(self):
        super().__init__()
        self.lr = 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def go_on_with_a_finder(folder):
    def run(steps, *callbacks):
        strategy = LocalSGDStrategy(2, outer=DiLoCo(lr=1.0, momentum=0.5))
        return trainer(2, strategy, max_epochs=-1, max_steps=steps, callbacks=list(callbacks), default_root_dir=folder)

    first = run(4)
    first.fit(WithRate(), loader([8] * 2))
    first.save_checkpoint(f"{folder}/after.ckpt")
    found = []
    for callbacks in ([], [LearningRateFinder(num_training_steps=5, early_stop_threshold=None, update_attr=False)]):
        trajectory = Trajectory()
        run(8, trajectory, *callbacks).fit(WithRate(), loader([8] * 2), ckpt_path=f"{folder}/after.ckpt")
        found.append(trajectory.column("weight"))
    return found


@since("2.5.3")  # before, one step is trained after the search, with DDP also
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_search_for_the_learning_rate_leaves_the_outer_state_as_it_was(tmp_path):
    for plain, after_a_search in run_workers(go_on_with_a_finder, 2, str(tmp_path)):
        assert plain == after_a_search[:4]  # Lightning counts its steps from 0 again, with any strategy
        assert len(plain) == 4


class Unfreezes(Regression):
    """Its first layer is frozen until step 6, in mid-round."""

    def __init__(self):
        super().__init__("sgd")
        self.net[0].requires_grad_(False)

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step == 5:
            self.net[0].requires_grad_(True)

    def configure_optimizers(self):
        return torch.optim.SGD([{"params": self.net[0].parameters()}, {"params": self.net[2].parameters()}], lr=0.1)


def unfreeze(outers, frozen):
    found = []
    for outer in outers:
        model, trajectory = Unfreezes(), Trajectory()
        strategy = LocalSGDStrategy(4, outer=outer, mean=Mean(frozen=frozen))
        run = trainer(2, strategy, callbacks=[trajectory], max_epochs=-1, max_steps=16)
        run.fit(model, loader([16] * 2))
        found.append([state["net.0.weight"] for state in trajectory.states])
    return found


@pytest.mark.parametrize("frozen", ["send", "skip"])
def test_what_is_unfrozen_in_a_round_takes_the_mean_and_then_the_outer_step(frozen):
    outers = [Outer(partial(SGD, lr=0.0)), DiLoCo(), SlowMo(0.5, 0.5)]
    ranks = run_workers(unfreeze, 2, outers, frozen)
    for stays, diloco, slow in ranks:
        assert torch.equal(stays[0], stays[4])  # frozen
        assert not torch.equal(stays[4], stays[7])  # the mean of what was trained since step 6
        assert torch.equal(stays[7], stays[11])  # an outer step of 0 goes back to the anchor
        assert not torch.equal(diloco[7], diloco[11])
        assert not torch.equal(slow[7], slow[11])
    for one, other in zip(*ranks, strict=True):
        assert all(torch.equal(one[t], other[t]) for t in (3, 7, 11, 15))


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"outer": DiLoCo}, "`outer` must be an `Outer`, `DiLoCo`, `SlowMo` or None"),
        ({"optimizer_state": "drop"}, "`optimizer_state` must be .* got 'drop'"),
        ({"period": 1, "outer": DiLoCo()}, "`outer` has no effect: leave it at its default, got DiLoCo"),
        ({"period": 1, "optimizer_state": "average"}, "`optimizer_state` has no effect"),
        ({"period": Every(1), "optimizer_state": AverageState()}, "`optimizer_state` has no effect"),
        ({"period": PostLocal(9, then=1), "outer": DiLoCo()}, "`outer` has no effect"),
        (
            {"period": Stages({0: 1, 9: PostLocal(9, then=1)}), "optimizer_state": "reset"},
            "`optimizer_state` has no effect",
        ),
        ({"period": PostLocal(9, then=1), "mean": Mean(frozen="skip")}, "`mean` has no effect"),
    ],
)
def test_options_without_sense_or_effect_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        LocalSGDStrategy(**options)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Outer(5), "`optimizer` must make an optimizer from a list of tensors, got 5"),
        (lambda: Outer(list), r"`optimizer` must return a `torch.optim.Optimizer`, got \["),
        (lambda: Outer(torch.optim.LBFGS), "`optimizer` must step without a closure, which LBFGS needs"),
        (lambda: DiLoCo(lr=0), "`lr` must be a number above 0, got 0"),
        (lambda: DiLoCo(momentum=1.0), "`momentum` must be a number of at least 0 and below 1, got 1.0"),
        (lambda: SlowMo(alpha=-1.0), "`alpha` must be a number above 0, got -1.0"),
        (lambda: SlowMo(beta=-0.1), "`beta` must be a number of at least 0 and below 1, got -0.1"),
        (lambda: AverageState(0), "`every` must be an int of at least 1, got 0"),
        (lambda: AverageState({}), "`every` must name a moment"),
        (lambda: AverageState({"exp_avg": 1.5}), "`every` must be an int of at least 1, got 1.5"),
    ],
)
def test_outer_steps_refuse_what_is_no_setting(make, told):
    with pytest.raises(ValueError, match=told):
        make()


class WithRoundLR(Regression):
    def __init__(self, sequences, interval):
        super().__init__()
        self.sequences, self.interval = sequences, interval

    def configure_optimizers(self):
        made = super().configure_optimizers()
        return {
            "optimizer": made,
            "lr_scheduler": {"scheduler": RoundLR(made, TimeVarying()), "interval": self.interval},
        }


class ScheduleFree(Regression):
    def configure_optimizers(self):
        return pytest.importorskip("schedulefree").SGDScheduleFree(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("strategy", "module", "arguments", "told"),
    [
        (LocalSGDStrategy(4, outer=DiLoCo(offload=True)), Regression, (), "`offload` must be False where the model is"),
        (LocalSGDStrategy(Stages({0: 1, 9: 4}), outer=DiLoCo()), Regression, (), "An outer step needs rounds of at"),
        (LocalSGDStrategy(TimeVarying(), outer=DiLoCo()), Regression, (), "An outer step needs rounds of at least 2"),
        (LocalSGDStrategy(TimeVarying()), WithRoundLR, (None, "epoch"), 'must have the interval "step"'),
        (LocalSGDStrategy(4), WithRoundLR, (None, "step"), "must be of the strategy's `period`"),
        (LocalSGDStrategy(4, outer=DiLoCo()), ScheduleFree, (), "keep no second model of their own"),
        (LocalSGDStrategy(4, optimizer_state="reset"), ScheduleFree, (), "keeps a part of the model there"),
        (LocalSGDStrategy(PostLocal(4, then=4)), Regression, ("lbfgs",), "LBFGS needs rounds of at least 2 steps"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_on_all_workers(strategy, module, arguments, told):
    found = run_workers(raises, 2, [strategy], module, arguments)
    assert all(told in words[0] for words in found), found


# ----------------------------------------------------------------------------------------------------------- the anchor


def test_an_anchor_finds_every_element_once():
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((3, 2), (0,), (), (5,))]
    parameters.append(nn.Parameter(torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last)))
    parameters.append(nn.Parameter(torch.randn(4, dtype=torch.float64)))
    parameters.append(nn.Parameter(torch.randn(3, dtype=torch.complex64)))
    trained = [(str(i), p, list(pieces(p))) for i, p in enumerate(parameters)]
    anchor = Anchor(trained)
    assert all(torch.equal(own, p) for own, p in zip(anchor.shaped(), parameters, strict=True))
    for group, values in anchor.values.items():
        for size in (1, 4, 7, 1000):
            covered = torch.zeros(len(values))
            for start in range(0, len(values), size):
                for line, own, here in anchor.within(group, start, min(start + size, len(values))):
                    covered[start:][here] += 1
                    piece = next(views[0] for name, _, views in trained if name == line.name)
                    assert torch.equal(values[start:][here], piece[own].to(values))
            assert (covered == 1).all()
    with torch.no_grad():
        parameters[3].add_(2.0)
    assert anchor.distance([views[0] for _, _, views in trained]) == pytest.approx(math.sqrt(20))
    part = torch.zeros(4, 4)[:, :2]
    with pytest.raises(ValueError, match="`a` is a slice"):
        Anchor([("a", part, list(pieces(part)))])


def test_a_clock_of_an_earlier_version_is_understood():
    clock = Clock(Every(4), 2, {"start": 8, "round": 2, "taken": 1, "averages_models": 1})
    assert (clock.step, clock.is_planned) == (9, False)


def peak_memory(outer):
    """Return the most memory that tensors have had at once in a run of three rounds, in models."""
    size = 4_000_000

    class Wide(Constant):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(size))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    strategy = LocalSGDStrategy(2, outer=outer, mean=Mean(bucket_mb=1))
    with torch.profiler.profile(profile_memory=True) as profile:
        trainer(2, strategy, max_epochs=-1, max_steps=6).fit(Wide(), loader([6] * 2))
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes)) / (4 * size)


@pytest.mark.parametrize(
    ("outer", "most"), [(DiLoCo(), 2), (SlowMo(), 2), (Outer(partial(torch.optim.Adam, lr=1e-3)), 3)]
)
def test_what_an_outer_step_costs_in_memory(outer, most):
    # The anchor and the optimizer's state: one model for momentum, two for Adam. What it needs for a moment beside the
    # average is small: here, a few pieces of 1 MiB, the bucket's size.
    plain = max(run_workers(peak_memory, 2, None))
    for models in run_workers(peak_memory, 2, outer):
        assert most - 0.1 < models - plain < most + 0.25

"""WHICH SETTINGS go together: what the constructor of the strategy can know to be without sense or effect."""

from typing import Any

from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.utilities import rank_zero_warn

from lightning_localsgd.mean import Mean
from lightning_localsgd.moments import AverageState
from lightning_localsgd.outer import OuterStep
from lightning_localsgd.pace import Proportional
from lightning_localsgd.schedule import AtEnd, Every, Schedule, require_known_needs


def require_settings(
    schedule: Schedule, *, mean: Any, outer: Any, optimizer_state: Any, replica: Any, pace: Any, checkpoint: Any
) -> None:
    """See that each setting is one of its kind, and has an effect beside the others.

    Args:
        schedule: when workers average.
        mean: as in :class:`LocalSGDStrategy`, and so are all that follow.
        outer: what is done with the mean.
        optimizer_state: what becomes of the optimizers' state.
        replica: who holds one.
        pace: who takes how many steps.
        checkpoint: what it keeps.

    Raises:
        ValueError: if one is not, or has none.
    """
    if not isinstance(mean, Mean):
        raise ValueError(f"`mean` must be a `Mean`, got {mean!r}.")
    if checkpoint not in ("consensus", "exact"):
        raise ValueError(f'`checkpoint` must be "consensus" or "exact", got {checkpoint!r}.')
    require_known_needs(schedule)
    if outer is not None and not isinstance(outer, OuterStep):
        raise ValueError(f"`outer` must be an `Outer`, `DiLoCo`, `SlowMo` or None, got {outer!r}.")
    if not (optimizer_state in ("keep", "average", "reset") or isinstance(optimizer_state, AverageState)):
        raise ValueError(
            f'`optimizer_state` must be "keep", "average", "reset" or an `AverageState`, got {optimizer_state!r}.'
        )
    if not (pace in ("equal", "proportional") or isinstance(pace, Proportional)):
        raise ValueError(f'`pace` must be "equal", "proportional" or a `Proportional`, got {pace!r}.')
    if replica not in ("device", "node"):
        raise ValueError(f'`replica` must be "device" or "node", got {replica!r}.')
    if pace != "equal" and replica == "node":
        raise ValueError(f"`pace` must be 'equal' with `replica=\"node\"`, whose devices step together, got {pace!r}.")
    if pace != "equal" and schedule.check:
        raise ValueError(
            "`pace` must be 'equal' with a schedule that asks in a round whether it ends, after the same number "
            f"of steps on each worker, got {pace!r} with {schedule!r}."
        )
    if schedule.averages_only_gradients:
        without_effect = {
            "mean": (mean, Mean(mean.bucket_mb)),
            "outer": (outer, None),
            "optimizer_state": (optimizer_state, "keep"),
            "pace": (pace, "equal"),
        }
        for name, (given, default) in without_effect.items():
            if given != default:
                raise ValueError(
                    "With a `period` of 1 gradients are averaged, as DDP does, and "
                    f"`{name}` has no effect: leave it at its default, got {given!r}."
                )
    if (mean.delay and isinstance(optimizer_state, AverageState)) or (mean.delay and optimizer_state == "average"):
        raise ValueError(
            '`optimizer_state` must be "keep" or "reset" where averages land with a delay, got '
            f"{optimizer_state!r} with {mean!r}."
        )
    if isinstance(schedule, Every) and mean.delay > schedule.period:
        raise ValueError(
            f"`delay` must be at most the period, after which the next average is sent, got {mean.delay} with "
            f"{schedule!r}."
        )
    if isinstance(schedule, AtEnd) and mean.delay:
        raise ValueError(f"`delay` must be 0 with `AtEnd`, whose only average is taken at once, got {mean.delay}.")


def warn_of_one_worker(mean: Mean, outer: OuterStep | None) -> None:
    """Warn that one worker, as in a trial on one device, sends nothing that a wire or a delay could be for."""
    if mean.wire != "float32" or (mean.delay and outer is None):
        rank_zero_warn(
            f"One worker has nothing to average, and sends nothing: {mean!r} has no effect.",
            category=PossibleUserWarning,
        )

"""WHAT HAPPENED: a callback that tells of rounds in the loggers, the progress bar, and a table after the fit."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from lightning_localsgd import _lightning
from lightning_localsgd.rounds import Round
from lightning_localsgd.spread import Spread
from lightning_localsgd.strategy import LocalSGD

PREFIX = "localsgd/"  # of our names in the loggers
# What is summed up over rounds, where it is known, and over spreads.
_OF_ROUND = ("steps", "local_steps", "seconds", "averaging", "blocked", "spared", "sent", "sent_by_ddp")
_OF_SPREAD = ("drift", "relative", "cosine", "variance", "signal")
_OF_FIT = ("total_", "local_", "rounds")  # what is of interest at its end
_OF_EACH = ("drift_of_rank", "bytes_", "averaging_", "blocked_seconds")  # what is of interest in each round


class Totals(Metric):
    """Sums up rounds and spreads over a fit.

    Args:
        workers: number of workers.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, workers: int = 1) -> None:
        super().__init__(sync_on_compute=False)  # all that it sums up is known here
        self._workers = workers
        for name in ("sums", "counts"):
            self.add_state(name, torch.zeros(len(_names(workers)), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, sums: Tensor, counts: Tensor) -> None:
        self.sums += sums
        self.counts += counts

    def compute(self) -> dict[str, float]:
        """Return each name's mean over the rounds in which it is known, and what follows from them."""
        return summary(self.sums, self.counts, self._workers)


def summed(rounds: Sequence[Round], spreads: Sequence[Spread], workers: int) -> tuple[Tensor, Tensor]:
    """Return the sums of what is known of these, and of how many each is known."""
    rest = [math.nan] * (len(_OF_SPREAD) + workers)
    rows = [[*_of_round(one), *rest] for one in rounds]
    rows += [[math.nan] * len(_OF_ROUND) + _of_spread(one) for one in spreads]
    values = torch.tensor(rows, dtype=torch.float64).view(-1, len(_OF_ROUND) + len(rest))
    return values.nansum(dim=0), (~values.isnan()).sum(dim=0)


def _names(workers: int) -> tuple[str, ...]:
    return (*_OF_ROUND, *_OF_SPREAD, *(f"apart_{rank}" for rank in range(workers)))


def summary(all_sums: Tensor, all_counts: Tensor, workers: int) -> dict[str, float]:
    """Return what the sums say, by the names in the loggers."""
    names = _names(workers)
    sums = dict(zip(names, all_sums.tolist(), strict=True))
    counts = dict(zip(names, all_counts.tolist(), strict=True))
    means = {name: sums[name] / counts[name] if counts[name] else math.nan for name in names}
    found = {
        "period": means["steps"],
        "averaging_seconds": means["averaging"],
        "blocked_seconds": means["blocked"],
        "blocked_share": _over(sums["blocked"], sums["seconds"]),
        "bytes_sent": means["sent"],
        "bytes_saved": means["sent_by_ddp"] - means["sent"],
        "drift": _root(means["drift"]),
        "drift_relative": _root(means["relative"]),
        "cosine": means["cosine"],
        "noise": _over(sums["variance"], sums["signal"]),
        "rounds": counts["steps"],
        "local_rounds": counts["averaging"],
        "local_steps": sums["local_steps"],
        "total_averaging_seconds": sums["averaging"],
        "total_blocked_seconds": sums["blocked"],
        "total_spared_seconds": sums["spared"],
        "total_sent": sums["sent"],
        "total_sent_by_ddp": sums["sent_by_ddp"],
    }
    digits = len(str(workers - 1))
    by_rank = {f"drift_of_rank/{rank:0{digits}}": _root(means[f"apart_{rank}"]) for rank in range(workers)}
    return {name: value for name, value in (found | by_rank).items() if not math.isnan(value)}


def _of_round(one: Round) -> list[float]:
    local = one.averaged == "models"
    return [
        float(one.steps),
        float(one.steps) if local else math.nan,
        one.seconds if local else math.nan,
        one.average_seconds,
        one.blocked_seconds,
        (one.steps - 1) * one.average_seconds,
        one.sent,
        one.sent_by_ddp,
    ]


def _of_spread(one: Spread) -> list[float]:
    squares = [distance**2 for distance in one.apart]
    return [one.drift**2, one.relative**2, one.cosine, one.variance, one.signal, *squares]


def _over(one: float, other: float) -> float:
    return one / other if other > 0 else math.nan


def _root(square: float) -> float:
    return math.sqrt(square) if square >= 0 else math.nan


class Monitor:
    r"""Tells what happens in the rounds; it reads, and changes no bit of the training.

    To each logger of the Trainer it writes `localsgd/period`, `localsgd/drift` and so on: the documentation lists them.
    That is when a round ends, but not more often than each ``Trainer(log_every_n_steps=...)`` steps: means over the
    rounds since it wrote last. How far the replicas move is measured once in so many steps, in the first round that
    begins in them, and in the first of the fit; each worker tells it in the header of the next round, so drift, cosine
    and noise come one round late. While gradients are averaged, as in DDP, there is no drift,
    and times are not known, since that average runs beside the backward pass.

    It costs a look at each element in an average that is measured, and no communication.

    Args:
        anchor: whether to keep a copy of the model where the round started, to see how far the replicas move.

    Raises:
        ValueError: at the start of ``fit``, with another strategy, or if ``anchor`` is True and no model is averaged.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(strategy="localsgd", callbacks=[LocalSGDMonitor()], accelerator="cpu", logger=False)

    The noise is that of McCandlish et al., *An Empirical Model of Large-Batch Training* (arXiv 1812.06162), of the
    updates of workers in place of the gradients of samples.
    """

    def __init__(self, anchor: bool = False) -> None:
        if not isinstance(anchor, bool):
            raise ValueError(f"`anchor` must be True or False, got {anchor!r}.")
        super().__init__()
        self.anchor = anchor
        self.totals = Totals()  # of the last fit
        self._begin()

    def _begin(self) -> None:
        self.totals.reset()
        self._rounds: list[Round] = []  # not written yet
        self._spreads: list[Spread] = []
        self._written = 0  # step at which
        self._shown = -1  # round that the progress bar shows

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        strategy = trainer.strategy
        if not isinstance(strategy, LocalSGD):
            raise ValueError(
                f"`LocalSGDMonitor` tells of the rounds of `LocalSGDStrategy`, got a {type(strategy).__name__}."
            )
        if self.anchor and strategy.schedule.averages_only_gradients:
            raise ValueError("`anchor` must be False with a `period` of 1, which averages no models, got True.")
        self._workers = strategy.workers
        self.totals = Totals(self._workers)
        every = _log_interval(trainer) or 50
        strategy.listen(self._hear_round, self._hear_spread, moves=self.anchor, every=every)

    def _hear_round(self, one: Round) -> None:
        self._rounds.append(one)

    def _hear_spread(self, one: Spread) -> None:
        self._spreads.append(one)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin()  # a search for the learning rate may have trained before

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not self._rounds:
            return
        last, every = self._rounds[-1], _log_interval(trainer) or sys.maxsize
        is_due = last.step // every > self._written // every
        if last.number > self._shown and (last.averaged == "models" or is_due):
            self._show(trainer, pl_module, last)
        if is_due or len(self._rounds) > 10_000:
            self._write(trainer, logs=is_due)

    def _show(self, trainer: Trainer, pl_module: LightningModule, last: Round) -> None:
        self._shown = last.number
        if trainer.is_global_zero and trainer.progress_bar_callback is not None:  # others cost time and show nothing
            shown = {"round": float(last.number + 1), "period": float(last.steps)}
            pl_module.log_dict(shown, prog_bar=True, logger=False, on_step=True, on_epoch=False)

    def _write(self, trainer: Trainer, logs: bool = True) -> None:
        rounds, workers = self._rounds, self._workers
        sums, counts = summed(rounds, self._spreads, workers)
        self.totals.update(sums, counts)
        self._rounds, self._spreads = [], []
        if not logs:
            return
        values = summary(sums, counts, workers)
        if rounds:
            last = rounds[-1]
            values |= {"round": last.number + 1, "step": last.step}
            values |= {} if last.slowest is None else {"slowest": last.slowest}
            self._written = last.step
        self._log(trainer, {name: values[name] for name in sorted(values) if not name.startswith(_OF_FIT)})

    def _log(self, trainer: Trainer, values: dict[str, float]) -> None:
        metrics = {PREFIX + name: float(value) for name, value in values.items()}
        for logger in trainer.loggers if metrics else ():
            logger.log_metrics(metrics, step=_lightning.logged_step(trainer))

    def _end(self, trainer: Trainer) -> dict[str, float]:
        """Write what is left, and the totals; return these."""
        writes = _log_interval(trainer) > 0
        if self._rounds or self._spreads:
            self._write(trainer, logs=writes)
        known = self.totals.compute() if self.totals.update_count else {}
        names = [name for name in known if not name.startswith(_OF_EACH)]
        if writes and names:
            self._log(trainer, {f"total/{name}": known[name] for name in names})
        return known

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        known = self._end(trainer)
        if known and trainer.is_global_zero:
            show("Rounds of local SGD", rows(known))


def _log_interval(trainer: Trainer) -> int:
    return int(getattr(trainer, "log_every_n_steps", 50))  # which the Trainer has, and does not declare


class LocalSGDMonitor(Monitor, Callback):  # noqa: D101
    __doc__ = Monitor.__doc__


def rows(values: dict[str, float]) -> list[tuple[str, str]]:
    """Return the table of what was summed up over a fit, as pairs of words.

    Args:
        values: as :meth:`Totals.compute` returns them.

    Example:
        >>> rows({"rounds": 500.0, "local_rounds": 0.0, "total_sent": 2e9, "total_sent_by_ddp": 2e9})
        [('steps that averaged gradients', '500'), ('sent by each worker', '2.00 GB')]
    """
    found: list[tuple[str, str]] = []
    local, sent, by_ddp = (values.get(name, 0.0) for name in ("local_rounds", "total_sent", "total_sent_by_ddp"))
    if values["rounds"] > local:
        found.append(("steps that averaged gradients", f"{values['rounds'] - local:,.0f}"))
    if local:
        steps = values["local_steps"]
        found.append(("rounds that averaged models", f"{local:,.0f}, of {steps / local:.4g} steps"))
        found.append(("seconds in averages", f"{values['total_averaging_seconds']:.4g}"))
        share = f" ({values['blocked_share']:.1%} of the time)" if "blocked_share" in values else ""
        found.append(("seconds blocked by them", f"{values['total_blocked_seconds']:.4g}{share}"))
    if sent:
        less = f" ({_in_bytes(by_ddp)} by DDP)" if by_ddp > sent else ""
        found.append(("sent by each worker", _in_bytes(sent) + less))
    if sent and local and values["total_spared_seconds"] > 0:
        found.append(("seconds spared, at an average a step", f"{values['total_spared_seconds']:.4g}"))
    if "drift" in values:
        relative = f" ({values['drift_relative']:.3g} of the way)" if "drift_relative" in values else ""
        found.append(("drift of the replicas", f"{values['drift']:.4g}{relative}"))
    for name in ("cosine", "noise"):
        if name in values:
            found.append((f"{name} of the workers' updates", f"{values[name]:.3g}"))
    return found


def _in_bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count / size >= 100 else f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def show(title: str, lines: Sequence[tuple[str, str]]) -> None:
    """Print a table, with `rich` where that is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        width = max(len(name) for name, _ in lines)
        text = "\n".join(f"  {name:{width}}  {value}" for name, value in lines)
        sys.stdout.write(f"{title}\n{text}\n")
        return
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    for line in lines:
        table.add_row(*line)
    Console().print(table)

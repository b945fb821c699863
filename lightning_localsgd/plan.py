"""WHICH SETTING: the throughput to expect of each period, wire and delay, from what a step and an average cost."""

import argparse
import logging
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple, get_args

from lightning_localsgd.wire import FORMATS, WireName

WIRES: tuple[WireName, ...] = get_args(WireName)
PERIODS = tuple(2**power for power in range(10))  # 1 is DDP
TOLERANCE = 0.02  # of the speed, which a shorter period is worth
_MARGIN = 1.2  # by which a delay is longer than an average takes, since not all take the same time
_OFF = 0.05  # by which a step of a setting may take longer than is computed
_NOISE = 0.1  # of a measurement, above which it is told
_BACKWARD = 2 / 3  # of a step, beside which DDP sends gradients, where it is not measured


class Setting(NamedTuple):
    """How workers train: with a period of 1 as DDP does."""

    period: int
    wire: WireName = "float32"
    delay: int = 0

    def __str__(self) -> str:
        if self.period == 1:
            return "DDP"
        return f"period {self.period}, {self.wire}, " + (f"delay {self.delay}" if self.delay else "blocking")


@dataclass(frozen=True)
class Costs:
    r"""What a step and an average cost, from which follows what a step takes with each setting.

    With :math:`s` the seconds of a local step, :math:`A` those of a blocking average, and :math:`c` those that an
    average costs which lands after all of it has travelled, a step takes in rounds of p steps with a delay of d

    .. math:: s + \frac{A}{p} \quad (d = 0), \qquad s + \frac{\max(c, A - d s)}{p} \quad (d > 0)

    Args:
        steps: seconds of a local step of each worker.
        ddp: seconds of a step of DDP.
        blocking: seconds of a blocking average, by wire.
        hidden: seconds that one costs while it travels beside local steps, by wire; empty where no delay is allowed.
        scaled: the wires of which something is not measured, but known from the bits of another one.
        noise: by what part of it a step without averages was slower, when measured, than the fastest step with them.
        checked: seconds of a step with settings that were recommended and then measured themselves.
    """

    steps: tuple[float, ...]
    ddp: float
    blocking: Mapping[WireName, float]
    hidden: Mapping[WireName, float]
    scaled: frozenset[str] = frozenset()
    noise: float = 0.0
    checked: Mapping[Setting, float] = field(default_factory=dict)

    @property
    def step(self) -> float:
        """The seconds of a local step of the slowest worker, for which the others wait."""
        return max(self.steps)


def seconds(costs: Costs, setting: Setting) -> float:
    """Return the seconds to expect of a step, averages included; those measured, where they are over 5 % more.

    Example:
        >>> costs = Costs(steps=(1.0, 1.0), ddp=5.0, blocking={"int8": 4.0}, hidden={"int8": 0.5})
        >>> [seconds(costs, Setting(8, "int8", delay)) for delay in (0, 2, 8)]
        [1.5, 1.25, 1.0625]
    """
    period, wire, delay = setting
    if period == 1:
        return costs.ddp
    cost = costs.blocking[wire]
    if delay:
        cost = max(costs.hidden[wire], cost - delay * costs.step)
    computed = costs.step + cost / period
    checked = costs.checked.get(setting, computed)
    return checked if checked > (1 + _OFF) * computed else computed


def shortest_delay(costs: Costs, period: int, wire: WireName) -> int:
    """Return the steps in which an average travels, at most the period; 0 where a delay gains nothing."""
    if wire not in costs.hidden:
        return 0
    to_hide = costs.blocking[wire] - costs.hidden[wire]
    return min(period, math.ceil(_MARGIN * to_hide / costs.step)) if to_hide > 0 else 0


def settings(costs: Costs) -> list[Setting]:
    """Return what is compared: DDP, and each longer period with each wire, blocking and with the shortest delay."""
    found = [Setting(1)]
    for period in PERIODS[1:]:
        for wire in costs.blocking:
            delays = {0, shortest_delay(costs, period, wire)}
            found += [Setting(period, wire, delay) for delay in sorted(delays)]
    return found


def recommended(costs: Costs) -> Setting:
    """Return the shortest period whose speed is within 2 % of the fastest's, blocking and of many bits if possible.

    Example:
        >>> recommended(Costs((1.0,), ddp=5.0, blocking={"float32": 4.0, "int8": 1.0}, hidden={"int8": 0.0}))
        Setting(period=2, wire='int8', delay=2)
    """
    found = {setting: seconds(costs, setting) for setting in settings(costs)}
    enough = min(found.values()) / (1 - TOLERANCE)
    good = [setting for setting, value in found.items() if value <= enough]
    return min(good, key=lambda setting: (setting.period, setting.delay > 0, WIRES.index(setting.wire)))


def bits(wire: WireName) -> float:
    """Return the bits of an element, with its part of a scale."""
    return 8 * FORMATS[wire].block_bytes / FORMATS[wire].block if wire in FORMATS else 32


def from_numbers(workers: int, parameters: float, step_seconds: float, mbit: float, latency_ms: float = 0) -> Costs:
    r"""Return what links of this speed make of it, if nothing else costs time.

    An average of P parameters in b bits each takes with N workers, a rate r and a latency :math:`\alpha`

    .. math:: A = 2 \frac{N - 1}{N} \frac{P b}{r} + 4 (N - 1) \alpha

    half of the latency for the header before it. DDP sends float32 beside the backward pass, of 2/3 of a step.

    Args:
        workers: N, an int of at least 2.
        parameters: P, above 0.
        step_seconds: of a local step, above 0.
        mbit: r in Mbit/s in each direction, above 0.
        latency_ms: of a message, in milliseconds, at least 0.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> costs = from_numbers(workers=2, parameters=25e6, step_seconds=0.1, mbit=100)
        >>> costs.blocking["float32"], costs.blocking["int8"]
        (8.0, 2.03125)
    """
    if not isinstance(workers, int) or workers < 2:
        raise ValueError(f"`workers` must be an int of at least 2: one worker has nothing to average, got {workers!r}.")
    for name, value in (("parameters", parameters), ("step-seconds", step_seconds), ("mbit", mbit)):
        if not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be a number above 0, got {value!r}.")
    if not 0 <= latency_ms < math.inf:
        raise ValueError(f"`latency-ms` must be a number of at least 0, got {latency_ms!r}.")
    part, latency = 2 * (workers - 1) / workers, 4e-3 * (workers - 1) * latency_ms
    blocking = {wire: part * parameters * bits(wire) / (1e6 * mbit) + latency for wire in WIRES}
    backward = _BACKWARD * step_seconds
    ddp = step_seconds - backward + max(backward, blocking["float32"])
    return Costs((step_seconds,) * workers, ddp, blocking, dict.fromkeys(WIRES, 0.0))


# ---------------------------------------------------------------------------------------------------------------- words


def as_yaml(setting: Setting) -> str:
    """Return the block of a configuration that trains so."""
    return (
        "trainer:\n  strategy:\n    class_path: lightning_localsgd.LocalSGDStrategy\n    init_args:\n"
        f"      period: {setting.period}\n      mean:\n        wire: {setting.wire}\n        delay: {setting.delay}\n"
    )


def limits(costs: Costs, setting: Setting) -> str:
    """Return what most of the time goes to with this setting, beside the steps, and with DDP."""
    whole, mean = seconds(costs, setting), sum(costs.steps) / len(costs.steps)
    slowest = costs.steps.index(costs.step)
    network, waiting = 1 - costs.step / whole, (costs.step - mean) / whole
    words = {
        "the network": f"averages take {max(0.0, network):.0%} of the time",
        "the slowest worker": f"workers wait {waiting:.0%} of the time for rank {slowest}, whose step takes "
        f"{costs.step / mean:.2f} times the mean; see `pace: proportional`",
    }
    worst = "the network" if network >= waiting else "the slowest worker"
    limit = worst if max(network, waiting) > 0.05 else "the step itself"
    shown = [words["the network"], *([words["the slowest worker"]] if waiting > 0.01 else [])]
    ddp = f"DDP would reach {costs.step / costs.ddp:.0%} of the speed without averages"
    blocks = f"a blocking average in float32 takes as long as {costs.blocking['float32'] / costs.step:.3g} steps"
    return f"Limited by {limit}: {'; '.join(shown)}. {ddp}: {blocks}."


def show(costs: Costs) -> None:
    """Print the table, the plot, the recommended setting and what limits it."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console  # an extra
    from rich.table import Table

    print_ = Console(highlight=False).print
    best = recommended(costs)
    print_(f"\n{len(costs.steps)} workers; steps/s of each worker, which without averages are {_rate(costs.step)}\n")
    names = [wire + " ≈" * (wire in costs.scaled) for wire in costs.blocking]
    table = Table("period", "delay", *names, box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for column in table.columns:
        column.justify = "right"

    def cell(setting: Setting) -> str:
        words = _rate(seconds(costs, setting)) + (f" ({setting.delay})" if setting.delay else "")
        return f"[bold green]{words}[/]" if setting == best else words

    table.add_row("1: DDP", "", cell(Setting(1)), *("" for _ in [*costs.blocking][1:]))
    for period in PERIODS[1:]:
        table.add_row(str(period), "", *(cell(Setting(period, wire)) for wire in costs.blocking))
        delays = [shortest_delay(costs, period, wire) for wire in costs.blocking]
        if any(delays):
            pairs = zip(costs.blocking, delays, strict=True)
            table.add_row("", "(steps)", *(cell(Setting(period, wire, k)) if k else "" for wire, k in pairs))
    print_(table)
    if costs.scaled:
        print_("≈: not all of it was measured, for lack of time, but taken from another wire by its bits")
    for line in bars(costs):
        print_(line)
    checked = f"; measured: {_rate(costs.checked[best])}" if best in costs.checked else ""
    print_(f"\nRecommended: [bold green]{best}[/], {_rate(seconds(costs, best))} steps/s{checked}\n")
    print_(as_yaml(best), markup=False)
    print_(limits(costs, best))
    if costs.noise > _NOISE:
        print_(f"\n[yellow]Beware:[/] {doubt(costs)}")


def doubt(costs: Costs) -> str:
    """Return why what was measured is not to be trusted, where its noise is large."""
    return (
        f"steps without averages were {costs.noise:.0%} slower than some with them, so something else takes time of "
        "these machines now and then, and averages may cost more than is said here. Measure again when that has ended, "
        "or for longer (`--seconds`)."
    )


def bars(costs: Costs, width: int = 50) -> list[str]:
    """Return a plot of words: how near each period comes to the speed without averages."""
    lines = [f"\n{'speed, % of that without averages':>{width}}", f"{'0':>9}{'50':>{width // 2}}{'100':>{width // 2}}"]
    for period in PERIODS:
        if period == 1:
            reached = [costs.step / costs.ddp]
        else:
            ones = [one for one in settings(costs) if one.period == period]
            kinds = [
                [one for one in ones if one.wire == "float32" and not one.delay],
                [one for one in ones if not one.delay],
                ones,
            ]
            reached = [max(costs.step / seconds(costs, one) for one in kind) for kind in kinds]
        lengths = [min(width, round(width * part)) for part in reached]
        steps = [length - before for length, before in zip(lengths, [0, *lengths], strict=False)]
        lines.append(
            f"{period:>7} [blue]{'█' * steps[0]}[/]"
            + "".join(
                f"[{color}]{mark * step}[/]"
                for step, mark, color in zip(steps[1:], "▓░", ("cyan", "yellow"), strict=False)
            )
        )
    return [*lines, "        [blue]█[/] float32 blocking (1: DDP)  [cyan]▓[/] the best wire  [yellow]░[/] with a delay"]


def draw(costs: Costs, path: Path) -> None:
    """Write the plot as a picture."""
    import matplotlib as mpl  # an extra

    mpl.use("Agg", force=False)
    import matplotlib.pyplot as plt

    best = recommended(costs)
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 4), sharey=True, layout="constrained")
    for place, (axis, title) in enumerate(zip(axes, ("blocking", "with a delay"), strict=True)):
        axis.axhline(1 / costs.step, color="lightgray", zorder=0, label="without averages")
        axis.axhline(1 / costs.ddp, color="black", linestyle=":", label="DDP")
        for number, wire in enumerate(costs.blocking):
            delays = [shortest_delay(costs, period, wire) if place else 0 for period in PERIODS[1:]]
            ones = [Setting(period, wire, k) for period, k in zip(PERIODS[1:], delays, strict=True) if k or not place]
            speeds = [1 / seconds(costs, one) for one in ones]
            style = f"C{number}o{'--' if wire == 'float16' else '-'}"  # which would hide bfloat16
            axis.plot([one.period for one in ones], speeds, style, markersize=3, label=wire)
        if (best.delay > 0) == bool(place):
            point = [1 / seconds(costs, best)]
            axis.plot([best.period], point, "o", color="black", fillstyle="none", markersize=11, label="recommended")
        axis.set_xscale("log", base=2)
        axis.set_xticks(PERIODS, [str(period) for period in PERIODS])
        axis.set_ylim(bottom=0)
        axis.set_xlabel("period: steps between two averages")
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("steps/s of each worker, expected")
    names: dict[str, Any] = {}
    for axis in axes:
        names |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend([*names.values()], [*names], loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _rate(step: float) -> str:
    return f"{1 / step:.3g}" if step > 1e-3 else f"{1 / step:,.0f}"


# ---------------------------------------------------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> None:
    """Print and draw what to expect of DDP and of each period, wire and delay, and recommend a setting.

    With a configuration it is measured, in the places where the run will be: started by hand, ``srun`` or ``torchrun``
    just as ``lightning-localsgd fit``. With numbers it is computed.

    Args:
        arguments: the words after ``lightning-localsgd plan``.

    Example:
        ``lightning-localsgd plan --config configs/digits.yaml`` or ``lightning-localsgd plan --workers 8 --parameters
        25e6 --step-seconds 0.1 --mbit 100``
    """
    parser = argparse.ArgumentParser(
        prog="lightning-localsgd plan",
        description="Say which throughput to expect of DDP and of each period, wire and delay, and recommend one.",
        epilog="Further words are those of `lightning-localsgd fit`, as --config run.yaml --trainer.devices 4.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", help="of the run, whose steps and averages are then measured")
    parser.add_argument("--seconds", type=float, help="about how long to measure; 60 by default")
    parser.add_argument("--workers", type=int, help="their number, where nothing is measured")
    parser.add_argument("--parameters", type=float, help="of the model, as 25e6")
    parser.add_argument("--step-seconds", type=float, help="of a local step")
    parser.add_argument("--mbit", type=float, help="speed of each worker's link, in Mbit/s")
    parser.add_argument("--latency-ms", type=float, help="of a message; 0 by default")
    parser.add_argument("--picture", type=Path, help="where the plot is written; by default plan.png, or a free name")
    parser.add_argument("--no-picture", action="store_true", help="write none, which needs no matplotlib")
    options, further = parser.parse_known_args(arguments)
    try:
        _require_extras(options)
        numbers = {
            name: getattr(options, name)
            for name in ("workers", "parameters", "step_seconds", "mbit", "latency_ms")
            if getattr(options, name) is not None
        }
        if numbers:
            costs: Costs | None = _computed(numbers, options, further)
        else:
            costs = _measured(options, further)
    except ValueError as error:
        parser.error(str(error))
    if costs is None:  # another rank prints
        return
    show(costs)
    if not options.no_picture:
        path = free(options.picture or Path("plan.png"))
        draw(costs, path)
        print(f"written: {path}")  # noqa: T201


def _require_extras(options: argparse.Namespace) -> None:
    if options.no_picture and options.picture:
        raise ValueError(f"`--picture` has no effect with `--no-picture`, got {str(options.picture)!r}.")
    if options.picture and not options.picture.resolve().parent.is_dir():
        raise ValueError(f"`--picture` must be in a folder that exists, got {str(options.picture)!r}.")
    for name in ("rich", *([] if options.no_picture else ["matplotlib"])):
        if find_spec(name) is None:
            raise ValueError(f"`plan` needs the package {name}: pip install 'lightning-localsgd[plan]'.")


def _computed(numbers: dict[str, Any], options: argparse.Namespace, further: Sequence[str]) -> Costs:
    lacks = [
        f"--{name.replace('_', '-')}"
        for name in ("workers", "parameters", "step_seconds", "mbit")
        if name not in numbers
    ]
    if lacks:
        raise ValueError(f"Without a run to measure, all of the numbers are needed, and {', '.join(lacks)} is missing.")
    others = [
        *(["--config"] if options.config else []),
        *(["--seconds"] if options.seconds is not None else []),
        *further,
    ]
    if others:
        raise ValueError(f"With numbers given nothing is measured, and `{others[0]}` has no effect.")
    return from_numbers(**numbers)


def _measured(options: argparse.Namespace, further: Sequence[str]) -> Costs | None:
    """Return what was measured, on rank 0."""
    from lightning_localsgd.measuring import Run, measure

    if not (options.config or further):
        raise ValueError("Give a run to measure, as `--config run.yaml`, or `--workers`, `--parameters` and so on.")
    duration = 60.0 if options.seconds is None else options.seconds
    if not 0 < duration < math.inf:
        raise ValueError(f"`--seconds` must be a number above 0, got {duration!r}.")
    warnings.filterwarnings("ignore", module=r"lightning\.")  # which says the same of each fit
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    run = Run([word for path in options.config or [] for word in ("--config", path)] + list(further))

    def tell(words: str) -> None:
        print(words, file=sys.stderr, flush=True)  # noqa: T201

    costs = measure(run, duration, tell)
    return costs if run.is_first else None


def free(path: Path) -> Path:
    """Return this path, or one like it where no file is."""
    others = (path.with_stem(f"{path.stem}-{number}") for number in count(1))
    return next(one for one in chain([path], others) if not one.exists())

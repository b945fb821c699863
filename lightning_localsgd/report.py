"""WHAT HAPPENED in a run: one page of curves and a table, from what it has logged."""

import argparse
import csv
import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_localsgd.monitor import PREFIX, rows

Points = list[tuple[float, float]]  # step, value
Series = dict[str, Points]  # of each metric
_MOST = 400  # points that a curve is drawn with


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a page about a run, which opens in any browser, without a network.

    The run must have been logged by Lightning's CSVLogger, or by its TensorBoardLogger where `tensorboard` is
    installed, with a :class:`~lightning_localsgd.LocalSGDMonitor` among its callbacks.

    Args:
        arguments: the words after ``lightning-localsgd report``.

    Example:
        ``lightning-localsgd report lightning_logs/version_0``
    """
    parser = argparse.ArgumentParser(
        prog="lightning-localsgd report",
        description="Write a page of curves and a table about a run, from what LocalSGDMonitor has logged.",
    )
    parser.add_argument("run", type=Path, help="a folder of logs, as lightning_logs/version_0")
    parser.add_argument("--output", type=Path, help="where the page is written; by default report.html in that folder")
    options = parser.parse_args(arguments)
    try:
        text = page(options.run.resolve().name, read(options.run))
        output = options.output or options.run / "report.html"
        output.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"written: {output}")  # noqa: T201


# --------------------------------------------------------------------------------------------------- what was logged


def read(run: Path) -> Series:
    """Return what was logged in this folder.

    Raises:
        ValueError: if there is nothing of ours.
    """
    if not run.is_dir():
        raise ValueError(f"The run must be a folder of logs, got {str(run)!r}.")
    table = run / "metrics.csv"
    events = sorted(run.glob("events.out.tfevents.*"))
    if table.exists():
        found = _read_csv(table)
    elif events:
        found = _read_events(run)
    else:
        inside = sorted(
            {str(path.parent) for pattern in ("metrics.csv", "events.out.tfevents.*") for path in run.rglob(pattern)}
        )
        hint = f": try {' or '.join(inside[-3:])}" if inside else ""
        raise ValueError(
            f"There must be a metrics.csv or event files of TensorBoard in {str(run)!r}, and none is{hint}."
        )
    if not any(name.startswith(PREFIX) for name in found):
        raise ValueError(
            f"There must be metrics of `LocalSGDMonitor` in {str(run)!r}, and none is: add it to the callbacks."
        )
    return found


def _read_csv(path: Path) -> Series:
    found: Series = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            step = float(row["step"])
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    found.setdefault(name, []).append((step, float(value)))
    return found


def _read_events(run: Path) -> Series:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise ValueError(
            "TensorBoard's event files need the package `tensorboard` to be read: pip install tensorboard."
        ) from None
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: [(float(one.step), float(one.value)) for one in events.Scalars(name)]
        for name in events.Tags()["scalars"]
        if name not in ("step", "epoch")
    }


def totals(series: Series) -> dict[str, float]:
    """Return the totals that the monitor wrote when the run ended; nothing if it did not end."""
    prefix = PREFIX + "total/"
    return {name.removeprefix(prefix): points[-1][1] for name, points in series.items() if name.startswith(prefix)}


def so_far(series: Series, name: str) -> Points:
    """Return the sum of what was logged as a mean over rounds."""
    rounds = dict(series.get(PREFIX + "round", []))
    total, before, found = 0.0, 0.0, []
    for step, value in series.get(PREFIX + name, []):
        if step in rounds:
            total += value * (rounds[step] - before)
            before = rounds[step]
            found.append((step, total))
    return found


# ------------------------------------------------------------------------------------------------------------ the page


@dataclass(frozen=True)
class Chart:
    """One picture.

    Args:
        title: what it shows.
        curves: the points of each, by what the legend calls it.
        beside: further ones, of each worker, in the background; they may lie under the first.
        words: writes a value of the axis.
    """

    title: str
    curves: Series
    beside: Series
    words: Callable[[float], str]


def charts(series: Series) -> list[Chart]:
    """Return what there is to show."""

    def of(*names: str) -> Series:
        return {name: series[PREFIX + name] for name in names if series.get(PREFIX + name)}

    losses = {name: points for name, points in series.items() if "loss" in name.lower() and points}
    ranks = {name: points for name, points in series.items() if name.startswith(PREFIX + "drift_of_rank/")}
    sent, saved = so_far(series, "bytes_sent"), so_far(series, "bytes_saved")
    by_ddp = [(step, one + other) for (step, one), (_, other) in zip(sent, saved, strict=True)]
    found = [
        Chart("Loss", dict(list(losses.items())[:4]), {}, _number),
        Chart("Period: steps in a round", of("period"), {}, _number),
        Chart("Drift of the replicas, and of each worker", of("drift"), ranks, _number),
        Chart("Drift over the movement of the mean", of("drift_relative"), {}, _number),
        Chart("Share of the time blocked by averages", of("blocked_share"), {}, _percent),
        Chart("Sent by each worker so far", {"local SGD": sent, "DDP": by_ddp} if sent else {}, {}, _bytes),
        Chart("Cosine of the workers' updates", of("cosine"), {}, _number),
        Chart("Noise of the workers' updates", of("noise"), {}, _number),
    ]
    return [chart for chart in found if any(chart.curves.values())]


def page(name: str, series: Series) -> str:
    """Return the page about a run, which needs nothing beside itself.

    Args:
        name: of the run.
        series: what it has logged.
    """
    known = totals(series)
    if known:
        lines = "".join(
            f"<tr><th>{html.escape(what)}</th><td>{html.escape(value)}</td></tr>" for what, value in rows(known)
        )
        table = f"<table>{lines}</table>"
    else:
        table = "<p>The run has written no totals: it has not ended, or it was killed.</p>"
    found = charts(series)
    steps = [step for chart in found for points in chart.curves.values() for step, _ in points]
    span = min(steps), max(steps)
    pictures = "".join(
        f"<figure><figcaption>{html.escape(chart.title)}</figcaption>{draw(chart, span)}</figure>" for chart in found
    )
    return _PAGE.format(name=html.escape(name), style=_STYLE, table=table, pictures=pictures)


def draw(chart: Chart, span: tuple[float, float], width: int = 560, height: int = 220) -> str:
    """Return the chart as an SVG element, over the steps of ``span``."""
    left, right, top, bottom = 64, 12, 10, 26
    curves = {name: _thinned(points) for name, points in chart.curves.items()}
    beside = {name: _thinned(points) for name, points in chart.beside.items()}
    every = [point for points in (*curves.values(), *beside.values()) for point in points]
    x_low, x_high = span if span[1] > span[0] else (span[0], span[0] + 1)
    xs = _ticks(x_low, x_high)
    ys = _ticks(min(0.0, *(y for _, y in every)), max(y for _, y in every))

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x_low) / (x_high - x_low) * (width - left - right),
            height - bottom - (y - ys[0]) / (ys[-1] - ys[0]) * (height - top - bottom),
        )

    def line(points: Points, kind: str, name: str) -> str:
        places = [at(x, y) for x, y in points]
        if len(places) == 1:
            mark = f'<circle class="{kind} dot" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3">'
        else:
            mark = f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}">'
        return f"{mark}<title>{html.escape(name)}</title></{'circle' if len(places) == 1 else 'polyline'}>"

    parts = []
    for y in ys:
        _, place = at(x_low, y)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{place + 4:.1f}" text-anchor="end">{chart.words(y)}</text>')
    for x in (x for x in xs if x_low <= x <= x_high):
        place, _ = at(x, ys[0])
        parts.append(f'<text x="{place:.1f}" y="{height - 8}" text-anchor="middle">{_number(x)}</text>')
    parts += [line(points, "beside", name) for name, points in beside.items() if points]
    parts += [line(points, f"c{index}", name) for index, (name, points) in enumerate(curves.items()) if points]
    words = html.escape(f"{chart.title}, by step")
    svg = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{words}">{"".join(parts)}</svg>'
    names = [(f"c{index}", name) for index, name in enumerate(curves)] + [("beside", "each worker")] * bool(beside)
    if len(names) == 1:
        return svg
    legend = "".join(f'<span class="{kind}">{html.escape(name)}</span>' for kind, name in names)
    return f"{svg}<div>{legend}</div>"


def _thinned(points: Points) -> Points:
    """Return at most so many points as can be seen, each the mean of some."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    size = math.ceil(len(points) / _MOST)
    groups = [points[start : start + size] for start in range(0, len(points), size or 1)]
    return [(math.fsum(x for x, _ in one) / len(one), math.fsum(y for _, y in one) / len(one)) for one in groups]


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers that span ``low`` to ``high``, about five of them.

    Example:
        >>> _ticks(0, 7)
        [0.0, 2.0, 4.0, 6.0, 8.0]
    """
    span = high - low or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next((multiple for multiple in (1, 2, 5) if span / (step * multiple) <= 5), 10)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e6 else f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _bytes(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} B"


_STYLE = """
:root { color-scheme: light dark; --ink: #1d1f23; --muted: #6a6f78; --grid: #e4e6ea; --page: #fcfcfb;
  --c0: #2a6fdb; --c1: #d9661f; --c2: #1a8f6f; --c3: #8a4fd0; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececea; --muted: #9a9fa8; --grid: #34373d; --page: #191a1c;
  --c0: #6ea3f5; --c1: #f0935a; --c2: #4cc3a2; --c3: #b98cf0; } }
body { margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: var(--ink); background: var(--page);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h1 small { color: var(--muted); font-weight: normal; }
table { border-collapse: collapse; margin-bottom: 1.5rem; }
th, td { padding: .25rem 1.5rem .25rem 0; border-bottom: 1px solid var(--grid); font-weight: normal; text-align: left; }
td { text-align: right; padding-right: 0; font-variant-numeric: tabular-nums; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); gap: 1.5rem 2.5rem; }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: .25rem; }
svg { width: 100%; height: auto; overflow: visible; }
svg text { font-size: 11px; fill: var(--muted); }
.grid { stroke: var(--grid); }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.beside { stroke: var(--muted); stroke-width: 1; opacity: .45; } .beside.dot { fill: var(--muted); }
.c0 { stroke: var(--c0); color: var(--c0); } .c1 { stroke: var(--c1); color: var(--c1); }
.c2 { stroke: var(--c2); color: var(--c2); } .c3 { stroke: var(--c3); color: var(--c3); }
.dot { fill: currentColor; } span.beside { color: var(--muted); opacity: 1; }
figure span { margin-right: 1rem; } figure span::before { content: "\\2014\\00a0"; font-weight: 700; }
footer { color: var(--muted); margin-top: 2rem; }
"""

# The policy forbids whatever is not in the page itself.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{name}: rounds of local SGD</title>
<style>{style}</style>
</head>
<body>
<h1>{name} <small>rounds of local SGD</small></h1>
{table}
<main>{pictures}</main>
<footer>Each curve runs over the steps of the run. Drift, cosine and noise are those of one round before.</footer>
</body>
</html>
"""

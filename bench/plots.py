"""Plots of `python -m bench report`: what merging gains at each resolution, step by step, and at what cost."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean, median
from typing import Any

from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from bench import tables
from bench.cases import ROUNDED, Case
from bench.cells import Cell
from bench.flops import LATENTS
from bench.runs import RUNS
from bench.suites import POINTS, YARDSTICK

MARKERS = {"tome_fx": "o", "v0.1": "s", "tomesd": "^", "todo": "D", "hidiffusion": "P"}
OURS, COLOR = "tome_fx+compile", "tab:green"
WATERFALL = ("vanilla", "sdpa", "compile", OURS)


def write(documents: dict[str, dict[str, Any]], folder: Path, shown: Callable[[str], bool]) -> list[Path]:
    """PNGs: quality over FLOPs for each file of qualities, times of each model in a file of latencies.

    Args:
        documents: By name.
        folder: Where to.
        shown: Whether there is a page for a picture of this name; no other is written.
    """
    written = []
    for name, document in documents.items():
        figures = _qualities(document) if document["kind"] == "quality" else _latencies(document.get("cells", ()))
        for what, figure in figures:
            path = folder / f"{name}-{what}.png"
            if shown(path.name):
                figure.tight_layout()
                figure.savefig(path, dpi=100)
                written.append(path)
    return written


def _qualities(document: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    figure = Figure(figsize=(7, 5))
    axes = figure.subplots()
    draw_frontier(axes, document["rows"], document["pipeline"])
    axes.set_xlabel(f"FLOPs saved, {LATENTS} x {LATENTS} latents")
    axes.set_ylabel("PSNR to stock's image of {width} x {height} px, dB".format(**document["size"]))
    yield "flops", figure


def draw_frontier(axes: Any, rows: list[dict[str, Any]], model: str) -> None:
    """What is lost over what is gained, by row: PSNR over the share of a model's FLOPs, and which of ours are best."""
    points = {
        Case.read(row["case"]): (row["flops_saved"][model], fmean(row["psnr"]))
        for row in rows
        if None not in row["psnr"]
    }
    for variant, marker in MARKERS.items():
        places = {case: place for case, place in points.items() if case.variant == variant}
        if places:
            axes.scatter(*zip(*places.values(), strict=True), s=24, marker=marker, label=variant)
        for case, place in places.items():
            if variant != "tome_fx":
                axes.annotate(f"{case.ratio:g}", place, textcoords="offset points", xytext=(4, 4), fontsize=7)
    best = frontier(place for case, place in points.items() if case.variant == "tome_fx")
    axes.plot(*zip(*best, strict=True), linewidth=0.8, zorder=0)
    for name, case in POINTS.items():
        if case in points:
            axes.annotate(name, points[case], textcoords="offset points", xytext=(6, 6), fontsize=9, weight="bold")
    if YARDSTICK in points:
        axes.axhline(points[YARDSTICK][1], color="grey", linewidth=0.8, linestyle=":", label=ROUNDED[YARDSTICK.variant])
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(fontsize=8)


def frontier(places: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of the points that no other one is above of and not left of, from left to right."""
    best: list[tuple[float, float]] = []
    for place in sorted(places, reverse=True):
        if not best or place[1] > best[-1][1]:
            best.append(place)
    return best[::-1]


def _latencies(entries: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Figure]]:
    """For each model and dtype with every step of the waterfall at a size, but for what has no memory in large images.

    A single resolution makes no line.
    """
    chosen: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    needed = {name for name in WATERFALL if RUNS[name].fused}
    for entry in entries:
        cell = Cell.read(entry["cell"])
        if (cell.ratio, cell.options, cell.batch) == (0.5, (), 1) and entry["rows"].keys() >= {"compile", OURS}:
            chosen.setdefault((cell.model, cell.dtype), {})[cell.resolution] = entry
    for (model, dtype), by_side in chosen.items():
        sides = sorted(by_side)
        whole = max((side for side in sides if by_side[side]["rows"].keys() >= needed), default=None)
        if whole is None:
            continue
        panels = 2 if len(sides) > 1 else 1
        figure = Figure(figsize=(5.5 * panels, 4))
        axes = figure.subplots(1, panels, squeeze=False)[0]
        if panels == 2:
            _draw_speedups(axes[0], {side: by_side[side] for side in sides})
            axes[0].set_title(f"{model}, {dtype}, ratio 0.5")
        _draw_waterfall(axes[-1], by_side[whole]["rows"])
        axes[-1].set_title(f"{model}, {dtype}, {whole} px: each bar adds one technique")
        yield f"{model}-{dtype}", figure


def _draw_speedups(axes: Any, by_side: dict[int, dict[str, Any]]) -> None:
    """Speed-up over `compile` against resolution: ours a broad line, for others lie on it; dotted where eager."""
    sides = list(by_side)
    merging = {name: run for name, run in RUNS.items() if run.merges}
    others = cycle(color for color in TABLEAU_COLORS if color != COLOR)
    colors = {name: COLOR if name == OURS else next(others) for name in merging}  # the same in every picture
    for name, run in merging.items():
        points = [tables.speedup(entry["rows"], "compile", name) for entry in by_side.values()]
        if any(points):
            look: dict[str, Any] = {"linewidth": 6, "alpha": 0.5} if name == OURS else {"linewidth": 1.2}
            look |= {"color": colors[name], "linestyle": "-" if run.compiled else ":"}
            axes.plot(sides, [p or float("nan") for p in points], marker="o", markersize=4, label=name, **look)
    bounds = [entry["bounds"][OURS] for entry in by_side.values()]
    axes.plot(sides, bounds, "k--", marker="_", label=f"FLOP bound of {OURS}")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xlabel="image side, px", ylabel="speed-up over compile", xticks=sides)
    axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.25))  # below, for lines are anywhere


def _draw_waterfall(axes: Any, rows: dict[str, Any]) -> None:
    """Milliseconds as techniques are added."""
    steps = [name for name in WATERFALL if name in rows and rows[name]["samples_ms"]]
    heights = [median(rows[name]["samples_ms"]) for name in steps]
    bars = axes.bar(steps, heights, color=["0.7", "0.6", "0.5", COLOR][-len(steps) :])
    axes.bar_label(bars, fmt="%.0f ms")
    axes.margins(y=0.12)
    axes.set_ylabel("ms per call")

"""Plots of `python -m bench report`: what merging gains at each resolution, step by step, and at what cost."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from bench import quality_tables, tables
from bench.cases import SCOPES
from bench.cells import Cell
from bench.runs import RUNS

TRADED = [*(("tome_fx", scope) for scope in SCOPES), ("prop_attn", "attn"), ("prop_attn", "all")]
WATERFALL = ("vanilla", "sdpa", "compile", "tome_fx+compile")


def write(documents: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
    """PNGs: likeness over speed-up of each file of qualities, times of each model in a file of latencies."""
    written = []
    for name, document in documents.items():
        figures = _qualities(document) if document["kind"] == "quality" else _latencies(document.get("cells", ()))
        for what, figure in figures:
            figure.tight_layout()
            written.append(folder / f"{name}-{what}.png")
            figure.savefig(written[-1], dpi=100)
    return written


def _qualities(document: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    figure = Figure(figsize=(5.5, 4))
    axes = figure.subplots()
    draw_tradeoff(axes, document["rows"])
    axes.set_xlabel("speed-up of an eager UNet call, {0} x {0} latents".format(document["timed"]["latents"]))
    height, width = document["size"]
    axes.set_ylabel(f"SSIM to stock's image, {width} x {height} px")
    yield "speed", figure


def draw_tradeoff(axes: Any, rows: list[dict[str, Any]]) -> None:
    """What is lost over what is gained: SSIM over speed-up, a line for each way to merge, a point for each ratio."""
    for variant, scope in TRADED:
        line = [
            (speed[0], *quality_tables.interval(row["ssim"]), row["case"]["ratio"])
            for row in rows
            if (row["case"]["variant"], row["case"]["scope"], row["case"]["max_downsample"]) == (variant, scope, None)
            and (speed := quality_tables.speed_range(row, rows))
        ]
        if line:
            x, y, low, high, ratios = zip(*sorted(line, key=lambda point: point[-1]), strict=True)
            bars = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
            axes.errorbar(x, y, bars, marker="o", capsize=2, label=f"{variant}, {scope}")
            for place in zip(ratios, x, y, strict=True):
                axes.annotate(f"{place[0]:g}", place[1:], textcoords="offset points", xytext=(5, 5), fontsize=7)
    axes.plot([1], [1], "k*", label="stock")
    axes.set(
        xlabel="speed-up of an eager UNet call",
        ylabel="SSIM to stock's image",
        title="What merging costs in likeness and gains in speed",
    )
    axes.legend(fontsize=8)


def _latencies(entries: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Figure]]:
    """For each model whose file has every step of the waterfall; a single resolution makes no line."""
    chosen: dict[str, dict[int, dict[str, Any]]] = {}
    for entry in entries:
        cell = Cell(**entry["cell"])
        if (cell.ratio, cell.scope, cell.batch) == (0.5, "attn", 1) and entry["rows"].keys() >= set(WATERFALL):
            chosen.setdefault(cell.model, {})[cell.resolution] = entry
    for model, by_side in chosen.items():
        sides = sorted(by_side)
        panels = 2 if len(sides) > 1 else 1
        figure = Figure(figsize=(5.5 * panels, 4))
        axes = figure.subplots(1, panels, squeeze=False)[0]
        if panels == 2:
            _draw_speedups(axes[0], {side: by_side[side] for side in sides})
            axes[0].set_title(f"{model}, ratio 0.5")
        _draw_waterfall(axes[-1], by_side[sides[-1]]["rows"])
        axes[-1].set_title(f"{model}, {sides[-1]} px: each bar adds one technique")
        yield model, figure


def _draw_speedups(axes: Any, by_side: dict[int, dict[str, Any]]) -> None:
    """Speed-up over `compile` against resolution."""
    sides = list(by_side)
    for name in (name for name, run in RUNS.items() if run.merges):
        points = [tables.speedup(entry["rows"], "compile", name) for entry in by_side.values()]
        axes.plot(sides, [p or float("nan") for p in points], marker="o", label=name)
    axes.plot(sides, [entry["bound"] for entry in by_side.values()], "k--", marker="_", label="FLOP bound")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xlabel="image side, px", ylabel="speed-up over compile", xticks=sides)
    axes.legend(fontsize=8)


def _draw_waterfall(axes: Any, rows: dict[str, Any]) -> None:
    """Milliseconds as techniques are added."""
    steps = [name for name in WATERFALL if rows[name]["samples_ms"]]
    heights = [median(rows[name]["samples_ms"]) for name in steps]
    bars = axes.bar(steps, heights, color=["0.7", "0.6", "0.5", "tab:green"][-len(steps) :])
    axes.bar_label(bars, fmt="%.0f ms")
    axes.margins(y=0.12)
    axes.set_ylabel("ms per UNet call")

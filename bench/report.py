"""`python -m bench report`: the README's tables and plots, from the JSON under bench/results."""

import argparse
import re
from pathlib import Path
from statistics import median
from typing import Any

from tabulate import tabulate

from bench import cold, demo, measure, quality_tables, tables
from bench.cells import Cell
from bench.variants import SCOPES, VARIANTS

RESULTS = Path(__file__).parent / "results"
TRADED = [*(("tome_fx", scope) for scope in SCOPES), ("prop_attn", "attn"), ("prop_attn", "all")]
WATERFALL = ("vanilla", "sdpa", "compile", "tome_fx+compile")
README = Path(__file__).parent.parent / "README.md"


def machine(m: dict[str, Any]) -> str:
    """The line above every table: what it was measured on and with."""
    where = m["gpu"] or f"{m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB"
    versions = ", ".join(f"{name} {m[name]}" for name in ("torch", "diffusers", "tomesd"))
    return f"{where}; Python {m['python']}, {versions}; commit {m['commit']}"


def section(name: str, document: dict[str, Any]) -> str:
    """A file's part of the README: each table under its setting and machine."""
    return "\n\n".join(SECTIONS[document["kind"]](document))


def _demo(document: dict[str, Any]) -> list[str]:
    cell = document["cell"]
    setting = (
        f"{cell['images']} images of {cell['side']} px at once, {cell['steps']} steps, ratio {cell['ratio']}; "
        f"ratios of the sweep: {', '.join(map(str, document['ratios']))}. {machine(document['machine'])}."
    )
    return [document["note"], setting, demo.table(document)]


def _cold(document: dict[str, Any]) -> list[str]:
    given = document["setting"]
    setting = f"{document['resolution']} px, UNet batch 1, ratio {given['ratio']}, {given['scope']}, fp32 on cpu."
    return [document["note"], f"{setting} {machine(document['machine'])}.", cold.table(document)]


def _quality(document: dict[str, Any]) -> list[str]:
    if "timed" not in document:
        raise ValueError("the rows of quality have no times: python -m bench quality --time SIDE --json PATH")
    timed = document["timed"]
    setting = (
        f"{document['count']} images of the pipeline {document['pipeline']}, {document['steps']} steps, guidance "
        f"{document['guidance']:g}, {document['dtype']} on {document['device']}; "
        f"means with 95 % confidence intervals. {machine(document['machine'])}. "
        f"Speed-ups of an eager call of the UNet at {timed['latents']} x {timed['latents']} latents, {timed['dtype']} "
        f"on {timed['device']}, the median over rounds and their range: `python -m bench {' '.join(timed['argv'])}`, "
        f"commit {timed['machine']['commit']}."
    )
    pairs = (
        "Differences between two rows, image by image, for prompts and seeds are the same: means with 95 % confidence "
        "intervals. Where one holds 0, the rows may be alike."
    )
    return [document["note"], setting, quality_tables.table(document), pairs, quality_tables.differences(document)]


def _support(document: dict[str, Any]) -> list[str]:
    return [f"{machine(document['machine'])}.", support(document["features"])]


def _latency(document: dict[str, Any]) -> list[str]:
    parts = [document["note"]]
    for entry in document["cells"]:
        cell = Cell(**entry["cell"])
        parts.append(
            f"**{cell.model}, {cell.resolution} px**, UNet batch {cell.unet_batch}, ratio {cell.ratio}, {cell.scope}, "
            f"{cell.dtype} on {cell.device}, mode {cell.mode}. {machine(entry['machine'])}. {tables.table(entry)}"
        )
        if "breakdown" in entry:
            parts.append("One site of the finest level, each part compiled alone:\n\n" + breakdown(entry["breakdown"]))
    return parts


SECTIONS = {"demo": _demo, "cold": _cold, "quality": _quality, "support": _support, "latency": _latency}


def support(features: dict[str, Any]) -> str:
    """What works with what, by the tests that showed it."""
    lines = []
    for feature, row in sorted(features.items(), key=lambda item: item[1]["group"]):
        outcomes = set(row["tests"].values())
        verdict = row["verdict"] if outcomes == {"passed"} else "not shown here: its test was skipped"
        if "failed" in outcomes:
            raise ValueError(f"{feature}: a test failed: {row['tests']}")
        tests = ", ".join(f"`{name.removeprefix('tests/')}`" for name in row["tests"])
        lines.append([row["group"], feature, verdict, row["condition"], tests])
    return tabulate(lines, ["", "feature", "verdict", "condition", "test"], tablefmt="github", disable_numparse=True)


def breakdown(rows: dict[str, Any]) -> str:
    """Milliseconds of the parts of a site."""
    lines = [f"| {name} | {median(row['samples_ms']):.2f} |" for name, row in rows.items() if row["samples_ms"]]
    return "\n".join(["| part | ms (median) |", "|---|---|", *lines])


def fill(text: str, name: str, content: str) -> str:
    """Replace what stands between the markers of `name`.

    Raises:
        ValueError: The text has no such markers.
    """
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"found no markers {begin} ... {end}")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)


def plots(documents: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
    """Speed-up over `compile` against resolution, and the waterfall from `vanilla`, for each file of latencies."""
    import matplotlib as mpl  # only this command needs it

    mpl.use("agg")
    from matplotlib import pyplot as plt

    written = []
    for name, document in documents.items():
        if document["kind"] == "quality":
            figure, panel = plt.subplots(figsize=(5.5, 4))
            _draw_tradeoff(panel, document["rows"])
            panel.set_xlabel("speed-up of an eager UNet call, {0} x {0} latents".format(document["timed"]["latents"]))
            height, width = document["size"]
            panel.set_ylabel(f"SSIM to stock's image, {width} x {height} px")
            figure.tight_layout()
            written.append(folder / f"{name}-speed.png")
            figure.savefig(written[-1], dpi=100)
            plt.close(figure)
        cells = [(Cell(**entry["cell"]), entry) for entry in document.get("cells", ())]
        for model in dict.fromkeys(cell.model for cell, _ in cells):
            chosen = sorted(
                (
                    (cell.resolution, entry)
                    for cell, entry in cells
                    if (cell.model, cell.ratio, cell.scope, cell.batch) == (model, 0.5, "attn", 1)
                    and entry["rows"].keys() >= set(WATERFALL)
                ),
                key=lambda pair: pair[0],
            )
            if not chosen:
                continue
            sides = [side for side, _ in chosen]
            panels = 2 if len(sides) > 1 else 1  # one resolution makes no line
            figure, axes = plt.subplots(1, panels, figsize=(5.5 * panels, 4), squeeze=False)
            left, right = axes[0][0], axes[0][-1]
            if panels == 2:
                for variant in VARIANTS:
                    if VARIANTS[variant].merges:
                        points = [tables.speedup(entry["rows"], "compile", variant) for _, entry in chosen]
                        left.plot(sides, [p or float("nan") for p in points], marker="o", label=variant)
                left.plot(sides, [entry["bound"] for _, entry in chosen], "k--", marker="_", label="FLOP bound")
                left.axhline(1, color="grey", linewidth=0.8)
                left.set(
                    xlabel="image side, px", ylabel="speed-up over compile", xticks=sides, title=f"{model}, ratio 0.5"
                )
                left.legend(fontsize=8)
            side, entry = chosen[-1]
            steps = [v for v in WATERFALL if entry["rows"][v]["samples_ms"]]
            heights = [median(entry["rows"][v]["samples_ms"]) for v in steps]
            bars = right.bar(steps, heights, color=["0.7", "0.6", "0.5", "tab:green"][-len(steps) :])
            right.bar_label(bars, fmt="%.0f ms")
            right.margins(y=0.12)
            right.set(ylabel="ms per UNet call", title=f"{model}, {side} px: each bar adds one technique")
            figure.tight_layout()
            path = folder / f"{name}-{model}.png"
            figure.savefig(path, dpi=100)
            plt.close(figure)
            written.append(path)
    return written


def _draw_tradeoff(axes: Any, rows: list[dict[str, Any]]) -> None:
    """What is lost over what is gained: SSIM over speed-up, a line for each way to merge, a point for each ratio."""
    for variant, scope in TRADED:
        line = [
            (quality_tables.speed_range(row, rows)[0], *quality_tables.interval(row["ssim"]), row["case"]["ratio"])
            for row in rows
            if (row["case"]["variant"], row["case"]["scope"], row["case"]["max_downsample"]) == (variant, scope, None)
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench report`."""
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the README is out of date")


def main(arguments: argparse.Namespace) -> None:
    """Run `python -m bench report`."""
    documents = {path.stem: measure.read(path) for path in sorted(RESULTS.glob("*.json"))}
    text = README.read_text()
    for name, document in documents.items():
        text = fill(text, name, section(name, document))
    if arguments.check:
        if text != README.read_text():
            raise SystemExit("README.md is out of date: run `python -m bench report`")
        return
    README.write_text(text)
    for path in (README, *plots(documents, RESULTS)):
        print(f"wrote {path.relative_to(README.parent)}")

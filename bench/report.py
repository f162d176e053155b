"""`python -m bench report`: the tables and plots of README and docs, from the JSON under bench/results."""

import argparse
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bench import attention, bounds, code, cold, demo, documents, gpu, markdown, quality_tables, tables, weights
from bench.cells import Cell
from bench.flops import LATENTS
from bench.runs import RUNS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
WIDTH = 120  # of a line on a page


def machine(m: dict[str, Any]) -> str:
    """The line above every table: what it was measured on and with."""
    where = m["gpu"] or f"{m['cpu']}, {m['cores']} core{'s' * (m['cores'] != 1)}, {m['memory_gib']} GiB"
    versions = ", ".join(f"{name} {m[name]}" for name in ("torch", "diffusers", "tomesd"))
    commit = f"; commit {m['commit']}" if m["commit"] else ""
    return f"{where}; Python {m['python']}, {versions}{commit}"


def section(name: str, document: dict[str, Any]) -> str:
    """What a page shows of a file: each table under its setting and machine."""
    return "\n\n".join(SECTIONS[document["kind"]](document))


def _demo(document: dict[str, Any]) -> list[str]:
    cell = document["cell"]
    setting = (
        f"Batch {cell['batch']}, ratio {cell['ratio']}; images of {cell['side']} px, {cell['steps']} steps; "
        f"ratios of the sweep: {', '.join(map(str, document['ratios']))}. {machine(document['machine'])}."
    )
    return [document["note"], setting, demo.table(document)]


def _cold(document: dict[str, Any]) -> list[str]:
    given = document["setting"]
    setting = f"{document['resolution']} px, batch 1, ratio {given['ratio']}, fp32 on cpu."
    return [document["note"], f"{setting} {machine(document['machine'])}.", cold.table(document)]


def _quality(document: dict[str, Any]) -> list[str]:
    setting = (
        f"{document['count']} images of {document['size']['width']} x {document['size']['height']} px of the pipeline "
        f"{document['pipeline']}, {document['steps']} steps, guidance {document['guidance']:g}, {document['dtype']} on "
        f"{document['device']}; means with 95 % confidence intervals. {machine(document['machine'])}. "
        f"FLOPs saved are those of a call at {LATENTS} x {LATENTS} latents, or as many as a transformer has places "
        "for, matching taken off, of a schedule the mean of its steps; where a row names no levels, each model merges "
        "at those that pay in it."
    )
    if timed := document.get("timed"):
        setting += (
            f" Speed-ups of an eager call at {timed['latents']} x {timed['latents']} latents, "
            f"{timed['dtype']} on {timed['device']}, the median over rounds and their range: "
            f"`python -m bench {' '.join(timed['argv'])}`, commit {timed['machine']['commit']}."
        )
    pairs = (
        "Differences between two rows, image by image, for prompts and seeds are the same: means with 95 % confidence "
        "intervals. Where one holds 0, the rows may be alike."
    )
    return [document["note"], setting, quality_tables.table(document), pairs, quality_tables.differences(document)]


def _points(document: dict[str, Any]) -> list[str]:
    return [
        f"PSNR to the unmerged image: {document['count']} images of the pipeline {document['pipeline']}, "
        f"{document['dtype']} on {document['device']}.\n{machine(document['machine'])}.",
        quality_tables.points(document),
    ]


def _support(document: dict[str, Any]) -> list[str]:
    return [f"{machine(document['machine'])}.", support(document["features"])]


def _latency(document: dict[str, Any]) -> list[str]:
    parts = [document["note"]]
    for entry in document["cells"]:
        cell = Cell.read(entry["cell"])
        beside = ", compiled side by side" if entry.get("apart") else ""
        parts.append(
            f"**{cell.model}, {cell.resolution} px**, batch {cell.unet_batch}, {cell.merging}, "
            f"{cell.dtype} on {cell.device}, mode {cell.mode}{beside}. {machine(entry['machine'])}.\n\n"
            + tables.table(entry)
        )
        if entry.get("breakdown"):  # transformers have none
            parts.append(
                "One site of the finest level, each part compiled alone:\n\n" + tables.breakdown(entry["breakdown"])
            )
    return parts


def _bounds(document: dict[str, Any]) -> list[str]:
    return [f"{document['note']} {machine(document['machine'])}.", bounds.table(document)]


def _code(document: dict[str, Any]) -> list[str]:
    cards = ", ".join(f"{card} is {name}" for card, name in document["cards"].items())
    setting = (
        f"{document['model']}, {document['resolution']} px, batch {document['batch']}, "
        f"ratio {document['ratio']:g}, fp16; {cards}. {machine(document['machine'])}."
    )
    return [document["note"], setting, code.table(document)]


def _weights(document: dict[str, Any]) -> list[str]:
    first = document["cells"][0]
    cell = weights.Cell(**first["cell"])
    setting = (
        f"Batch {cell.batch}, {attention.HEADS} heads, {cell.dtype} on {cell.device}. {machine(first['machine'])}."
    )
    return [document["note"], setting, weights.table(document)]


def _tests(document: dict[str, Any]) -> list[str]:
    return [f"{machine(document['machine'])}.", gpu.told(document)]


def _prototypes(document: dict[str, Any]) -> list[str]:
    lines = []
    for name, row in document["rows"].items():
        lines.append([name, f"{row['psnr']:.1f}" + (f" ± {row['interval']:.1f}" if "interval" in row else "")])
    return [f"{document['note']} {machine(document['machine'])}.", markdown.table(lines, ["", "PSNR, dB"])]


def _published(document: dict[str, Any]) -> list[str]:
    lines = [
        [
            row["model"],
            row["side"],
            ", ".join(f"{name} {times:.2f}x" for name, times in row["speedups"].items()),
            row["source"],
        ]
        for row in document["rows"]
    ]
    return [document["note"], markdown.table(lines, ["model", "image, px", "speed-up", "source"])]


SECTIONS = {
    "bounds": _bounds,
    "code": _code,
    "demo": _demo,
    "cold": _cold,
    "quality": _quality,
    "support": _support,
    "latency": _latency,
    "prototypes": _prototypes,
    "published": _published,
    "weights": _weights,
    "tests": _tests,
}
# Of no file of their own, from all results
COMPUTED: dict[str, Callable[[dict[str, Any]], str]] = {
    "points": lambda results: "\n\n".join(_points(results["quality"])),
    "attention-kernels": lambda results: attention.chosen(),
    "rows": lambda results: markdown.table([(f"`{name}`", run.about) for name, run in RUNS.items()], ("row", "it is")),
    "support-counts": lambda results: support_counts(results["support"]["features"]),
}
VERDICTS = {"works": "yes", "works with a condition": "yes, if", "refused": "refused"}


def support(features: dict[str, Any]) -> str:
    """What works with what, by the tests that showed it: a table for each group."""
    groups: dict[str, list[list[str]]] = {group: [] for group in sorted({row["group"] for row in features.values()})}
    for feature, row in features.items():
        if "failed" in row["tests"].values():
            raise ValueError(f"{feature}: a test failed: {row['tests']}")
        told = [VERDICTS[row["verdict"]], row["condition"]] if _shown(row) else ["not shown", "its test was skipped"]
        groups[row["group"]].append([feature, *told])
    return "\n\n".join(markdown.table(lines, [group, "works", "if, or why not"]) for group, lines in groups.items())


def support_counts(features: dict[str, Any]) -> str:
    """The same in a sentence."""
    counts = Counter(row["verdict"] for row in features.values() if _shown(row))
    works, condition, refused = (counts[verdict] for verdict in VERDICTS)
    return (
        f"Of {len(features)} features that have a test, {works} work, {condition} do under a condition and {refused} "
        f"are refused, each with the reason; {len(features) - counts.total()} wait for a device that was not there."
    )


def _shown(row: dict[str, Any]) -> bool:
    return set(row["tests"].values()) == {"passed"}


def pages(root: Path) -> dict[Path, str]:
    """The pages that may show results, and their texts."""
    return {path: path.read_text() for path in (root / "README.md", *sorted((root / "docs").glob("*.md")))}


def fill(texts: Mapping[Path, str], name: str, content: str) -> dict[Path, str]:
    """Replace what stands between the markers of `name`, on whichever page they are.

    Raises:
        ValueError: No page has such markers.
    """
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not any(map(pattern.search, texts.values())):
        raise ValueError(f"found no markers {begin} ... {end}")
    filled = f"{begin}\n{wrapped(content)}\n{end}"
    return {path: pattern.sub(lambda _: filled, text) for path, text in texts.items()}


def wrapped(text: str) -> str:
    """The text in lines of the pages' length, but for those of tables, which cannot be broken."""
    wrap = partial(textwrap.fill, width=WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n".join(line if line.startswith("|") else wrap(line) for line in text.splitlines())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench report`."""
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is out of date")


def main(arguments: argparse.Namespace) -> None:
    """Run `python -m bench report`."""
    results = {path.stem: documents.read(path) for path in sorted(RESULTS.glob("*.json"))}
    before = after = pages(ROOT)
    for name, document in results.items():
        after = fill(after, name, section(name, document))
    for name, compute in COMPUTED.items():
        after = fill(after, name, compute(results))
    stale = [path.relative_to(ROOT) for path, text in after.items() if text != before[path]]
    if arguments.check:
        if stale:
            raise SystemExit(f"{', '.join(map(str, stale))}: out of date; run `python -m bench report`")
        return
    from bench import plots  # only they need matplotlib

    for path in stale:
        (ROOT / path).write_text(after[ROOT / path])
    pictures = plots.write(results, RESULTS, lambda name: any(name in text for text in after.values()))
    for written in (*stale, *(path.relative_to(ROOT) for path in pictures)):
        print(f"wrote {written}")

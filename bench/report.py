"""`python -m bench report`: the README's tables and plots, from the JSON under bench/results."""

import argparse
import re
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench import cold, demo, documents, gpu, quality_tables, tables, weights
from bench.cells import Cell
from bench.flops import LATENTS

RESULTS = Path(__file__).parent / "results"
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
    setting = f"{document['resolution']} px, UNet batch 1, ratio {given['ratio']}, fp32 on cpu."
    return [document["note"], f"{setting} {machine(document['machine'])}.", cold.table(document)]


def _quality(document: dict[str, Any]) -> list[str]:
    setting = (
        f"{document['count']} images of {document['size']['width']} x {document['size']['height']} px of the pipeline "
        f"{document['pipeline']}, {document['steps']} steps, guidance {document['guidance']:g}, {document['dtype']} on "
        f"{document['device']}; means with 95 % confidence intervals. {machine(document['machine'])}. "
        f"FLOPs saved are those of a UNet call at {LATENTS} x {LATENTS} latents, matching taken off, of a schedule the "
        "mean of its steps; where a row names no levels, each model merges at those that pay in it."
    )
    if timed := document.get("timed"):
        setting += (
            f" Speed-ups of an eager call of the UNet at {timed['latents']} x {timed['latents']} latents, "
            f"{timed['dtype']} on {timed['device']}, the median over rounds and their range: "
            f"`python -m bench {' '.join(timed['argv'])}`, commit {timed['machine']['commit']}."
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
        cell = Cell.read(entry["cell"])
        parts.append(
            f"**{cell.model}, {cell.resolution} px**, UNet batch {cell.unet_batch}, {cell.merging}, "
            f"{cell.dtype} on {cell.device}, mode {cell.mode}. {machine(entry['machine'])}.\n\n{tables.table(entry)}"
        )
        if "breakdown" in entry:
            parts.append(
                "One site of the finest level, each part compiled alone:\n\n" + tables.breakdown(entry["breakdown"])
            )
    return parts


def _weights(document: dict[str, Any]) -> list[str]:
    first = document["cells"][0]
    cell = weights.Cell(**first["cell"])
    setting = f"Batch {cell.batch}, {weights.HEADS} heads, {cell.dtype} on {cell.device}. {machine(first['machine'])}."
    return [document["note"], setting, weights.table(document)]


def _tests(document: dict[str, Any]) -> list[str]:
    return [f"{machine(document['machine'])}.", gpu.told(document)]


SECTIONS = {
    "demo": _demo,
    "cold": _cold,
    "quality": _quality,
    "support": _support,
    "latency": _latency,
    "weights": _weights,
    "tests": _tests,
}
COMPUTED = {"attention-kernels": weights.chosen}  # of no file; written where a page has the markers


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench report`."""
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the README is out of date")


def main(arguments: argparse.Namespace) -> None:
    """Run `python -m bench report`."""
    results = {path.stem: documents.read(path) for path in sorted(RESULTS.glob("*.json"))}
    text = README.read_text()
    for name, document in results.items():
        text = fill(text, name, section(name, document))
    for name, compute in COMPUTED.items():
        if f"<!-- bench:{name} -->" in text:
            text = fill(text, name, compute())
    if arguments.check:
        if text != README.read_text():
            raise SystemExit("README.md is out of date: run `python -m bench report`")
        return
    from bench import plots  # only they need matplotlib

    README.write_text(text)
    for path in (README, *plots.write(results, RESULTS)):
        print(f"wrote {path.relative_to(README.parent)}")

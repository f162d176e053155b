"""`python -m bench cold`: seconds to compile from nothing, with and without token merging, whole and block by block."""

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch._inductor.utils import fresh_cache
from tqdm import tqdm

from bench import documents, latency, markdown, measure, models
from bench.cases import STOCK, Case
from bench.runs import compiled
from bench.variants import apply

MODES = ("default", "regional")
RATIO = 0.5
WAYS = {STOCK: Case(), "tome_fx": Case("tome_fx", RATIO)}


def run(names: list[str], resolution: int, rounds: int, path: Path) -> dict[str, Any]:
    """Measure in interleaved rounds, writing the JSON after each sample, and return it.

    Who goes first alternates, and a compile before the first round, which is not counted, pays for what a process does
    once.
    """
    document = documents.new(
        "cold",
        note=latency.NOTE,
        **documents.origin("cpu"),
        resolution=resolution,
        setting={"ratio": RATIO},
        models={name: {mode: {way: [] for way in WAYS} for mode in MODES} for name in names},
    )
    with tqdm(total=len(names) * len(MODES) * len(WAYS) * rounds, file=sys.stderr, leave=False) as bar:
        for name in names:
            unet = models.build(name)
            inputs = models.inputs(unet, resolution, 1)
            bar.set_postfix_str(f"{name} before the first round")
            compile_seconds(compiled(apply(WAYS[STOCK], unet), "regional"), inputs)
            for turn in range(rounds):
                for mode in MODES:
                    for way in list(WAYS)[:: -1 if turn % 2 else 1]:
                        bar.set_postfix_str(f"{name} {mode} {way}")
                        model = compiled(apply(WAYS[way], unet), mode)
                        document["models"][name][mode][way].append(compile_seconds(model, inputs))
                        documents.write(path, document)
                        bar.update()
    return document


def compile_seconds(model: nn.Module, inputs: dict[str, Any]) -> float:
    """What a first call takes longer than a second, with every cache empty."""
    torch._dynamo.reset()
    seconds = []
    with fresh_cache(), torch.no_grad():
        for _ in range(2):
            start = time.perf_counter()
            model(**inputs)
            seconds.append(time.perf_counter() - start)
    return seconds[0] - seconds[1]


def table(document: dict[str, Any]) -> str:
    """Medians, and the ratio taken within each round."""
    lines = []
    for name, modes in document["models"].items():
        for mode, ways in modes.items():
            stock, ours = ways["stock"], ways["tome_fx"]
            if times := measure.ratios(ours, stock):
                what = "block by block" if mode == "regional" else "whole"
                row = [name, what, f"{median(stock):.1f}", f"{median(ours):.1f}", f"{times[0]:.2f}x"]
                lines.append([*row, f"{times[1]:.2f} - {times[2]:.2f}", min(len(stock), len(ours))])
    heads = ("model", "compiled", "stock s", "tome_fx s", "tome_fx / stock", "range", "rounds")
    return markdown.table(lines, heads)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench cold`."""
    parser.add_argument("--model", nargs="+", default=["tiny"], help=f"{', '.join(models.CONFIGS)} or a folder")
    parser.add_argument("--resolution", type=int, default=512, help="pixels along a side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("out/cold.json"))


def main(arguments: argparse.Namespace) -> None:
    """Run `python -m bench cold`."""
    a = arguments
    print(table(run(a.model, a.resolution, a.rounds, a.json)))

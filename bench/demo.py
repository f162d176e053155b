"""`python -m bench demo`: a StableDiffusionPipeline with and without token merging, in a few minutes on any machine."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import tomesd
import torch
from diffusers import UNet2DConditionModel
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import tome_fx
from bench import latency, measure, models, tables
from bench.cells import Cell
from bench.variants import VARIANTS, Setting, prepare, sample_first
from tome_fx.api import share

ROWS = ("sdpa", "compile", "tomesd+sdpa", "tome_fx", "tome_fx+compile", "tomesd+compile")
CELL = Cell("tiny", 512)
RATIOS = (0.25, 0.5, 0.75)


def run(steps: int, rounds: int, path: Path) -> dict[str, Any]:
    """Measure, write the JSON, and return it."""
    unet = models.build(CELL.model)
    rows = measure.compare(
        {name: _denoising(name, unet, steps) for name in ROWS},
        exact={name: not VARIANTS[name].merges for name in ROWS},
        rounds=rounds,
        device="cpu",
        title=f"{steps} steps at {CELL.resolution}px",
    )
    document = {
        "schema": 1,
        "kind": "demo",
        "note": latency.NOTE,
        "argv": sys.argv[1:],
        "machine": measure.machine(),
        "cell": {**vars(CELL), "steps": steps},
        "rows": measure.as_json(rows),
        "ratios": RATIOS,
        "sweeps": {name: sweep(name, unet) for name in ROWS if "compile" in name and VARIANTS[name].merges},
    }
    measure.write(path, document)
    return document


def table(document: dict[str, Any]) -> str:
    """The demo's table, in GitHub's format."""
    rows, steps = document["rows"], document["cell"]["steps"]
    lines = []
    for name, row in rows.items():
        if not row["samples_ms"]:
            lines.append([name, row["error"] or "not measured"])
            continue
        compiled = "compile" in name
        sweep = document["sweeps"].get(name)
        lines.append(
            [
                f"`{name}`",
                f"{median(row['samples_ms']) / steps:.0f}",
                f"{tables.speedup(rows, 'sdpa', name):.2f}x",
                f"{tables.speedup(rows, 'compile', name):.2f}x",
                f"{row['first_s'] - median(row['samples_ms']) / 1e3:.0f}" if compiled else "",
                row["compiles"]["graphs"] if compiled else "",
                row["compiles"]["graph_breaks"] if compiled else "",
                *(sweep or ("", "")),
            ]
        )
    count = len(document["ratios"])
    heads = ["variant", "ms per step", "vs eager", "vs compile", "compile s", "graphs", "graph breaks"]
    heads += [f"compiles, {count} ratios", "the same again"]
    return tabulate(lines, heads, tablefmt="github", disable_numparse=True)


def _denoising(name: str, unet: UNet2DConditionModel, steps: int) -> Callable[[], Callable[[], Tensor]]:
    """What prepares a pipeline around a variant and returns the call that denoises once."""

    def make() -> Callable[[], Tensor]:
        return latency.image(prepare(name, unet, Setting()), unet, CELL, steps=steps, output_type="latent")

    return make


def sweep(name: str, unet: UNet2DConditionModel) -> tuple[int, int]:
    """Graphs compiled while the ratio goes through `RATIOS`, and while it does so again.

    Counted with a backend that generates no code: what dynamo compiles does not depend on the backend.
    """
    given = models.inputs(unet, CELL.resolution // 2, 2)
    sample = given.pop("sample")
    visits = _ours(unet) if name.startswith("tome_fx") else _tomesd(unet)
    counts = []
    torch._dynamo.reset()
    with torch.no_grad(), tqdm(total=2 * len(RATIOS), desc=f"ratios, {name}", leave=False) as bar:
        for _ in range(2):
            with measure.count_compiles() as compiles:
                for ratio in RATIOS:
                    visits(ratio)(sample=sample, **given)
                    bar.update()
            counts.append(compiles.graphs)
    return counts[0], counts[1]


def _ours(unet: UNet2DConditionModel) -> Callable[[float], Callable[..., Any]]:
    """A transformed UNet per ratio costs no memory: the weights are shared."""
    unets = {ratio: torch.compile(tome_fx.transform(unet, ratio), fullgraph=True, backend="eager") for ratio in RATIOS}
    return unets.__getitem__


def _tomesd(unet: UNet2DConditionModel) -> Callable[[float], Callable[..., Any]]:
    """tomesd changes the ratio by patching the UNet again."""
    patched = share(unet)
    compiled = torch.compile(patched, backend="eager")

    def visit(ratio: float) -> Callable[..., Any]:
        tomesd.apply_patch(patched, ratio)
        return sample_first(compiled)

    return visit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench demo`."""
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of a timed image")
    parser.add_argument("--rounds", type=int, default=5, help="timed images of each variant")
    parser.add_argument("--json", type=Path, default=Path("out/demo.json"), help="where the samples are written")


def main(arguments: argparse.Namespace) -> None:
    """Run `python -m bench demo`."""
    print(
        "A small UNet in a StableDiffusionPipeline, six ways. The compiled ones take half a minute or more to warm up."
    )
    document = run(arguments.steps, arguments.rounds, arguments.json)
    print(f"{latency.NOTE}\n\n{table(document)}\n\nwritten to {arguments.json}")

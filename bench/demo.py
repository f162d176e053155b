"""`python -m bench demo`: the shapes pipeline with and without token merging, in a few minutes on any machine."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import tomesd
import torch
from diffusers import UNet2DConditionModel
from tqdm import tqdm

import tome_fx
from bench import documents, markdown, measure, shapes, tables, viz, warm
from bench.images import generate
from bench.models import example
from bench.runs import RUNS, prepare
from bench.shapes.scenes import HELD_OUT, SIDE, numbered
from bench.variants import predict
from tome_fx.families.unet import share

NOTE = (
    "A small UNet whose trained weights come with the project. Times are of a call with 64 x 64 tokens at the finest "
    "level, as Stable Diffusion has at 512 px; images are of the size that it was trained for."
)
ROWS = ("sdpa", "compile", "tomesd+sdpa", "tome_fx", "tome_fx+compile", "tomesd+compile")
PICTURED = ("sdpa", "tome_fx", "tomesd+sdpa")  # compiled ones make the same, and would be compiled for this size
LATENTS, BATCH = 64, 2  # along a side, and one image under guidance
RATIO = 0.5
RATIOS = (0.25, 0.5, 0.75)


def run(images: int, steps: int, rounds: int, path: Path) -> dict[str, Any]:
    """Measure, write the JSON and, beside it, the images, and return what the JSON holds."""
    pipe = shapes.pipeline()
    inputs = example(pipe.unet, LATENTS, LATENTS, BATCH)

    def make(name: str) -> warm.Call:
        return partial(predict, prepare(name, pipe.unet, ratio=RATIO), inputs)

    rows = measure.compare(
        {name: partial(make, name) for name in ROWS},
        exact={name: not RUNS[name].merges for name in ROWS},
        rounds=rounds,
        device="cpu",
        title=f"a call, {LATENTS} x {LATENTS}",
    )
    document = documents.new(
        "demo",
        note=NOTE,
        **documents.origin("cpu"),
        cell={"latents": LATENTS, "batch": BATCH, "ratio": RATIO, "images": images, "side": SIDE, "steps": steps},
        rows=measure.as_json(rows),
        ratios=RATIOS,
    )
    documents.write(path, document)
    prompts = [scene.caption for scene in numbered(HELD_OUT, images)]
    columns = {}
    for name in PICTURED:
        if not rows[name].error:  # it would fail again
            call = prepare(name, pipe.unet, ratio=RATIO)
            made = generate(pipe, call, prompts, steps=steps, guidance=shapes.GUIDANCE, title=f"images, {name}")
            columns[_title(name)] = list(made.pixels)
    if columns:
        viz.grid(path.with_suffix(".png"), columns, prompts)
    document["sweeps"] = {name: sweep(name, pipe.unet) for name in ROWS if "compile" in name and RUNS[name].merges}
    documents.write(path, document)
    return document


def _title(name: str) -> str:
    return f"{name}, ratio {RATIO if RUNS[name].merges else 0:g}"


def table(document: dict[str, Any]) -> str:
    """The demo's table, in GitHub's format."""
    rows = document["rows"]
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
                f"{median(row['samples_ms']):.0f}",
                f"{tables.speedup(rows, 'sdpa', name):.2f}x",
                f"{tables.speedup(rows, 'compile', name):.2f}x",
                f"{row['first_s'] - median(row['samples_ms']) / 1e3:.0f}" if compiled else "",
                row["compiles"]["graphs"] if compiled else "",
                row["compiles"]["graph_breaks"] if compiled else "",
                *(sweep or ("", "")),
            ]
        )
    count = len(document["ratios"])
    heads = ["variant", "ms (median)", "vs eager", "vs compile", "compile s", "graphs", "graph breaks"]
    heads += [f"compiles, {count} ratios", "the same again"]
    return markdown.table(lines, heads)


def sweep(name: str, unet: UNet2DConditionModel) -> tuple[int, int]:
    """Graphs compiled while the ratio goes through `RATIOS`, and while it does so again.

    Counted with a backend that generates no code: what dynamo compiles does not depend on the backend.
    """
    inputs = example(unet, 16, 16, BATCH)
    visits = _ours(unet) if name.startswith("tome_fx") else _tomesd(unet)
    counts = []
    torch._dynamo.reset()
    with torch.no_grad(), tqdm(total=2 * len(RATIOS), desc=f"ratios, {name}", leave=False) as bar:
        for _ in range(2):
            with warm.count_compiles() as compiles:
                for ratio in RATIOS:
                    predict(visits(ratio), inputs)
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
        return compiled

    return visit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench demo`."""
    parser.add_argument("--images", type=int, default=4, help="that are made")
    parser.add_argument("--steps", type=int, default=12, help="denoising steps of an image")
    parser.add_argument("--rounds", type=int, default=5, help="how often each variant is timed")
    parser.add_argument("--json", type=Path, default=Path("out/demo.json"), help="the samples; beside it go the images")


def main(arguments: argparse.Namespace) -> None:
    """Run `python -m bench demo`."""
    a = arguments
    print("A UNet of coloured shapes, timed six ways. The compiled ones take a minute or more to warm up.")
    document = run(a.images, a.steps, a.rounds, a.json)
    print(f"{NOTE}\n\n{table(document)}\n\nwritten to {a.json}, images to {a.json.with_suffix('.png')}")

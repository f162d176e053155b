"""`python -m bench demo`: the shapes pipeline with and without token merging, in a few minutes on any machine."""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import tomesd
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import tome_fx
from bench import measure, shapes, tables, viz
from bench.shapes.scenes import HELD_OUT, SIDE, numbered
from bench.variants import VARIANTS, AsUNet, Setting, prepare, sample_first
from tome_fx.families.inputs import example_inputs
from tome_fx.families.unet import share

NOTE = "Real images, from trained weights that come with the project; the i-th from prompt i and seed i in every row."
ROWS = ("sdpa", "compile", "tomesd+sdpa", "tome_fx", "tome_fx+compile", "tomesd+compile")
PICTURED = ("compile", "tome_fx+compile", "tomesd+compile")
RATIOS = (0.25, 0.5, 0.75)


def run(images: int, steps: int, rounds: int, path: Path) -> dict[str, Any]:
    """Measure, write the JSON and, beside it, the images, and return what the JSON holds."""
    pipe = shapes.pipeline()
    unet = pipe.unet
    prompts = [scene.caption for scene in numbered(HELD_OUT, images)]
    calls: dict[str, Callable[[], Tensor]] = {}

    def make(name: str) -> Callable[[], Tensor]:
        calls[name] = denoising(pipe, AsUNet(prepare(name, unet, Setting()), unet), prompts, steps)
        return calls[name]

    rows = measure.compare(
        {name: partial(make, name) for name in ROWS},
        exact={name: not VARIANTS[name].merges for name in ROWS},
        rounds=rounds,
        device="cpu",
        title=f"{images} images, {steps} steps",
    )
    document = {
        "schema": 1,
        "kind": "demo",
        "note": NOTE,
        "argv": sys.argv[1:],
        "machine": measure.machine("cpu"),
        "cell": {"model": "shapes", "side": SIDE, "images": images, "steps": steps, "ratio": Setting().ratio},
        "rows": measure.as_json(rows),
        "ratios": RATIOS,
    }
    measure.write(path, document)
    with torch.no_grad():
        done = [name for name in PICTURED if not rows[name].error]  # one that failed would fail again
        pixels = {name: pipe.vae.decode(calls[name]() / pipe.vae.config.scaling_factor).sample for name in done}
    columns = {_title(name): list(p.clamp(-1, 1) / 2 + 0.5) for name, p in pixels.items()}
    if columns:
        viz.grid(path.with_suffix(".png"), columns, prompts)
    document["sweeps"] = {name: sweep(name, unet) for name in ROWS if "compile" in name and VARIANTS[name].merges}
    measure.write(path, document)
    return document


def _title(name: str) -> str:
    return f"{name}, ratio {Setting().ratio if VARIANTS[name].merges else 0:g}"


def denoising(pipe: StableDiffusionPipeline, unet: AsUNet, prompts: Sequence[str], steps: int) -> Callable[[], Tensor]:
    """A call that makes the latents of an image for each prompt."""

    def call() -> Tensor:
        own, pipe.unet = pipe.unet, unet
        try:
            latents: Tensor = pipe(
                list(prompts),
                num_inference_steps=steps,
                guidance_scale=shapes.GUIDANCE,
                generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
                output_type="latent",
            ).images
        finally:
            pipe.unet = own
        return latents

    return call


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


def sweep(name: str, unet: UNet2DConditionModel) -> tuple[int, int]:
    """Graphs compiled while the ratio goes through `RATIOS`, and while it does so again.

    Counted with a backend that generates no code: what dynamo compiles does not depend on the backend.
    """
    given = example_inputs(unet, 16, 16)
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
    parser.add_argument("--images", type=int, default=4, help="that are made at once")
    parser.add_argument("--steps", type=int, default=12, help="denoising steps of an image")
    parser.add_argument("--rounds", type=int, default=5, help="how often each variant is timed")
    parser.add_argument("--json", type=Path, default=Path("out/demo.json"), help="the samples; beside it go the images")


def main(arguments: argparse.Namespace) -> None:
    """Run `python -m bench demo`."""
    a = arguments
    print("A trained pipeline of coloured shapes, six ways. The compiled ones take a minute or more to warm up.")
    document = run(a.images, a.steps, a.rounds, a.json)
    print(f"{NOTE}\n\n{table(document)}\n\nwritten to {a.json}, images to {a.json.with_suffix('.png')}")

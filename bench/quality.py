"""`python -m bench quality`: how far merging moves an image of the same seed, and whether it shows its prompt."""

import argparse
import csv
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from tqdm import tqdm

import tome_fx
from bench import measure, shapes, variants, viz
from bench.cells import STOCK, Case
from bench.latency import DTYPES
from bench.metrics import Images, compare, judging, perceiving
from bench.quality_tables import table
from bench.shapes.scenes import HELD_OUT, SIDE, Scene, draw, numbered
from bench.variants import SCOPES, AsUNet
from tome_fx.families.inputs import example_inputs
from tome_fx.families.unet import share

ROUNDS = 9  # of timed calls


def _transformed(unet: UNet2DConditionModel, case: Case, **options: Any) -> UNet2DConditionModel:
    return tome_fx.transform(unet, case.ratio, max_downsample=case.max_downsample, **SCOPES[case.scope], **options)


def _each_step(unet: UNet2DConditionModel, case: Case, steps: int) -> Callable[..., Any]:
    """Other destinations in every step, as tomesd draws them; a pipeline calls its UNet once a step."""
    turns = itertools.cycle([_transformed(unet, case, seed=step) for step in range(steps)])
    return lambda **inputs: next(turns)(**inputs)


def _tomesd(unet: UNet2DConditionModel, case: Case, steps: int) -> Callable[..., Any]:
    return variants.sample_first(variants.patched(unet, variants.Setting(case.ratio, case.scope)))


VARIANTS: dict[str, Callable[[UNet2DConditionModel, Case, int], Callable[..., Any]]] = {
    STOCK: lambda unet, case, steps: unet,
    "tome_fx": lambda unet, case, steps: _transformed(unet, case),
    "prop_attn": lambda unet, case, steps: _transformed(unet, case, prop_attn=True),
    "top-left": lambda unet, case, steps: _transformed(unet, case, use_rand=False),
    "each-step": _each_step,
    "one-match": lambda unet, case, steps: variants.one_match(_transformed(unet, case)),
    "tomesd": _tomesd,
    "todo": lambda unet, case, steps: variants.downsampled(unet, variants.Setting(case.ratio)),
}


@torch.no_grad()
def generate(
    pipe: Any,
    call: Callable[..., Any],
    prompts: Sequence[str],
    steps: int,
    guidance: float,
    *,
    first_seed: int = 0,
    size: Mapping[str, int] | None = None,
) -> Images:
    """An image for each prompt, the i-th from seed `first_seed + i`, of the pipeline's own size or of `size`.

    Raises:
        ValueError: An image is not finite.
    """
    unet = pipe.unet
    pipe.unet = AsUNet(call, unet)
    try:
        latents = pipe(
            list(prompts),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(first_seed + i) for i in range(len(prompts))],
            output_type="latent",
            **(size or {}),
        ).images
    finally:
        pipe.unet = unet
    pixels = pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample
    if not pixels.isfinite().all():
        raise ValueError(f"an image is not finite: try another dtype than {unet.dtype}")
    return Images(latents.float().cpu(), (pixels.float().cpu() / 2 + 0.5).clamp(0, 1))


def read_prompts(path: Path, count: int) -> list[str]:
    """The first prompts of a text file, one a line, or of the column Prompt of a TSV, such as PartiPrompts'.

    Raises:
        ValueError: There are fewer, or a TSV has no such column.
    """
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if path.suffix == ".tsv":
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
        if rows and "Prompt" not in rows[0]:
            raise ValueError(f"prompts: {path} must have a column Prompt, its columns are {', '.join(rows[0])}")
        lines = [row["Prompt"] for row in rows]
    if len(lines) < count:
        raise ValueError(f"prompts: {path} must have at least n={count} prompts, it has {len(lines)}")
    return lines[:count]


def load(
    pipeline: str, prompts: Path | None, count: int, device: str = "cpu", dtype: str = "fp32"
) -> tuple[Any, list[str], list[Scene]]:
    """The pipeline, so many prompts, and the scenes that they are captions of, if they are.

    Raises:
        ValueError: There are no prompts, or too few, or `count` is not positive.
    """
    if count < 1:
        raise ValueError(f"n must be at least 1, got {count}")
    ours = pipeline == "shapes"
    if not ours and prompts is None:
        raise ValueError("prompts must be a file of prompts, for any pipeline but shapes; got none")
    pipe = _open(pipeline, device, dtype)
    if prompts is not None:
        return pipe, read_prompts(prompts, count), []
    scenes = numbered(HELD_OUT, count)
    return pipe, [scene.caption for scene in scenes], scenes


def _open(pipeline: str, device: str, dtype: str) -> Any:
    pipe = shapes.pipeline() if pipeline == "shapes" else DiffusionPipeline.from_pretrained(pipeline)
    pipe.to(device)
    if dtype != "fp32":
        pipe.to(DTYPES[dtype])
        pipe.vae.float()  # SDXL's overflows in half precision
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(
    pipeline: str,
    cases: Sequence[Case],
    *,
    count: int,
    steps: int,
    guidance: float,
    prompts: Path | None,
    path: Path,
    batch: int = 16,
    keep: int = 0,
    device: str = "cpu",
    dtype: str = "fp32",
    size: Mapping[str, int] | None = None,
) -> tuple[dict[str, Any], dict[Case, Tensor]]:
    """Generate and judge, case by case, writing the JSON after each; returns it and the first `keep` images of each.

    Cases that the file holds already stay in it, so that several calls can fill one table.

    Raises:
        ValueError: A case has an option that its variant would pass over, or the file holds what was measured in
            another setting or on another machine.
    """
    for case in cases:
        case.check()
    pipe, texts, scenes = load(pipeline, prompts, count, device, dtype)
    judged = judging(scenes) if scenes else None
    perceived = perceiving(texts) if not scenes else None
    document: dict[str, Any] = {
        "schema": 2,
        "kind": "quality",
        "note": "The i-th image of every row is from seed i and prompt i.",
        "machine": measure.machine(device),
        "device": device,
        "dtype": dtype,
        "pipeline": pipeline,
        "count": count,
        "steps": steps,
        "guidance": guidance,
        "prompts": texts,
    }
    document["rows"] = _earlier_rows(path, document, cases)
    if document["rows"]:
        document["size"] = measure.read(path)["size"]
    if judged:  # what the measures say of as many real images: the best that there is
        pixels = draw(scenes, SIDE) / 2 + 0.5
        document["real"] = judged(Images(pixels, pixels))
    stock: Images | None = None
    pictures = {}
    with tqdm(total=len(cases) * count, file=sys.stderr, leave=False) as bar:
        for case in cases:
            bar.set_postfix_str(case.title)
            torch.manual_seed(0)  # tomesd draws from the process's generator
            call = VARIANTS[case.variant](share(pipe.unet), case, steps)
            parts = []
            for first in range(0, count, batch):
                some = texts[first : first + batch]
                parts.append(generate(pipe, call, some, steps, guidance, first_seed=first, size=size))
                bar.update(len(parts[-1].latents))
            images = Images(torch.cat([p.latents for p in parts]), torch.cat([p.pixels for p in parts]))
            stock = stock or images
            row = {"case": asdict(case), "argv": sys.argv[1:], **compare(images, stock)}
            row |= judged(images) if judged else {}
            row |= perceived(images, stock) if perceived else {}
            document["rows"].append(row)
            document["rows"].sort(key=lambda row: row["case"]["variant"] != STOCK)  # stock first, whenever it was run
            if document.setdefault("size", list(images.pixels.shape[-2:])) != list(images.pixels.shape[-2:]):
                raise ValueError(f"json: {path} holds images of another size; give another file")
            pictures[case] = images.pixels[:keep]
            measure.write(path, document)
    return document, pictures


def _earlier_rows(path: Path, document: dict[str, Any], cases: Sequence[Case]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    earlier = measure.read(path)
    other = [name for name, value in document.items() if earlier.get(name) != value]
    if other:
        raise ValueError(f"json: {path} holds results of another {', '.join(other)}; give another file")
    kept = [row for row in earlier["rows"] if Case(**row["case"]) not in cases]
    return [{name: value for name, value in row.items() if name != "ms"} for row in kept]  # times are of all rows


def add_times(path: Path, side: int, rounds: int, device: str = "cpu", dtype: str = "fp32") -> dict[str, Any]:
    """Time an eager call of the UNet, an image under guidance, for every row of the file; the rows take turns.

    Args:
        path: The file, to which the times are added; stock must be among its rows.
        side: Latents along a side. Images may be made at a size where merging saves little and timed at a larger one.
        rounds: Calls of each.
        device: Which need not be the one that the images were made on.
        dtype: A key of `DTYPES`.
    """
    document = measure.read(path)
    pipe = _open(document["pipeline"], device, dtype)
    given = example_inputs(pipe.unet, side, side, device=device, dtype=DTYPES[dtype])
    cases = [Case(**row["case"]) for row in document["rows"]]

    def make(case: Case) -> Callable[[], Tensor]:
        call = VARIANTS[case.variant](share(pipe.unet), case, document["steps"])
        return lambda: call(**given).sample

    runs = {str(case): partial(make, case) for case in cases}
    timed = measure.compare(runs, exact=None, rounds=rounds, device=device, title="speed")
    document["timed"] = {"latents": side, "device": device, "dtype": dtype}
    document["timed"] |= {"argv": sys.argv[1:], "machine": measure.machine(device)}
    for row, case in zip(document["rows"], cases, strict=True):
        row["ms"] = timed[str(case)].samples_ms
    measure.write(path, document)
    return document


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench quality`."""
    parser.add_argument("--pipeline", default="shapes", help="shapes, or the folder of a pipeline with a UNet")
    parser.add_argument("--variant", nargs="+", choices=list(VARIANTS)[1:], default=["tome_fx", "tomesd"])
    parser.add_argument("--ratio", nargs="+", type=float, default=[0.25, 0.5, 0.75])
    parser.add_argument("--scope", nargs="+", choices=SCOPES, default=["attn"])
    parser.add_argument(
        "--max-downsample", type=int, choices=(1, 2, 4, 8), help="levels to merge at; finest if not given"
    )
    parser.add_argument("--prompts", type=Path, help="a text file, one prompt a line, or a TSV with a column Prompt")
    parser.add_argument("--n", type=int, default=96, help="images of each row")
    parser.add_argument("--steps", type=int, default=12, help="denoising steps of an image")
    parser.add_argument("--guidance", type=float, default=shapes.GUIDANCE, help="scale of the classifier-free guidance")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, of the images, the times and the map")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of all but the VAE, which is fp32")
    parser.add_argument("--batch", type=int, default=16, help="images that are made at once")
    parser.add_argument("--height", type=int, help="of an image in pixels, the pipeline's own if not given")
    parser.add_argument("--width", type=int, help="likewise")
    parser.add_argument("--json", type=Path, default=Path("out/quality.json"), help="rows are added to those it holds")
    parser.add_argument("--grid", type=Path, help="a PNG of the first four prompts' images of each row")
    parser.add_argument(
        "--time", type=int, metavar="SIDE", help="only time the rows of --json, at so many latents a side"
    )
    parser.add_argument("--map", type=Path, help="only write this PNG: what the first ratio merges in the first image")


def write_map(arguments: argparse.Namespace) -> None:
    """What `--map` asks for."""
    a = arguments
    pipe, texts, _ = load(a.pipeline, a.prompts, 1, a.device, a.dtype)
    case = Case("tome_fx", a.ratio[0], a.scope[0], a.max_downsample)
    pipe.unet = VARIANTS["tome_fx"](pipe.unet, case, a.steps)
    viz.merge_maps(a.map, pipe, texts[0], steps=a.steps, guidance=a.guidance)
    print(f"written to {a.map}")


def main(arguments: argparse.Namespace) -> None:
    """Run `python -m bench quality`."""
    a = arguments
    products = itertools.product(a.variant, a.scope, a.ratio)
    cases = [Case(), *(Case(variant, ratio, scope, a.max_downsample) for variant, scope, ratio in products)]
    if a.map:
        write_map(a)
        return
    if a.time:
        print(table(add_times(a.json, a.time, ROUNDS, a.device, a.dtype)))
        return
    document, pictures = run(
        a.pipeline,
        cases,
        count=a.n,
        steps=a.steps,
        guidance=a.guidance,
        prompts=a.prompts,
        path=a.json,
        batch=a.batch,
        keep=4,
        device=a.device,
        dtype=a.dtype,
        size={name: value for name in ("height", "width") if (value := getattr(a, name))},
    )
    if a.grid:
        viz.grid(a.grid, {case.title: list(images) for case, images in pictures.items()}, document["prompts"][:4])
    print(f"{document['note']}\n\n{table(document)}\n\nwritten to {a.json}")

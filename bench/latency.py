"""`python -m bench latency`: milliseconds of a UNet call, every variant beside its peers."""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

import tome_fx
from bench import measure, models
from bench.cells import SUITES, Cell, suite
from bench.tables import table
from bench.variants import MODES, SCOPES, VARIANTS, AsUNet, Setting, merged, prepare
from tome_fx import ops, plan
from tome_fx.families.unet import find_sites

NOTE = "Weights are random, from a seed: latency does not depend on them."
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
STEPS = 50  # of an end-to-end image: diffusers' default


def run(cells: Sequence[Cell], variants: Sequence[str], rounds: int, path: Path, *, breakdown: bool = False) -> Any:
    """Measure the cells that the file does not hold yet, write them into it, and return its content."""
    document: dict[str, Any] = {"schema": 1, "kind": "latency", "note": NOTE, "cells": []}
    if path.exists():
        document = measure.read(path)
    here = {"argv": sys.argv[1:], "machine": measure.machine()}
    unet: UNet2DConditionModel | None = None
    built: tuple[str, str, str] | None = None
    for cell in cells:
        key = asdict(cell)
        known = [entry for entry in document["cells"] if entry["cell"] == key and entry["complete"]]
        entry = known[0] if known and set(variants) <= set(known[0]["rows"]) else None
        if entry and ("breakdown" in entry or not breakdown):
            continue
        if built != (cell.model, cell.device, cell.dtype):
            unet = models.build(cell.model, cell.device, DTYPES[cell.dtype])
            built = (cell.model, cell.device, cell.dtype)
        assert unet is not None
        if entry is None:
            entry = {"cell": key, "complete": False, **here, **_flops(unet, cell), "rows": {}}
            document["cells"] = [other for other in document["cells"] if other["cell"] != key] + [entry]

            def save(rows: dict[str, measure.Row], entry: dict[str, Any] = entry) -> None:
                entry["rows"] = measure.as_json(rows)
                measure.write(path, document)

            measure.compare(
                {name: _calling(name, unet, cell) for name in variants},
                exact={name: not VARIANTS[name].merges for name in variants},
                rounds=rounds,
                device=cell.device,
                title=str(cell),
                save=save,
            )
            entry["complete"] = True
        if breakdown:
            entry["breakdown"] = measure.as_json(_breakdown(unet, cell, rounds))
        measure.write(path, document)
        print(f"\n{cell}\n{table(entry)}\n", flush=True)
    return document


def _flops(unet: UNet2DConditionModel, cell: Cell) -> dict[str, Any]:
    """FLOPs per call and the bound, from `tome_fx.explain`."""
    side = cell.resolution // models.LATENT
    report = tome_fx.explain(merged(unet, Setting(cell.ratio, cell.scope)), side, side)
    return {
        "flops": report.flops_before * cell.unet_batch,
        "flops_merged": report.flops_after * cell.unet_batch,
        "bound": report.bound,
    }


def _calling(name: str, unet: UNet2DConditionModel, cell: Cell) -> Callable[[], Callable[[], Tensor]]:
    """What prepares a variant of the UNet for a cell and returns the call to time."""
    setting = Setting(cell.ratio, cell.scope, cell.mode)

    def make() -> Callable[[], Tensor]:
        call = prepare(name, unet, setting)
        if cell.end_to_end:
            return image(call, unet, cell)
        given = models.inputs(unet, cell.resolution, cell.unet_batch)
        sample = given.pop("sample")
        return lambda: call(sample=sample, **given).sample

    return make


def image(
    call: Callable[..., Any],
    unet: UNet2DConditionModel,
    cell: Cell,
    *,
    steps: int = STEPS,
    output_type: str = "pt",
) -> Callable[[], Tensor]:
    """A call that makes one image from prompt embeddings; it returns the pixels, or latents where asked to."""
    pipe = models.pipeline(unet)
    prompt = models.inputs(unet, cell.resolution, cell.batch)["encoder_hidden_states"]
    pipe.unet = AsUNet(call, unet)

    def run() -> Tensor:
        result: Tensor = pipe(
            prompt_embeds=prompt,
            negative_prompt_embeds=torch.zeros_like(prompt),
            guidance_scale=7.5 if cell.guidance else 1.0,
            num_inference_steps=steps,
            height=cell.resolution,
            width=cell.resolution,
            generator=torch.Generator().manual_seed(0),
            output_type=output_type,
        ).images
        return result

    return run


def _breakdown(unet: UNet2DConditionModel, cell: Cell, rounds: int) -> dict[str, measure.Row]:
    """The parts of one site of the finest level, each compiled alone: where a site's time goes."""
    sites = find_sites(unet)
    site = min(sites, key=lambda site: site.downsample)
    side = cell.resolution // models.LATENT // site.downsample
    block: Any = unet.get_submodule(site.path)
    options: dict[str, Any] = {"kept": plan.kept(side, side, cell.ratio), "sx": 2, "sy": 2, "seed": 1}
    tokens = torch.randn(cell.unet_batch, side * side, site.channels, device=unet.device, dtype=unet.dtype)
    slots = ops.match(tokens, side, side, **options)
    small = ops.merge(tokens, slots)
    parts: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "match": (lambda x: ops.match(x, side, side, **options), (tokens,)),
        "merge": (ops.merge, (tokens, slots)),
        "unmerge": (ops.unmerge, (small, slots)),
        "attention, all tokens": (lambda x: block.attn1(x), (tokens,)),
        "attention, merged": (lambda x: block.attn1(x), (small,)),
    }

    def make(part: Callable[..., Any], given: tuple[Any, ...]) -> Callable[[], Callable[[], Tensor]]:
        def prepared() -> Callable[[], Tensor]:
            compiled = torch.compile(part, fullgraph=True)
            return lambda: compiled(*given)

        return prepared

    return measure.compare(
        {name: make(*part) for name, part in parts.items()},
        exact=None,
        rounds=max(rounds, 10),
        device=cell.device,
        title=f"parts of {cell}",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench latency`."""
    rows = "; ".join(f"{name}: {variant.about}" for name, variant in VARIANTS.items())
    parser.add_argument("--suite", choices=SUITES, help="a fixed set of cells; the options below are then its own")
    parser.add_argument("--part", default="1/1", help="which part of the cells, 1/3 for the first third")
    parser.add_argument("--model", nargs="+", default=["tiny"], help=f"{', '.join(models.CONFIGS)} or a folder")
    parser.add_argument("--resolution", nargs="+", type=int, default=[512], help="pixels along a side")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="images")
    parser.add_argument("--ratio", nargs="+", type=float, default=[0.5])
    parser.add_argument("--scope", nargs="+", choices=SCOPES, default=["attn"])
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS), help=rows)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--mode", choices=MODES, default="default")
    parser.add_argument("--no-guidance", action="store_true", help="one UNet call per image, not two")
    parser.add_argument("--end-to-end", action="store_true", help=f"seconds per image of {STEPS} steps, VAE included")
    parser.add_argument("--breakdown", action="store_true", help="time match, merge, unmerge and attention as well")
    parser.add_argument("--rounds", type=int, help="timed calls of each variant")
    parser.add_argument("--json", type=Path, help="where to; a file that is there is continued")


def main(arguments: argparse.Namespace) -> None:
    """Run `python -m bench latency`."""
    a = arguments
    if a.suite:
        chosen = suite(a.suite, a.device)
        cells, variants, rounds = chosen.cells, chosen.variants, a.rounds or chosen.rounds
    else:
        products = itertools.product(a.model, a.resolution, a.batch, a.ratio, a.scope)
        common = (a.dtype, a.device, a.mode, not a.no_guidance, a.end_to_end)
        cells = tuple(Cell(*product, *common) for product in products)
        variants, rounds = tuple(a.variant), a.rounds or 10
    part, parts = map(int, a.part.split("/"))
    path = a.json or Path("out") / f"{a.suite or 'latency'}.json"
    print(NOTE)
    run(cells[part - 1 :: parts], variants, rounds, path, breakdown=a.breakdown)
    print(f"written to {path}")

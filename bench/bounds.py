"""`python -m bench bounds`: what merging saves at most, by FLOPs, in models of real size; needs no weights."""

import argparse
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

import tome_fx
from bench import documents, markdown, models

NOTE = (
    "By `tome_fx.explain`, for models from their configs and without weights: FLOPs of a call before merging over "
    "those after it, matching paid for, with a prompt as long as pipelines make it and a video of 81 frames. No times: "
    "attention often gains more."
)
RATIOS = (0.25, 0.5, 0.75)
KEYS = "keys and values"
WAYS: dict[str, dict[str, Any]] = {
    "attention": {},
    KEYS: {"merge_queries": False},
    "whole blocks": {"merge_block": True},
}
MODELS = {
    "SD 1.5": "sd15",
    "SD 2.1": "sd21",
    "SDXL": "sdxl",
    "PixArt-Σ XL": "pixart",
    "SD 3.5 medium": "sd35-medium",
    "SD 3.5 large": "sd35-large",
    "Flux.1 dev": "flux",
    "Qwen-Image": "qwen",
    "Wan 2.1 1.3B": "wan",
    "Wan 2.1 14B": "wan-large",
}
WITH_KEYS = (*models.UNETS, "pixart")
IMAGES = (  # models with the width and the height, in pixels
    *(("SD 1.5", side, side) for side in (512, 1024)),
    ("SD 2.1", 768, 768),
    *(("SDXL", side, side) for side in (1024, 2048)),
    *(("PixArt-Σ XL", side, side) for side in (1024, 2048)),
    *((name, 1024, 1024) for name in ("SD 3.5 medium", "SD 3.5 large", "Flux.1 dev")),
    ("Qwen-Image", 1328, 1328),
    *((name, 832, 480) for name in ("Wan 2.1 1.3B", "Wan 2.1 14B")),
    ("Wan 2.1 14B", 1280, 720),
)


def run(path: Path) -> dict[str, Any]:
    """Count each way at each image, where a model has it."""
    rows: list[dict[str, Any]] = []
    document = documents.new("bounds", note=NOTE, **documents.origin("cpu"), rows=rows)
    for name, width, height in tqdm(IMAGES, file=sys.stderr, leave=False):
        model, sides = models.build(MODELS[name], "meta"), (height // models.LATENT, width // models.LATENT)
        for way, options in WAYS.items():
            if way == KEYS and MODELS[name] not in WITH_KEYS:
                continue  # attention of text and image together takes keys from the tokens that attend
            reports = [tome_fx.explain(tome_fx.transform(model, r, **options), *sides) for r in RATIOS]
            rows.append(
                {
                    "model": name,
                    "image": [width, height],
                    "way": way,
                    "tflops": reports[0].flops_before / 1e12,
                    "tokens": max(site.tokens for site in reports[0].rows),
                    "bounds": [round(report.bound, 3) for report in reports],
                }
            )
    documents.write(path, document)
    return document


def table(document: dict[str, Any]) -> str:
    """A line for each model, image and way."""
    lines = [
        [
            row["model"],
            _size(*row["image"]),
            row["tokens"],
            f"{row['tflops']:.2f}",
            row["way"],
            *map("{:.2f}x".format, row["bounds"]),
        ]
        for row in document["rows"]
    ]
    heads = ["model", "image, px", "tokens", "TFLOPs", "merged", *(f"at {ratio:g}" for ratio in RATIOS)]
    return markdown.table(lines, heads)


def _size(width: int, height: int) -> str:
    return str(width) if width == height else f"{width} x {height}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench bounds`."""
    parser.add_argument("--json", type=Path, default=Path("out/bounds.json"))


def main(arguments: argparse.Namespace) -> None:
    """Run `python -m bench bounds`."""
    print(NOTE, table(run(arguments.json)), f"written to {arguments.json}", sep="\n\n")

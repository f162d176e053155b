"""`python -m bench bounds`: what merging saves at most, by FLOPs, in models of real size; needs no weights."""

import argparse
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from tqdm import tqdm

import tome_fx
from bench import documents, markdown, models

NOTE = (
    "By `tome_fx.explain`, for models from their configs and without weights: FLOPs of a call before merging over "
    "those after it, matching paid for, with a prompt of 77 tokens. No times: attention often gains more."
)
RATIOS = (0.25, 0.5, 0.75)
KEYS = "keys and values"
WAYS: dict[str, dict[str, Any]] = {
    "attention": {},
    KEYS: {"merge_queries": False},
    "whole blocks": {"merge_block": True},
}
# Where a config departs from its class's defaults, which are nearly those of PixArt-Σ XL and Flux.1 dev
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "PixArt-Σ XL": ("PixArtTransformer2DModel", {"caption_channels": 4096}),
    "SD 3.5 medium": (
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
    ),
    "SD 3.5 large": (
        "SD3Transformer2DModel",
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
    "Flux.1 dev": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}),
}
UNETS = {"SD 1.5": "sd15", "SD 2.1": "sd21", "SDXL": "sdxl"}
IMAGES = (
    *(("SD 1.5", side) for side in (512, 1024)),
    ("SD 2.1", 768),
    *(("SDXL", side) for side in (1024, 2048)),
    *(("PixArt-Σ XL", side) for side in (1024, 2048)),
    *((name, 1024) for name in ("SD 3.5 medium", "SD 3.5 large", "Flux.1 dev")),
    ("Qwen-Image", 1328),
)


def build(name: str) -> nn.Module:
    """A model without values."""
    model: nn.Module
    if name in UNETS:
        model = models.build(UNETS[name], "meta")
    else:
        kind, config = TRANSFORMERS[name]
        with torch.device("meta"):
            model = getattr(diffusers, kind)(**config)
    return model


def run(path: Path) -> dict[str, Any]:
    """Count each way at each image, where a model has it."""
    rows: list[dict[str, Any]] = []
    document = documents.new("bounds", note=NOTE, **documents.origin("cpu"), rows=rows)
    for name, side in tqdm(IMAGES, file=sys.stderr, leave=False):
        model, latents = build(name), side // models.LATENT
        for way, options in WAYS.items():
            if way == KEYS and name not in (*UNETS, "PixArt-Σ XL"):
                continue  # attention of text and image together takes keys from the tokens that attend
            reports = [tome_fx.explain(tome_fx.transform(model, r, **options), latents, latents) for r in RATIOS]
            rows.append(
                {
                    "model": name,
                    "side": side,
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
            row["side"],
            row["tokens"],
            f"{row['tflops']:.2f}",
            row["way"],
            *map("{:.2f}x".format, row["bounds"]),
        ]
        for row in document["rows"]
    ]
    heads = ["model", "image, px", "tokens", "TFLOPs", "merged", *(f"at {ratio:g}" for ratio in RATIOS)]
    return markdown.table(lines, heads)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench bounds`."""
    parser.add_argument("--json", type=Path, default=Path("out/bounds.json"))


def main(arguments: argparse.Namespace) -> None:
    """Run `python -m bench bounds`."""
    print(NOTE, table(run(arguments.json)), f"written to {arguments.json}", sep="\n\n")

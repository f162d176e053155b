"""Trained pipelines to judge images of, and prompts for them."""

import csv
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from bench import shapes
from bench.images import denoiser_of
from bench.models import DTYPES
from bench.shapes.scenes import HELD_OUT, Scene, numbered


def load(pipeline: str, device: str = "cpu", dtype: str = "fp32") -> Any:
    """A shapes pipeline, or that of a folder."""
    known = shapes.PIPELINES.get(pipeline)
    pipe = known() if known else DiffusionPipeline.from_pretrained(pipeline)
    pipe.to(device)
    if dtype != "fp32":
        pipe.to(DTYPES[dtype])
        pipe.vae.float()  # SDXL's overflows in half precision
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sides(pipe: Any) -> dict[str, int]:
    """Height and width, in pixels, of the images that a pipeline makes if it is not told otherwise."""
    latents = denoiser_of(pipe).config.sample_size
    height, width = (latents, latents) if isinstance(latents, int) else latents
    return {"height": height * pipe.vae_scale_factor, "width": width * pipe.vae_scale_factor}


def prompts_for(pipeline: str, path: Path | None, count: int) -> tuple[list[str], list[Scene]]:
    """So many prompts, and the scenes that they are captions of, if they are.

    Raises:
        ValueError: There are no prompts, or too few, or `count` is not positive.
    """
    if count < 1:
        raise ValueError(f"n must be at least 1, got {count}")
    if path is not None:
        return read_prompts(path, count), []
    if pipeline not in shapes.PIPELINES:
        known = " and ".join(shapes.PIPELINES)
        raise ValueError(f"prompts must be a file of prompts, for any pipeline but {known}; got none")
    scenes = numbered(HELD_OUT, count)
    return [scene.caption for scene in scenes], scenes


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

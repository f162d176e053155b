"""Requests of two qualities, served by two threads from one copy of the weights.

    python examples/server.py --model FOLDER_OR_ID --seeds 4

Models that are transformed from one UNet share its weights and have a ratio each. So there is one for each quality; a
pipeline and its scheduler, which keeps count of the steps, serve one request at a time and are one thread's own.
"""

import argparse
import copy
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tiny
import torch
from diffusers import StableDiffusionPipeline

import tome_fx

RATIOS = {"best": 0.0, "fast": 0.5}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--prompt", default="a red circle left of a blue square")
parser.add_argument("--seeds", type=int, default=2, help="how many images of each quality to ask for")
parser.add_argument("--output", type=Path, default=Path("served"), help="folder of the images")
args = tiny.parse(parser)

stock = StableDiffusionPipeline.from_pretrained(args.model or tiny.stable_diffusion(), torch_dtype=args.dtype)
stock.to(args.device)


def pipeline(ratio: float) -> StableDiffusionPipeline:
    """A pipeline with a UNet of its own, and what keeps state, all else in common; its first call compiles."""
    unet = tome_fx.transform(stock.unet, ratio)
    scheduler = type(stock.scheduler).from_config(stock.scheduler.config)
    own = {"unet": unet, "scheduler": scheduler, "tokenizer": copy.deepcopy(stock.tokenizer)}
    components = {**stock.components, **own}
    pipe = StableDiffusionPipeline(**components, requires_safety_checker=stock.config.requires_safety_checker)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.compile(fullgraph=True)
    pipe(args.prompt, num_inference_steps=1)
    return pipe


def image(quality: str, seed: int) -> Any:
    """Serve a request, in the thread of its quality."""
    start = time.perf_counter()
    generator = torch.Generator("cpu").manual_seed(seed)
    (result,) = pipes[quality](args.prompt, num_inference_steps=args.steps, generator=generator).images
    print(f"seed {seed}, {quality}: {time.perf_counter() - start:.1f} s")
    return result


pipes = {quality: pipeline(ratio) for quality, ratio in RATIOS.items()}
threads = {quality: ThreadPoolExecutor(max_workers=1) for quality in RATIOS}  # a queue and a thread each
requests = [(quality, seed) for seed in range(args.seeds) for quality in RATIOS]
waiting = {request: threads[request[0]].submit(image, *request) for request in requests}
images = {request: future.result() for request, future in waiting.items()}
args.output.mkdir(parents=True, exist_ok=True)
for (quality, seed), result in images.items():
    result.save(args.output / f"{quality}-{seed}.png")
print(f"{len(images)} images of {len(RATIOS)} qualities from one copy of the weights: {args.output}")

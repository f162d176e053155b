"""Requests of two qualities, served by two threads from one copy of the weights.

    python examples/server.py --model FOLDER_OR_ID --requests 8

Models that are transformed from one UNet share its weights and have a ratio each. So there is one for each quality; a
pipeline and its scheduler, which keeps count of the steps, serve one request at a time and are one thread's own.
"""

import argparse
import queue
import threading
import time
from typing import Any

import tiny
import torch
from diffusers import StableDiffusionPipeline

import tome_fx

RATIOS = {"best": 0.0, "fast": 0.5}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--prompt", default="a red circle left of a blue square")
parser.add_argument("--requests", type=int, default=4, help="how many to serve, half of each quality")
args = tiny.parse(parser)

stock = StableDiffusionPipeline.from_pretrained(args.model or tiny.stable_diffusion(), torch_dtype=args.dtype)
stock.to(args.device)


def pipeline(ratio: float) -> StableDiffusionPipeline:
    """A pipeline with a UNet and a scheduler of its own, all else in common; its first call compiles."""
    unet = tome_fx.transform(stock.unet, ratio)
    scheduler = type(stock.scheduler).from_config(stock.scheduler.config)
    components = {**stock.components, "unet": unet, "scheduler": scheduler}
    pipe = StableDiffusionPipeline(**components, requires_safety_checker=stock.config.requires_safety_checker)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.compile(fullgraph=True)
    pipe(args.prompt, num_inference_steps=1)
    return pipe


def serve(quality: str, pipe: StableDiffusionPipeline) -> None:
    """Serve the requests of a quality, seeds, until there is a None."""
    while (seed := requests[quality].get()) is not None:
        start = time.perf_counter()
        generator = torch.Generator("cpu").manual_seed(seed)
        images[quality, seed] = pipe(args.prompt, num_inference_steps=args.steps, generator=generator).images[0]
        print(f"seed {seed}, {quality}: {time.perf_counter() - start:.1f} s")


pipes = {quality: pipeline(ratio) for quality, ratio in RATIOS.items()}
requests: dict[str, queue.Queue[int | None]] = {quality: queue.Queue() for quality in RATIOS}
images: dict[tuple[str, int], Any] = {}
workers = [threading.Thread(target=serve, args=item) for item in pipes.items()]
for worker in workers:
    worker.start()
for number in range(args.requests):
    requests[list(RATIOS)[number % 2]].put(number // 2)
for waiting in requests.values():
    waiting.put(None)
for worker in workers:
    worker.join()
print(f"{len(images)} images of {len(RATIOS)} qualities from one copy of the weights")

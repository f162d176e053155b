"""Prompts shared out among processes, each with a merged, compiled pipeline on a device of its own.

    torchrun --nproc_per_node 2 examples/distributed.py --model FOLDER_OR_ID --prompts prompts.txt

An image depends on its prompt and seed alone, not on the process that makes it or on how many there are. Run by python
it is one process that makes them all.
"""

import argparse
import os
from pathlib import Path

import tiny
import torch
from diffusers import StableDiffusionPipeline

import tome_fx

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--prompts", type=Path, help="a file with a prompt in each line; without it, three of ours")
parser.add_argument("--ratio", type=float, default=0.5, help="share of the tokens to remove")
parser.add_argument("--output", type=Path, default=Path("images"), help="folder of the images")
args = tiny.parse(parser)
lines = args.prompts.read_text().splitlines() if args.prompts else [f"a {c} circle" for c in ("red", "blue", "green")]
prompts = [line for line in lines if line.strip()]

rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # which torchrun sets
device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.device == "cuda" else args.device

pipe = StableDiffusionPipeline.from_pretrained(args.model or tiny.stable_diffusion(), torch_dtype=args.dtype)
pipe.to(device)
pipe.set_progress_bar_config(disable=rank > 0)
pipe.unet = tome_fx.transform(pipe.unet, ratio=args.ratio)
pipe.unet = torch.compile(pipe.unet, fullgraph=True)

args.output.mkdir(parents=True, exist_ok=True)
for number in range(rank, len(prompts), processes):
    generator = torch.Generator("cpu").manual_seed(number)
    image = pipe(prompts[number], num_inference_steps=args.steps, generator=generator).images[0]
    image.save(args.output / f"{number}.png")
    print(f"process {rank} of {processes}, {prompts[number]}: {args.output / f'{number}.png'}", flush=True)

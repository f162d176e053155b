"""An image of Stable Diffusion 1 or 2 with token merging, compiled.

    python examples/image.py --model FOLDER_OR_ID --prompt "a red circle left of a blue square"

The first image waits for the compiler, a minute or more; the second tells how long one takes. With `--eager` nothing is
compiled.
"""

import argparse
import time

import tiny
import torch
from diffusers import StableDiffusionPipeline

import tome_fx

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--prompt", default="a red circle left of a blue square")
parser.add_argument("--ratio", type=float, default=0.5, help="share of the tokens to remove")
parser.add_argument("--size", type=int, help="height and width in pixels; without it, what the model is made for")
parser.add_argument("--eager", action="store_true", help="do not compile")
parser.add_argument("--output", default="image.png", help="file of the image")
args = tiny.parse(parser)

pipe = StableDiffusionPipeline.from_pretrained(args.model or tiny.stable_diffusion(), torch_dtype=args.dtype)
pipe.to(args.device)
pipe.unet = tome_fx.transform(pipe.unet, ratio=args.ratio)
if not args.eager:
    pipe.unet = torch.compile(pipe.unet, fullgraph=True)

for label in ("first image" if args.eager else "first image, with compiling", "second image"):
    start = time.perf_counter()
    generator = torch.Generator("cpu").manual_seed(0)  # on the CPU, so that a seed is the same image on every device
    options = {"num_inference_steps": args.steps, "height": args.size, "width": args.size, "generator": generator}
    image = pipe(args.prompt, **options).images[0]
    print(f"{label}: {time.perf_counter() - start:.1f} s")

image.save(args.output)
print(f"{image.width} x {image.height} px, {args.ratio:.0%} of the tokens merged: {args.output}")

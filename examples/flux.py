"""Flux.1 with whole blocks merged in the second half of the steps, compiled block by block.

    python examples/flux.py --model FOLDER_OR_ID --ratio 0.5 --offload

Early steps lay out the image: a transformer that merges late keeps far closer to what it makes without merging. Blocks
are compiled once for a ratio of 0 and once for any other. With `--offload` each part of the pipeline is on the GPU only
while it is used. It comes last: transform, compile, then offload.
"""

import argparse
import time

import tiny
import torch
from diffusers import FluxPipeline

import tome_fx

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--prompt", default="a red circle left of a blue square")
parser.add_argument("--ratio", type=float, default=0.5, help="share of the image's tokens to remove, late")
parser.add_argument("--start", type=float, default=0.5, help="share of the steps to leave as they are")
parser.add_argument("--size", type=int, help="height and width in pixels; without it, what the model is made for")
parser.add_argument("--offload", action="store_true", help="keep on the GPU only what is used")
parser.add_argument("--output", default="flux.png")
args = tiny.parse(parser, half="bfloat16")

if args.steps < 2:
    parser.error(f"--steps must be at least 2, for the first half of them is not merged; got {args.steps}")

pipe = FluxPipeline.from_pretrained(args.model or tiny.flux(), torch_dtype=args.dtype)
pipe.transformer = tome_fx.transform(pipe.transformer, merge_block=True)
schedule = tome_fx.RatioSchedule.late(pipe.transformer, ratio=args.ratio, start=args.start)
pipe.transformer.compile_repeated_blocks(fullgraph=True)
if args.offload:
    pipe.enable_model_cpu_offload(device=args.device)
else:
    pipe.to(args.device)


def image(seed: int) -> None:
    """Make and save the image of a seed, and say how long it took."""
    start = time.perf_counter()
    generator = torch.Generator("cpu").manual_seed(seed)
    options = {"num_inference_steps": args.steps, "height": args.size, "width": args.size, "generator": generator}
    pipe(args.prompt, callback_on_step_end=schedule, **options).images[0].save(args.output)
    print(f"image of seed {seed}: {time.perf_counter() - start:.1f} s")


image(seed=0)  # waits for the compiler
with torch.compiler.set_stance("fail_on_recompile"):  # an error here would say what was compiled again, and why
    image(seed=1)
print(f"no recompile: {args.output}")

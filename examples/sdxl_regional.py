"""SDXL with whole blocks merged, compiled block by block, which takes a fraction of the time of compiling it whole.

    python examples/sdxl_regional.py --model FOLDER_OR_ID --ratio 0.5

Most of SDXL's work is outside of attention, so that merging around whole blocks saves most; without `merge_block` an
image stays nearer and less is saved. Each kind of block is compiled once and serves all its copies. What merging saves
in this model, by FLOPs, is printed first.
"""

import argparse
import time

import tiny
import torch
from diffusers import StableDiffusionXLPipeline

import tome_fx

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--prompt", default="a red circle left of a blue square")
parser.add_argument("--ratio", type=float, default=0.5, help="share of the tokens to remove")
parser.add_argument("--output", default="sdxl.png")
args = tiny.parse(parser)

pipe = StableDiffusionXLPipeline.from_pretrained(args.model or tiny.sdxl(), torch_dtype=args.dtype)
pipe.to(args.device)
pipe.unet = tome_fx.transform(pipe.unet, ratio=args.ratio, merge_block=True)
side = pipe.unet.config.sample_size
print(tome_fx.explain(pipe.unet, side, side))
pipe.unet.compile_repeated_blocks(fullgraph=True)


def image(seed: int) -> None:
    """Make and save the image of a seed, and say how long it took."""
    start = time.perf_counter()
    generator = torch.Generator("cpu").manual_seed(seed)
    pipe(args.prompt, num_inference_steps=args.steps, generator=generator).images[0].save(args.output)
    print(f"image of seed {seed}: {time.perf_counter() - start:.1f} s")


image(seed=0)  # waits for the compiler
with torch.compiler.set_stance("fail_on_recompile"):  # an error here would say what was compiled again, and why
    image(seed=1)
print(f"no recompile: {args.output}")

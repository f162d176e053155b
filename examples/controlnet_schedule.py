"""A ControlNet and its UNet, both merged late: nothing in the first half of the steps, half of the tokens after it.

    python examples/controlnet_schedule.py --model FOLDER_OR_ID --controlnet FOLDER_OR_ID --image edges.png

Early steps lay out the image, so that merging late moves it less. Both models are compiled once for each of the two
ratios, in the first image.
"""

import argparse
import time

import tiny
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from diffusers.utils import load_image

import tome_fx

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--controlnet", metavar="FOLDER_OR_ID", help="one for --model")
parser.add_argument("--image", help="file or address of what the ControlNet is to follow; without it, a white ring")
parser.add_argument("--prompt", default="a red circle")
parser.add_argument("--ratio", type=float, default=0.5, help="share of the tokens to remove, late")
parser.add_argument("--start", type=float, default=0.5, help="share of the steps to leave as they are")
parser.add_argument("--output", default="controlled.png")
args = tiny.parse(parser)
if (args.model is None) != (args.controlnet is None):
    parser.error("--model and --controlnet are for one another: give both or none")

controlnet = ControlNetModel.from_pretrained(args.controlnet or tiny.controlnet(), torch_dtype=args.dtype)
pipe = StableDiffusionControlNetPipeline.from_pretrained(
    args.model or tiny.stable_diffusion(), controlnet=controlnet, torch_dtype=args.dtype
).to(args.device)
pipe.unet = tome_fx.transform(pipe.unet)
pipe.controlnet = tome_fx.transform(pipe.controlnet)
schedule = tome_fx.RatioSchedule.late(pipe.unet, pipe.controlnet, ratio=args.ratio, start=args.start)
pipe.unet.compile(fullgraph=True)
pipe.controlnet.compile(fullgraph=True)

if args.image:
    control = load_image(args.image)
else:
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    radius = torch.linspace(-1, 1, side).square()
    radius = (radius[:, None] + radius[None]).sqrt()
    control = ((radius > 0.6) & (radius < 0.7)).float().expand(1, 3, side, side)


def image(seed: int) -> None:
    """Make and save the image of a seed, with the ratio that the schedule gives each step."""
    start = time.perf_counter()
    generator = torch.Generator("cpu").manual_seed(seed)
    options = {"num_inference_steps": args.steps, "generator": generator, "callback_on_step_end": schedule}
    pipe(args.prompt, image=control, **options).images[0].save(args.output)
    print(f"image of seed {seed}: {time.perf_counter() - start:.1f} s")


image(seed=0)  # waits for the compiler
with torch.compiler.set_stance("fail_on_recompile"):  # an error here would say what was compiled again, and why
    image(seed=1)
print(f"no recompile, though the ratio changes in every image: {args.output}")

"""A merged UNet compiled ahead of time: exported, made a package, and run by a pipeline in its UNet's place.

    python examples/aoti.py --model FOLDER_OR_ID --ratio 0.5 --package unet.pt2

A process that only runs the package needs `aoti_load_package` and what calls it, and neither tome_fx nor the weights of
the UNet: the last part of this script, with a UNet of the same config. A package has the ratio and the sizes that it
was exported with, and is for the kind of device that it was compiled on.
"""

import argparse
import time
from typing import Any

import tiny
import torch
from diffusers import StableDiffusionPipeline

import tome_fx

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--prompt", default="a red circle left of a blue square")
parser.add_argument("--ratio", type=float, default=0.5, help="share of the tokens to remove")
parser.add_argument("--package", default="unet.pt2", help="where to write what was compiled")
args = tiny.parse(parser)

pipe = StableDiffusionPipeline.from_pretrained(args.model or tiny.stable_diffusion(), torch_dtype=args.dtype)
pipe.to(args.device)
pipe.unet = tome_fx.transform(pipe.unet, ratio=args.ratio)


def image() -> torch.Tensor:
    """The pixels of an image from a seed, 0 to 1."""
    generator = torch.Generator("cpu").manual_seed(0)
    pixels = pipe(args.prompt, num_inference_steps=args.steps, generator=generator, output_type="pt").images
    return torch.as_tensor(pixels).float()


expected = image()

# Export, with inputs like those of the pipeline: two images, for guidance, a timestep, and two prompts
size, config = pipe.unet.config.sample_size, pipe.unet.config
sample = torch.randn(2, config.in_channels, size, size, device=args.device, dtype=args.dtype)
prompts = torch.randn(2, 77, config.cross_attention_dim, device=args.device, dtype=args.dtype)
timestep = pipe.scheduler.timesteps[0]
with torch.no_grad():
    program = torch.export.export(pipe.unet, (sample, timestep, prompts), {"return_dict": False})
start = time.perf_counter()
torch._inductor.aoti_compile_and_package(program, package_path=args.package)
print(f"compiled in {time.perf_counter() - start:.0f} s: {args.package}")

# Load and run, which could be in another process
package = torch._inductor.aoti_load_package(args.package)


def forward(sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any) -> Any:
    """What the pipeline calls; arguments that it leaves at None were not exported."""
    return package(sample, timestep, encoder_hidden_states, return_dict=False)


pipe.unet.forward = forward
difference = (image() - expected).abs().max()
print(f"the package's image differs from the eager one by at most {difference:.5f}, where white is 1")

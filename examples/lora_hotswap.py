"""One LoRA after another in a merged, compiled UNet, without a recompile.

    python examples/lora_hotswap.py --model FOLDER_OR_ID --loras FOLDER_OR_FILE FOLDER_OR_FILE --rank 64

Room is made for the largest rank before the first LoRA is loaded; those that follow take the place of its weights. They
may have other ranks, up to that, but are for the same layers of the UNet, and not for the text encoder.
"""

import argparse
from pathlib import Path

import tiny
import torch
from diffusers import StableDiffusionPipeline

import tome_fx

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--prompt", default="a red circle left of a blue square")
parser.add_argument("--ratio", type=float, default=0.5, help="share of the tokens to remove")
parser.add_argument("--loras", nargs="+", metavar="LORA", help="folders, ids or files; without them, three made here")
parser.add_argument("--rank", type=int, default=64, help="the largest rank of the LoRAs")
parser.add_argument("--output", type=Path, default=Path("loras"), help="folder of the images")
args = tiny.parse(parser)
if args.loras and len(args.loras) < 2:
    parser.error("--loras must be two or more, the second of which takes the place of the first; got one")
loras = args.loras or [tiny.lora(rank, seed=rank) for rank in (4, 8, 2)]

pipe = StableDiffusionPipeline.from_pretrained(args.model or tiny.stable_diffusion(), torch_dtype=args.dtype)
pipe.to(args.device)
pipe.unet = tome_fx.transform(pipe.unet, ratio=args.ratio)
pipe.enable_lora_hotswap(target_rank=args.rank)
pipe.load_lora_weights(loras[0], adapter_name="style")
pipe.unet = torch.compile(pipe.unet, fullgraph=True)
args.output.mkdir(parents=True, exist_ok=True)


def image(number: int) -> None:
    """Make and save the image of the LoRA that is loaded."""
    path = args.output / f"{number}.png"
    generator = torch.Generator("cpu").manual_seed(0)
    pipe(args.prompt, num_inference_steps=args.steps, generator=generator).images[0].save(path)
    print(f"{loras[number]}: {path}")


image(0)  # waits for the compiler
with torch.compiler.set_stance("fail_on_recompile"):  # an error here would say what was compiled again, and why
    for number in range(1, len(loras)):
        pipe.load_lora_weights(loras[number], adapter_name="style", hotswap=True)
        image(number)
print(f"no recompile for {len(loras) - 1} more LoRAs")

"""A LoRA trained through a merged UNet, on a folder of pictures that share a prompt.

    python examples/train_lora.py --model FOLDER_OR_ID --pictures FOLDER --prompt "a photo of sks dog" --steps 500

Only the LoRA learns: gradients go through merging. What is saved is a plain LoRA, for merged models and others.
Pictures are cut to squares of the model's size. On a GPU it computes in bfloat16: float16 would need its losses scaled.
"""

import argparse
from pathlib import Path
from typing import Any

import tiny
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.utils import load_image
from peft import LoraConfig, get_peft_model_state_dict
from torch.nn.functional import mse_loss

import tome_fx

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def square(picture: Any, side: int) -> Any:
    """The middle of a picture, as large as asked for."""
    left, top = ((length - min(picture.size)) // 2 for length in picture.size)
    return picture.resize((side, side), box=(left, top, left + min(picture.size), top + min(picture.size)))


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="pictures; without it, four of plain colours")
parser.add_argument("--prompt", default="a red circle left of a blue square")
parser.add_argument("--ratio", type=float, default=0.5, help="share of the tokens to remove")
parser.add_argument("--rank", type=int, default=4, help="of the LoRA")
parser.add_argument("--lr", type=float, default=1e-4, help="how fast it learns")
parser.add_argument("--output", default="lora", help="folder of the LoRA")
args = tiny.parse(parser, half="bfloat16")
if args.dtype == torch.float16:
    parser.error("--dtype must be bfloat16 or float32, for small gradients vanish in float16; got float16")
torch.manual_seed(0)

pipe = StableDiffusionPipeline.from_pretrained(args.model or tiny.stable_diffusion(), torch_dtype=args.dtype)
pipe.to(args.device)
side = pipe.unet.config.sample_size * pipe.vae_scale_factor
if args.pictures:
    paths = sorted(path for path in args.pictures.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        parser.error(f"--pictures must have files that end in {', '.join(SUFFIXES)}, found none in {args.pictures}")
    pictures = [square(load_image(str(path)), side) for path in paths]
    pixels = pipe.image_processor.preprocess(pictures)  # [N, 3, side, side], -1 to 1
else:
    pixels = torch.rand(4, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, side, side) * 2 - 1

with torch.no_grad():  # neither the autoencoder nor the text encoder learns
    pixels = pixels.to(args.device, args.dtype)
    latents = torch.cat([pipe.vae.encode(one[None]).latent_dist.mean for one in pixels])
    latents = latents * pipe.vae.config.scaling_factor
    prompt, _ = pipe.encode_prompt(args.prompt, args.device, 1, False)

pipe.unet.requires_grad_(False)
unet = tome_fx.transform(pipe.unet, ratio=args.ratio)
unet.add_adapter(LoraConfig(r=args.rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
learning = [parameter for parameter in unet.parameters() if parameter.requires_grad]
for parameter in learning:
    parameter.data = parameter.data.float()  # steps are too small for half precision
optimizer = torch.optim.AdamW(learning, args.lr)
scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
unet.train()

for step in range(args.steps):
    picture = latents[step % len(latents)][None]
    timestep = torch.randint(scheduler.config.num_train_timesteps, (1,), device=args.device)
    noise = target = torch.randn_like(picture)
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(picture, noise, timestep)
    with torch.autocast(torch.device(args.device).type, args.dtype, enabled=args.dtype != torch.float32):
        predicted = unet(scheduler.add_noise(picture, noise, timestep), timestep, prompt).sample
    loss = mse_loss(predicted.float(), target.float())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % max(1, args.steps // 10) == 0:
        print(f"step {step}: loss {loss:.4f}")

StableDiffusionPipeline.save_lora_weights(args.output, get_peft_model_state_dict(unet))
print(f"{sum(parameter.numel() for parameter in learning)} weights: {args.output}")

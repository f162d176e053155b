"""`python -m bench.shapes.train`: train the reader, the VAE and the denoiser, and write the pipeline.

Each of the three can be stopped at any time and goes on where it was. A step depends on its number alone, so that a
run which was stopped trains what one which was not trains.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from bench.shapes import GUIDANCE, PIPELINE, TEXT_TOKENS
from bench.shapes import reader as judge
from bench.shapes.reader import Reader
from bench.shapes.scenes import HELD_OUT, SIDE, Scene, cover, draw, numbered

WIDTH = 96  # of the text's tokens


def fit(
    path: Path,
    module: nn.Module,
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    rate: float,
    decay: float = 0.0,
    show: Callable[[int], str] | None = None,
    every: int = 500,
) -> None:
    """Train with AdamW: the rate rises for 100 steps, holds, and falls to zero over the last third.

    Args:
        path: The file that holds all that goes on after an interruption; beside it grows a log of the losses.
        module: Trained in place; in the end its weights are the running average, where one is kept.
        loss: The loss of a step, by its number.
        steps: How many in all.
        rate: The learning rate that is held.
        decay: Of the running average of the weights; 0 for none.
        show: What to do every so many steps with the average in place; what it returns is logged.
        every: How many.
    """
    optimizer = torch.optim.AdamW(module.parameters(), rate, weight_decay=0.01)
    schedule = LambdaLR(optimizer, lambda step: min(1, (step + 1) / 100, 3 * (1 - step / steps)))
    average = EMAModel(module.parameters(), decay=decay)
    parts: dict[str, Any] = {"module": module, "optimizer": optimizer, "schedule": schedule, "average": average}
    first = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        first = state.pop("step")
        for name, part in parts.items():
            part.load_state_dict(state[name])

    def save(step: int) -> None:
        torch.save(
            {"step": step, **{name: part.state_dict() for name, part in parts.items()}}, path.with_suffix(".new")
        )
        os.replace(path.with_suffix(".new"), path)

    losses: list[float] = []
    with tqdm(total=steps, initial=first, desc=path.stem) as bar, path.with_suffix(".log").open("a") as log:
        for step in range(first, steps):
            module.train()
            torch.manual_seed(step)
            value = loss(step)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.step(module.parameters())
            losses.append(value.item())
            bar.update()
            if (step + 1) % every == 0 or step + 1 == steps:
                save(step + 1)
                average.store(module.parameters())
                average.copy_to(module.parameters())
                shown = show(step + 1) if show else ""
                average.restore(module.parameters())
                log.write(f"{step + 1} {sum(losses) / len(losses):.4f} {shown}\n")
                log.flush()
                bar.set_postfix_str(f"{sum(losses) / len(losses):.4f} {shown}")
                losses.clear()
    average.copy_to(module.parameters())
    module.eval().requires_grad_(False)


def train_reader(folder: Path, steps: int) -> Reader:
    """The judge, which never sees a generated image."""
    torch.manual_seed(0)
    reader = Reader()
    test = numbered(HELD_OUT, 500)
    images = draw(test, SIDE)

    def show(step: int) -> str:
        return f"right: {reader.eval().right(test, images).float().mean():.4f}"

    def loss(step: int) -> Tensor:
        scenes = numbered(64 * step, 64)
        images = draw(scenes, judge.SIDE)
        return reader.loss(scenes, images + 0.1 * torch.rand(()) * torch.randn_like(images))

    fit(folder / "reader.pt", reader, loss, steps=steps, rate=2e-3, show=show)
    return reader


def train_vae(folder: Path, steps: int) -> AutoencoderKL:
    """Four latents for 4 x 4 pixels; trained on windows, for it has to know edges and grounds, no scenes."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIDE,
    )

    def loss(step: int) -> Tensor:
        extent = 48
        left, top = torch.randint(0, SIDE - extent + 1, (2,)).tolist()
        images = draw(numbered(16 * step, 16), SIDE, window=(left, top, extent))
        latent = vae.encode(images).latent_dist
        result = vae.decode(latent.sample()).sample
        return F.l1_loss(result, images) + F.mse_loss(result, images) + 1e-6 * latent.kl().mean()  # type: ignore[no-any-return]

    def show(step: int) -> str:
        images = draw(numbered(HELD_OUT, 8), SIDE)
        with torch.no_grad():
            result = vae.eval()(images).sample
        write_grid(folder / f"vae-{step}.png", torch.cat([images, result]), 8)
        return f"squared error: {F.mse_loss(result, images):.5f}"

    fit(folder / "vae.pt", vae, loss, steps=steps, rate=1e-3, decay=0.995, show=show)
    with torch.no_grad():
        latents = vae.encode(draw(numbered(0, 128), SIDE)).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return vae


def word_tokenizer(words: Sequence[str]) -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary in which each word is one token, the same in every process.

    A trained one is not: which of equally frequent pairs is merged first differs from process to process, and a run
    that is resumed would then go on with other ids.

    Args:
        words: Of lower case; a comma may follow.
    """
    words = sorted({part for word in words for part in (word.rstrip(","), "," * word.endswith(",")) if part})
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in words:  # a merge comes after all earlier ones, so that it cannot take the words before this one apart
        while len(parts := _merged([*word[:-1], word[-1] + "</w>"], merges)) > 1:
            merges.append((parts[0], parts[1]))
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *map("".join, merges)]))}
    return CLIPTokenizer(vocabulary, merges)


def _merged(parts: list[str], merges: Sequence[tuple[str, str]]) -> list[str]:
    """What byte pair encoding makes of a word's parts: of all that can be merged, the earliest merge is done first."""
    while pairs := set(pairwise(parts)) & set(merges):
        first = min(pairs, key=merges.index)
        at = list(pairwise(parts)).index(first)
        parts = [*parts[:at], "".join(first), *parts[at + 2 :]]
    return parts


def blank_pipeline(vae: AutoencoderKL) -> StableDiffusionPipeline:
    """The pipeline with its denoiser and text encoder untrained."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer(sorted({word for one in numbered(0, 1000) for word in one.caption.split()}))
    tokenizer.model_max_length = TEXT_TOKENS
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=SIDE // 4,
        block_out_channels=(32, 64, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        transformer_layers_per_block=(1, 2, 1),  # one stacked, as in SDXL
        attention_head_dim=(1, 2, 4),  # heads, whatever the name says
        cross_attention_dim=WIDTH,
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tokens(pipe: StableDiffusionPipeline, captions: Sequence[str]) -> Tensor:
    """Ids `[B, TEXT_TOKENS]`."""
    ids: Tensor = pipe.tokenizer(
        list(captions), padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def train_denoiser(
    folder: Path, vae: AutoencoderKL, reader: Reader, coarse: int, steps: int
) -> StableDiffusionPipeline:
    """UNet and text encoder together, on images of half the side first, which cost a sixth."""
    pipe = blank_pipeline(vae)
    both = nn.ModuleDict({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    test = numbered(HELD_OUT, 48)

    def loss(step: int) -> Tensor:
        fine = step >= coarse
        count = 16 if fine else 32
        scenes = numbered(32 * step, count)
        with torch.no_grad():
            images = draw(scenes, SIDE if fine else SIDE // 2)
            latents = vae.encode(images).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        times = torch.randint(0, pipe.scheduler.config.num_train_timesteps, (len(latents),))
        told = torch.rand(len(scenes)) > 0.1  # the others train what guidance leads away from
        captions = [one.caption if tell else "" for one, tell in zip(scenes, told, strict=True)]
        hidden = pipe.text_encoder(tokens(pipe, captions))[0]
        result = pipe.unet(pipe.scheduler.add_noise(latents, noise, times), times, hidden).sample
        # grounds are most of an image and none of its caption: a shape's outline would hardly be learnt beside them
        weight = 1 + 4 * cover(scenes, latents.shape[-1], reach=0.05).expand_as(latents)
        error = (result - pipe.scheduler.get_velocity(latents, noise, times)).square()
        mean: Tensor = (weight * error).sum() / weight.sum()
        return mean

    def show(step: int) -> str:
        both.eval()
        side = SIDE if step >= coarse else SIDE // 2
        images = torch.cat([generate(pipe, test[i : i + 16], side, seed=i) for i in range(0, len(test), 16)])
        write_grid(folder / f"samples-{step}.png", images[:32], 8)
        return f"right: {reader.right(test, images).float().mean():.3f}"

    fit(folder / "denoiser.pt", both, loss, steps=steps, rate=1e-3, decay=0.999, show=show)
    return pipe


def generate(pipe: StableDiffusionPipeline, scenes: Sequence[Scene], side: int, seed: int, steps: int = 12) -> Tensor:
    """Images `[B, 3, side, side]` from -1 to 1 of the scenes' captions."""
    images: Tensor = pipe(
        [one.caption for one in scenes],
        height=side,
        width=side,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images
    return 2 * images - 1


def write_grid(path: Path, images: Tensor, columns: int) -> None:
    """A PNG of images `[B, 3, H, W]` from -1 to 1, row by row."""
    count, _, height, width = images.shape
    rows = count // columns
    grid = images.reshape(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2).reshape(rows * height, -1, 3)
    Image.fromarray(((grid.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()).save(path)


def main() -> None:
    """Run `python -m bench.shapes.train`."""
    parser = argparse.ArgumentParser(prog="python -m bench.shapes.train", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("out/shapes"), help="where what is not finished is kept")
    parser.add_argument("--reader-steps", type=int, default=1500)
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--coarse-steps", type=int, default=2500, help="steps of the denoiser at half the side")
    parser.add_argument("--steps", type=int, default=4700, help="steps of the denoiser in all")
    parser.add_argument("--pipeline", type=Path, default=PIPELINE, help="where the trained pipeline is written")
    parser.add_argument("--reader", type=Path, default=judge.WEIGHTS, help="where the trained reader is written")
    a = parser.parse_args()
    a.run.mkdir(parents=True, exist_ok=True)
    reader = train_reader(a.run, a.reader_steps)
    save_file(reader.state_dict(), a.reader)
    vae = train_vae(a.run, a.vae_steps)
    pipe = train_denoiser(a.run, vae, reader, coarse=a.coarse_steps, steps=a.steps)
    for module in (pipe.unet, pipe.vae):  # loaded as float32 all the same; transformers would load float16 as such
        module.half()
    pipe.save_pretrained(a.pipeline)


if __name__ == "__main__":
    main()

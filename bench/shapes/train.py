"""`python -m bench.shapes.train`: train the reader, the VAE and the denoiser, and write the pipeline.

Each of the three can be stopped at any time and goes on where it was.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from diffusers.models.embeddings import PatchEmbed
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.images import denoiser_name, denoiser_of, generate
from bench.shapes import GUIDANCE, PIPELINE, blank, inputs
from bench.shapes import reader as judge
from bench.shapes.fit import fit
from bench.shapes.reader import Reader
from bench.shapes.scenes import HELD_OUT, SIDE, Scene, cover, draw, numbered
from bench.shapes.tokenizer import tokens

Denoiser = Callable[..., Any]  # the model itself, compiled


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
    """Trained on windows, for it has to know edges and grounds, no scenes."""
    vae = blank.vae()

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


def train_denoiser(
    path: Path,
    pipe: DiffusionPipeline,
    reader: Reader,
    *,
    coarse: int | None = None,
    steps: int | None = None,
    batch: int = 16,
) -> None:
    """Denoiser and text encoder together, on less of twice as many images first, which costs a sixth."""
    vae, name, device = pipe.vae, denoiser_name(pipe), pipe.device
    lesson = LESSONS[name]
    coarse = lesson.coarse if coarse is None else coarse
    steps = lesson.steps if steps is None else steps
    both = nn.ModuleDict({name: denoiser_of(pipe), "text_encoder": pipe.text_encoder})
    compiled = torch.compile(denoiser_of(pipe), dynamic=False)  # of two sizes, which share no code
    test = numbered(HELD_OUT, 32)

    def loss(step: int) -> Tensor:
        fine = step >= coarse
        scenes = numbered(2 * batch * step, batch if fine else 2 * batch)
        with torch.no_grad():
            images = draw(scenes, SIDE if fine else lesson.side).to(device)
            latents = vae.encode(images).latent_dist.sample() * vae.config.scaling_factor
        told = torch.rand(len(scenes)) > 0.1  # the others train what guidance leads away from
        captions = [one.caption if tell else "" for one, tell in zip(scenes, told, strict=True)]
        # grounds are most of an image and none of its caption: a shape's outline would hardly be learnt beside them
        weight = 1 + 4 * cover(scenes, latents.shape[-1], reach=0.05).to(device).expand_as(latents)
        with torch.autocast(device.type, torch.bfloat16):  # products take a third of their time
            mean: Tensor = lesson.loss(pipe, compiled, latents, weight, captions, fine)
        return mean

    def show(step: int) -> str:
        both.eval()
        images = sample(pipe, test, SIDE if step >= coarse else lesson.side)
        write_grid(path.parent / f"{path.stem}-{step}.png", images, 8)
        return f"right: {reader.right(test, images).float().mean():.3f}"

    fit(path, both, loss, steps=steps, rate=lesson.rate, betas=lesson.betas, decay=0.999, show=show)


def of_velocity(
    pipe: StableDiffusionPipeline, unet: Denoiser, latents: Tensor, weight: Tensor, captions: list[str], fine: bool
) -> Tensor:
    """The weighted squared error of a UNet that predicts velocities, at times drawn evenly."""
    times = torch.randint(0, pipe.scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
    noise = torch.randn_like(latents)
    hidden = pipe.text_encoder(tokens(pipe.tokenizer, captions).to(latents.device))[0]
    result = unet(pipe.scheduler.add_noise(latents, noise, times), times, hidden).sample
    return _mean(result - pipe.scheduler.get_velocity(latents, noise, times), weight)


def of_flow(
    pipe: StableDiffusion3Pipeline,
    transformer: Denoiser,
    latents: Tensor,
    weight: Tensor,
    captions: list[str],
    fine: bool,
) -> Tensor:
    """The weighted squared error of flow matching, at first of a quarter of the tokens, taken at random.

    A transformer sees no more of a token than its place and its value, so that it learns from some of an image what it
    does with all: "Fast Training of Diffusion Models with Masked Transformers" (2023), arXiv 2306.09305. Times are
    drawn as "Scaling Rectified Flow Transformers" (2024), arXiv 2403.03206, found best: most in the middle.
    """
    share = torch.randn_like(latents[:, :1, :1, :1]).sigmoid()
    noise = torch.randn_like(latents)
    hidden, _, pooled, _ = pipe.encode_prompt(captions, None, None, do_classifier_free_guidance=False, **inputs(pipe))
    order = torch.randperm(latents[0, 0].numel(), device=latents.device)
    kept = order if fine else order[: len(order) // 4]
    with places(pipe.transformer.pos_embed, kept):
        result = transformer(
            part((1 - share) * latents + share * noise, kept),
            timestep=share.flatten() * pipe.scheduler.config.num_train_timesteps,
            encoder_hidden_states=hidden,
            pooled_projections=pooled,
        ).sample
    return _mean(result - part(noise - latents, kept), part(weight, kept))


def part(image: Tensor, kept: Tensor) -> Tensor:
    """These tokens of `[B, C, H, W]`, as many as a square has, as if they were an image."""
    side = math.isqrt(len(kept))
    result: Tensor = image.flatten(2)[..., kept].unflatten(2, (side, side))
    return result


@contextmanager
def places(embedding: PatchEmbed, kept: Tensor) -> Iterator[None]:
    """Within it, the tokens of `part` have the places that they have in the image."""
    table, largest = embedding.pos_embed, embedding.pos_embed_max_size
    embedding.pos_embed, embedding.pos_embed_max_size = table[:, kept], math.isqrt(len(kept))
    try:
        yield
    finally:
        embedding.pos_embed, embedding.pos_embed_max_size = table, largest


def _mean(error: Tensor, weight: Tensor) -> Tensor:
    mean: Tensor = (weight * error.square()).sum() / weight.sum()
    return mean


@dataclass(frozen=True)
class Lesson:
    """How a kind of denoiser is trained.

    Args:
        loss: Its loss on some images.
        side: Pixels along a side of the first images.
        rate: The learning rate.
        betas: Of Adam.
        coarse: Steps on less of each image.
        steps: Steps in all.
    """

    loss: Callable[..., Tensor]
    side: int
    rate: float
    betas: tuple[float, float]
    coarse: int
    steps: int


LESSONS = {
    "unet": Lesson(of_velocity, side=SIDE // 2, rate=1e-3, betas=(0.9, 0.999), coarse=2500, steps=4700),
    "transformer": Lesson(of_flow, side=SIDE, rate=2e-3, betas=(0.9, 0.95), coarse=4500, steps=5000),
}


def sample(pipe: DiffusionPipeline, scenes: Sequence[Scene], side: int) -> Tensor:
    """Images `[B, 3, side, side]` from -1 to 1 of the scenes' captions, the i-th from seed i."""
    captions = [one.caption for one in scenes]
    images = generate(
        pipe, denoiser_of(pipe), captions, steps=12, guidance=GUIDANCE, height=side, width=side, **inputs(pipe)
    )
    return 2 * images.pixels - 1


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
    parser.add_argument("--coarse-steps", type=int, help="of a denoiser on a quarter of each image, if not its own")
    parser.add_argument("--steps", type=int, help="of a denoiser in all, if not its own")
    parser.add_argument(
        "--batch", type=int, default=16, help="images of a step of a denoiser, twice as many while it is coarse"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda, of a denoiser; the others are small")
    parser.add_argument("--pipeline", type=Path, default=PIPELINE, help="where the trained pipeline is written")
    parser.add_argument("--reader", type=Path, default=judge.WEIGHTS, help="where the trained reader is written")
    parser.add_argument(
        "--transformer",
        type=Path,
        help="train no more than a diffusion transformer for the trained pipeline, and write it to this folder",
    )
    a = parser.parse_args()
    a.run.mkdir(parents=True, exist_ok=True)
    how = {"coarse": a.coarse_steps, "steps": a.steps, "batch": a.batch}
    if a.transformer:
        pipe = blank.transformer_pipeline(StableDiffusionPipeline.from_pretrained(a.pipeline, local_files_only=True))
        train_denoiser(a.run / "transformer.pt", pipe.to(a.device), judge.load(a.reader), **how)
        pipe.transformer.half().save_pretrained(a.transformer / "transformer")
        pipe.text_encoder.save_pretrained(a.transformer / "text_encoder")
        return
    reader = train_reader(a.run, a.reader_steps)
    save_file(reader.state_dict(), a.reader)
    vae = train_vae(a.run, a.vae_steps)
    pipe = blank.pipeline(vae)
    train_denoiser(a.run / "denoiser.pt", pipe.to(a.device), reader, **how)
    for module in (pipe.unet, pipe.vae):  # loaded as float32 all the same; transformers would load float16 as such
        module.half()
    pipe.save_pretrained(a.pipeline)


if __name__ == "__main__":
    main()

"""What images are judged by: how far each is from its stock twin, and what it shows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from bench import warm
from bench.images import Images
from bench.shapes import reader as judge
from bench.shapes.reader import Reader
from bench.shapes.scenes import HELD_OUT, SIDE, Scene, draw, numbered

REAL = 1024  # scenes that a Fréchet distance is taken from


def compare(images: Images, stock: Images) -> dict[str, list[float | None]]:
    """How far each image is from the stock one: PSNR in dB, SSIM, and the latents' relative distance.

    There is no PSNR, None, where nothing differs.
    """
    peak: list[float | None] = []
    likeness: list[float | None] = []
    for mine, theirs in zip(images.pixels, stock.pixels, strict=True):
        same = torch.equal(mine, theirs)
        peak.append(None if same else float(peak_signal_noise_ratio(mine, theirs, data_range=1.0)))
        likeness.append(float(_ssim(mine, theirs)))
    difference = (images.latents - stock.latents).flatten(1).norm(dim=1) / stock.latents.flatten(1).norm(dim=1)
    return {"psnr": peak, "ssim": likeness, "latent_error": difference.tolist()}


def _ssim(mine: Tensor, theirs: Tensor) -> Any:
    return structural_similarity_index_measure(mine[None], theirs[None], data_range=1.0)


class Features(nn.Module):
    """The reader's features, the way that a Fréchet distance asks for them."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader = reader
        self.num_features = reader.head.in_channels

    def forward(self, images: Tensor) -> Tensor:
        """`[B, num_features]` from images `[B, 3, H, W]` in 0 to 1."""
        return self.reader.features(2 * images - 1)


def judging(scenes: Sequence[Scene]) -> Callable[[Images], dict[str, Any]]:
    """What says of images whether each shows its scene's caption, and how far all are from real scenes, by Fréchet.

    `right`: the reader finds what the caption tells, in its order. `counted`: and nothing is drawn twice.
    """
    reader = judge.load()
    told = torch.tensor([len(scene.things) for scene in scenes])
    distance = FrechetInceptionDistance(Features(reader), reset_real_features=False)
    for first in range(0, REAL, 128):
        distance.update(draw(numbered(HELD_OUT + len(scenes) + first, 128), SIDE) / 2 + 0.5, real=True)

    def judged(images: Images) -> dict[str, Any]:
        right = reader.right(scenes, 2 * images.pixels - 1)
        counted = right & (judge.counts(2 * images.pixels - 1) == told)
        result: dict[str, Any] = {"right": right.float().tolist(), "counted": counted.float().tolist()}
        if len(scenes) > 1:  # of a single image there is no covariance
            distance.reset()
            distance.update(images.pixels, real=False)
            result["frechet"] = float(distance.compute())
        return result

    return judged


def perceiving(prompts: Sequence[str]) -> Callable[[Images, Images], dict[str, Any]]:
    """LPIPS and CLIP score where torchmetrics and their weights are at hand, else why they are not; each built once."""

    def lpips() -> Callable[[Images, Images], list[float]]:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
        return lambda images, stock: [
            float(metric(mine[None], theirs[None])) for mine, theirs in zip(images.pixels, stock.pixels, strict=True)
        ]

    def clip_score() -> Callable[[Images, Images], list[float]]:
        from torchmetrics.multimodal.clip_score import CLIPScore

        metric: Any = CLIPScore("openai/clip-vit-base-patch16")
        return lambda images, stock: [
            float(metric((255 * mine).byte(), prompt)) for mine, prompt in zip(images.pixels, prompts, strict=True)
        ]

    scores: dict[str, Callable[[Images, Images], list[float]] | str] = {}
    for build in (lpips, clip_score):
        try:
            scores[build.__name__] = build()
        except Exception as error:  # a package, its weights or the network is missing, each in its own way
            scores[build.__name__] = f"not measured: {warm.reason(error)}"

    def perceived(images: Images, stock: Images) -> dict[str, Any]:
        return {name: score if isinstance(score, str) else score(images, stock) for name, score in scores.items()}

    return perceived

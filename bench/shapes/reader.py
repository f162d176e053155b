"""The judge: a small network that reads the shapes, their colours and their order out of an image."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.shapes.scenes import COLOURS, THINGS, Scene

WEIGHTS = Path(__file__).parent / "reader.safetensors"
SIDE = 64  # pixels that it sees along a side
CELLS = 8  # along a side of the map that it makes
NEAR = 0.25  # of a shape's colour, as a distance in RGB from 0 to 1; the nearest ground is 0.35 away
LEAST = 0.005  # share of an image that is no speck; the smallest shape covers four times as much


class Reader(nn.Module):
    """Convolutions to a map of `CELLS x CELLS` that says of each kind of thing how likely it is there."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        widths = (3, width // 4, width // 2, width)
        down = [
            layer
            for before, after in pairwise(widths)
            for layer in (nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.SiLU())
        ]
        around = [
            layer
            for _ in range(2)
            for layer in (nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.SiLU())
        ]
        self.body = nn.Sequential(*down, *around)
        self.head = nn.Conv2d(width, len(THINGS), 1)

    def features(self, images: Tensor) -> Tensor:
        """`[B, width]` from images `[B, 3, H, W]` in -1 to 1: what a Fréchet distance is taken of."""
        return self._body(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, things, CELLS, CELLS]` from images `[B, 3, H, W]` in -1 to 1."""
        logits: Tensor = self.head(self._body(images))
        return logits

    def _body(self, images: Tensor) -> Tensor:
        maps: Tensor = self.body(F.adaptive_avg_pool2d(images, SIDE))
        return maps

    def loss(self, scenes: Sequence[Scene], images: Tensor) -> Tensor:
        """Whether each thing is there at all, and if so in which cell."""
        logits = self(images)
        there = torch.zeros(logits.shape[:2])
        place = torch.zeros(logits.shape[:2], dtype=torch.long)
        for i, scene in enumerate(scenes):
            for thing in scene.things:
                k = THINGS.index((thing.colour, thing.shape))
                there[i, k] = 1
                place[i, k] = int(thing.y * CELLS) * CELLS + int(thing.x * CELLS)
        presence = F.binary_cross_entropy_with_logits(logits.amax((2, 3)), there)
        where = F.cross_entropy(logits.flatten(2)[there == 1], place[there == 1])
        return presence + 0.1 * where

    @torch.no_grad()
    def right(self, scenes: Sequence[Scene], images: Tensor) -> Tensor:
        """Whether each image shows what its scene's caption says, and nothing else: bools `[B]`."""
        logits = self(images)
        found = logits.amax((2, 3)) > 0
        share = logits.flatten(2).softmax(-1)
        cell = torch.arange(CELLS * CELLS)
        across, down = share @ (cell % CELLS).float(), share @ (cell // CELLS).float()
        verdicts = []
        for i, scene in enumerate(scenes):
            kinds = [THINGS.index((thing.colour, thing.shape)) for thing in scene.things]
            line = (down if scene.relation == "above" else across)[i, kinds]
            verdicts.append(set(kinds) == set(found[i].nonzero().flatten().tolist()) and bool((line.diff() > 0).all()))
        return torch.tensor(verdicts)


def counts(images: Tensor) -> Tensor:
    """How many shapes each image `[B, 3, H, W]` in -1 to 1 shows, from its pixels alone: ints `[B]`.

    A shape is a connected patch of pixels near one of the palette's colours. Two shapes of one colour that touch count
    as one.
    """
    palette = torch.tensor(list(COLOURS.values()))[..., None, None]
    masks = torch.stack([(image - palette).norm(dim=1) < NEAR for image in images / 2 + 0.5])
    pixels = masks[0, 0].numel()
    label = masks * torch.arange(1, pixels + 1).view(masks.shape[-2:])
    while not torch.equal(label, wider := _spread(_spread(label, -1), -2)):
        label = wider
    sizes = torch.zeros(*masks.shape[:2], pixels + 1).scatter_add(2, label.flatten(2), masks.flatten(2).float())
    return (sizes > LEAST * pixels).sum((1, 2))


def _spread(label: Tensor, dim: int) -> Tensor:
    """The largest label of each unbroken run along a dimension; a label of 0 is a gap."""
    for _ in range(2):  # there and back
        # the number of gaps so far, put before the label, rises at each gap: a running maximum begins anew there
        size = label[0, 0].numel() + 1
        runs = (label == 0).long().cumsum(dim) * size + label
        label = torch.where(label > 0, runs.cummax(dim).values % size, 0).flip(dim)
    return label


def load(weights: Path = WEIGHTS) -> Reader:
    """The trained reader."""
    reader = Reader()
    reader.load_state_dict(load_file(weights))
    return reader.eval()

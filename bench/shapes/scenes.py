"""Scenes of one to three coloured shapes with captions: an endless data set, each scene a function of its number."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (0.85, 0.12, 0.12),
    "green": (0.10, 0.60, 0.20),
    "blue": (0.15, 0.25, 0.85),
    "yellow": (0.95, 0.80, 0.10),
    "purple": (0.55, 0.15, 0.65),
}
THINGS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
SIDE = 128  # pixels along a side of an image
HELD_OUT = 1_000_000_000  # the numbers of the scenes that are not trained on begin here
GROUNDS = ("plain", "gradient", "stripes", "checks")
RADII = {1: (0.20, 0.32), 2: (0.15, 0.20), 3: (0.11, 0.135)}  # by how many shapes there are
REACH = 1.2  # radii from a shape's centre to the furthest of its points


@dataclass(frozen=True)
class Thing:
    """A shape of a scene; lengths are shares of the image's side, y points down."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape}"


@dataclass(frozen=True)
class Ground:
    """What lies behind the shapes: one or two pale colours, mixed along a direction."""

    kind: str
    colours: tuple[tuple[float, float, float], tuple[float, float, float]]
    angle: float
    waves: float


@dataclass(frozen=True)
class Scene:
    """Shapes on a ground. Two shapes stand in `relation`, three stand from left to right in the caption's order."""

    things: tuple[Thing, ...]
    relation: str
    ground: Ground

    @property
    def caption(self) -> str:
        """What the scene shows, without its ground."""
        if len(self.things) == 2:
            return f"{self.things[0]} {self.relation} {self.things[1]}"
        *first, last = map(str, self.things)
        return f"{', '.join(first)} and {last}" if first else last


def scene(number: int) -> Scene:
    """The scene of this number, the same on every machine."""
    rng = random.Random(number)
    count = rng.choices((1, 2, 3), weights=(4, 4, 2))[0]
    relation = rng.choice(("left of", "above")) if count == 2 else "left of"
    things = []
    for i, (colour, shape) in enumerate(rng.sample(THINGS, count)):
        radius = rng.uniform(*RADII[count])
        play = 0.5 / count - REACH * radius
        along = (i + 0.5) / count + rng.uniform(-play, play)
        across = rng.uniform(REACH * radius, 1 - REACH * radius)
        x, y = (across, along) if relation == "above" else (along, across)
        things.append(Thing(colour, shape, x, y, radius))
    return Scene(tuple(things), relation, _ground(rng))


def numbered(first: int, count: int) -> list[Scene]:
    """Scenes by their numbers."""
    return [scene(number) for number in range(first, first + count)]


def _ground(rng: random.Random) -> Ground:
    light = rng.uniform(0.65, 0.85)

    def pale() -> tuple[float, float, float]:
        shade = light + rng.uniform(-0.1, 0.1)
        red, green, blue = (shade + rng.uniform(-0.05, 0.05) for _ in range(3))
        return red, green, blue

    return Ground(rng.choice(GROUNDS), (pale(), pale()), rng.uniform(0, math.tau), rng.uniform(2, 5))


def draw(scenes: Sequence[Scene], side: int, *, window: tuple[int, int, int] | None = None) -> Tensor:
    """Images `[B, 3, side, side]` from -1 to 1, with smooth edges.

    Args:
        scenes: One for each image.
        side: Pixels along a side.
        window: Left, top and side of a square of pixels to draw instead of all.
    """
    left, top, extent = window or (0, 0, side)
    y = (torch.arange(extent)[:, None] + top + 0.5) / side
    x = (torch.arange(extent)[None, :] + left + 0.5) / side
    images = []
    for one in scenes:
        image = _draw_ground(one.ground, x, y)
        for thing in one.things:
            inside = (0.5 - side * _distance(thing, x, y)).clamp(0, 1)
            image = torch.lerp(image, torch.tensor(COLOURS[thing.colour])[:, None, None], inside)
        images.append(image)
    return 2 * torch.stack(images) - 1


def cover(scenes: Sequence[Scene], side: int, reach: float) -> Tensor:
    """Which pixels are a shape's or within `reach` of one, in shares of the side: `[B, 1, side, side]` of 0 and 1."""
    places = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(places, places, indexing="ij")
    near = [torch.stack([_distance(thing, x, y) for thing in one.things]).amin(0) < reach for one in scenes]
    return torch.stack(near).float()[:, None]


def _draw_ground(ground: Ground, x: Tensor, y: Tensor) -> Tensor:
    along = (x - 0.5) * math.cos(ground.angle) + (y - 0.5) * math.sin(ground.angle)
    across = (y - 0.5) * math.cos(ground.angle) - (x - 0.5) * math.sin(ground.angle)
    wave = math.tau * ground.waves
    share = {
        "plain": torch.zeros_like(along),
        "gradient": along / math.sqrt(2) + 0.5,
        "stripes": 0.5 + 0.5 * (wave * along).sin(),
        "checks": 0.5 + 0.5 * (wave * along).sin() * (wave * across).sin(),
    }[ground.kind]
    first, second = (torch.tensor(colour)[:, None, None] for colour in ground.colours)
    return torch.lerp(first, second, share)


def _distance(thing: Thing, x: Tensor, y: Tensor) -> Tensor:
    """How far outside of the shape a point is, below 0 within."""
    x, y = x - thing.x, y - thing.y
    if thing.shape == "circle":
        return torch.hypot(x, y) - thing.radius
    if thing.shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.84 * thing.radius
    sides = math.sqrt(3) / 2 * x.abs() - y / 2
    return torch.maximum(sides, y) - REACH / 2 * thing.radius

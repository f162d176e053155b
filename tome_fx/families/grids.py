"""Where the tokens of transformers lie: functions that rewritten graphs call."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tome_fx import ops


def grid_of_patches(image: Tensor, patch: int) -> tuple[int, int]:
    """Height and width of the tokens of an image `[B, C, H, W]`, each a square of this side."""
    height, width = ops.grid_of(image)
    return height // patch, width // patch


def grid_of_frames(video: Tensor, frames: int, patch: int) -> tuple[int, int, int]:
    """Frames, height and width of the tokens of a video `[B, C, F, H, W]`, each of so many frames of such a square."""
    return video.shape[2] // frames, *grid_of_patches(video, patch)


def grid_of_frames_before_channels(video: Tensor, frames: int, patch: int) -> tuple[int, int, int]:
    """The same of a video `[B, F, C, H, W]`."""
    return grid_of_frames(video.transpose(1, 2), frames, patch)


def grid_as_told(frames: int | None, height: int | None, width: int | None, *patch: int) -> tuple[int, int, int]:
    """Frames, height and width of the tokens themselves; none where coordinates are told in their place."""
    return frames or 0, height or 0, width or 0


def row_of_coordinates(coordinates: Tensor) -> tuple[int, int]:
    """One row of all tokens `[N, axes]`, or `[B, N, axes]` with the same for all images."""
    return 1, coordinates.shape[-2]


def line_of_coordinates(coordinates: Tensor, tokens: Tensor, sx: int, sy: int) -> Tensor:
    """The order of tokens along a line, by coordinates as above; see `ops.line_of`."""
    return ops.line_of(coordinates[0] if coordinates.ndim == 3 else coordinates, sx, sy)


def line_of_coordinates_and_layer(coordinates: Tensor, tokens: Tensor, sx: int, sy: int) -> Tensor:
    """The same by coordinates whose last axis, after row and column, is another that tells pictures apart."""
    return line_of_coordinates(coordinates.roll(1, dims=-1), tokens, sx, sy)


def row_of_shapes(shapes: Any) -> tuple[int, int]:
    """One row of all tokens of pictures of these shapes: those of one image, or a list for each image, all alike."""
    return 1, sum(frames * height * width for frames, height, width in _pictures(shapes))


def line_of_shapes(shapes: Any, tokens: Tensor, sx: int, sy: int) -> Tensor:
    """The order of the tokens of pictures of these shapes along a line; see `ops.line_of`."""
    found = []
    for number, (frames, height, width) in enumerate(_pictures(shapes)):
        place = torch.arange(frames * height * width, device=tokens.device)
        frame, inside = place // (height * width), place % (height * width)
        found.append(torch.stack([torch.full_like(place, number), frame, inside // width, inside % width], dim=1))
    return ops.line_of(torch.cat(found), sx, sy)


def _pictures(shapes: Any) -> Sequence[tuple[int, int, int]]:
    """Frames, height and width of each picture of an image."""
    first = shapes[0] if isinstance(shapes, list) else shapes
    return first if isinstance(first, list) else [first]

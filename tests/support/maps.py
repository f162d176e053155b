"""Pictures of what is merged, as data."""

from typing import Any

import torch

from tome_fx import viz

PIXELS, STEPS = 128, 5
SHOWN = ["image", "call 1 of 5", "call 3 of 5", "call 5 of 5"]


def mapped(pipe: Any, call: dict[str, Any], **more: Any) -> Any:
    """The figure that `merge_map` draws of a small image."""
    pipe.set_progress_bar_config(disable=True)
    size = {"height": PIXELS, "width": PIXELS, "generator": torch.Generator().manual_seed(0)}
    return viz.merge_map(pipe, **{"num_inference_steps": STEPS, **size, **call, **more})


def cells(figure: Any) -> list[Any]:
    """The images of a figure, row by row."""
    return [axis.images[0].get_array() for axis in figure.axes]


def rows(figure: Any) -> list[str]:
    """What stands at the left of each row."""
    return [" ".join(axis.get_ylabel().split()) for axis in figure.axes if axis.get_ylabel()]


def columns(figure: Any) -> list[str]:
    """The title of each column."""
    return [axis.get_title() for axis in figure.axes if axis.get_title()]

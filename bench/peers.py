"""What tome_fx is measured beside: tomesd's patch, ToDo's shorter keys and values, and HiDiffusion's windows.

They act at the finest level, as they were published for: tomesd's own default of a downsampling of 1 leaves SDXL as it
was, so it is told the level.
"""

from typing import Any

import tomesd
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from bench.cases import Case
from tome_fx.families.unet import Site, find_sites


def finest_sites(unet: UNet2DConditionModel) -> list[Site]:
    """The sites of the finest level that has attention.

    Raises:
        ValueError: The model has no levels.
    """
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(f"tomesd, todo and hidiffusion merge in UNets, got a {type(unet).__name__}")
    sites = find_sites(unet)
    finest = min(site.downsample for site in sites)
    return [site for site in sites if site.downsample == finest]


def patched(unet: UNet2DConditionModel, case: Case) -> UNet2DConditionModel:
    """tomesd's patch."""
    level = finest_sites(unet)[0].downsample
    tomesd.apply_patch(unet, case.ratio, max_downsample=level, **dict(case.options))
    return unet


class ToDoProcessor:
    """Attention whose keys and values are every `stride`-th token of the grid along both sides; queries are whole.

    Source: Smith et al., "ToDo: Token Downsampling for Efficient Generation of High-Resolution Images" (2024):
    nearest-neighbour downsampling of keys and values, by 2 at the finest level.
    """

    def __init__(self, inner: Any, stride: int = 2) -> None:
        self.inner = inner
        self.stride = stride

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: None, **kwargs: Any) -> Tensor:
        """Attend to the downsampled tokens; the grid is square, as every resolution measured here is."""
        grid = _on_grid(hidden_states)
        context = grid[:, :: self.stride, :: self.stride].flatten(1, 2)
        result: Tensor = self.inner(attn, hidden_states, encoder_hidden_states=context, **kwargs)
        return result


class WindowProcessor:
    """Attention within each quarter of the grid, which is rolled by `shift` quarters of a window's side before.

    Source: Zhang et al., "HiDiffusion: Unlocking Higher-Resolution Creativity and Efficiency in Pretrained Diffusion
    Models" (2024): MSW-MSA, windows of half the grid's sides at the finest level, moved by another stride from one time
    step to the next. Written from that description. Its other part, RAU-Net, is for images larger than those that a
    model was trained on: it shrinks what the deeper levels see, to make another picture than the model would and a
    better one, so that a distance from the model's own says nothing of it. It is left out.
    """

    STRIDES = 4  # of a quarter each: the fifth would be the first again

    def __init__(self, inner: Any, shift: int) -> None:
        self.inner = inner
        self.shift = shift

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: None, **kwargs: Any) -> Tensor:
        """Attend within the windows; the grid is a square of an even side, as every resolution measured here is."""
        batch, _, channels = hidden_states.shape
        grid = _on_grid(hidden_states)
        side = grid.shape[1] // 2
        move = self.shift * side // self.STRIDES
        windows = grid.roll((-move, -move), (1, 2)).view(batch, 2, side, 2, side, channels).transpose(2, 3)
        inside: Tensor = self.inner(attn, windows.reshape(4 * batch, side * side, channels), **kwargs)
        windows = inside.view(batch, 2, 2, side, side, channels).transpose(2, 3)
        moved = windows.reshape(batch, 2 * side, 2 * side, channels)
        return moved.roll((move, move), (1, 2)).flatten(1, 2)


def _on_grid(tokens: Tensor) -> Tensor:
    """Tokens `[B, side * side, C]` as `[B, side, side, C]`."""
    side = int(tokens.shape[1] ** 0.5)
    return tokens.view(tokens.shape[0], side, side, tokens.shape[2])


def downsampled(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """ToDo."""
    for site in finest_sites(unet):
        attn: Any = unet.get_submodule(f"{site.path}.attn1")
        attn.set_processor(ToDoProcessor(attn.processor))
    return unet


def windowed(unet: UNet2DConditionModel, turn: int) -> UNet2DConditionModel:
    """HiDiffusion's attention in the step of this number, from 0; the first is one that moves its windows."""
    for site in finest_sites(unet):
        attn: Any = unet.get_submodule(f"{site.path}.attn1")
        attn.set_processor(WindowProcessor(attn.processor, (turn + 1) % WindowProcessor.STRIDES))
    return unet

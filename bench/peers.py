"""What tome_fx is measured beside: tomesd's patch, and ToDo, which shortens keys and values instead."""

from typing import Any

import tomesd
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from bench.cases import SCOPES, Case
from tome_fx.families.unet import find_sites


def patched(unet: UNet2DConditionModel, case: Case) -> UNet2DConditionModel:
    """tomesd's patch. Its level is chosen as ours is, for its default of 1 leaves SDXL as it was."""
    finest = min(site.downsample for site in find_sites(unet))
    tomesd.apply_patch(unet, case.ratio, max_downsample=finest, **SCOPES[case.scope])
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
        batch, tokens, channels = hidden_states.shape
        side = int(tokens**0.5)
        grid = hidden_states.view(batch, side, side, channels)
        context = grid[:, :: self.stride, :: self.stride].reshape(batch, -1, channels)
        result: Tensor = self.inner(attn, hidden_states, encoder_hidden_states=context, **kwargs)
        return result


def downsampled(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """ToDo at the levels that we merge at."""
    sites = find_sites(unet)
    finest = min(site.downsample for site in sites)
    for site in sites:
        if site.downsample == finest:
            attn = unet.get_submodule(f"{site.path}.attn1")
            attn.set_processor(ToDoProcessor(attn.processor))
    return unet

"""Use of an installed tome_fx, as somebody has it who has no checkout: a small UNet is transformed and called."""

import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

import tome_fx

if not Path(tome_fx.__file__).is_relative_to(sys.prefix):
    sys.exit(f"expected tome_fx installed in {sys.prefix}, found {tome_fx.__file__}")
torch.manual_seed(0)
unet = UNet2DConditionModel(
    block_out_channels=(16,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    mid_block_type=None,
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=8,
    norm_num_groups=4,
).eval()
merged = tome_fx.transform(unet, 0.5)
with torch.no_grad():
    given = torch.randn(2, 4, 32, 32), 500, torch.randn(2, 5, 8)
    error = (merged(*given).sample - unet(*given).sample).norm() / unet(*given).sample.norm()
if not 0 < error < 0.5:
    sys.exit(f"expected an output near that without merging, found one {error:.3g} of its norm away")
print(tome_fx.explain(merged, 32, 32))

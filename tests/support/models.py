"""Small real diffusers models with seeded random weights, and what the tests do with any of them.

A builder returns the same object every time: `transform` leaves a model as it is, and a test that changes one
works on a deep copy. No builder and no helper moves the random state of the process.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import ControlNetModel, MotionAdapter, UNet2DConditionModel, UNet3DConditionModel, UNetMotionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from tome_fx.families.inputs import example_inputs

TEXT_TOKENS = 5  # few, as no test depends on how many there are


@functools.cache
def sd15() -> UNet2DConditionModel:
    """Stable Diffusion 1.5 in small: attention at 1, 2, 4 and in the middle at 8, convolutions around it."""
    return _unet(down_block_types=3 * ("CrossAttnDownBlock2D",) + ("DownBlock2D",), attention_head_dim=2)


@functools.cache
def sd21() -> UNet2DConditionModel:
    """Stable Diffusion 2.1 in small: linear projections, heads by level."""
    return _unet(
        down_block_types=3 * ("CrossAttnDownBlock2D",) + ("DownBlock2D",),
        attention_head_dim=(2, 2, 4, 4),
        use_linear_projection=True,
    )


@functools.cache
def sdxl() -> UNet2DConditionModel:
    """SDXL in small: no attention at 1, stacked blocks at 2 and 4, sizes and pooled prompt in the embedding."""
    return _unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        attention_head_dim=(2, 2, 4),
        transformer_layers_per_block=(1, 2, 3),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )


@functools.cache
def gligen() -> UNet2DConditionModel:
    """A UNet of two stages whose blocks have gated self-attention over grounded objects, its gates open."""
    stages = ("CrossAttnDownBlock2D", "DownBlock2D")
    return _without_zeros(_unet(down_block_types=stages, attention_head_dim=2, attention_type="gated"))


@functools.cache
def two_stages() -> UNet2DConditionModel:
    """The smallest UNet with merged and unmerged levels: attention at 1 and in the middle at 2, four blocks."""
    return _unet(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=2)


@functools.cache
def one_stack() -> UNet2DConditionModel:
    """A single transformer, of two blocks. For compiling many times over what blocks in a row share."""
    return _unet(
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        attention_head_dim=2,
        transformer_layers_per_block=2,
        mid_block_type=None,
    )


@functools.cache
def one_stage() -> UNet2DConditionModel:
    """The smallest UNet that there is: three blocks at 1. For real code generation, which takes long."""
    return _unet(down_block_types=("CrossAttnDownBlock2D",), attention_head_dim=2, mid_block_type=None)


@functools.cache
def one_block() -> UNet2DConditionModel:
    """A single block. For compiling many times over."""
    return _unet(
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        attention_head_dim=2,
        mid_block_type=None,
    )


@functools.cache
def controlnet() -> ControlNetModel:
    """A ControlNet for `sd15()` whose zero convolutions are not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ControlNetModel.from_unet(sd15(), conditioning_embedding_out_channels=(8, 8)).eval()
    return _without_zeros(model)


@functools.cache
def motion_modules() -> MotionAdapter:
    """AnimateDiff's attention over time, for `sd15()`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MotionAdapter(
            block_out_channels=(32, 32, 64, 64),
            motion_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=8,
        ).eval()


def animated(unet: UNet2DConditionModel) -> UNetMotionModel:
    """What `AnimateDiffPipeline` makes of a UNet of the size of `sd15()`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNetMotionModel.from_unet2d(unet, motion_modules()).eval()


@functools.cache
def motion() -> UNetMotionModel:
    """AnimateDiff in small: `sd15()` with attention over the frames of a clip beside it."""
    return animated(sd15())


@functools.cache
def clips() -> UNet3DConditionModel:
    """A text-to-video UNet of two stages, with convolutions and attention over the frames of a clip."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet3DConditionModel(
            sample_size=32,
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        ).eval()


def _without_zeros(model: Any) -> Any:
    """The model as if trained: what starts from zero, so as to have no effect at first, has one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.3)
    return model


def _unet(down_block_types: tuple[str, ...], **config: Any) -> UNet2DConditionModel:
    channels = (32, 32, 64, 64)[: len(down_block_types)]
    ups = [name.replace("Down", "Up") for name in reversed(down_block_types)]
    options = {
        "sample_size": 32,
        "block_out_channels": channels,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 16,
        "up_block_types": tuple(ups),
    }
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # wherever the first test to ask is
        torch.manual_seed(0)
        return UNet2DConditionModel(down_block_types=down_block_types, **{**options, **config}).eval()


def inputs(
    model: Any, height: int = 32, width: int = 32, *, batch: int = 2, seed: int = 0, text_tokens: int = TEXT_TOKENS
) -> dict[str, Any]:
    """Arguments for a forward of the model, in its dtype and on its device: the same for the same seed.

    Of a model of clips each has three frames.
    """
    options: dict[str, Any] = {"batch": batch, "text_tokens": text_tokens, "device": model.device, "dtype": model.dtype}
    options["frames"] = 3 if isinstance(model, (UNetMotionModel, UNet3DConditionModel)) else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        arguments = example_inputs(model, height, width, **options)
    if isinstance(model, UNetMotionModel):  # which wants the prompt once for each frame
        arguments["encoder_hidden_states"] = arguments["encoder_hidden_states"].repeat_interleave(3, 0)
    return arguments


def mask() -> Tensor:
    """An `encoder_attention_mask` for a batch of 2 that hides the ends of the prompts."""
    return torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 0]])


def objects() -> dict[str, Tensor]:
    """Three grounded objects in each of 2 images, for `cross_attention_kwargs={"gligen": ...}` of `gligen()`."""
    generator = torch.Generator().manual_seed(0)
    boxes, embeddings = torch.rand(2, 3, 4, generator=generator), torch.randn(2, 3, 16, generator=generator)
    return {"boxes": boxes, "masks": torch.ones(2, 3), "positive_embeddings": embeddings}


def output(model: Any, arguments: dict[str, Any]) -> Tensor:
    """What the model makes of the arguments, without gradients; of a ControlNet, all residuals in one row.

    The latents go by position, since tomesd finds them nowhere else.
    """
    others = {name: value for name, value in arguments.items() if name != "sample"}
    with torch.no_grad():
        result = model(arguments["sample"], return_dict=False, **others)
    if len(result) == 2:
        down, middle = result
        return torch.cat([residual.flatten() for residual in (*down, middle)])
    (sample,) = result
    assert isinstance(sample, Tensor)
    return sample


def relative_error(result: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected value; asserts that the two can be compared at all."""
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    assert result.isfinite().all()
    assert expected.isfinite().all()
    assert expected.any()
    return float((result - expected).abs().max() / expected.abs().max())


def blocks(model: nn.Module) -> dict[str, Any]:
    """Every transformer block of the model, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, BasicTransformerBlock)}


def transformers(model: nn.Module) -> dict[str, Any]:
    """Every `Transformer2DModel` of the model, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Transformer2DModel)}


def transformer(model: nn.Module, side: int = 8) -> tuple[Any, tuple[Tensor, Tensor]]:
    """The first transformer without the convolutions around it, which take long to compile; an image and a prompt."""
    result = next(iter(transformers(model).values()))
    generator = torch.Generator().manual_seed(0)
    prompt = result.transformer_blocks[0].attn2.to_k.in_features
    image = torch.randn(2, result.in_channels, side, side, generator=generator)
    return result, (image, torch.randn(2, TEXT_TOKENS, prompt, generator=generator))


def gradients(model: Any, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Those of all parameters, by their names in a model that nothing is wrapped around; asserts that there are any."""
    model.zero_grad()
    model(**arguments).sample.square().mean().backward()
    found = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found.values())
    return {name: gradient.clone() for name, gradient in found.items()}


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Have PyTorch compute with this many threads, and as before afterwards. These models are too small for many."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

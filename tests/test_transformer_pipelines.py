"""A transformed transformer makes in diffusers' pipelines what the stock model with a patch makes, in every scope.

With a ratio of 0 no bit changes. Prompts are given as embeddings and pictures are left as latents, so that a pipeline
is its transformer, a scheduler, and where a picture goes in a small autoencoder.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    PixArtSigmaPipeline,
    QwenImagePipeline,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)
from support.features import supports
from support.models import relative_error
from support.transformers import flux, flux_controlnet, patched, pixart, qwen, sd3, sd3_controlnet
from torch import Tensor

import tome_fx

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

PIXELS, STEPS = 128, 3
Change = Callable[[Any], Any]
WITHOUT_TEXT = {"text_encoder": None, "tokenizer": None}
TWO = {**WITHOUT_TEXT, "text_encoder_2": None, "tokenizer_2": None}
THREE = {**TWO, "text_encoder_3": None, "tokenizer_3": None}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prompt(*, pooled: bool = True, mask: str = "", negative: bool = True) -> dict[str, Any]:
    """A prompt of five tokens and one that is not wanted."""
    result: dict[str, Any] = {}
    for number, name in enumerate(("", "negative_")[: 1 + negative]):
        result[f"{name}prompt_embeds"] = random(1, 5, 12, seed=number)
        if pooled:
            result[f"{name}pooled_prompt_embeds"] = random(1, 10, seed=number)
        if mask:
            result[f"{name}{mask}"] = torch.tensor([[1, 1, 1, 1, number]])
    return result


def coder(channels: int) -> AutoencoderKL:
    """An autoencoder that makes latents an eighth as wide as a picture."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKL(
            block_out_channels=(4, 4, 4, 4),
            norm_num_groups=2,
            latent_channels=channels,
            down_block_types=4 * ("DownEncoderBlock2D",),
            up_block_types=4 * ("UpDecoderBlock2D",),
            shift_factor=0.1,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).eval()


def picture() -> Tensor:
    return torch.rand(1, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(2))


def hole() -> Tensor:
    """What is to be painted of `picture()`: its left half."""
    return (torch.arange(PIXELS) < PIXELS // 2).float().expand(1, 1, PIXELS, PIXELS)


def euler() -> Any:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False)


def of_flux(change: Change) -> tuple[Any, dict[str, Any]]:
    return FluxPipeline(euler(), None, transformer=change(flux()), **TWO), prompt(negative=False)


def of_flux_with_guidance(change: Change) -> tuple[Any, dict[str, Any]]:
    return FluxPipeline(euler(), None, transformer=change(flux()), **TWO), {**prompt(), "true_cfg_scale": 3.0}


def of_kontext(change: Change) -> tuple[Any, dict[str, Any]]:
    pipe = FluxKontextPipeline(euler(), coder(2), transformer=change(flux()), **TWO)
    return pipe, {**prompt(negative=False), "image": picture(), "max_area": PIXELS**2, "_auto_resize": False}


def of_flux_img2img(change: Change) -> tuple[Any, dict[str, Any]]:
    pipe = FluxImg2ImgPipeline(euler(), coder(2), transformer=change(flux()), **TWO)
    return pipe, {**prompt(negative=False), "image": picture(), "strength": 1.0}


def of_flux_inpainting(change: Change) -> tuple[Any, dict[str, Any]]:
    pipe = FluxInpaintPipeline(euler(), coder(2), transformer=change(flux()), **TWO)
    return pipe, {**prompt(negative=False), "image": picture(), "mask_image": hole(), "strength": 1.0}


def of_flux_controlnet(change: Change) -> tuple[Any, dict[str, Any]]:
    pipe = FluxControlNetPipeline(
        euler(), coder(2), transformer=change(flux()), controlnet=change(flux_controlnet()), **TWO
    )
    return pipe, {**prompt(negative=False), "control_image": picture(), "control_mode": 1}


def of_sd3(change: Change) -> tuple[Any, dict[str, Any]]:
    return StableDiffusion3Pipeline(change(sd3()), euler(), None, **THREE), prompt()


def of_sd3_with_skipped_layers(change: Change) -> tuple[Any, dict[str, Any]]:
    options = {"skip_guidance_layers": [1, 2], "skip_layer_guidance_stop": 1.0, "skip_layer_guidance_start": 0.0}
    return StableDiffusion3Pipeline(change(sd3()), euler(), None, **THREE), {**prompt(), **options}


def of_sd3_img2img(change: Change) -> tuple[Any, dict[str, Any]]:
    pipe = StableDiffusion3Img2ImgPipeline(change(sd3()), euler(), coder(4), **THREE)
    return pipe, {**prompt(), "image": picture(), "strength": 1.0}


def of_sd3_controlnet(change: Change) -> tuple[Any, dict[str, Any]]:
    pipe = StableDiffusion3ControlNetPipeline(
        change(sd3()), euler(), coder(4), controlnet=change(sd3_controlnet()), **THREE
    )
    return pipe, {**prompt(), "control_image": picture()}


def of_pixart(change: Change) -> tuple[Any, dict[str, Any]]:
    pipe = PixArtSigmaPipeline(
        transformer=change(pixart()), scheduler=DDIMScheduler(clip_sample=False), vae=None, **WITHOUT_TEXT
    )
    return pipe, {
        **prompt(pooled=False, mask="prompt_attention_mask"),
        "negative_prompt": None,
        "use_resolution_binning": False,
    }


def of_qwen(change: Change) -> tuple[Any, dict[str, Any]]:
    pipe = QwenImagePipeline(euler(), None, transformer=change(qwen()), **WITHOUT_TEXT)
    return pipe, prompt(pooled=False, mask="prompt_embeds_mask")


TITLES = {
    "flux": "Flux.1",
    "flux_with_guidance": "Flux.1, true classifier-free guidance",
    "kontext": "Flux.1 Kontext",
    "flux_img2img": "Flux.1 image to image",
    "flux_inpainting": "Flux.1 inpainting",
    "flux_controlnet": "Flux.1 ControlNet",
    "sd3": "Stable Diffusion 3",
    "sd3_with_skipped_layers": "Stable Diffusion 3, skipping layers",
    "sd3_img2img": "Stable Diffusion 3 image to image",
    "sd3_controlnet": "Stable Diffusion 3 ControlNet",
    "pixart": "PixArt-Σ",
    "qwen": "Qwen-Image",
}
PIPELINES = {name.removeprefix("of_"): value for name, value in list(globals().items()) if name.startswith("of_")}
scopes = pytest.mark.parametrize("scope", [{"merge_block": True}, {"merge_block": False}], ids=["blocks", "attention"])
ON_ONE_GRID = [name for name in PIPELINES if name != "kontext"]  # which the oracle knows


def latents(pipe: Any, call: dict[str, Any], **options: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some draw what they make of a picture from the process's generator
        sizes = {"height": PIXELS, "width": PIXELS, "num_inference_steps": STEPS, **call, **options}
        result = pipe(**sizes, generator=torch.Generator().manual_seed(0), output_type="latent", return_dict=False)[0]
    assert isinstance(result, Tensor)
    return result


def merged(ratio: float = 0.5, **options: Any) -> Change:
    return lambda model: tome_fx.transform(model, ratio, use_rand=False, **options)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=supports(TITLES[name], "works", group="Diffusion transformers")) for name in PIPELINES],
)
@scopes
def test_a_pipeline_makes_the_stock_picture_at_ratio_0_and_another_with_merged_tokens(
    scope: dict[str, Any], name: str
) -> None:
    stock = latents(*PIPELINES[name](copy.copy))
    assert torch.equal(latents(*PIPELINES[name](merged(0, **scope))), stock)
    result = latents(*PIPELINES[name](merged(**scope)))
    assert relative_error(result, stock) > 1e-4


@pytest.mark.parametrize("name", ON_ONE_GRID)
@scopes
def test_a_pipeline_makes_the_picture_that_a_plain_patch_makes(scope: dict[str, Any], name: str) -> None:
    result = latents(*PIPELINES[name](merged(**scope)))
    expected = latents(*PIPELINES[name](lambda model: patched(model, **scope)))
    assert relative_error(result, expected) < 1e-6


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart", "qwen"])
@scopes
def test_a_picture_may_have_another_size_than_the_model_is_made_for(scope: dict[str, Any], name: str) -> None:
    large, wide = {"height": 192, "width": 192}, {"height": 112, "width": 208}
    result = latents(*PIPELINES[name](merged(**scope)), **large)
    assert relative_error(result, latents(*PIPELINES[name](lambda model: patched(model, **scope)), **large)) < 1e-6
    stock = latents(*PIPELINES[name](copy.copy), **wide)
    assert torch.equal(latents(*PIPELINES[name](merged(0, **scope)), **wide), stock)
    assert relative_error(latents(*PIPELINES[name](merged(**scope)), **wide), stock) > 1e-4


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen"])
@scopes
def test_a_schedule_sets_the_ratio_through_the_pipelines_callback(scope: dict[str, Any], name: str) -> None:
    pipe, call = PIPELINES[name](merged(**scope))
    schedule = tome_fx.RatioSchedule({0: 0, 0.5: 0.75}, pipe.transformer)
    seen: list[float] = []

    def watched(*args: Any) -> Any:
        found = schedule(*args)
        seen.append(pipe.transformer.tome_fx.plan.ratio)
        return found

    first = latents(pipe, call, callback_on_step_end=watched)
    assert seen == [0, 0.75, 0]
    assert torch.equal(latents(pipe, call, callback_on_step_end=watched), first)
    assert relative_error(first, latents(*PIPELINES[name](merged(0, **scope)))) > 1e-5

"""A transformed transformer makes in diffusers' pipelines what the stock model with a patch makes, in every scope.

With a ratio of 0 no bit changes. Prompts are given as embeddings and pictures are left as latents, so that a pipeline
is its transformer, a scheduler, and where a picture goes in a small autoencoder. What a pipeline does to its
transformer, with LoRAs or to hold it elsewhere, acts as on the stock model, or in the wrong order is an error.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    AuraFlowPipeline,
    AutoencoderKL,
    ChromaPipeline,
    CogVideoXPipeline,
    CogView4Pipeline,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    HunyuanDiTPipeline,
    LTXPipeline,
    PixArtSigmaPipeline,
    QwenImagePipeline,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    WanPipeline,
)
from support.features import AFTER, CONDITION, CPU, WORKS, supports
from support.models import relative_error
from support.transformer_oracle import patched
from support.transformers import (
    MODELS,
    flux,
    flux_controlnet,
    inputs,
    ltx,
    output,
    pixart,
    qwen,
    sd3,
    sd3_controlnet,
)
from torch import Tensor
from torch._dynamo.utils import counters

import tome_fx
from tome_fx import TransformError

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),  # of a second LoRA
]

PIXELS, STEPS = 128, 3
GROUP = "Diffusion transformers"
Change = Callable[[Any], Any]
WITHOUT_TEXT: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
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


def of_chroma(change: Change) -> tuple[Any, dict[str, Any]]:
    call = prompt(pooled=False, mask="prompt_attention_mask")
    return plain(ChromaPipeline, change, "chroma"), {n: v.float() for n, v in call.items()}


def of_flux2(change: Change) -> tuple[Any, dict[str, Any]]:
    return plain(Flux2Pipeline, change, "flux2"), prompt(pooled=False, negative=False)


def of_auraflow(change: Change) -> tuple[Any, dict[str, Any]]:
    return plain(AuraFlowPipeline, change, "auraflow"), prompt(pooled=False, mask="prompt_attention_mask")


def of_cogview4(change: Change) -> tuple[Any, dict[str, Any]]:
    return plain(CogView4Pipeline, change, "cogview4"), prompt(pooled=False)


def of_hunyuan_dit(change: Change) -> tuple[Any, dict[str, Any]]:
    pipe = HunyuanDiTPipeline(
        scheduler=DDIMScheduler(clip_sample=False),
        vae=None,
        transformer=change(MODELS["hunyuan_dit"]()),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **TWO,
    )
    call: dict[str, Any] = {"use_resolution_binning": False}
    for number, name in enumerate(("prompt", "negative_prompt")):
        for place, width in (("", 12), ("_2", 16)):
            call[f"{name}_embeds{place}"] = random(1, 4, width, seed=number)
            call[f"{name}_attention_mask{place}"] = torch.tensor([[1, 1, 1, number]])
    return pipe, call


def of_wan(change: Change) -> tuple[Any, dict[str, Any]]:
    return plain(WanPipeline, change, "wan"), {**prompt(pooled=False), "num_frames": 9}


def of_cogvideox(change: Change) -> tuple[Any, dict[str, Any]]:
    scheduler = DDIMScheduler(clip_sample=False)
    return plain(CogVideoXPipeline, change, "cogvideox", scheduler), {**prompt(pooled=False), "num_frames": 9}


def of_ltx(change: Change) -> tuple[Any, dict[str, Any]]:
    pipe = LTXPipeline(euler(), None, transformer=change(ltx(patch=1)), **WITHOUT_TEXT)
    call = prompt(pooled=False, mask="prompt_attention_mask")
    return pipe, {**call, "num_frames": 17, "height": 2 * PIXELS, "width": 2 * PIXELS}


def plain(pipeline: Any, change: Change, name: str, scheduler: Any = None) -> Any:
    """A pipeline of one transformer and a scheduler."""
    return pipeline(scheduler=scheduler or euler(), vae=None, transformer=change(MODELS[name]()), **WITHOUT_TEXT)


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
    "chroma": "Chroma",
    "flux2": "Flux.2",
    "auraflow": "AuraFlow",
    "cogview4": "CogView 4",
    "hunyuan_dit": "Hunyuan-DiT",
    "wan": "Wan 2.1, text to video",
    "cogvideox": "CogVideoX, text to video",
    "ltx": "LTX-Video, text to video",
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
    [pytest.param(name, marks=supports(TITLES[name], WORKS, group=GROUP)) for name in PIPELINES],
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
    large: dict[str, Any] = {"height": 192, "width": 192}
    wide: dict[str, Any] = {"height": 112, "width": 208}
    oracle = functools.partial(patched, pictures=((12, 12),), **scope)  # the tokens of such a picture
    expected = latents(*PIPELINES[name](oracle), **large)
    assert relative_error(latents(*PIPELINES[name](merged(**scope)), **large), expected) < 1e-6
    stock = latents(*PIPELINES[name](copy.copy), **wide)
    assert torch.equal(latents(*PIPELINES[name](merged(0, **scope)), **wide), stock)
    assert relative_error(latents(*PIPELINES[name](merged(**scope)), **wide), stock) > 1e-4


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen", "wan"])
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


# ------------------------------------------------------------------------------------------------ LoRA


def lora(model: Any, seed: int = 1, rank: int = 4, prefix: str = "") -> dict[str, Tensor]:
    """The weights of a LoRA for the attention and the feed-forwards of a model, as if trained."""
    weights = {}
    for path, module in model.named_modules():
        if path.endswith(("to_q", "to_k", "add_v_proj", "proj_mlp", "ff.net.0.proj")):
            outs, ins = module.weight.shape
            weights[f"{prefix}{path}.lora_A.weight"] = random(rank, ins, seed=seed) / ins**0.5
            weights[f"{prefix}{path}.lora_B.weight"] = random(outs, rank, seed=seed + 100) / rank**0.5
    return weights


@supports("Fused LoRA, several, weighted and taken out", WORKS, group=GROUP)
@pytest.mark.parametrize("name", ["flux", "sd3"])
@scopes
@pytest.mark.parametrize("loaded", [False, True], ids=["new", "loaded"])
def test_the_lora_verbs_of_a_pipeline_act_on_a_transformed_model_as_on_a_stock_one(
    loaded: bool, scope: dict[str, Any], name: str
) -> None:
    (ours, _), (stock, _) = PIPELINES[name](copy.deepcopy), PIPELINES[name](copy.deepcopy)
    arguments, weights = inputs(stock.transformer), functools.partial(lora, copy.deepcopy(stock.transformer))
    plain = output(patched(stock.transformer, **scope), arguments)
    found: dict[str, Tensor] = {}

    def step(title: str, *verbs: Callable[[Any], Any]) -> None:
        for verb in verbs:
            verb(ours)
            verb(stock)
        if title == "loaded" and loaded:
            ours.transformer = merged(**scope)(ours.transformer)
        found[title] = output(patched(stock.transformer, **scope), arguments)
        assert relative_error(output(ours.transformer, arguments), found[title]) < 1e-6, title
        before = list(found.values())[-2] if len(found) > 1 else plain
        assert relative_error(found[title], before) > 1e-3, title

    ours.transformer = ours.transformer if loaded else merged(**scope)(ours.transformer)
    one, two = weights(1, 4, "transformer."), weights(2, 2, "transformer.")
    step(
        "loaded",
        lambda pipe: pipe.load_lora_weights(dict(one), adapter_name="one"),
        lambda pipe: pipe.load_lora_weights(dict(two), adapter_name="two"),
    )
    step("weighted", lambda pipe: pipe.set_adapters(["one", "two"], [0.7, -0.4]))
    step("fused", lambda pipe: pipe.fuse_lora(lora_scale=0.5))
    step("switched", lambda pipe: pipe.unfuse_lora(), lambda pipe: pipe.set_adapters("one", 0.9))
    step("unloaded", lambda pipe: pipe.unload_lora_weights())
    assert relative_error(found["unloaded"], plain) < 1e-5  # weights were fused into, and that taken out again


@pytest.mark.slow
@supports("LoRA hotswap", WORKS, group="Adapters")
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    "name, scope, loaded",
    [
        pytest.param("flux", {"merge_block": True}, False, id="new-blocks-flux"),
        pytest.param("sd3", {"merge_block": False}, True, id="loaded-attention-sd3"),
    ],
)
def test_a_lora_is_swapped_for_another_in_a_compiled_model_without_a_recompile(
    name: str, scope: dict[str, Any], loaded: bool
) -> None:
    model = copy.deepcopy(PIPELINES[name](copy.copy)[0].transformer)
    weights, arguments = functools.partial(lora, copy.deepcopy(model)), inputs(model)

    def load(into: Any, seed: int, rank: int, **options: Any) -> Any:
        into.load_lora_adapter(weights(seed, rank), prefix=None, adapter_name="one", **options)
        return into

    stock = copy.deepcopy(model)
    model = model if loaded else merged(**scope)(model)
    model.enable_lora_hotswap(target_rank=8)
    load(model, 1, 4)
    model = merged(**scope)(model) if loaded else model
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    for seed, rank in ((1, 4), (2, 8), (3, 2)):
        if seed > 1:
            load(compiled, seed, rank, hotswap=True)
        expected = output(patched(load(copy.deepcopy(stock), seed, rank), **scope), arguments)
        assert relative_error(output(compiled, arguments), expected) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1


# ------------------------------------------------------------------------------------------------ where it is held


def model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe: Any) -> None:
    cpu_offload(pipe.transformer, execution_device=CPU)  # as enable_sequential_cpu_offload, which takes no plain "cpu"


def group_offload(pipe: Any) -> None:
    pipe.transformer.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def layerwise_casting(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


HOLDERS = pytest.mark.parametrize(
    "hold",
    [
        pytest.param(hold, id=hold.__name__, marks=supports(title, CONDITION, AFTER, group="Memory and devices"))
        for hold, title in {
            model_offload: "Model CPU offloading",
            sequential_offload: "CPU offloading",
            group_offload: "Group offloading",
            layerwise_casting: "Layerwise casting",
        }.items()
    ],
)
HELD = pytest.mark.parametrize("name", ["flux", "sd3", "pixart", "qwen", "wan"])


@HOLDERS
@HELD
@scopes
def test_a_model_held_elsewhere_makes_the_picture_of_a_plain_patch_held_so(
    scope: dict[str, Any], name: str, hold: Callable[[Any], None]
) -> None:
    found = []
    for change in (merged(**scope), lambda model: patched(model, **scope)):
        pipe, call = PIPELINES[name](lambda model, change=change: change(copy.deepcopy(model)))
        hold(pipe)
        found.append(latents(pipe, call))
        assert any(hasattr(part, "_hf_hook") or hasattr(part, "_diffusers_hook") for part in pipe.transformer.modules())
    assert relative_error(*found) < 1e-6


@HOLDERS
@HELD
def test_a_model_that_is_held_elsewhere_already_is_refused(name: str, hold: Callable[[Any], None]) -> None:
    pipe, _ = PIPELINES[name](copy.deepcopy)
    hold(pipe)
    with pytest.raises(TransformError, match=r"forward of .* is replaced on the instance.*transform the model first"):
        tome_fx.transform(pipe.transformer)

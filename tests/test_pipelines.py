"""A transformed UNet or ControlNet makes in diffusers' pipelines what the stock model with wrapped children makes.

Each pipeline of a table is run with its stock models, with a ratio of 0, which must change no bit, and with half of the
tokens merged, which must equal merging by wrapped children (`support.wrapped`) bit for bit. Tokens are counted where
attention gets them: half of them at the finest level over images, all of them elsewhere.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, LCMScheduler, UNet2DConditionModel
from diffusers.models.controlnets import MultiControlNetModel
from support import models
from support.features import CONDITION, REFUSED, WORKS, expected_of, merged
from support.models import blocks, relative_error, transformers
from support.speed import slow
from torch import Tensor, nn

from tome_fx import RatioSchedule, TransformError, transform

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

HEIGHT, WIDTH = 32, 48  # of the images, twice the size of the latents
FRAMES = 3

Build = Callable[[], Any]
Change = Callable[[Any], Any]


def supports(feature: str, verdict: str, condition: str = "", group: str = "Pipelines") -> pytest.MarkDecorator:
    return pytest.mark.supports(group, feature, verdict, condition)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ models


def lazy(build: Callable[..., Any], **config: Any) -> Build:
    """A function that builds a model, weights from a seed: the same object every time."""

    @functools.cache
    def built() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build(**config).eval()

    return built


def like(base: Callable[[], UNet2DConditionModel], **config: Any) -> Build:
    """Builds the UNet of `models` with another config."""
    return lazy(lambda: UNet2DConditionModel.from_config(base().config, **config))


def stages(*down: str) -> dict[str, Any]:
    return {"down_block_types": down, "up_block_types": tuple(name.replace("Down", "Up") for name in reversed(down))}


PLAIN, CROSS = "DownBlock2D", "CrossAttnDownBlock2D"
TWO = {"sample_size": 32, "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 16}
FOUR = {"block_out_channels": (32, 32, 64, 64)}
REFINER = {"attention_head_dim": 2, "transformer_layers_per_block": 2, "projection_class_embeddings_input_dim": 16 + 40}
UPSCALER = {"in_channels": 7, "num_class_embeds": 32, "only_cross_attention": (True, True, True, False)}
EMBEDDED = {"encoder_hid_dim": 16, "encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"}
TIMED = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24, "num_attention_heads": (2, 4)}
VAE = {"block_out_channels": (8, 8), "norm_num_groups": 4, "scaling_factor": 0.08333}
CODERS = {"down_block_types": 2 * ("DownEncoderBlock2D",), "up_block_types": 2 * ("UpDecoderBlock2D",)}
KANDINSKY = stages("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")
STABLE_VIDEO = stages("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal")
sd15, sdxl = models.sd15, models.sdxl
sd15_with_mask, sdxl_with_mask = like(sd15, in_channels=9), like(sdxl, in_channels=9)
refiner = like(sdxl, **FOUR, **stages(PLAIN, CROSS, CROSS, PLAIN), **REFINER)
consistency = like(sd15, time_cond_proj_dim=8)
pix2pix = like(sd15, in_channels=8)
upscaler = like(models.sd21, **stages(PLAIN, CROSS, CROSS, CROSS), **UPSCALER)
kandinsky = lazy(UNet2DConditionModel, **TWO, **KANDINSKY, **EMBEDDED, mid_block_type="UNetMidBlock2DSimpleCrossAttn")
stable_video = lazy(diffusers.UNetSpatioTemporalConditionModel, **TWO, **STABLE_VIDEO, **TIMED)
adapter = lazy(diffusers.T2IAdapter, channels=(32, 32, 64, 64), num_res_blocks=1, downscale_factor=2)
vae = lazy(diffusers.AutoencoderKL, **VAE, **CODERS)
ddim = functools.partial(diffusers.DDIMScheduler, steps_offset=1, clip_sample=False)


# ------------------------------------------------------------------------------------------------ pipelines


@dataclass(frozen=True)
class Case:
    """A pipeline and how it is called."""

    feature: str  # what the support table calls it
    kind: str  # its class, by name, without the word Pipeline
    unet: Build
    call: Mapping[str, Any] = field(default_factory=dict)  # arguments besides those that all are called with
    parts: Mapping[str, Build] = field(default_factory=dict)  # other components; None are those it only requires
    merged: tuple[str, ...] = ("unet",)  # the components to transform
    batch: int = 2  # images that the models see at once
    condition: str = ""  # of the support table

    @property
    def cls(self) -> Any:
        return getattr(diffusers, f"{self.kind}Pipeline")

    def pipeline(self, change: Change = copy.deepcopy) -> Any:
        """The pipeline with the change made to the models that are to be merged in."""
        names = inspect.signature(self.cls.__init__).parameters
        required = [name for name, p in names.items() if p.default is p.empty and name != "self"]
        parts: dict[str, Build] = {"unet": self.unet, "vae": vae, "scheduler": ddim, **self.parts}
        options = {"requires_safety_checker": False, **{name: build() for name, build in parts.items()}}
        pipe = self.cls(**{**dict.fromkeys(required), **{k: value for k, value in options.items() if k in names}})
        self.install(pipe, change)
        return pipe

    def install(self, pipe: Any, change: Change) -> None:
        """Make the change to the models that are to be merged in, to each of several ControlNets on its own."""
        for name in self.merged:
            part = getattr(pipe, name)
            if isinstance(part, MultiControlNetModel):
                part.nets = nn.ModuleList(change(net) for net in part.nets)
            else:
                setattr(pipe, name, change(part))

    def run(self, pipe: Any) -> Tensor:
        """The latents that the pipeline makes of the same inputs every time."""
        pipe.set_progress_bar_config(disable=True)
        call = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 2, "output_type": "latent"}
        for name, shape in {"prompt_embeds": (1, 5, 16), "pooled_prompt_embeds": (1, 16)}.items():
            call |= {name: random(*shape), f"negative_{name}": random(*shape, seed=1)}
        call = {name: value for name, value in call.items() if name in inspect.signature(self.cls.__call__).parameters}
        result = pipe(**{**call, **self.call}, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
        assert isinstance(result, Tensor)
        return result


IMAGE = {"image": random(1, 3, HEIGHT, WIDTH)}
PART = {**IMAGE, "strength": 0.5, "num_inference_steps": 4}  # half of the steps
HOLE = {**IMAGE, "mask_image": random(1, 1, HEIGHT, WIDTH).round()}
TWICE = {"image": [IMAGE["image"], 1 - IMAGE["image"]], "controlnet_conditioning_scale": [1.0, 0.5]}
CLIP = {"num_frames": FRAMES}
BOTH = ("unet", "controlnet")
V_PREDICTION = {"scheduler": functools.partial(ddim, prediction_type="v_prediction")}
SCORE = {"requires_aesthetics_score": lambda: True}
CONTROL = {"controlnet": models.controlnet}
CONTROLS = {"controlnet": lambda: [copy.deepcopy(models.controlnet()) for _ in range(2)]}
SINGLY = "its ControlNets transformed one by one"
FRAMEWISE = "blocks over single frames alone are merged"
CASES = {
    "text": Case("Stable Diffusion 1", "StableDiffusion", sd15),
    "image": Case("Stable Diffusion 1", "StableDiffusionImg2Img", sd15, PART),
    "inpaint": Case("Stable Diffusion inpainting", "StableDiffusionInpaint", sd15_with_mask, HOLE),
    "sd2": Case("Stable Diffusion 2", "StableDiffusion", models.sd21, parts=V_PREDICTION),
    "sdxl": Case("SDXL", "StableDiffusionXL", sdxl),
    "refiner": Case("SDXL refiner", "StableDiffusionXLImg2Img", refiner, PART, SCORE),
    "sdxl-inpaint": Case("SDXL inpainting", "StableDiffusionXLInpaint", sdxl_with_mask, HOLE),
    "controlled": Case("ControlNet", "StableDiffusionControlNet", sd15, IMAGE, CONTROL),
    "controlnet": Case("ControlNet", "StableDiffusionControlNet", sd15, IMAGE, CONTROL, ("controlnet",)),
    "both": Case("ControlNet", "StableDiffusionControlNet", sd15, IMAGE, CONTROL, BOTH),
    "controlnets": Case("MultiControlNet", "StableDiffusionControlNet", sd15, TWICE, CONTROLS, BOTH, condition=SINGLY),
    "adapter": Case("T2I-Adapter", "StableDiffusionAdapter", sd15, IMAGE, {"adapter": adapter}),
    "lcm": Case("LCM", "LatentConsistencyModel", consistency, parts={"scheduler": LCMScheduler}, batch=1),
    "pix2pix": Case("InstructPix2Pix", "StableDiffusionInstructPix2Pix", pix2pix, IMAGE, batch=3),
    "upscaler": Case("x4 upscaler", "StableDiffusionUpscale", upscaler, IMAGE, {"low_res_scheduler": DDPMScheduler}),
    "animatediff": Case("AnimateDiff", "AnimateDiff", models.motion, CLIP, batch=2 * FRAMES, condition=FRAMEWISE),
    "clips": Case("Text-to-video", "TextToVideoSD", models.clips, CLIP, batch=2 * FRAMES, condition=FRAMEWISE),
}


OF_EACH_KIND = ("text", "inpaint", "sdxl", "both", "adapter", "lcm", "animatediff")


def cases(*names: str, fast: tuple[str, ...] = ()) -> list[Any]:
    """The cases of these names, or all; where some are named fast, the others are slow."""
    chosen = {name: CASES[name] for name in names or CASES}
    works = {name: (CONDITION if case.condition else WORKS, case.condition) for name, case in chosen.items()}
    marks = {name: [pytest.mark.slow] if fast and name not in fast else [] for name in chosen}
    return [
        pytest.param(c, id=name, marks=[supports(c.feature, *works[name]), *marks[name]]) for name, c in chosen.items()
    ]


@pytest.mark.parametrize("case", cases(fast=OF_EACH_KIND))
def test_a_pipeline_makes_what_wrapped_children_make_and_at_a_ratio_of_0_what_it_made_before(case: Case) -> None:
    stock, ours = case.run(case.pipeline()), case.run(case.pipeline(merged))
    assert torch.equal(case.run(case.pipeline(lambda model: transform(model, 0))), stock)
    assert torch.equal(ours, case.run(case.pipeline(expected_of)))
    assert relative_error(ours, stock) > 1e-3
    assert torch.equal(case.run(case.pipeline()), stock)


def attended(case: Case, change: Change) -> list[dict[tuple[str, bool], set[tuple[int, int]]]]:
    """For each model, by path of a block and whether it is over images, the batches and tokens that attn1 gets."""
    found = []

    def watched(model: Any) -> Any:
        result, seen = change(model), dict[tuple[str, bool], set[tuple[int, int]]]()
        found.append(seen)
        for path, block in blocks(result).items():
            over_images = any(path.startswith(f"{transformer}.") for transformer in transformers(result))
            sizes = seen.setdefault((path, over_images), set())
            block.attn1.register_forward_pre_hook(lambda _, args, sizes=sizes: sizes.add(tuple(args[0].shape[:2])))
        return result

    case.run(case.pipeline(watched))
    return found


@pytest.mark.parametrize("case", cases(fast=OF_EACH_KIND))
def test_half_of_the_tokens_reach_attention_at_the_finest_level_over_images_and_all_elsewhere(case: Case) -> None:
    for stock, ours in zip(attended(case, copy.deepcopy), attended(case, merged), strict=True):
        images = {size for (_, over_images), sizes in stock.items() for size in sizes if over_images}
        finest = max(tokens for _, tokens in images)
        assert {batch for batch, _ in images} == {case.batch}
        assert any(not over_images for _, over_images in stock) == (case.condition == FRAMEWISE)
        for block, sizes in stock.items():
            ((batch, tokens),) = sizes
            assert ours.pop(block) == {(batch, tokens // 2 if tokens == finest else tokens)}
        assert not ours


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("case", cases())
def test_a_compiled_pipeline_makes_the_same_of_as_many_graphs_as_the_stock_one(case: Case, counter: Any) -> None:
    def compiled(change: Change) -> tuple[Tensor, int]:
        torch._dynamo.reset()  # no graph of one counts for the other
        counter.clear()
        pipe = case.pipeline(lambda model: torch.compile(change(model), fullgraph=True, backend=counter))
        return case.run(pipe), counter.frame_count

    (_, stock_graphs), (ours, graphs) = compiled(copy.deepcopy), compiled(merged)
    assert torch.equal(ours, case.run(case.pipeline(merged)))
    assert graphs == stock_graphs >= len(case.merged)


CALLS = {name: inspect.signature(case.cls.__call__).parameters for name, case in CASES.items()}
SCHEDULED = [name for name, parameters in CALLS.items() if "callback_on_step_end" in parameters]


@pytest.mark.parametrize("case", cases(*SCHEDULED))
def test_a_schedule_gives_each_step_of_any_pipeline_that_has_the_callback_its_ratio(case: Case) -> None:
    pipe, seen = case.pipeline(merged), list[float]()
    models = [m for name in case.merged for m in getattr(getattr(pipe, name), "nets", [getattr(pipe, name)])]
    models[0].register_forward_pre_hook(lambda model, _: seen.append(model.tome_fx.plan.ratio))
    schedule = RatioSchedule({0: 0.5, 0.5: 0.25}, *models)
    steps = 8 if "strength" in case.call else 4  # of which about half are taken
    call = {**case.call, "num_inference_steps": steps, "callback_on_step_end": schedule}
    for _ in range(2):
        replace(case, call=call).run(pipe)
        assert len(seen) >= 3
        assert seen == [0.5 if step < len(seen) / 2 else 0.25 for step in range(len(seen))]
        seen.clear()


def test_pipelines_of_most_kinds_have_the_callback() -> None:
    assert len(SCHEDULED) == 14


@supports("from_pipe", WORKS)
@supports("pipe.components", WORKS)
@pytest.mark.parametrize("name", ["image", "controlled"])
def test_another_pipeline_of_the_same_components_merges_too(name: str) -> None:
    pipe, case = CASES["text"].pipeline(merged), CASES[name]
    expected, parts = case.run(case.pipeline(expected_of)), {part: build() for part, build in case.parts.items()}
    components = case.cls(**pipe.components, **parts, requires_safety_checker=False)
    for other in (components, case.cls.from_pipe(pipe, **parts)):
        assert other.unet is pipe.unet
        assert torch.equal(case.run(other), expected)
    assert relative_error(expected, case.run(case.pipeline())) > 1e-3


def files(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kinds(whole: Any) -> list[type]:
    """The classes of a model's modules, or a pipeline's."""
    parts = getattr(whole, "components", {"": whole}).values()
    return [type(module) for part in parts if isinstance(part, nn.Module) for module in part.modules()]


@supports("save_pretrained and from_pretrained", WORKS)
@pytest.mark.parametrize("name", ["text", "sdxl", "both", "controlnets", "animatediff"])
def test_a_saved_pipeline_is_the_plain_one_and_merges_again_when_transformed(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    pipe, stock = case.pipeline(merged), case.pipeline()
    pipe.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    assert files(tmp_path / "ours") == files(tmp_path / "stock")
    absent = {name: None for name, part in pipe.components.items() if part is None}
    loaded = case.cls.from_pretrained(tmp_path / "ours", local_files_only=True, **absent)
    assert kinds(loaded) == kinds(stock) != kinds(pipe)
    assert torch.equal(case.run(loaded), case.run(stock))
    case.install(loaded, merged)
    assert torch.equal(case.run(loaded), case.run(pipe))


@supports("pipe.to(dtype)", WORKS)
@pytest.mark.parametrize("case", [CASES["text"], CASES["sdxl"]], ids=["text", "sdxl"])
@pytest.mark.parametrize(
    "dtype",
    [torch.float16, *slow(torch.float64, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_pipeline_in_another_dtype_merges_in_it(first: bool, dtype: torch.dtype, case: Case) -> None:
    changes = (copy.deepcopy, expected_of, copy.deepcopy if first else merged)
    stock, wrapper, pipe = (copy.deepcopy(case.pipeline(change)).to("cpu", dtype) for change in changes)
    if first:
        case.install(pipe, merged)
    ours = case.run(pipe)
    assert ours.dtype == dtype
    assert torch.equal(ours, case.run(wrapper))
    assert relative_error(ours, case.run(stock)) > 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="another device than the CPU is needed")
@supports("pipe.to(device)", WORKS)
@pytest.mark.parametrize("case", [CASES["text"], CASES["sdxl"]], ids=["text", "sdxl"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_pipeline_on_another_device_merges_there(first: bool, case: Case) -> None:
    changes = (copy.deepcopy, expected_of, copy.deepcopy if first else merged)
    stock, wrapper, pipe = (copy.deepcopy(case.pipeline(change)).to("cuda") for change in changes)
    if first:
        case.install(pipe, merged)
    ours = case.run(pipe)
    assert ours.is_cuda
    assert relative_error(ours, case.run(wrapper)) < 1e-4
    assert relative_error(ours, case.run(stock)) > 1e-3


@supports("A model made from a UNet (AnimateDiff, ControlNet)", CONDITION, "it is plain: transform it, not the UNet")
@pytest.mark.parametrize(
    "make", [models.animated, diffusers.ControlNetModel.from_unet], ids=["animatediff", "controlnet"]
)
def test_a_model_that_is_made_from_a_transformed_unet_is_plain_and_can_be_transformed(make: Change) -> None:
    ours, stock = lazy(lambda: make(merged(sd15())))(), lazy(lambda: make(sd15()))()
    assert all(torch.equal(weight, ours.state_dict()[name]) for name, weight in stock.state_dict().items())
    assert kinds(ours) == kinds(stock)
    assert kinds(merged(ours)) == kinds(merged(stock)) != kinds(stock)


@supports("MultiControlNet", CONDITION, SINGLY)
def test_several_controlnets_are_not_transformed_as_one() -> None:
    with pytest.raises(TypeError, match=r"model must be a .* got MultiControlNetModel"):
        transform(CASES["controlnets"].pipeline().controlnet)


EMBEDDING = {"encoder_hidden_states": None, "added_cond_kwargs": {"image_embeds": random(2, 16)}}
TIMES = {"encoder_hidden_states": random(2, 1, 16), "added_time_ids": random(2, 3)}
FOUND = "found no transformer block over image tokens in UNet2DConditionModel: .*SimpleCrossAttnDownBlock2D"
KIND = "model must be a .* got UNetSpatioTemporalConditionModel"


@pytest.mark.parametrize(
    "build, size, call, error, words",
    [
        pytest.param(
            *(kandinsky, (4,), EMBEDDING, TransformError, FOUND),
            id="kandinsky",
            marks=supports("Kandinsky 2.2", REFUSED, "it has none of the blocks that are known"),
        ),
        pytest.param(
            *(stable_video, (2, 8), TIMES, TypeError, KIND),
            id="svd",
            marks=supports("Stable Video Diffusion", REFUSED, "its UNet is of another kind"),
        ),
    ],
)
def test_a_unet_of_other_blocks_is_refused_and_left_as_it_is(
    build: Build, size: tuple[int, ...], call: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = build()
    arguments = {"sample": random(2, *size, 16, 24), "timestep": 500, **call}
    with torch.no_grad():
        before = model(**arguments).sample
        with pytest.raises(error, match=words):
            transform(model)
        assert torch.equal(model(**arguments).sample, before)

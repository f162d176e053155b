"""The contract of `RatioSchedule`: each step of a pipeline has its ratio, and no later image compiles anything."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.callbacks import MultiPipelineCallbacks
from support.compiling import by_block, in_place, plan_of, whole
from support.models import (
    inputs,
    one_block,
    sd15,
    two_stages,
)
from support.speed import slow
from torch import Tensor
from torch._dynamo.utils import counters

import tome_fx
from tome_fx import RatioSchedule, TransformError, set_ratio, transform

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    # torch's own, on the first import of its compiler in a process
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


def test_a_schedule_that_is_given_as_the_older_callback_is_an_error_that_says_what_to_do() -> None:
    schedule: Any = RatioSchedule.late(transform(two_stages()))
    with pytest.raises(TypeError, match=r"must be given as callback_on_step_end.*call tome_fx\.set_ratio"):
        schedule(0, 981, torch.zeros(1))


def test_late_merges_nothing_and_then_what_is_asked() -> None:
    unet = transform(one_block(), 0.3)
    assert RatioSchedule.late(unet).ratios == {0: 0, 0.5: 0.5}
    assert plan_of(unet).ratio == 0
    schedule = RatioSchedule.late(unet, unet, ratio=0.75, start=0.8)
    assert schedule.ratios == {0: 0, 0.8: 0.75}
    assert [schedule.ratio_at(step, 10) for step in (0, 7, 8, 9)] == [0, 0, 0.75, 0.75]


@pytest.mark.parametrize(
    "start, error, message",
    [
        (0, ValueError, "start must be above 0, .* and below 1; got 0"),
        (1, ValueError, "start must be above 0, .* and below 1; got 1"),
        ("half", TypeError, "start must be a number, got 'half' of type str"),
        (True, TypeError, "start must be a number, got True of type bool"),
    ],
)
def test_where_late_is_to_start_must_be_within_the_steps(start: Any, error: type[Exception], message: str) -> None:
    unet = transform(one_block(), 0.3)
    with pytest.raises(error, match=message):
        RatioSchedule.late(unet, start=start)
    assert plan_of(unet).ratio == 0.3


def pipeline(unet: Any, **components: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=4,
            down_block_types=4 * ("DownEncoderBlock2D",),
            up_block_types=4 * ("UpDecoderBlock2D",),
        )
    pipe = StableDiffusionPipeline(
        unet=unet,
        vae=vae.eval(),
        scheduler=components.pop("scheduler", DDIMScheduler(steps_offset=1, clip_sample=False)),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe: Any, steps: int = 5, **options: Any) -> Tensor:
    """Latents of one image, from a seed."""
    embeddings = inputs(getattr(pipe.unet, "_orig_mod", pipe.unet), 16, 16, batch=1)["encoder_hidden_states"]
    result = pipe(
        prompt_embeds=embeddings,
        negative_prompt_embeds=-embeddings,
        height=128,
        width=128,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **options,
    )
    assert isinstance(result.images, Tensor)
    return result.images


def ratios_of_steps(model: Any) -> list[float]:
    """The ratio at each call of the model from now on."""
    seen: list[float] = []
    model.register_forward_pre_hook(lambda *_: seen.append(plan_of(model).ratio))
    return seen


STAGES = {0: 0.5, 0.4: 0.25, 0.8: 0}


def test_each_step_has_the_ratio_of_its_share_and_so_has_the_next_image() -> None:
    pipe = pipeline(transform(one_block(), ratio=0.1))
    seen = ratios_of_steps(pipe.unet)
    schedule = RatioSchedule(STAGES, pipe.unet)
    first = image(pipe, callback_on_step_end=schedule)
    assert seen == [0.5, 0.5, 0.25, 0.25, 0]
    second = image(pipe, callback_on_step_end=schedule)
    assert seen == 2 * [0.5, 0.5, 0.25, 0.25, 0]
    assert torch.equal(first, second)
    image(pipe, steps=10, callback_on_step_end=schedule)
    assert seen[10:] == 4 * [0.5] + 4 * [0.25] + 2 * [0]
    image(pipe, steps=1, callback_on_step_end=schedule)
    assert seen[20:] == [0.5]


def test_an_image_by_a_schedule_is_the_one_made_by_hand() -> None:
    pipe = pipeline(transform(one_block(), ratio=0.5))
    model = pipe.unet

    def by_hand(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        set_ratio(model, [0.5, 0.25, 0.25, 0, 0.5][step])
        return given

    expected = image(pipe, callback_on_step_end=by_hand)
    assert torch.equal(image(pipe, callback_on_step_end=RatioSchedule(STAGES, model)), expected)
    assert not torch.equal(image(pipe), expected)


@pytest.mark.parametrize("compiler", [whole, *slow(in_place, by_block)])
@pytest.mark.parametrize("dynamic", [False, *slow(True)])
def test_after_one_image_no_image_compiles_anything(compiler: Callable[..., Any], dynamic: bool, counter: Any) -> None:
    model = transform(one_block(), ratio=0.5, dynamic_ratio=dynamic)
    schedule = RatioSchedule(STAGES, model)
    pipe = pipeline(compiler(model, counter))
    first = image(pipe, callback_on_step_end=schedule)
    graphs = counter.frame_count
    assert graphs == {(True, False): 2, (True, True): 1}.get((dynamic, compiler is not by_block), 2 if dynamic else 3)
    assert torch.equal(image(pipe, callback_on_step_end=schedule), first)
    image(pipe, steps=10, callback_on_step_end=schedule)
    assert counter.frame_count == graphs
    assert not counters["graph_break"]


def test_a_schedule_drives_several_models_and_stands_beside_other_callbacks() -> None:
    pipe = pipeline(transform(one_block(), ratio=0.5))
    other = pipe.another = transform(sd15(), ratio=0.5)
    steps: list[int] = []

    class Note:
        tensor_inputs = ("latents",)

        def __call__(self, pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            steps.append(step)
            assert plan_of(other).ratio == plan_of(pipe.unet).ratio == [0.5, 0.25, 0.25, 0, 0.5][step]
            assert list(given) == ["latents"]
            return given

    schedule = RatioSchedule(STAGES, pipe.unet, other)
    image(pipe, callback_on_step_end=MultiPipelineCallbacks([schedule, Note()]))
    assert steps == [0, 1, 2, 3, 4]


def test_a_part_of_the_steps_is_counted_as_the_whole_image() -> None:
    """Image to image at a strength of a half runs the last half of the steps."""
    pipe = StableDiffusionImg2ImgPipeline.from_pipe(pipeline(transform(one_block(), ratio=0.5)))
    pipe.set_progress_bar_config(disable=True)
    seen = ratios_of_steps(pipe.unet)
    embeddings = inputs(pipe.unet, 16, 16, batch=1)["encoder_hidden_states"]
    pipe(
        image=inputs(pipe.unet, 16, 16, batch=1)["sample"],
        prompt_embeds=embeddings,
        negative_prompt_embeds=embeddings,
        strength=0.5,
        num_inference_steps=10,
        output_type="latent",
        callback_on_step_end=RatioSchedule(STAGES, pipe.unet),
    )
    assert seen == [0.5, 0.5, 0.25, 0.25, 0]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # the scheduler's own
def test_a_scheduler_with_more_calls_than_steps_is_counted_by_its_calls() -> None:
    pipe = pipeline(transform(one_block(), ratio=0.5), scheduler=HeunDiscreteScheduler(steps_offset=1))
    seen = ratios_of_steps(pipe.unet)
    image(pipe, steps=3, callback_on_step_end=RatioSchedule({0: 0.5, 0.5: 0}, pipe.unet))
    assert seen == [0.5, 0.5, 0.5, 0, 0]


def test_an_image_that_was_cut_short_is_told_of_by_the_next_one_and_start_mends_it() -> None:
    pipe = pipeline(transform(one_block(), ratio=0.5))
    schedule = RatioSchedule(STAGES, pipe.unet)

    def interrupted(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 2
        return schedule(pipe, step, timestep, given)

    whole_image = image(pipe, callback_on_step_end=schedule)
    image(pipe, callback_on_step_end=interrupted)
    with pytest.raises(
        TransformError, match=r"began at a ratio of 0\.25, and its schedule begins at 0\.5: call .*start"
    ):
        image(pipe, callback_on_step_end=schedule)
    schedule.start()
    assert torch.equal(image(pipe, callback_on_step_end=schedule), whole_image)


def test_a_dynamic_ratio_may_be_a_sum_that_falls_short_of_thousandths() -> None:
    pipe = pipeline(transform(one_block(), dynamic_ratio=True))
    image(pipe, callback_on_step_end=RatioSchedule({0: 0.1 + 0.2, 0.5: 1 - 0.9}, pipe.unet))
    assert plan_of(pipe.unet).ratio == 0.3  # and the image that it began at


def test_a_model_that_the_pipeline_no_longer_uses_is_told_of() -> None:
    pipe = pipeline(transform(one_block(), ratio=0.5))
    schedule = RatioSchedule(STAGES, pipe.unet)
    pipe.unet = transform(one_block(), ratio=0.5)
    with pytest.raises(TransformError, match="schedule's UNet2DConditionModel is no part of this StableDiffusionPip"):
        image(pipe, callback_on_step_end=schedule)


@pytest.mark.parametrize(
    "ratios, error, message",
    [
        (0.5, TypeError, r"ratios must map shares of the steps to ratios, got 0\.5"),
        ({}, ValueError, "an entry for 0"),
        ({0.5: 0.5}, ValueError, r"an entry for 0; got \{0\.5: 0\.5\}"),
        ({0: 0.5, 1: 0.25}, ValueError, "from 0 to below 1, got 1"),
        ({0: 0.5, -0.1: 0.25}, ValueError, r"from 0 to below 1, got -0\.1"),
        ({0: 0.5, "late": 0.25}, TypeError, "got 'late' for a share"),
        ({0: 0.5, 0.5: 0.9}, ValueError, r"ratio must be between 0 and 0\.75"),
        ({0: 0.5, 0.5: None}, TypeError, "ratio must be a number, got None"),
    ],
)
def test_a_bad_schedule_is_an_error_and_nothing_is_changed(ratios: Any, error: type[Exception], message: str) -> None:
    model = transform(two_stages(), ratio=0.1)
    with pytest.raises(error, match=message):
        RatioSchedule(ratios, model)
    assert plan_of(model).ratio == 0.1


def test_a_schedule_asks_for_transformed_models() -> None:
    with pytest.raises(ValueError, match="at least one transformed model"):
        RatioSchedule(STAGES)
    model = transform(two_stages(), ratio=0.1)
    with pytest.raises(TransformError, match="is not transformed"):
        RatioSchedule(STAGES, model, two_stages())
    assert plan_of(model).ratio == 0.1
    assert set(tome_fx.__all__) >= {"RatioSchedule", "set_ratio"}

"""The contract of a ratio that changes: `set_ratio`, `dynamic_ratio` and `RatioSchedule`.

A model whose ratio was set is what a transform at that ratio gives, bit for bit, and all else about it stays. Compiled,
it compiles once on the first visit to a ratio and resolution and never on a return; with a dynamic ratio it compiles
once. A schedule gives each step of a pipeline its ratio and no later image a compile. No limit of dynamo's is raised.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.callbacks import MultiPipelineCallbacks
from peft import LoraConfig
from support.models import (
    blocks,
    controlnet,
    inputs,
    mask,
    one_block,
    output,
    relative_error,
    sd15,
    sdxl,
    transformers,
    two_stages,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import tome_fx
from tome_fx import RatioSchedule, TransformError, set_ratio, transform
from tome_fx.plan import Grid, Plan, kept, kept_by_size

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    # torch's own, on the first import of its compiler in a process
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

RATIOS = [round(0.06 * i, 2) for i in range(12)]  # more than dynamo would recompile one code object for, 0 among them
EVERYTHING: dict[str, Any] = {"max_downsample": 8, "merge_crossattn": True, "merge_mlp": True, "prop_attn": True}


def whole(model: Any, counter: Any, **options: Any) -> Any:
    return torch.compile(model, backend=counter, fullgraph=True, **options)


def in_place(model: Any, counter: Any) -> Any:
    model.compile(backend=counter, fullgraph=True)
    return model


def by_block(model: Any, counter: Any) -> Any:
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    return model


def plan_of(model: Any) -> Plan:
    plan = model.tome_fx.plan
    assert isinstance(plan, Plan)
    return plan


# ------------------------------------------------------------------------------------------------ set_ratio


@pytest.mark.parametrize("options", [{}, {"use_rand": False, "sx": 3}, EVERYTHING], ids=["", "strides", "everything"])
@pytest.mark.parametrize("build", [two_stages, sdxl, controlnet])
def test_a_ratio_that_was_set_gives_what_a_transform_at_it_gives(
    build: Callable[[], Any], options: dict[str, Any]
) -> None:
    arguments = inputs(build())
    model = transform(build(), ratio=0.5, **options)
    for ratio in (0.25, 0, 0.6, 0.5):
        assert set_ratio(model, ratio) is None  # type: ignore[func-returns-value]
        assert torch.equal(output(model, arguments), output(transform(build(), ratio=ratio, **options), arguments))
    set_ratio(model, 0)
    assert torch.equal(output(model, arguments), output(build(), arguments))


def test_all_but_the_ratio_stays() -> None:
    model = transform(copy.deepcopy(two_stages()), ratio=0.5, seed=3)  # a LoRA freezes the parameters that are shared
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    block = next(iter(blocks(model).values()))
    calls: list[str] = []
    block.register_forward_hook(lambda *_: calls.append("block"))
    model.register_forward_hook(lambda *_: calls.append("model"))
    tensors, modules = dict(model.state_dict(keep_vars=True)), dict(model.named_modules())
    arguments = inputs(model)
    at_half = output(model, arguments)
    set_ratio(model, 0.25)
    assert plan_of(model) == Plan(ratio=0.25, seed=3)
    assert all(tensor is tensors[name] for name, tensor in model.state_dict(keep_vars=True).items())
    assert all(module is modules[path] for path, module in model.named_modules())
    assert type(model) is type(two_stages())
    calls.clear()
    assert relative_error(output(model, arguments), at_half) > 1e-4
    assert calls == ["block", "model"]
    set_ratio(model, 0.5)
    assert torch.equal(output(model, arguments), at_half)


def test_no_other_model_is_touched() -> None:
    original, arguments = two_stages(), inputs(two_stages())
    model, other = transform(original, ratio=0.5), transform(original, ratio=0.5)
    twin = copy.deepcopy(model)
    before = output(model, arguments)
    set_ratio(model, 0.25)
    for same in (other, twin):
        assert plan_of(same).ratio == 0.5
        assert torch.equal(output(same, arguments), before)
    set_ratio(twin, 0.1)
    assert torch.equal(output(twin, arguments), output(transform(original, ratio=0.1), arguments))
    assert torch.equal(output(model, arguments), output(transform(original, ratio=0.25), arguments))
    assert not hasattr(original, "tome_fx")
    assert "forward" not in vars(original)


def test_a_wrapper_put_around_the_forward_afterwards_stays_and_is_reached_through(counter: Any) -> None:
    """As offloading does: accelerate replaces `forward` on the instance and calls what was there."""
    arguments = inputs(one_block(), 16, 16)
    model = transform(one_block(), ratio=0.5)
    add_hook_to_module(model, ModelHook())
    wrapper, codes = model.forward, set()
    for ratio in (0.25, 0.1, 0.25):
        set_ratio(model, ratio)
        codes.add(model.tome_fx.forward.__code__)
        assert model.forward is wrapper
        assert torch.equal(output(model, arguments), output(transform(one_block(), ratio), arguments))
    assert len(codes) == 2
    remove_hook_from_module(model)
    compiled = whole(model, counter)
    for ratio in (0.25, 0.1, 0.25):
        set_ratio(model, ratio)
        assert torch.equal(output(compiled, arguments), output(model, arguments))
    assert counter.frame_count == 2


def test_a_hook_around_what_was_compiled_leaves_room_for_any_number_of_ratios(counter: Any) -> None:
    """Around the model itself dynamo sees the hook's function, which is one for all: only a dynamic ratio fits then."""
    arguments = inputs(one_block(), 8, 8)
    compiled = whole(transform(one_block(), ratio=0.5), counter)
    add_hook_to_module(compiled, ModelHook())
    for ratio in RATIOS[:9]:
        set_ratio(compiled, ratio)
        assert relative_error(output(compiled, arguments), output(transform(one_block(), ratio), arguments)) < 1e-5
    assert counter.frame_count == 9
    model = transform(one_block(), ratio=0.5, dynamic_ratio=True)
    add_hook_to_module(model, ModelHook())
    compiled = whole(model, counter)
    for ratio in RATIOS[:9]:
        set_ratio(compiled, ratio)
        assert relative_error(output(compiled, arguments), output(model, arguments)) < 1e-5
    assert counter.frame_count == 9 + 1


@pytest.mark.parametrize(
    "ratio, error, message",
    [
        (0.8, ValueError, r"ratio must be between 0 and 0\.75"),
        (-0.1, ValueError, "ratio must be between 0"),
        (float("nan"), ValueError, "ratio must be between 0"),
        ("half", TypeError, "ratio must be a number, got 'half'"),
        (True, TypeError, "ratio must be a number, got True"),
    ],
)
def test_a_bad_ratio_is_an_error_and_nothing_is_changed(ratio: Any, error: type[Exception], message: str) -> None:
    model, arguments = transform(two_stages(), ratio=0.5), inputs(two_stages())
    before = output(model, arguments)
    with pytest.raises(error, match=message):
        set_ratio(model, ratio)
    assert plan_of(model).ratio == 0.5
    assert torch.equal(output(model, arguments), before)


def test_a_model_that_is_not_transformed_is_an_error() -> None:
    models: list[Any] = [two_stages(), torch.compile(two_stages())]
    for model in models:
        with pytest.raises(TransformError, match=r"UNet2DConditionModel is not transformed: pass what .*transform"):
            set_ratio(model, 0.5)
    with pytest.raises(TypeError, match=r"model must be a UNet2DConditionModel, .*, got Linear"):
        set_ratio(torch.nn.Linear(1, 1), 0.5)
    with pytest.raises(TypeError, match=r"pass pipe\.unet, not the pipeline"):
        set_ratio(pipeline(two_stages()), 0.5)


# ------------------------------------------------------------------------------------------------ compiled


@pytest.mark.parametrize(
    "compiler, ratios, sizes", [(whole, RATIOS, [(16, 16), (16, 24)]), (in_place, RATIOS[:9], [(16, 16)])]
)
def test_any_number_of_ratios_is_compiled_once_for_each_resolution_and_not_again(
    compiler: Callable[..., Any], ratios: list[float], sizes: list[tuple[int, int]], counter: Any
) -> None:
    """dynamo's limit for one code object is eight."""
    assert torch._dynamo.config.recompile_limit == 8
    model = transform(one_block(), ratio=0.5)
    compiled, graphs = compiler(model, counter), 0
    for _ in range(2):
        for ratio in ratios:
            set_ratio(compiled, ratio)
            for height, width in sizes:
                arguments = inputs(model, height, width)
                expected = output(transform(one_block(), ratio), arguments)
                assert relative_error(output(compiled, arguments), expected) < 1e-5
        graphs = graphs or counter.frame_count
    assert counter.frame_count == graphs == len(ratios) * len(sizes)
    assert not counters["graph_break"]


def test_any_number_of_transformed_models_compiles_one_by_one(counter: Any) -> None:
    arguments = inputs(one_block(), 16, 16)
    models = [transform(one_block(), ratio=ratio) for ratio in RATIOS]
    for model in (*models, *models):
        assert torch.equal(output(whole(model, counter), arguments), output(model, arguments))
    assert counter.frame_count == len(RATIOS)


def test_block_by_block_all_ratios_share_their_compiles(counter: Any) -> None:
    """A block reads K off a shape: it compiles for the first K, then for any. The second level is not merged."""
    model = by_block(transform(two_stages(), ratio=0.5), counter)
    seen = []
    for ratio in (0.5, 0.25, 0.3, 0.1, 0.6, 0.5):
        set_ratio(model, ratio)
        arguments = inputs(model, 16, 16)
        expected = output(transform(two_stages(), ratio), arguments)
        assert relative_error(output(model, arguments), expected) < 1e-5
        seen.append(counter.frame_count)
    assert seen == [2, 3, 3, 3, 3, 3]


def test_a_copy_of_a_compiled_model_is_not_disturbed_when_the_ratio_of_the_other_is_set(counter: Any) -> None:
    model, arguments = transform(one_block(), ratio=0.5), inputs(one_block(), 16, 16)
    twin = copy.deepcopy(model)
    compiled = whole(twin, counter)
    before = output(compiled, arguments)
    set_ratio(model, 0.25)
    assert torch.equal(output(compiled, arguments), before)
    assert counter.frame_count == 1


def test_a_wrapper_around_the_forward_of_a_part_follows_the_ratio_for_every_kind_of_call() -> None:
    model, reference = transform(two_stages(), ratio=0.5), transform(two_stages(), ratio=0.25)
    plain = inputs(model)
    masked = {**plain, "encoder_attention_mask": mask()}
    for arguments in (masked, plain):
        output(model, arguments)
    for transformer in transformers(model).values():
        add_hook_to_module(transformer, ModelHook())
    set_ratio(model, 0.25)
    for arguments in (plain, masked):
        assert torch.equal(output(model, arguments), output(reference, arguments))


def test_a_larger_function_that_calls_the_model_follows_its_ratio(counter: Any) -> None:
    model, arguments = transform(one_block(), ratio=0.5), inputs(one_block(), 16, 16)

    def guided(**given: Any) -> Any:
        return model(**given).sample * 2

    compiled = torch.compile(guided, backend=counter, fullgraph=True)
    for ratio in (0.5, 0.25, 0.5, 0.25):
        set_ratio(model, ratio)
        with torch.no_grad():
            assert torch.equal(compiled(**arguments), guided(**arguments))
    assert counter.frame_count == 2


@pytest.mark.parametrize("dynamic_ratio", [False, True])
def test_a_ratio_that_is_set_to_what_it_is_changes_nothing(dynamic_ratio: bool) -> None:
    def parts(model: Any) -> list[Any]:
        return [value for module in model.modules() for value in (type(module), *vars(module).values())]

    model = transform(one_block(), ratio=0.5, dynamic_ratio=dynamic_ratio)
    before = parts(model)
    set_ratio(model, 0.5)
    assert all(value is known for value, known in zip(parts(model), before, strict=True))


# ------------------------------------------------------------------------------------------------ a dynamic ratio


@pytest.mark.parametrize("inside", [torch.inference_mode, torch.no_grad])
def test_a_dynamic_ratio_that_is_set_in_the_middle_of_inference_costs_no_compile(inside: Any, counter: Any) -> None:
    model = transform(one_block(), ratio=0.5, dynamic_ratio=True)
    compiled, arguments = whole(model, counter), inputs(one_block(), 16, 16)
    with inside():
        for ratio in (0.5, 0.25, 0.3):
            set_ratio(compiled, ratio)
            assert relative_error(compiled(**arguments).sample, model(**arguments).sample) < 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize("build", [one_block, two_stages, sdxl])
def test_one_graph_serves_every_ratio(build: Callable[[], Any], counter: Any) -> None:
    model = transform(build(), ratio=0.5, dynamic_ratio=True)
    compiled = whole(model, counter)
    arguments = inputs(model)
    for ratio in (0.5, 0.25, 0.123, 0.001, 0, 0.75, *RATIOS):
        set_ratio(compiled, ratio)
        result = output(compiled, arguments)
        assert relative_error(result, output(model, arguments)) < 1e-5
        assert relative_error(result, output(transform(build(), ratio), arguments)) < 1e-5
    assert counter.frame_count == 1
    assert not counters["graph_break"]


def test_dynamic_sizes_and_a_dynamic_ratio_take_the_compiles_of_the_stock_model() -> None:
    taken = {}
    for name, model in (("stock", one_block()), ("ours", transform(one_block(), ratio=0.5, dynamic_ratio=True))):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = whole(model, counter, dynamic=True)
        for ratio in (0.022, 0.5, 0.25, 0, 0.7):  # the first is of the length of a side
            if name == "ours":
                set_ratio(model, ratio)
            for height, width in ((24, 24), (24, 22), (17, 40)):
                arguments = inputs(model, height, width)
                assert relative_error(output(compiled, arguments), output(model, arguments)) < 1e-5
        taken[name] = counter.frame_count
    assert taken == {"stock": 2, "ours": 2}  # one for squares, one for the rest


@pytest.mark.parametrize("compiler", [in_place, by_block])
def test_a_dynamic_ratio_is_served_by_the_other_ways_to_compile(compiler: Callable[..., Any], counter: Any) -> None:
    model = compiler(transform(one_block(), ratio=0.5, dynamic_ratio=True), counter)
    for ratio in RATIOS:
        set_ratio(model, ratio)
        arguments = inputs(model, 16, 16)
        eager = transform(one_block(), ratio, dynamic_ratio=True)
        assert relative_error(output(model, arguments), output(eager, arguments)) < 1e-5
    assert counter.frame_count == (2 if compiler is by_block else 1)  # a block: the first K, then any


def test_two_models_with_a_dynamic_ratio_share_their_graph_and_not_their_ratio(counter: Any) -> None:
    models = [transform(one_block(), ratio, dynamic_ratio=True) for ratio in (0.5, 0.25)]
    arguments = inputs(one_block(), 16, 16)
    for model in models:
        assert relative_error(output(whole(model, counter), arguments), output(model, arguments)) < 1e-5
    set_ratio(models[0], 0.1)
    assert [plan_of(model).ratio for model in models] == [0.1, 0.25]
    assert relative_error(output(models[0], arguments), output(models[1], arguments)) > 1e-4
    assert counter.frame_count == 1


def test_a_dynamic_ratio_keeps_as_many_tokens_as_a_static_one_but_where_a_float_falls_short() -> None:
    for thousandths in range(751):
        ratio = thousandths / 1000
        size = torch.empty(Plan(ratio=ratio, dynamic_ratio=True).ratio_size, 0)
        for height, width in ((8, 8), (16, 24), (40, 40), (64, 64), (60, 80), (96, 96), (100, 100), (128, 128)):
            tokens, found = height * width, kept_by_size(height, width, size)
            assert found == Grid(height, width, 2, 2, ratio, dynamic_ratio=True).kept
            whole = tokens * thousandths % 1000 == 0  # where a float may fall short, as 0.29 * 1600 does
            assert kept(height, width, ratio) - found in ((0, 1) if whole else (0,))


def test_a_dynamic_ratio_is_a_whole_number_of_thousandths() -> None:
    with pytest.raises(ValueError, match=r"whole number of thousandths with dynamic_ratio=True, got 0\.3333"):
        transform(two_stages(), 1 / 3, dynamic_ratio=True)
    model = transform(two_stages(), 0.333, dynamic_ratio=True)
    with pytest.raises(ValueError, match=r"whole number of thousandths with dynamic_ratio=True, got 0\.0005"):
        set_ratio(model, 0.0005)
    assert plan_of(model).ratio == 0.333
    set_ratio(model, 0.1 + 0.2)  # not 0.3, but meant to be
    assert plan_of(model).ratio_size == Plan(ratio=0.3).ratio_size


# ------------------------------------------------------------------------------------------------ a schedule


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


@pytest.mark.parametrize("compiler", [whole, in_place, by_block])
@pytest.mark.parametrize("dynamic", [False, True])
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

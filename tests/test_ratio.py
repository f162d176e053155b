"""The contract of `set_ratio`.

A model whose ratio was set is what a transform at that ratio gives, bit for bit, and all else about it stays. Compiled,
it compiles once on the first visit to a ratio and resolution and never on a return. No limit of dynamo's is raised.
"""

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig
from support.compiling import EVERYTHING, RATIOS, by_block, in_place, plan_of, whole
from support.models import (
    blocks,
    controlnet,
    inputs,
    mask,
    one_block,
    output,
    relative_error,
    sdxl,
    transformers,
    two_stages,
)
from support.speed import slow
from torch._dynamo.utils import counters

from tome_fx import TransformError, set_ratio, transform
from tome_fx.plan import Plan

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    # torch's own, on the first import of its compiler in a process
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


# ------------------------------------------------------------------------------------------------ eager


@pytest.mark.parametrize(
    "options", [{"tile": 6}, {"use_rand": False, "sx": 3}, EVERYTHING], ids=["tiles", "strides", "everything"]
)
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
    assert isinstance(model, type(two_stages()))
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
    wrapper = model.forward
    for ratio in (0.25, 0.1, 0.25):
        set_ratio(model, ratio)
        assert model.forward is wrapper
        assert torch.equal(output(model, arguments), output(transform(one_block(), ratio), arguments))
    remove_hook_from_module(model)
    compiled = whole(model, counter)
    for ratio in (0.25, 0.1, 0.25):
        set_ratio(model, ratio)
        assert torch.equal(output(compiled, arguments), output(model, arguments))
    assert counter.frame_count == 2


@pytest.mark.slow
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
        set_ratio(types.SimpleNamespace(unet=two_stages()), 0.5)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ compiled


@pytest.mark.parametrize(
    "compiler, ratios, sizes",
    [
        *slow((whole, RATIOS[:10], [(16, 16), (16, 24)])),
        (in_place, RATIOS[:9], [(8, 8)]),
    ],
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


@pytest.mark.slow
def test_any_number_of_transformed_models_compiles_one_by_one(counter: Any) -> None:
    arguments = inputs(one_block(), 16, 16)
    models = [transform(one_block(), ratio=ratio) for ratio in RATIOS]
    for model in (*models, *models):
        assert torch.equal(output(whole(model, counter), arguments), output(model, arguments))
    assert counter.frame_count == len(RATIOS)


@pytest.mark.slow
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

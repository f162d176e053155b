"""What cannot be served is an error that names the argument, what is allowed and what came, and changes nothing."""

import copy
import math
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from support.compiling import raised_while_compiling
from support.models import (
    blocks,
    controlnet,
    inputs,
    one_stage,
    output,
    sd15,
    sdxl,
    two_stages,
)
from support.state import state, untouched
from torch import nn

from tome_fx import TransformError, transform

# torch's own, on the first import of its compiler in a process
compiles = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


# ------------------------------------------------------------------------------------------------ bad arguments
BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"ratio": "0.5"}, TypeError, r"ratio must be a number, got '0\.5' of type str"),
    ({"ratio": None}, TypeError, r"ratio must be a number, got None of type NoneType"),
    ({"ratio": True}, TypeError, r"ratio must be a number, got True of type bool"),
    ({"ratio": torch.tensor(0.5)}, TypeError, r"ratio must be a number, got tensor\(0\.5"),
    ({"ratio": -0.1}, ValueError, r"ratio must be between 0 and 0\.75.*2 x 2; got -0\.1"),
    ({"ratio": 0.76}, ValueError, r"ratio must be between 0 and 0\.75.*2 x 2; got 0\.76"),
    ({"ratio": 0.84, "sx": 3}, ValueError, r"ratio must be between 0 and 0\.8333.*3 x 2; got 0\.84"),
    ({"ratio": 0.8889, "sx": 3, "sy": 3}, ValueError, r"ratio must be between 0 and 0\.8888, .*3 x 3; got 0\.8889"),
    ({"ratio": 50}, ValueError, r"ratio must be between 0 and 0\.75.*got 50"),
    ({"ratio": math.nan}, ValueError, r"ratio must be between 0 and 0\.75.*got nan"),
    ({"ratio": math.inf}, ValueError, r"ratio must be between 0 and 0\.75.*got inf"),
    ({"max_downsample": 3}, ValueError, r"max_downsample must be None, 'finest' or one of \(1, 2, 4, 8\), got 3"),
    ({"max_downsample": 0}, ValueError, r"max_downsample must be None, 'finest' or one of \(1, 2, 4, 8\), got 0"),
    (
        {"max_downsample": "coarsest"},
        TypeError,
        r"max_downsample must be an int or None or 'finest', got 'coarsest' of type str",
    ),
    ({"tile": 1}, ValueError, r"tile must be None or at least 2 tokens, to hold a cell of sx x sy, 2 x 2; got 1"),
    ({"tile": 2.0}, TypeError, r"tile must be an int or None, got 2\.0 of type float"),
    ({"max_downsample": 2.0}, TypeError, r"max_downsample must be an int or None or 'finest', got 2\.0 of type float"),
    ({"max_downsample": True}, TypeError, r"max_downsample must be an int or None or 'finest', got True of type bool"),
    (
        {"max_downsample": np.array([1, 2])},
        TypeError,
        r"max_downsample must be an int or None or 'finest', got array\(\[1, 2\]\) of type ndarray",
    ),
    ({"sx": 0}, ValueError, r"sx must be at least 1 token, got 0"),
    ({"sy": -2}, ValueError, r"sy must be at least 1 token, got -2"),
    ({"sx": 2.0}, TypeError, r"sx must be an int, got 2\.0 of type float"),
    ({"sy": "2"}, TypeError, r"sy must be an int, got '2' of type str"),
    ({"sx": True}, TypeError, r"sx must be an int, got True of type bool"),
    ({"sx": 1, "sy": 1, "ratio": 0}, ValueError, r"sx and sy of 1 x 1 leave no source to merge"),
    ({"sx": 33, "tile": None}, ValueError, r"sx must be at most 32, .*sample_size of 32; got 33"),
    ({"sy": 64, "tile": 64}, ValueError, r"sy must be at most 32, .*sample_size of 32; got 64"),
    ({"use_rand": 1}, TypeError, r"use_rand must be True or False, got 1"),
    ({"use_rand": None}, TypeError, r"use_rand must be True or False, got None"),
    ({"merge_attn": "yes"}, TypeError, r"merge_attn must be True or False, got 'yes'"),
    ({"merge_crossattn": 1}, TypeError, r"merge_crossattn must be True or False, got 1"),
    ({"merge_mlp": 0}, TypeError, r"merge_mlp must be True or False, got 0"),
    ({"merge_attn": False}, ValueError, r"nothing to merge: at least one of merge_attn, merge_crossattn, merge_mlp"),
    ({"merge_queries": None}, TypeError, r"merge_queries must be True or False, got None"),
    ({"merge_block": 1}, TypeError, r"merge_block must be True or False, got 1"),
    ({"prop_attn": "yes"}, TypeError, r"prop_attn must be True, False or None, got 'yes'"),
    ({"merge_block": True, "merge_mlp": True}, ValueError, r"merge_mlp=True does nothing with merge_block=True"),
    ({"merge_block": True, "merge_queries": False}, ValueError, r"merge_queries=False does nothing with merge_block="),
    (
        {"merge_queries": False, "merge_attn": False, "merge_mlp": True},
        ValueError,
        r"merge_queries=False does nothing with merge_attn=False",
    ),
    ({"seed": -1}, ValueError, r"seed must be between 0 and 2\*\*32 - 1, got -1"),
    ({"seed": 2**32}, ValueError, r"seed must be between 0 and 2\*\*32 - 1, got 4294967296"),
    ({"seed": 1.0}, TypeError, r"seed must be an int, got 1\.0 of type float"),
    ({"seed": None}, TypeError, r"seed must be an int, got None of type NoneType"),
    ({"seed": 1, "use_rand": False}, ValueError, r"seed=1 does nothing with use_rand=False"),
]


@pytest.mark.parametrize("options, error, message", BAD_OPTIONS)
def test_a_bad_option_is_an_error_that_says_which_what_and_what_came(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with untouched(two_stages()), pytest.raises(error, match=message):
        transform(two_stages(), **options)


def test_options_go_by_name_and_an_unknown_one_is_an_error() -> None:
    with pytest.raises(TypeError, match="positional"):
        transform(two_stages(), 0.5, 1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="generator"):
        transform(two_stages(), generator=torch.Generator())  # type: ignore[call-arg]


@pytest.mark.parametrize("options", [{}, {"tile": None}])
def test_a_stride_may_be_as_large_as_the_finest_grid_with_attention(options: dict[str, Any]) -> None:
    with untouched(sdxl()):
        widest = {"tile": 17, **options}  # which holds a cell as wide as the grid, and one wider
        assert isinstance(transform(sdxl(), sx=16, sy=16, **widest), UNet2DConditionModel)
        with pytest.raises(ValueError, match=r"sx must be at most 16, .*sample_size of 32; got 17"):
            transform(sdxl(), sx=17, **widest)
        with pytest.raises(ValueError, match=r"sy must be at most 16, .*sample_size of 32; got 17"):
            transform(sdxl(), sy=17, **widest)


# ------------------------------------------------------------------------------------------------ bad models


def with_peft() -> Any:
    """A UNet in what PEFT puts around models."""
    return get_peft_model(copy.deepcopy(two_stages()), LoraConfig(target_modules=["to_q"]))


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Linear(2, 2), r"got Linear$"),
        (None, r"got NoneType$"),
        (types.SimpleNamespace(unet=None), r"got SimpleNamespace; pass pipe\.unet, not the pipeline$"),
        (nn.DataParallel(two_stages()), r"got DataParallel; pass its module$"),
        (nn.ModuleDict({"unet": two_stages()}), r"got ModuleDict; pass its unet$"),
        (nn.ModuleDict({"unet": nn.Linear(2, 2)}), r"got ModuleDict$"),
        (with_peft, r"got PeftModel; pass its model$"),
    ],
    ids=["linear", "none", "pipeline", "replicas", "wrapped", "wrapped other", "peft"],
)
def test_what_is_not_a_unet_is_a_type_error(model: Any, message: str) -> None:
    model = model() if model is with_peft else model
    with pytest.raises(TypeError, match=r"model must be a UNet2DConditionModel, .*, " + message):
        transform(model)


@pytest.mark.parametrize("build", [sd15, controlnet])
def test_a_model_that_is_transformed_already_is_an_error(build: Callable[[], Any]) -> None:
    result = transform(build(), ratio=0.25)
    with (
        untouched(result),
        pytest.raises(TransformError, match=r"transformed already: .*set_ratio, or transform the original"),
    ):
        transform(result, ratio=0.5)


@compiles
@pytest.mark.parametrize(
    "how, where",
    [
        ("wrapper", r"\(OptimizedModule\)"),
        ("whole", r"\(UNet2DConditionModel\)"),
        ("part", r", at mid_block \(UNetMidBlock2DCrossAttn\)"),
        ("blocks", r", at down_blocks\.0\.attentions\.0\.transformer_blocks\.0 \(BasicTransformerBlock\)"),
    ],
)
def test_a_model_that_is_compiled_already_is_an_error(how: str, where: str) -> None:
    model: Any = copy.deepcopy(two_stages())
    compiled: Any = model
    if how == "wrapper":
        compiled = torch.compile(model, backend="eager")
    elif how == "whole":
        model.compile()
    elif how == "part":
        model.mid_block.compile()
    else:
        model.compile_repeated_blocks()
    before = state(model)
    with pytest.raises(TransformError, match=r"compiled already.*" + where + r".*transform it first, then compile"):
        transform(compiled)
    assert state(model) == before


def test_a_forward_that_is_replaced_on_an_instance_is_an_error() -> None:
    model = copy.deepcopy(two_stages())
    add_hook_to_module(model.mid_block, ModelHook())
    with (
        untouched(model),
        pytest.raises(TransformError, match=r"forward of mid_block \(UNetMidBlock2DCrossAttn\) is repl"),
    ):
        transform(model)


@pytest.mark.parametrize("middle", [None, "UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn"])
def test_a_unet_without_a_block_over_image_tokens_is_an_error(middle: str | None) -> None:
    model = UNet2DConditionModel(
        block_out_channels=(8, 8),
        norm_num_groups=2,
        layers_per_block=1,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        mid_block_type=middle,
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    before = state(model)
    with pytest.raises(
        TransformError, match=r"no transformer block over image tokens in UNet2DCond.*DownBlock2D.*UpBl"
    ):
        transform(model)
    assert state(model) == before


def test_levels_that_hold_no_block_are_an_error() -> None:
    message = (
        r"max_downsample=1 reaches no block of UNet2DConditionModel: its finest attention.* of 2; pass max_downsample=2"
    )
    with untouched(sdxl()), pytest.raises(TransformError, match=message):
        transform(sdxl(), max_downsample=1)


# ------------------------------------------------------------------------------------------------ calls that cannot be


@compiles
@pytest.mark.supports(
    "Optional inputs", "attention_mask", "works with a condition", "merge_attn=False, or a static ratio of 0"
)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_mask_over_merged_tokens_is_an_error_when_called(compiled: bool) -> None:
    result: Any = transform(two_stages(), ratio=0.5)
    arguments = inputs(result)
    expected = output(result, arguments)
    model = torch.compile(result, backend="eager", fullgraph=True) if compiled else result
    try:
        words = r"attention_mask was given to attn1.*merge_attn=True.*merge_attn=False"
        with pytest.raises(Exception, match=raised_while_compiling(words) if compiled else words) as info:
            output(model, {**arguments, "attention_mask": torch.ones(2, 1024)})
    finally:
        torch._dynamo.reset()
    assert compiled or info.type is TransformError
    assert torch.equal(output(result, arguments), expected)


def test_chunks_that_do_not_divide_merged_tokens_are_diffusers_error() -> None:
    result = transform(two_stages(), ratio=0.5, merge_mlp=True)
    for block in blocks(result).values():
        block.set_chunk_feed_forward(1024, 1)
    with pytest.raises(ValueError, match="chunk"):
        output(result, inputs(result))


@pytest.mark.supports(
    "Optional inputs", "attention_mask", "works with a condition", "merge_attn=False, or a static ratio of 0"
)
def test_ratio_0_serves_a_mask_as_the_original_does() -> None:
    tokens = one_stage()
    arguments = {**inputs(tokens), "attention_mask": torch.ones(2, 32 * 32)}
    assert torch.equal(output(transform(tokens, ratio=0), arguments), output(tokens, arguments))


def test_proportional_attention_to_the_prompt_is_an_error() -> None:
    model = UNet2DConditionModel.from_config(two_stages().config, only_cross_attention=(True, False))
    with pytest.raises(TransformError, match=r"attends to the prompt in a block of only_cross_attention.*prop_attn=Tr"):
        transform(model, prop_attn=True)
    output(transform(model), inputs(model, 16, 16))


def test_a_module_that_is_not_there_to_merge_around_is_an_error() -> None:
    model = copy.deepcopy(two_stages())
    for block in blocks(model).values():
        block.attn2 = None
    transform(model)
    with pytest.raises(TransformError, match="expected one call each of attn1, attn2, found calls of attn1, ff"):
        transform(model, merge_crossattn=True)

"""`merge_queries=False`: every token keeps its own query, keys and values alone are merged, and nothing is unmerged.

It needs attention that attends to what it is given. What attends elsewhere, or has one projection for all three, is
refused by name.
"""

import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0, PAGIdentitySelfAttnProcessor2_0
from support.compiling import raised_while_compiling
from support.models import blocks, inputs, one_stage, output, relative_error, sdxl, two_stages
from support.wrapped import wrapped
from torch import Tensor

from tome_fx import TransformError, set_ratio, transform

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    # torch's own, on the first import of its compiler in a process
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]
SIZE = 24, 20
KEYS = {"merge_queries": False}


def of_keys(model: Any, ratio: float = 0.5, **options: Any) -> Any:
    """A transformed model whose destinations are those of `wrapped`."""
    return transform(copy.deepcopy(model), ratio, use_rand=False, tile=16, **KEYS, **options)


def test_every_token_has_its_own_query_and_nothing_is_unmerged() -> None:
    seen: list[Any] = []
    model, arguments = of_keys(one_stage(), 0.75), inputs(one_stage(), *SIZE)
    for block in blocks(model).values():
        block.attn1.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
        block.attn1.register_forward_hook(lambda _, args, result: seen.append(result))
    output(model, arguments)
    tokens = SIZE[0] * SIZE[1]
    for (args, kwargs), result in zip(seen[::2], seen[1::2], strict=True):
        assert args[0].shape[1] == result.shape[1] == tokens
        assert kwargs["encoder_hidden_states"].shape[1] == tokens // 4
        assert kwargs["attention_mask"].exp().sum(-1).flatten().tolist() == pytest.approx([tokens] * 4)


def test_it_moves_the_image_less_than_merging_the_queries_too() -> None:
    arguments = inputs(sdxl(), 40, 40)
    plain = output(sdxl(), arguments)
    keys, all_three = (output(transform(sdxl(), merge_queries=q), arguments) for q in (False, True))
    assert 1e-4 < relative_error(keys, plain) < relative_error(all_three, plain)


class Reading:
    """A processor of a user's own, which attends to what it is given."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **kwargs: Any) -> Any:
        return AttnProcessor2_0()(attn, hidden_states * 0.9, encoder_hidden_states, **kwargs)


class Ignoring:
    """One that attends to the tokens that ask, whatever else it is given."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **kwargs: Any) -> Any:
        return AttnProcessor2_0()(attn, hidden_states, **kwargs)


@pytest.mark.parametrize("prop_attn", [None, True])
def test_a_processor_that_attends_to_what_it_is_given_works(prop_attn: bool | None) -> None:
    stock, arguments = copy.deepcopy(two_stages()), inputs(two_stages(), *SIZE)
    result = of_keys(stock, prop_attn=prop_attn)
    for model in (stock, result):
        model.set_attn_processor(Reading())
    ours = output(result, arguments)
    assert torch.equal(ours, output(wrapped(stock, prop_attn=prop_attn, tile=16, **KEYS), arguments))
    assert relative_error(ours, output(of_keys(two_stages(), prop_attn=prop_attn), arguments)) > 1e-4


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("processor", [Ignoring, PAGIdentitySelfAttnProcessor2_0])
def test_a_processor_that_attends_elsewhere_is_refused_by_name(processor: Any, compiled: bool) -> None:
    result, arguments = of_keys(two_stages()), inputs(two_stages(), *SIZE)
    for block in blocks(result).values():
        block.attn1.set_processor(processor())
    called = torch.compile(result, backend="eager", fullgraph=True) if compiled else result
    words = f"{processor.__name__} takes no notice of encoder_hidden_states, by which merge_queries=False gives it"
    with pytest.raises(Exception, match=raised_while_compiling(words) if compiled else words) as info:
        output(called, arguments)
    assert compiled or info.type is TransformError
    set_ratio(result, 0)
    output(result, arguments)


@pytest.mark.parametrize("place", ["before", "after"])
def test_fused_projections_are_refused_by_name_and_work_again_when_taken_apart(place: str) -> None:
    stock, arguments = copy.deepcopy(two_stages()), inputs(two_stages(), *SIZE)
    expected = output(of_keys(stock), arguments)
    if place == "before":
        stock.fuse_qkv_projections()
    result = of_keys(stock)
    if place == "after":
        result.fuse_qkv_projections()
    with pytest.raises(TransformError, match=r"fuse_qkv_projections has made one projection .* unfuse_qkv_projections"):
        output(result, arguments)
    set_ratio(result, 0)
    output(result, arguments)
    set_ratio(result, 0.5)
    result.unfuse_qkv_projections()
    assert torch.equal(output(result, arguments), expected)


def test_fused_projections_of_cross_attention_alone_are_no_matter() -> None:
    result, arguments = of_keys(two_stages()), inputs(two_stages(), *SIZE)
    expected = output(result, arguments)
    for block in blocks(result).values():
        block.attn2.fuse_projections()
    assert torch.equal(output(result, arguments), expected)


def test_a_block_that_attends_to_the_prompt_has_no_keys_to_merge() -> None:
    model = UNet2DConditionModel.from_config(two_stages().config, only_cross_attention=(True, False))
    with pytest.raises(
        TransformError, match=r"only_cross_attention, .* merge_queries=False has no keys to merge there"
    ):
        transform(model, **KEYS)


@pytest.mark.parametrize("slices", [1, "max"])
def test_sliced_attention_gives_the_same(slices: Any) -> None:
    result, arguments = of_keys(two_stages()), inputs(two_stages(), *SIZE)
    expected = output(result, arguments)
    result.set_attention_slice(slices)
    assert relative_error(output(result, arguments), expected) < 1e-5

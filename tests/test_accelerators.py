"""A transformed model beside other accelerators: what they keep or skip, they keep or skip as in the stock model.

What keeps merged tokens from step to step is refused by name, since each step merges other ones.
"""

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig
from diffusers.hooks import apply_pyramid_attention_broadcast
from support.features import (
    ACCELERATORS,
    AFTER,
    CONDITION,
    FIRST,
    MIDDLE,
    Enable,
    assert_compiles_as_the_stock_model,
    equal,
    expected_of,
    merged,
    own,
    skip,
    steps,
    supports,
)
from support.models import inputs, two_stages
from support.speed import slow
from torch import Tensor

from tome_fx import TransformError, transform


@contextlib.contextmanager
def deep_cache(unet: Any, times: Tensor) -> Iterator[None]:
    helper = pytest.importorskip("DeepCache").DeepCacheSDHelper(
        pipe=types.SimpleNamespace(unet=unet, scheduler=types.SimpleNamespace(timesteps=times))
    )
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()
    yield
    helper.disable()


@supports("DeepCache", CONDITION, AFTER, ACCELERATORS)
def test_deep_cache_skips_the_steps_that_it_skips_in_the_stock_model() -> None:
    times = torch.tensor([900, 700, 500, 300])

    def run(unet: Any) -> list[Tensor]:
        arguments = inputs(two_stages())
        with torch.no_grad():  # by position, as DeepCache looks for the time there
            return [unet(arguments["sample"], time, arguments["encoder_hidden_states"]).sample for time in times]

    result, stock = merged(two_stages()), expected_of(two_stages())
    without = run(stock)
    with deep_cache(stock, times), deep_cache(result, times):
        ours = run(result)
        assert equal(ours, run(stock))
    assert equal(run(result), without)
    assert [torch.equal(one, other) for one, other in zip(ours, without, strict=True)] == [True, False, True, False]
    model = own()
    with deep_cache(model, times), pytest.raises(TransformError, match="replaced on the instance"):
        transform(model)


def broadcast(unet: Any, **every: int) -> None:
    config = PyramidAttentionBroadcastConfig(**every, current_timestep_callback=lambda: 500)
    apply_pyramid_attention_broadcast(unet, config)


BROADCAST = supports(
    "Pyramid Attention Broadcast", CONDITION, "enabled after transform, on attention that is not merged", ACCELERATORS
)
SELF = functools.partial(broadcast, spatial_attention_block_skip_range=2)
CROSS = functools.partial(broadcast, cross_attention_block_skip_range=2)
SKIPPING = supports("Layer skipping", CONDITION, AFTER, ACCELERATORS)


def skips(*choices: dict[str, bool]) -> list[Any]:
    """Each choice of what to skip, in a block that is merged and in one that is not."""
    rows = [(where, options) for where in (FIRST, MIDDLE) for options in choices]
    ids = [f"{where.split('.')[0]}-{'-'.join(options)}" for where, options in rows]
    enables = [functools.partial(skip, where=where, **options) for where, options in rows]
    return [pytest.param(enable, id=name, marks=SKIPPING) for enable, name in zip(enables, ids, strict=True)]


SCORES = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}
PARTS = skips({"skip_ff": False}, {"skip_attention": False}, SCORES)
SKIPS = [*skips({}), *PARTS]  # with no options: the whole block


@BROADCAST
def test_a_cache_of_merged_attention_is_refused_by_name_as_each_step_merges_other_tokens() -> None:
    result = merged(two_stages())
    SELF(result)
    with pytest.raises(TransformError, match=r"(?i)pyramid[ _]?attention[ _]?broadcast"):
        steps(result)


@pytest.mark.parametrize("enable", [pytest.param(CROSS, id="broadcast", marks=BROADCAST), *SKIPS])
def test_what_keeps_or_skips_whole_tokens_does_so_as_in_the_stock_model(enable: Enable) -> None:
    result, stock = merged(two_stages()), expected_of(two_stages())
    enable(result)
    enable(stock)
    ours = steps(result)
    assert equal(ours, steps(stock))
    assert not equal(ours, steps(merged(two_stages())))


# Not the whole block: Dynamo cannot trace how diffusers then looks for an argument, in the stock model either.
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("enable", slow(pytest.param(CROSS, id="broadcast", marks=BROADCAST), *PARTS))
def test_what_compiles_whole_in_the_stock_model_does_so_in_the_result(enable: Enable, counter: Any) -> None:
    assert_compiles_as_the_stock_model(enable, counter)


@pytest.mark.parametrize(
    "enable",
    [*SKIPS, *(pytest.param(one, id=name, marks=BROADCAST) for name, one in {"self": SELF, "cross": CROSS}.items())],
)
def test_what_replaces_a_forward_is_refused_when_it_comes_first(enable: Enable) -> None:
    model = own()
    enable(model)
    with pytest.raises(TransformError, match=r"forward of .* is replaced on the instance.*transform the model first"):
        transform(model)

"""The contract of `dynamic_ratio`: one graph serves every ratio, and each gives what a transform at it gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.compiling import RATIOS, by_block, in_place, plan_of, whole
from support.models import (
    inputs,
    one_block,
    output,
    relative_error,
    sdxl,
    two_stages,
)
from support.speed import slow
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from tome_fx import ops, set_ratio, transform
from tome_fx.plan import Grid, kept

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    # torch's own, on the first import of its compiler in a process
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


@pytest.mark.parametrize("inside", [torch.inference_mode, torch.no_grad])
def test_a_dynamic_ratio_that_is_set_in_the_middle_of_inference_costs_no_compile(inside: Any, counter: Any) -> None:
    model = transform(one_block(), ratio=0.5, dynamic_ratio=True)
    compiled, arguments = whole(model, counter), inputs(one_block(), 16, 16)
    with inside():
        for ratio in (0.5, 0.25, 0.3):
            set_ratio(compiled, ratio)
            assert relative_error(compiled(**arguments).sample, model(**arguments).sample) < 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize("build", [one_block, *slow(two_stages, sdxl)])
def test_one_graph_serves_every_ratio(build: Callable[[], Any], counter: Any) -> None:
    model = transform(build(), ratio=0.5, dynamic_ratio=True, tile=16)
    compiled = whole(model, counter)
    arguments = inputs(model)
    for ratio in (0.5, 0.25, 0.123, 0.001, 0, 0.75, *RATIOS):
        set_ratio(compiled, ratio)
        result = output(compiled, arguments)
        assert relative_error(result, output(model, arguments)) < 1e-5
        assert relative_error(result, output(transform(build(), ratio, tile=16), arguments)) < 1e-5
    assert counter.frame_count == 1
    assert not counters["graph_break"]


@pytest.mark.slow
def test_dynamic_sizes_and_a_dynamic_ratio_take_the_compiles_of_the_stock_model() -> None:
    taken = {}
    for name, model in (
        ("stock", one_block()),
        ("ours", transform(one_block(), ratio=0.5, dynamic_ratio=True, tile=16)),
    ):
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
        size = ops.as_read(ratio, dynamic=True)
        assert ops.ratio_of(size) == ratio
        for height, width in ((8, 8), (16, 24), (40, 40), (64, 64), (60, 80), (96, 96), (100, 100), (128, 128)):
            tokens, found = height * width, ops.kept(height, width, size)
            assert found == Grid(height, width, 2, 2, ratio, dynamic_ratio=True).kept
            whole = tokens * thousandths % 1000 == 0  # where a float may fall short, as 0.29 * 1600 does
            assert isinstance(found, int)
            assert kept(height, width, ratio) - found in ((0, 1) if whole else (0,))


def test_a_dynamic_ratio_is_a_whole_number_of_thousandths() -> None:
    with pytest.raises(ValueError, match=r"whole number of thousandths with dynamic_ratio=True, got 0\.3333"):
        transform(two_stages(), 1 / 3, dynamic_ratio=True)
    model = transform(two_stages(), 0.333, dynamic_ratio=True)
    with pytest.raises(ValueError, match=r"whole number of thousandths with dynamic_ratio=True, got 0\.0005"):
        set_ratio(model, 0.0005)
    assert plan_of(model).ratio == 0.333
    set_ratio(model, 0.1 + 0.2)  # not 0.3, but meant to be
    assert plan_of(model).ratio == 0.3

"""The contract, for every option of `transform` by itself.

Whole it is one graph, compiled once for a ratio and a shape, and by repeated blocks as often as the stock model. Two
runs agree bit for bit, compiled and eager to rounding, gradients with those of wrapped children. Ratio 0 is the
original. It is exported, and compiled ahead of time.
"""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.compiling import assert_no_break_and, whole
from support.models import (
    gradients,
    inputs,
    one_block,
    one_stack,
    output,
    relative_error,
    sdxl,
    transformer,
    two_stages,
)
from support.options import FEW, MODES, OF_ONE_BLOCK, each_option
from support.state import untouched
from support.wrapped import wrapped
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache

from tome_fx import set_ratio, transform

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    # torch's own, on the first import of its compiler in a process
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]
TILES = {"tile": 16}  # several of them, as the sizes of users hold of the default
STACKS = {"max_downsample": 4, **TILES}  # all of the blocks of `sdxl()`, in stacks of two and three
SIZE = 40, 24


@each_option()
def test_a_ratio_is_one_graph_that_no_step_prompt_or_return_compiles_again(
    options: dict[str, Any], counter: Any
) -> None:
    ratios = (0.5, 0)
    models = [transform(one_stack(), ratio, **{**STACKS, **options}) for ratio in ratios]
    arguments = inputs(one_stack(), 24, 20)
    for seed, time in ((0, 500), (1, 20)):
        for model in models:
            given = {**inputs(one_stack(), 24, 20, seed=seed), "timestep": torch.tensor(time)}
            assert torch.equal(output(whole(model, counter), given), output(model, given))
    for ratio in ratios:
        set_ratio(models[0], ratio)
        output(whole(models[0], counter), arguments)
    assert_no_break_and(counter, len(ratios))


@each_option(*MODES, of=OF_ONE_BLOCK)
def test_a_dynamic_ratio_is_one_graph_for_all(options: dict[str, Any], counter: Any) -> None:
    model = transform(one_block(), 0.5, dynamic_ratio=True, **{**TILES, **options})
    compiled, arguments = whole(model, counter), inputs(one_block(), 24, 20)
    for ratio in (0.5, 0.25, 0, 0.75):
        set_ratio(compiled, ratio)
        result = output(compiled, arguments)
        assert relative_error(result, output(model, arguments)) < 1e-5
        assert relative_error(result, output(transform(one_block(), ratio, **{**TILES, **options}), arguments)) < 1e-5
    assert_no_break_and(counter, 1)


@functools.cache
def of_stock(taken: Callable[[Any], int], build: Callable[[], Any]) -> int:
    """The compiles that the stock model takes, counted once for all options."""
    return taken(build())


def of_sizes(model: Any) -> int:
    """The compiles of several sizes, and of as many ratios where the model has any."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = whole(model, counter, dynamic=True)
    for ratio, *size in ((0.5, 32, 32), (0.25, 32, 24), (0.5, 17, 40), (0.7, 24, 24), (0.3, 40, 22)):
        if hasattr(model, "tome_fx"):
            set_ratio(model, ratio)
        arguments = inputs(model, *size)
        assert relative_error(output(compiled, arguments), output(model, arguments)) < 1e-5
    return int(counter.frame_count)


@each_option(of=OF_ONE_BLOCK)
def test_dynamic_sizes_and_ratios_take_the_compiles_of_the_stock_model(options: dict[str, Any]) -> None:
    taken = of_sizes(transform(one_block(), 0.5, dynamic_ratio=True, **{**TILES, **options}))
    assert taken == of_stock(of_sizes, one_block) == 2  # one for squares, one for the rest


def own_sdxl() -> Any:
    """One that may be compiled in place."""
    return copy.deepcopy(sdxl())


def of_repeated_blocks(model: Any) -> int:
    """The compiles of two calls, block by block."""
    torch._dynamo.reset()
    counter, arguments = CompileCounterWithBackend("eager"), inputs(sdxl(), *SIZE)
    expected = output(model, arguments)
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    for _ in range(2):
        assert torch.equal(output(model, arguments), expected)
    return int(counter.frame_count)


@each_option(*MODES)
def test_by_repeated_blocks_it_takes_no_more_compiles_than_the_stock_model(options: dict[str, Any]) -> None:
    taken = of_repeated_blocks(transform(sdxl(), 0.5, **{**STACKS, **options}))
    assert 0 < taken <= of_stock(of_repeated_blocks, own_sdxl)


@each_option(*MODES)
def test_two_runs_agree_bit_for_bit_and_ratio_0_with_the_original(options: dict[str, Any]) -> None:
    arguments = inputs(sdxl(), *SIZE)
    with untouched(sdxl()):
        results = [output(transform(sdxl(), **{**STACKS, **options}), arguments) for _ in range(2)]
        unmerged = output(transform(sdxl(), 0, **{**STACKS, **options}), arguments)
    assert torch.equal(*results)
    assert torch.equal(unmerged, output(sdxl(), arguments))
    assert relative_error(results[0], unmerged) > 1e-4


@each_option(of=OF_ONE_BLOCK)
def test_gradients_are_those_of_wrapped_children_compiled_or_not(options: dict[str, Any]) -> None:
    model = copy.deepcopy(two_stages()).train()
    arguments = inputs(model, 24, 20)
    expected = gradients(wrapped(model, **{**TILES, **options}), arguments)
    result = transform(model, use_rand=False, **{**TILES, **options})
    for ours in (gradients(result, arguments), gradients(whole(result, "aot_eager"), arguments)):
        found = {name.removeprefix("_orig_mod."): gradient for name, gradient in ours.items()}
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert relative_error(gradient, expected[name]) < 1e-4, name


@each_option()
def test_inductor_gives_what_eager_gives(options: dict[str, Any]) -> None:
    model, (image, prompt) = transformer(transform(sdxl(), **{**STACKS, **options}), side=20)
    with fresh_cache(), torch.no_grad():
        results = [run(image, prompt, return_dict=False)[0] for run in (torch.compile(model, fullgraph=True), model)]
    assert relative_error(*results) < 1e-5


@each_option(of=OF_ONE_BLOCK)
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_gives_what_eager_gives(options: dict[str, Any], strict: bool) -> None:
    model, arguments = transform(two_stages(), **{**TILES, **options}), inputs(two_stages(), 24, 20)
    with torch.no_grad():
        program = torch.export.export(model, (), {**arguments, "return_dict": False}, strict=strict).module()
        assert torch.equal(program(**arguments, return_dict=False)[0], output(model, arguments))


@each_option(of=FEW)
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # torch's own
def test_a_model_compiled_ahead_of_time_gives_what_eager_gives(options: dict[str, Any], tmp_path: Path) -> None:
    model, (image, prompt) = transformer(transform(sdxl(), **{**STACKS, **options}), side=20)
    arguments = {"encoder_hidden_states": prompt, "return_dict": False}
    with torch.no_grad(), fresh_cache():
        program = torch.export.export(model, (image,), arguments)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "transformer.pt2"))
        (result,) = torch._inductor.aoti_load_package(path)(image, **arguments)
        assert relative_error(result, model(image, **arguments)[0]) < 1e-5

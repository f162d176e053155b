"""The contract under `torch.compile`: the whole model is one graph, and it is compiled no oftener than it must be.

One compile per ratio and shape: none over steps, prompts and seeds, none on coming back to a ratio, and block by
block no more than the stock model takes. Compiles are counted by the backend, which dynamo calls once per graph.
No limit of dynamo's is raised for it.
"""

import contextlib
import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.compiling import EVERYTHING, assert_no_break_and, finest, merges
from support.models import (
    blocks,
    controlnet,
    gligen,
    inputs,
    mask,
    objects,
    one_block,
    one_stage,
    output,
    relative_error,
    sd15,
    sd21,
    sdxl,
    two_stages,
)
from support.speed import slow
from support.wrapped import wrapped
from torch._dynamo.testing import CompileCounterWithBackend

from tome_fx import transform
from tome_fx.graph import specialize

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    # torch's own, on the first import of its compiler in a process
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


# ------------------------------------------------------------------------------------------------ the whole model


@pytest.mark.parametrize("build", [sdxl, *slow(sd15, sd21, controlnet, gligen)])
def test_the_whole_model_is_one_graph_with_every_merge_in_it(build: Callable[[], Any], counter: Any) -> None:
    model = transform(build(), ratio=0.5)
    arguments = inputs(model)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert torch.equal(output(compiled, arguments), output(model, arguments))
    assert_no_break_and(counter, 1)
    assert merges(counter) == [finest(model)]


def test_nothing_breaks_the_graph_where_breaks_are_allowed(counter: Any) -> None:
    model = transform(one_block(), ratio=0.5, **EVERYTHING)
    arguments = inputs(model)
    output(torch.compile(model, backend=counter), arguments)
    assert_no_break_and(counter, 1)
    assert merges(counter) == [3 * len(blocks(model))]
    found = torch._dynamo.explain(model)(**arguments)
    assert (found.graph_count, found.graph_break_count, found.break_reasons) == (1, 0, [])


def test_steps_prompts_and_seeds_compile_nothing_new(counter: Any) -> None:
    model = transform(two_stages(), ratio=0.5)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    samples, prompts = inputs(model), [inputs(model, seed=seed)["encoder_hidden_states"] for seed in range(3)]
    output(compiled, samples)
    with torch._dynamo.config.patch(error_on_recompile=True):
        results = [output(compiled, {**samples, "timestep": torch.tensor(step)}) for step in range(999, 0, -100)]
        results += [output(compiled, inputs(model, seed=seed)) for seed in range(3)]
        results += [output(compiled, {**samples, "encoder_hidden_states": prompt}) for prompt in prompts]
    assert_no_break_and(counter, 1)
    assert len(results) == 16
    assert torch.equal(results[-1], output(model, {**samples, "encoder_hidden_states": prompts[-1]}))


def test_a_ratio_is_compiled_once_and_coming_back_to_it_or_transforming_anew_compiles_nothing(counter: Any) -> None:
    arguments = inputs(one_block())
    ratios = (0.1, 0.3, 0.5)
    models = [transform(one_block(), ratio=ratio, tile=16) for ratio in ratios]
    anew = [transform(one_block(), ratio=ratio, tile=16) for ratio in ratios]
    for visit in (models, models, anew):
        for model in visit:
            compiled = torch.compile(model, backend=counter, fullgraph=True)
            assert torch.equal(output(compiled, arguments), output(model, arguments))
        assert_no_break_and(counter, len(ratios))
    assert merges(counter) == [finest(one_block())] * len(ratios)


def test_a_shape_is_compiled_once(counter: Any) -> None:
    model = transform(one_block(), ratio=0.5)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for _ in range(2):
        for height, width, batch in ((16, 16, 2), (16, 24, 2), (16, 16, 3)):
            arguments = inputs(model, height, width, batch=batch)
            assert torch.equal(output(compiled, arguments), output(model, arguments))
        assert_no_break_and(counter, 3)


@pytest.mark.slow
def test_dynamic_shapes_take_no_more_compiles_than_the_stock_model() -> None:
    taken = {}
    for name, model in (("stock", one_block()), ("ours", transform(one_block(), ratio=0.5, tile=16))):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
        for height, width in ((32, 32), (32, 24), (17, 40), (16, 48)):
            arguments = inputs(model, height, width)
            assert torch.equal(output(compiled, arguments), output(model, arguments))
        taken[name] = counter.frame_count
    assert taken == {"stock": 2, "ours": 2}  # one for squares, one for the rest


@pytest.mark.parametrize(
    "build, extra",
    [
        (one_block, {"encoder_attention_mask": mask()}),
        *slow((gligen, {"cross_attention_kwargs": {"gligen": objects()}})),
    ],
    ids=["mask", "gligen"],
)
def test_an_optional_input_that_is_first_met_while_compiling_leaves_merging_in_place(
    build: Callable[[], Any], extra: dict[str, Any], counter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specialize, "_classes", {})  # so that no graph for it is known from another test
    model, reference = transform(build(), ratio=0.5, use_rand=False), wrapped(build())
    plain = inputs(model)
    assert all(len(block.graphs) == 1 for block in blocks(model).values())
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for arguments in ({**plain, **extra}, plain, {**plain, **extra}, plain):
        assert torch.equal(output(compiled, arguments), output(reference, arguments))
    assert_no_break_and(counter, 2)
    assert merges(counter) == [finest(model)] * 2
    assert all(len(block.graphs) == 2 for block in blocks(model).values())


# ------------------------------------------------------------------------------------------------ block by block


@pytest.mark.parametrize(
    "options",
    [{}, *slow({"max_downsample": 2}), EVERYTHING],
    ids=["defaults", "two", "everything"],
)
@pytest.mark.parametrize("build, stock", [*slow((sd15, 3), (sd21, 3)), (sdxl, 2)])
def test_regional_compile_takes_no_more_compiles_than_the_stock_model(
    build: Callable[[], Any], stock: int, options: dict[str, Any]
) -> None:
    taken = []
    changes: tuple[Callable[[Any], Any], ...] = (copy.deepcopy, lambda model: transform(model, ratio=0.5, **options))
    for change in changes:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        model, eager = change(build()), change(build())
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        for seed in range(2):
            arguments = inputs(model, seed=seed)
            assert torch.equal(output(model, arguments), output(eager, arguments))
        taken.append(counter.frame_count)
    assert taken == [stock, stock]


# ------------------------------------------------------------------------------------------------ whatever it runs in
CONTEXTS: list[Any] = [
    torch.inference_mode,
    torch.no_grad,
    lambda: torch.autocast("cpu", torch.bfloat16),
    contextlib.nullcontext,
]


@pytest.mark.parametrize("dynamic_ratio", [False, *slow(True)])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, *slow(torch.channels_last)])
def test_contexts_and_memory_formats_change_no_count_and_no_result(
    layout: torch.memory_format, context: Any, dynamic_ratio: bool, counter: Any
) -> None:
    model = transform(copy.deepcopy(one_block()), ratio=0.5, dynamic_ratio=dynamic_ratio).to(memory_format=layout)
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    with context():
        for seed in range(2):
            arguments = inputs(model, 16, 16, seed=seed)
            arguments["sample"] = arguments["sample"].contiguous(memory_format=layout)
            assert torch.equal(compiled(**arguments).sample, model(**arguments).sample)
    assert_no_break_and(counter, 1)


@pytest.mark.parametrize(
    "options",
    [{"seed": 5}, *slow({"seed": 5, **EVERYTHING})],
    ids=["defaults", "everything"],
)
def test_random_destinations_are_the_same_when_compiled(options: dict[str, Any]) -> None:
    model = transform(one_block(), ratio=0.5, **options)
    arguments = inputs(model)
    compiled = output(torch.compile(model, backend="aot_eager", fullgraph=True), arguments)
    assert relative_error(compiled, output(model, arguments)) < 1e-5
    assert relative_error(compiled, output(transform(one_block(), ratio=0.5, use_rand=False), arguments)) > 1e-3


@pytest.mark.parametrize("dynamic_ratio", [False, *slow(True)])
def test_a_compiled_training_step_has_the_gradients_of_an_eager_one(dynamic_ratio: bool) -> None:
    gradients = []
    model = transform(one_block(), ratio=0.5, dynamic_ratio=dynamic_ratio)
    arguments = inputs(model, 16, 16)
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        found = torch.autograd.grad(run(**arguments).sample.square().mean(), list(model.parameters()))
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    eager, compiled = gradients
    assert relative_error(compiled, eager) < 1e-5


SETTINGS = """
import torch
import torch._dynamo, torch._functorch.config, torch._inductor.config
from diffusers import ControlNetModel, UNet2DConditionModel

def settings():
    configs = torch._dynamo.config, torch._functorch.config, torch._inductor.config
    flags = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    return [config.get_config_copy() for config in configs], flags, torch.get_rng_state().tolist()

before = settings()
import tome_fx
assert settings() == before
model = UNet2DConditionModel.from_config({CONFIG})
before = settings()
tome_fx.transform(model, ratio=0.5, merge_mlp=True)
assert settings() == before
"""


@pytest.mark.slow
def test_neither_import_nor_transform_changes_a_setting_or_the_random_state() -> None:
    config = {name: value for name, value in one_stage().config.items() if not name.startswith("_")}
    subprocess.run([sys.executable, "-c", SETTINGS.replace("{CONFIG}", repr(config))], check=True, timeout=600)


def test_a_compiled_call_changes_no_setting_of_the_compiler() -> None:
    configs = (torch._dynamo.config, torch._inductor.config, torch._functorch.config)
    before = [config.get_config_copy() for config in configs]
    model = transform(one_stage(), ratio=0.5)
    output(torch.compile(model, backend="eager", fullgraph=True), inputs(model, 16, 16))
    assert [config.get_config_copy() for config in configs] == before

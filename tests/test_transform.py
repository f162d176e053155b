"""The contract of `transform`.

The result is a model of the same type that shares every tensor; the model given stays as it is, bit for bit. What
the result computes is what the original computes with wrapped children (`support.wrapped`), whatever optional inputs
and features of diffusers are used with it. What is saved is the plain model. An argument or a model that cannot be
served is an error which names the argument, what is allowed and what came, and changes nothing.
"""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from support.models import (
    blocks,
    controlnet,
    gligen,
    inputs,
    output,
    relative_error,
    sd15,
    sd21,
    sdxl,
    threads,
    two_stages,
)
from support.state import state, untouched
from torch import nn

import tome_fx
from tome_fx import transform

MODELS = [sd15, sd21, sdxl, controlnet, gligen, two_stages]


def rewritten(model: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if hasattr(type(module), "graph")}


@pytest.mark.parametrize("build", MODELS)
def test_the_result_has_the_same_type_tensors_and_keys_and_its_blocks_the_same_classes(
    build: Callable[[], Any],
) -> None:
    model = build()
    result = transform(model, ratio=0.5)
    assert result is not model
    assert isinstance(result, type(model))
    assert result.config == model.config
    for ours, theirs in (
        (result.named_parameters(), model.named_parameters()),
        (result.named_buffers(), model.named_buffers()),
    ):
        assert {name: id(tensor) for name, tensor in ours} == {name: id(tensor) for name, tensor in theirs}
    assert list(result.state_dict()) == list(model.state_dict())
    for (path, ours), (expected, theirs) in zip(result.named_modules(), model.named_modules(), strict=True):
        assert path == expected
        assert ours is not theirs
        assert isinstance(ours, type(theirs))
        assert type(ours).__name__ == type(theirs).__name__
        assert type(ours).__qualname__ == type(theirs).__qualname__
        assert type(ours).__module__ == type(theirs).__module__
        assert not ours._forward_hooks
        assert not ours._forward_pre_hooks
    assert set(blocks(result)) <= set(rewritten(result))


@pytest.mark.parametrize("build", MODELS)
def test_the_original_is_left_as_it_is_bit_for_bit(build: Callable[[], Any]) -> None:
    model = build()
    with untouched(model):
        result = transform(model, ratio=0.5, merge_crossattn=True, merge_mlp=True)
        output(result, inputs(result))
    assert not rewritten(model)


@pytest.mark.parametrize("options", [{}, {"merge_crossattn": True, "merge_mlp": True, "max_downsample": 8}])
@pytest.mark.parametrize("build", MODELS)
def test_ratio_0_is_the_original_bit_for_bit(build: Callable[[], Any], options: dict[str, Any]) -> None:
    model = build()
    arguments = inputs(model, 17, 23, batch=3)
    assert torch.equal(output(transform(model, ratio=0, **options), arguments), output(model, arguments))


def test_a_grid_that_holds_no_cell_is_left_unmerged() -> None:
    model = two_stages()
    arguments = inputs(model, 6, 3)
    assert torch.equal(output(transform(model, sx=4, sy=4), arguments), output(model, arguments))


def test_a_call_leaves_no_state_in_the_model() -> None:
    result = transform(two_stages(), ratio=0.5)
    before = state(result)
    output(result, inputs(result))
    output(result, inputs(result, 16, 24))
    assert state(result) == before


def test_a_deep_copy_works_and_shares_nothing() -> None:
    result = transform(two_stages(), ratio=0.5)
    twin = copy.deepcopy(result)
    arguments = inputs(result)
    expected = output(result, arguments)
    assert torch.equal(output(twin, arguments), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not output(twin, arguments).any()
    assert torch.equal(output(result, arguments), expected)


@pytest.mark.slow
def test_what_is_saved_is_the_plain_model_and_loads_where_tome_fx_is_not_imported(tmp_path: Path) -> None:
    model = two_stages()
    arguments = inputs(model)
    transform(model, ratio=0.5).save_pretrained(tmp_path / "unet")
    torch.save(arguments, tmp_path / "arguments.pt")
    program = """
import sys
import torch
from diffusers import UNet2DConditionModel
torch.set_num_threads(1)
unet = UNet2DConditionModel.from_pretrained("unet")
with torch.no_grad():
    torch.save(unet(**torch.load("arguments.pt")).sample, "sample.pt")
assert "tome_fx" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=600)
    assert torch.equal(torch.load(tmp_path / "sample.pt"), output(model, arguments))


def test_a_model_on_the_meta_device_is_transformed_and_gives_the_right_shape() -> None:
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(sdxl().config)
    assert output(transform(model, ratio=0.5), inputs(model, 24, 40, batch=3)).shape == (3, 4, 24, 40)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_low_and_as_near_to_float32_as_without_merging(dtype: torch.dtype) -> None:
    model = two_stages()
    low = UNet2DConditionModel.from_config(model.config).to(dtype)
    low.load_state_dict(model.state_dict())
    arguments = inputs(low)
    merged, plain = output(transform(low, ratio=0.5), arguments), output(low, arguments)
    assert merged.dtype == dtype
    assert 1e-3 < relative_error(merged, plain) < 0.2


def test_the_seed_decides_the_output_and_no_generator_is_read_or_advanced() -> None:
    model = two_stages()
    arguments = inputs(model)
    torch.manual_seed(1)
    generator = torch.get_rng_state()
    first = output(transform(model, seed=1), arguments)
    assert torch.equal(torch.get_rng_state(), generator)
    torch.manual_seed(2)
    assert torch.equal(output(transform(model, seed=1), arguments), first)
    for options in ({"seed": 2}, {"seed": 2**32 - 1}, {"use_rand": False}):
        assert relative_error(output(transform(model, **options), arguments), first) > 1e-3


def test_an_image_is_merged_alike_in_any_batch() -> None:
    result = transform(two_stages(), ratio=0.5)
    arguments = inputs(result, batch=3)
    alone = {name: value[:1] if value.ndim else value for name, value in arguments.items()}
    assert relative_error(output(result, alone), output(result, arguments)[:1]) < 1e-5


@pytest.mark.parametrize("count", [1, 2])
def test_two_runs_agree_bit_for_bit(count: int) -> None:
    result = transform(two_stages(), ratio=0.75, merge_crossattn=True, merge_mlp=True, max_downsample=2)
    arguments = inputs(result)
    with threads(count):
        assert torch.equal(output(result, arguments), output(result, arguments))


def test_the_package_says_what_it_offers() -> None:
    assert all(hasattr(tome_fx, name) for name in tome_fx.__all__)
    assert tome_fx.transform is transform

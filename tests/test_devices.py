"""A transformed model on whatever holds or moves a model: it computes what the stock model does there.

What `transform` must equal is the stock model with wrapped children (`support.wrapped`) and the same feature enabled.
What cannot be served, or only in the other order, is an error that names it.
"""

import copy
import functools
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from diffusers import DDIMScheduler, StableDiffusionPipeline
from support.features import (
    ACCELERATORS,
    AFTER,
    CONDITION,
    CPU,
    MIDDLE,
    REFUSED,
    WORKS,
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
from support.models import blocks, inputs, output, relative_error, two_stages
from support.speed import slow
from torch import nn

from tome_fx import TransformError, set_ratio, transform

# ------------------------------------------------------------------------------------------------ offloading, casting


def model_offload(unet: Any) -> None:
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe = StableDiffusionPipeline(unet=unet, scheduler=scheduler, requires_safety_checker=False, **parts)
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(unet: Any) -> None:
    cpu_offload(unet, execution_device=CPU)  # as enable_sequential_cpu_offload does, which takes no plain "cpu"


def device_map(unet: Any) -> None:
    dispatch_model(unet, device_map={"": "cpu"}, force_hooks=True)


def group_offload(unet: Any, **options: Any) -> None:
    unet.enable_group_offload(onload_device=CPU, offload_device=CPU, **options)


def layerwise_casting(unet: Any) -> None:
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


HOOKS = [
    pytest.param(model_offload, id="model", marks=supports("Model CPU offloading", CONDITION, AFTER)),
    pytest.param(sequential_offload, id="sequential", marks=supports("CPU offloading", CONDITION, AFTER)),
    pytest.param(device_map, id="map", marks=supports("Device map", CONDITION, AFTER)),
    *(
        pytest.param(enable, id=name, marks=supports("Group offloading", CONDITION, AFTER))
        for name, enable in {
            "blocks": functools.partial(group_offload, offload_type="block_level", num_blocks_per_group=1),
            "leaves": functools.partial(group_offload, offload_type="leaf_level"),
            "disk": functools.partial(group_offload, offload_type="leaf_level", offload_to_disk_path="offloaded"),
        }.items()
    ),
    pytest.param(layerwise_casting, id="casting", marks=supports("Layerwise casting", CONDITION, AFTER)),
]


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("enable", HOOKS)
def test_enabled_on_the_result_it_changes_nothing_but_what_it_changes_in_the_stock_model(
    enable: Enable, in_tmp_path: None
) -> None:
    arguments = inputs(two_stages())
    result = merged(own())
    enable(result)
    for ratio in (0.5, 0.25, 0, 0.5):  # the hooks stay while the ratio changes
        set_ratio(result, ratio)
        stock = expected_of(own(), ratio)
        enable(stock)
        expected = output(stock, arguments)
        assert torch.equal(output(result, arguments), expected)
        assert torch.equal(output(result, arguments), expected)
    plain = own()
    enable(plain)
    assert relative_error(output(result, arguments), output(plain, arguments)) > 1e-3
    assert any(hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook") for module in result.modules())


def remove_diffusers_hooks(model: Any) -> None:
    for registry in [module._diffusers_hook for module in model.modules() if hasattr(module, "_diffusers_hook")]:
        for name in list(registry.hooks):
            registry.remove_hook(name)


@pytest.mark.parametrize(
    "enable, disable",
    [
        (device_map, remove_hook_from_submodules),
        (lambda model: skip(model, MIDDLE, skip_attention=False), remove_diffusers_hooks),
    ],
    ids=["accelerate", "diffusers"],
)
def test_a_model_whose_hooks_were_removed_again_is_transformed_as_any(enable: Enable, disable: Enable) -> None:
    model = own()
    enable(model)
    disable(model)
    assert equal(steps(model), steps(two_stages()))
    assert equal(steps(merged(model)), steps(expected_of(two_stages())))


@pytest.mark.parametrize("enable", HOOKS)
def test_what_replaces_a_forward_is_refused_when_it_comes_first(enable: Enable, in_tmp_path: None) -> None:
    model = own()
    enable(model)
    with pytest.raises(TransformError, match=r"forward of .* is replaced on the instance.*transform the model first"):
        transform(model)


# ------------------------------------------------------------------------------------------------ settings of the model
SETTINGS = [
    pytest.param(lambda m: m.set_attention_slice("auto"), id="slice", marks=supports("Attention slicing", WORKS)),
    pytest.param(lambda m: m.set_attention_slice(1), id="slice-1", marks=supports("Attention slicing", WORKS)),
    pytest.param(
        lambda m: m.to(memory_format=torch.channels_last), id="layout", marks=supports("channels_last", WORKS)
    ),
    pytest.param(
        lambda m: m.fuse_qkv_projections(),
        id="qkv",
        marks=supports("Fused QKV projections", WORKS, group=ACCELERATORS),
    ),
]


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("change", SETTINGS)
def test_a_setting_of_the_model_acts_alike_before_and_after_the_transform(change: Enable, first: bool) -> None:
    model = own()
    if first:
        change(model)
    result = merged(model)
    if not first:
        change(result)
    stock = own()
    change(stock)
    arguments = inputs(two_stages())
    assert torch.equal(output(result, arguments), output(expected_of(stock), arguments))
    assert relative_error(output(result, arguments), output(stock, arguments)) > 1e-3

    def settings(model: Any) -> list[Any]:
        processors = model.attn_processors.values()
        strides = [parameter.stride() for parameter in model.parameters()]
        return strides + [(type(one), vars(one)) for one in processors]

    assert settings(result) == settings(stock)
    assert settings(result) != settings(two_stages())


# ------------------------------------------------------------------------------------------------ quantization


def torchao(model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def bitsandbytes(kind: str, model: nn.Module) -> None:
    layers = pytest.importorskip("bitsandbytes", exc_type=ImportError).nn
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                sizes = child.in_features, child.out_features, child.bias is not None
                if kind == "4bit":
                    layer = layers.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
                else:
                    layer = layers.Linear8bitLt(*sizes, has_fp16_weights=False)
                layer.load_state_dict(child.state_dict())
                setattr(parent, name, layer.to("cpu"))


TORCHAO = pytest.param(torchao, id="torchao", marks=supports("torchao", WORKS))


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    "quantize",
    [
        TORCHAO,
        pytest.param(functools.partial(bitsandbytes, "4bit"), id="bnb-4bit", marks=supports("bitsandbytes", WORKS)),
        pytest.param(functools.partial(bitsandbytes, "8bit"), id="bnb-8bit", marks=supports("bitsandbytes", WORKS)),
    ],
)
def test_quantized_weights_give_what_they_give_in_the_stock_model(quantize: Enable, first: bool) -> None:
    arguments = inputs(two_stages())
    stock, model = own(), own()
    quantize(stock)
    if first:
        quantize(model)
    result = merged(model)
    assert all(ours is theirs for ours, theirs in zip(result.parameters(), model.parameters(), strict=True))
    if not first:
        quantize(result)
        assert torch.equal(output(model, arguments), output(two_stages(), arguments))
    for ratio in (0.5, 0.25):
        set_ratio(result, ratio)
        assert torch.equal(output(result, arguments), output(expected_of(stock, ratio), arguments))
    assert 1e-4 < relative_error(output(stock, arguments), output(two_stages(), arguments)) < 0.1


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("enable", [*slow(*SETTINGS[:-1]), SETTINGS[-1], *slow(TORCHAO)])
def test_what_compiles_whole_in_the_stock_model_does_so_in_the_result(enable: Enable, counter: Any) -> None:
    assert_compiles_as_the_stock_model(enable, counter)


# ------------------------------------------------------------------------------------------------ copies and files


@supports("Deep copies", WORKS)
@pytest.mark.parametrize("enable", [None, model_offload, sequential_offload], ids=["plain", "model", "sequential"])
def test_a_deep_copy_merges_too_and_has_a_ratio_of_its_own(enable: Enable | None) -> None:
    result = merged(own())
    if enable is not None:
        enable(result)
    twin = copy.deepcopy(result)
    arguments = inputs(two_stages())
    half, quarter = (output(expected_of(two_stages(), ratio), arguments) for ratio in (0.5, 0.25))
    for changed, left in ((twin, result), (result, twin)):
        assert torch.equal(output(changed, arguments), half)
        set_ratio(changed, 0.25)
        assert torch.equal(output(changed, arguments), quarter)
        assert torch.equal(output(left, arguments), half)
        set_ratio(changed, 0.5)


@supports("Pickling", REFUSED, "its class is generated: use save_pretrained")
@pytest.mark.parametrize("write", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())], ids=["dumps", "save"])
@pytest.mark.parametrize("ratio", [0.5, 0])
def test_pickling_a_transformed_model_is_an_error_that_says_what_to_do(
    ratio: float, write: Callable[[Any], Any]
) -> None:
    result = transform(two_stages(), ratio)
    for model in (result, result.mid_block, next(iter(blocks(result).values()))):
        with pytest.raises(TypeError, match=r"cannot be pickled.*save_pretrained"):
            write(model)
    write(two_stages())
    write(result.state_dict())

"""The contract of merging in diffusion transformers: what a plain patch computes, in one graph.

Whole blocks see merged tokens, or their attention alone.

The model given is left as it is, the result is of its class and has its weights. It can do what it could before:
gradients, checkpointing, half precision, adapters, ControlNets, compilation whole and by blocks, export. What cannot
work with merged tokens is an error that says so.
"""

import copy
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    SanaTransformer2DModel,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.models import attention_dispatch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from peft import LoraConfig
from support.compiling import assert_no_break_and, by_block, whole
from support.features import supports
from support.models import relative_error
from support.speed import slow, slow_but
from support.state import state
from support.transformer_oracle import patched
from support.transformers import (
    FRAMES,
    MODELS,
    SIDE,
    flattened,
    flux,
    inputs,
    one_of,
    output,
    pixart,
    qwen,
    sd3,
    wan_of_an_image,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tome_fx
from tome_fx.families import rotary
from tome_fx.families.facts import CANNOT, FACTS
from tome_fx.families.registry import family_of
from tome_fx.families.skeleton import skeleton
from tome_fx.plan import TransformError

FIRST = ("pixart", "sd3", "sd3_controlnet", "sd3_controlnet_without_text", "flux", "flux_controlnet", "qwen")
LATER = tuple(name for name in MODELS if name not in FIRST)
OF_EACH_KIND = ("chroma", "wan", "ltx")  # whose tokens lie where coordinates, the video or numbers tell
# Of later ones Chroma and Wan stand for all, and where a test takes long Flux does, but for a thorough run.
QUICK = (*FIRST, "chroma", "wan")
models = pytest.mark.parametrize("name", slow_but(QUICK, MODELS))
scopes = pytest.mark.parametrize("scope", [{"merge_block": True}, {"merge_block": False}], ids=["blocks", "attention"])
some = pytest.mark.parametrize("name", slow_but(["flux"], MODELS))


def refuses(feature: str, why: str) -> pytest.MarkDecorator:
    """Marks a test as showing that something is refused."""
    return supports(feature, "refused", why, "Diffusion transformers")


def compiled(*later: str) -> pytest.MarkDecorator:
    """The first models in both scopes, and later ones merged whole: all but one of these slow."""
    cases = [
        pytest.param({"merge_block": whole}, name, id=f"{kind}-{name}")
        for whole, kind in ((True, "blocks"), (False, "attention"))
        for name in (*FIRST, *(later if whole else ()))
    ]
    return pytest.mark.parametrize("scope, name", slow_but(["blocks-flux"], cases))


def transformed(model: Any, ratio: float = 0.5, **options: Any) -> Any:
    return tome_fx.transform(model, ratio, **{"merge_block": True, "use_rand": False, **options})


def with_lora(model: Any) -> Any:
    """A copy of the model with a LoRA on its attention that has an effect."""
    result = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    return result


def load_ip_adapter(model: Any) -> None:
    """Put an image prompt of random weights into a Flux, as a pipeline does."""
    random = torch.Generator().manual_seed(0)

    def linear(rows: int, columns: int, name: str) -> dict[str, Tensor]:
        shapes = {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
        return {key: torch.randn(shape, generator=random) for key, shape in shapes.items()}

    projection = {**linear(4 * 12, 10, "proj"), "norm.weight": torch.ones(12), "norm.bias": torch.zeros(12)}
    attention = {
        name: value
        for number in range(model.config.num_layers)
        for part in ("to_k_ip", "to_v_ip")
        for name, value in linear(32, 12, f"{number}.{part}").items()
    }
    weights = [{"image_proj": projection, "ip_adapter": attention}]
    model._load_ip_adapter_weights(weights, low_cpu_mem_usage=False)


def with_image_prompt(arguments: dict[str, Any]) -> dict[str, Any]:
    image = torch.randn(2, 1, 10, generator=torch.Generator().manual_seed(1))
    return {**arguments, "joint_attention_kwargs": {"ip_adapter_image_embeds": [image]}}


def residuals(model: Any, count: int) -> list[Tensor]:
    """What a ControlNet of so many blocks gives a model."""
    config = model.config
    shape = count, 2, (SIDE // 2) ** 2, config.num_attention_heads * config.attention_head_dim
    return list(torch.randn(shape, generator=torch.Generator().manual_seed(1)))


def control(model: Any) -> dict[str, Any]:
    """What a pipeline with a ControlNet gives a model besides its other inputs."""
    if model is sd3():
        return {"block_controlnet_hidden_states": residuals(model, 2)}
    if model is qwen():
        return {"controlnet_block_samples": residuals(model, 3)}
    if model in (MODELS["hunyuan_dit"](), MODELS["chroma"]()):  # Chroma's for its last blocks are refused
        return {"controlnet_block_samples": residuals(model, 1)}
    return {
        "controlnet_block_samples": residuals(model, 1),
        "controlnet_single_block_samples": residuals(model, 3),
    }


@models
@scopes
def test_at_ratio_0_a_model_is_the_original_bit_for_bit(scope: dict[str, Any], name: str) -> None:
    model = MODELS[name]()
    assert torch.equal(output(transformed(model, 0, **scope), inputs(model)), output(model, inputs(model)))


@models
@pytest.mark.parametrize(
    "options", [{}, {"prop_attn": False}, {"share_match": False}, {"tile": None}, {"tile": 4}], ids=str
)
@scopes
def test_what_is_merged_computes_what_a_plain_patch_around_it_does(
    scope: dict[str, Any], name: str, options: dict[str, Any]
) -> None:
    model, arguments = MODELS[name](), inputs(MODELS[name]())
    result = output(transformed(model, **options, **scope), arguments)
    expected = output(patched(model, **options, **scope), arguments)
    assert relative_error(result, expected) < 1e-6
    assert relative_error(output(model, arguments), expected) > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"merge_queries": False},
        {"merge_queries": False, "prop_attn": False},
        {"merge_crossattn": True, "merge_mlp": True},
        {"merge_attn": False, "merge_mlp": True},
    ],
    ids=str,
)
def test_parts_of_blocks_of_pixart_are_merged_as_those_of_unets_are(options: dict[str, Any]) -> None:
    arguments = inputs(pixart())
    result = output(transformed(pixart(), merge_block=False, **options), arguments)
    expected = output(patched(pixart(), merge_block=False, **options), arguments)
    assert relative_error(result, expected) < 1e-6
    assert relative_error(output(pixart(), arguments), expected) > 1e-4


@pytest.mark.parametrize(
    "name, path, last",
    [
        ("flux", "transformer_blocks.0", "ff_context.net.2"),
        ("flux", "single_transformer_blocks.0", "proj_out"),
        ("qwen", "transformer_blocks.0", "txt_mlp.net.2"),
    ],
)
def test_numbers_of_float16_are_clipped_where_the_original_clips_them(name: str, path: str, last: str) -> None:
    model, random = copy.deepcopy(MODELS[name]()).half(), torch.Generator().manual_seed(0)
    nn.init.constant_(model.get_submodule(f"{path}.{last}").bias, 50)
    tokens, text, emb = (torch.randn(shape, generator=random).half() for shape in ((2, 64, 32), (2, 5, 32), (2, 32)))
    text[..., :4] = 65504 * text[..., :4].sign()
    arguments: dict[str, Any] = {"hidden_states": tokens, "encoder_hidden_states": text, "temb": 5 * emb}
    if name == "qwen":
        arguments["encoder_hidden_states_mask"] = None
    found, expected = (one.get_submodule(path)(**arguments) for one in (transformed(model, merge_block=False), model))
    assert all(map(torch.equal, found, expected))
    assert found[0].isfinite().all()


@supports("Fused QKV projections of PixArt and Flux", "works", group="Diffusion transformers")
@pytest.mark.parametrize("name", ["pixart", "flux"])
def test_fused_projections_are_merged_too(name: str) -> None:
    model, arguments = copy.deepcopy(MODELS[name]()), inputs(MODELS[name]())
    result = transformed(model, merge_block=False)
    expected = output(result, arguments)
    result.fuse_qkv_projections()
    assert relative_error(output(result, arguments), expected) < 1e-5


@scopes
def test_fused_projections_that_cannot_weigh_are_merged_without_weights_or_refused_in_words(
    scope: dict[str, Any],
) -> None:
    model, arguments = copy.deepcopy(MODELS["cogvideox"]()), inputs(MODELS["cogvideox"]())
    expected = output(transformed(model, prop_attn=False, **scope), arguments)
    model.fuse_qkv_projections()
    assert relative_error(output(transformed(model, **scope), arguments), expected) < 1e-5
    with pytest.raises(TransformError, match=r"FusedCogVideoXAttnProcessor2_0 pads a mask .*: prop_attn=True cannot"):
        output(transformed(model, prop_attn=True, **scope), arguments)


@pytest.mark.parametrize(
    "name, more",
    [
        ("chroma", lambda model: {"controlnet_single_block_samples": residuals(model, 2)}),
        ("flux2", lambda model: {"kv_cache_mode": "extract", "num_ref_tokens": 4}),
    ],
)
def test_what_cannot_be_traced_is_told_by_the_arguments_that_a_traced_call_had_not(name: str, more: Any) -> None:
    model = MODELS[name]()
    given = {**inputs(model), **more(model)}
    with pytest.raises(TransformError, match=f"A call without .*{next(iter(more(model)))}.* was traced before: leave"):
        output(transformed(model), given)


def test_a_processor_that_returns_other_values_than_known_is_an_error_in_words() -> None:
    class Three(Own):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            found = super().__call__(*args, **kwargs)
            return (*found, found[0]) if isinstance(found, tuple) else found

    model = copy.deepcopy(flux())
    model.set_attn_processor({name: Three(processor) for name, processor in model.attn_processors.items()})
    assert output(transformed(model), inputs(model)).isfinite().all()
    with pytest.raises(TransformError, match=r"Three returned 3 values where 2 were expected: .* merge whole blocks"):
        output(transformed(model, merge_block=False), inputs(model))


@supports("FirstBlockCache", "works with a condition", "attention alone is merged", group="Diffusion transformers")
@pytest.mark.parametrize("name", ["flux", "qwen", "wan"])
def test_a_cache_of_blocks_serves_models_whose_attention_alone_is_merged(name: str) -> None:
    result = transformed(MODELS[name](), merge_block=False)
    expected = output(result, inputs(result))
    result.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with result.cache_context("one"):
        for _ in range(2):
            assert relative_error(output(result, inputs(result)), expected) < 1e-6


@refuses("TaylorSeer, Pyramid Attention Broadcast", "they keep what merged tokens gave")
@pytest.mark.parametrize(
    "cache, hook",
    [
        (TaylorSeerCacheConfig(), "TaylorSeerCacheHook"),
        (
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
            ),
            "PyramidAttentionBroadcastHook",
        ),
    ],
    ids=["TaylorSeer", "PAB"],
)
def test_a_cache_of_attention_is_refused_where_its_tokens_are_merged(cache: Any, hook: str) -> None:
    result = transformed(copy.deepcopy(flux()), merge_block=False)
    result.enable_cache(cache)
    with (
        result.cache_context("one"),
        pytest.raises(TransformError, match=f"{hook} keeps what it sees in attn, whose tokens are merged"),
    ):
        output(result, inputs(flux()))


def test_a_block_whose_forward_was_replaced_is_refused_where_it_would_not_merge() -> None:
    result = transformed(sd3(), merge_block=False)
    stock = sd3().transformer_blocks[1]
    result.transformer_blocks[1].forward = stock.forward
    with pytest.raises(TransformError, match=r"forward of transformer_blocks.1 in a SD3Transformer2DModel is replaced"):
        output(result, inputs(sd3()))


def test_a_layer_can_be_skipped_by_diffusers_hook() -> None:
    result, expected = transformed(pixart(), merge_block=False), patched(pixart(), merge_block=False)
    apply_layer_skip(result, LayerSkipConfig(indices=[1], fqn="transformer_blocks"))
    del expected.transformer_blocks[1]
    assert relative_error(output(result, inputs(pixart())), output(expected, inputs(pixart()))) < 1e-6


@models
@scopes
def test_a_batch_of_two_is_two_batches_of_one(scope: dict[str, Any], name: str) -> None:
    model = MODELS[name]()
    result, arguments = transformed(model, **scope), inputs(model)
    both = result(**arguments, return_dict=False)
    alone = [result(**one_of(arguments, image), return_dict=False) for image in range(2)]
    groups = [found if isinstance(found[0], Tensor) else [part for group in found for part in group] for found in alone]
    own = both if isinstance(both[0], Tensor) else [part for group in both for part in group]
    for found, *parts in zip(own, *groups, strict=True):
        assert relative_error(torch.cat(parts).detach(), found.detach()) < 2e-6


@models
@scopes
def test_the_model_given_is_left_as_it_is_and_the_result_is_of_its_class_and_weights(
    scope: dict[str, Any], name: str
) -> None:
    model = MODELS[name]()
    before, expected = state(model), output(model, inputs(model))
    result = transformed(model, **scope)
    output(result, inputs(model))
    assert state(model) == before
    assert torch.equal(output(model, inputs(model)), expected)
    assert type(result) == type(model)  # noqa: E721
    assert isinstance(result, type(model))
    assert list(result.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(result.parameters(), model.parameters(), strict=True))


@some
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("prop_attn", [False, *slow(None)], ids=["", "weighed"])
@scopes
def test_gradients_are_those_of_the_patch(
    scope: dict[str, Any], prop_attn: bool | None, name: str, checkpointing: bool
) -> None:
    model, arguments = copy.deepcopy(MODELS[name]()), inputs(MODELS[name]())
    options = {"prop_attn": prop_attn, **scope}
    result, expected = transformed(model, **options), patched(model, **options)
    if checkpointing and not model._supports_gradient_checkpointing:
        pytest.skip(f"diffusers has no checkpointing for {name}")
    if checkpointing:  # in both, for Chroma hands its last blocks no mask then
        result.enable_gradient_checkpointing()
        expected.enable_gradient_checkpointing()
    found = []
    for one in (result, expected):
        one.zero_grad()
        flattened(one(**arguments, return_dict=False)).square().mean().backward()
        found.append(
            {name: parameter.grad.clone() for name, parameter in one.named_parameters() if parameter.grad is not None}
        )
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 20
    for parameter, gradient in found[1].items():
        assert (found[0][parameter] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-9


def test_a_processor_that_asks_more_of_the_table_of_places_is_told_what_it_may() -> None:
    class Own(FluxAttnProcessor):  # type: ignore[misc]
        def __call__(self, attn: Any, hidden: Tensor, text: Any = None, mask: Any = None, table: Any = None) -> Any:
            assert table[0].shape
            return super().__call__(attn, hidden, text, mask, table)

    model = copy.deepcopy(flux())
    model.set_attn_processor(Own())
    arguments = inputs(model)
    output(transformed(model, 0), arguments)
    with pytest.raises(AttributeError, match="table of places has no shape where tokens are merged"):
        output(transformed(model), arguments)


def test_a_table_of_places_that_was_made_elsewhere_is_taken_to_the_tokens() -> None:
    table, places = torch.ones(4, 6), torch.zeros(2, 3, dtype=torch.long, device="meta")
    for part in rotary.of_image((table, table), None, places):
        assert (part.rows.device.type, part.rows.shape) == ("meta", (2, 3, 6))


@some
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@scopes
def test_half_precision_is_as_near_to_the_whole_as_the_patch_is(
    scope: dict[str, Any], name: str, dtype: torch.dtype
) -> None:
    model = copy.deepcopy(MODELS[name]()).to(dtype)
    result, expected = (
        output(transformed(model, **scope), inputs(model)),
        output(patched(model, **scope), inputs(model)),
    )
    assert relative_error(result.float(), expected.float()) < (0.1 if dtype == torch.bfloat16 else 0.02)


@supports("PEFT LoRA with a scale", "works", group="Diffusion transformers")
@pytest.mark.parametrize(
    "name",
    ["sd3", "flux", "qwen", "wan", *slow("chroma", "flux2", "auraflow", "cogview4", "cogvideox", "ltx")],
)
@pytest.mark.parametrize("ratio", [0.0, 0.5])
@scopes
def test_a_lora_has_its_scale(scope: dict[str, Any], name: str, ratio: float) -> None:
    model, arguments = with_lora(MODELS[name]()), inputs(MODELS[name]())
    argument = next(a for a in inspect.signature(model.forward).parameters if a.endswith("attention_kwargs"))
    scaled = {**arguments, argument: {"scale": 0.3}}
    result, expected = transformed(model, ratio, **scope), patched(model, ratio, **scope)
    if ratio == 0:
        assert torch.equal(output(result, scaled), output(model, scaled))
    assert relative_error(output(result, scaled), output(expected, scaled)) < 1e-6
    assert relative_error(output(result, arguments), output(result, scaled)) > 1e-3


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen", "hunyuan_dit", "chroma"])
@scopes
def test_residuals_of_a_controlnet_are_added_to_whole_tokens_between_merged_blocks(
    scope: dict[str, Any], name: str
) -> None:
    model = MODELS[name]()
    result, expected = (
        output(changed(model, **scope), {**inputs(model), **control(model)}) for changed in (transformed, patched)
    )
    assert relative_error(result, expected) < 1e-6
    assert relative_error(output(transformed(model, **scope), inputs(model)), expected) > 1e-3


@pytest.mark.parametrize("skipped", [[1], [0, 2], [3]])
@scopes
def test_layers_of_sd3_can_be_skipped(scope: dict[str, Any], skipped: list[int]) -> None:
    arguments = {**inputs(sd3()), "skip_layers": skipped}
    if 0 in skipped:
        expected = patched(sd3(), share_match=False, **scope)
        assert (
            relative_error(
                output(transformed(sd3(), share_match=False, **scope), arguments), output(expected, arguments)
            )
            < 1e-6
        )
    else:
        assert (
            relative_error(output(transformed(sd3(), **scope), arguments), output(patched(sd3(), **scope), arguments))
            < 1e-6
        )


@pytest.mark.parametrize("skipped", [[], (), range(1, 3), {1}], ids=str)
@scopes
def test_layers_of_sd3_to_skip_are_any_numbers_that_can_be_looked_up(scope: dict[str, Any], skipped: Any) -> None:
    arguments = {**inputs(sd3()), "skip_layers": skipped}
    assert torch.equal(output(transformed(sd3(), 0, **scope), arguments), output(sd3(), arguments))
    merged = transformed(sd3(), **scope)
    assert torch.equal(output(merged, arguments), output(merged, {**arguments, "skip_layers": list(skipped)}))


@supports("IP-Adapter of Flux", "works with a condition", "loaded before transform", group="Diffusion transformers")
@scopes
def test_an_image_prompt_of_flux_is_for_merged_tokens_too(scope: dict[str, Any]) -> None:
    model = copy.deepcopy(flux())
    load_ip_adapter(model)
    arguments, stock = with_image_prompt(inputs(model)), output(model, with_image_prompt(inputs(model)))
    assert relative_error(output(flux(), inputs(model)), stock) > 1e-3
    assert torch.equal(output(transformed(model, 0, **scope), with_image_prompt(inputs(model))), stock)
    expected = output(patched(model, **scope), with_image_prompt(inputs(model)))
    assert relative_error(output(transformed(model, **scope), arguments), expected) < 1e-6


@scopes
def test_an_image_prompt_of_flux_that_comes_after_the_transform_is_an_error_in_words(scope: dict[str, Any]) -> None:
    result = transformed(flux(), **scope)
    load_ip_adapter(result)
    with pytest.raises(TransformError, match=r"had no encoder_hid_proj when it was transformed: load .* first"):
        output(result, with_image_prompt(inputs(flux())))


def with_second_picture(name: str) -> dict[str, Any]:
    """Inputs of a model with a picture of as many tokens beside the one that is made, as edits have it."""
    one, second = inputs(MODELS[name]()), inputs(MODELS[name](), seed=1)
    tokens = torch.cat([one["hidden_states"], second["hidden_states"]], dim=1)
    if name == "qwen":
        return {**one, "hidden_states": tokens, "img_shapes": [[(1, 8, 8), (1, 8, 8)]] * 2}
    beside = one["img_ids"] + (torch.arange(one["img_ids"].shape[1]) == 0)
    return {**one, "hidden_states": tokens, "img_ids": torch.cat([one["img_ids"], beside])}


@pytest.mark.parametrize("name", ["flux", "qwen", "flux2"])
@pytest.mark.parametrize("tile", [4, 8])
@scopes
def test_a_second_picture_of_whole_tiles_is_merged_as_a_plain_patch_merges_it_by_itself(
    scope: dict[str, Any], tile: int, name: str
) -> None:
    model, arguments = MODELS[name](), with_second_picture(name)
    result = output(transformed(model, tile=tile, **scope), arguments)
    expected = output(patched(model, tile=tile, pictures=((8, 8), (8, 8)), **scope), arguments)
    assert relative_error(result, expected) < 1e-6
    assert relative_error(output(model, arguments), expected) > 1e-3
    assert torch.equal(output(transformed(model, 0, **scope), arguments), output(model, arguments))


@models
@scopes
def test_images_that_are_no_squares_are_merged_as_a_plain_patch_merges_them(scope: dict[str, Any], name: str) -> None:
    model, arguments = MODELS[name](), inputs(MODELS[name](), SIDE, SIDE - 4)
    result = output(transformed(model, **scope), arguments)
    assert relative_error(result, output(patched(model, pictures=((8, 6),), **scope), arguments)) < 1e-6
    assert relative_error(result, output(model, arguments)) > 1e-3


@pytest.mark.parametrize("name", ["wan", *slow("cogvideox", "ltx")])
@scopes
def test_frames_that_are_no_whole_tiles_are_merged_as_a_plain_patch_merges_each(
    scope: dict[str, Any], name: str
) -> None:
    model, arguments = MODELS[name](), inputs(MODELS[name](), 10, 14)
    result = output(transformed(model, tile=4, **scope), arguments)
    assert relative_error(result, output(patched(model, tile=4, pictures=((5, 7),), **scope), arguments)) < 1e-6
    assert relative_error(result, output(model, arguments)) > 1e-3


@scopes
def test_a_video_may_be_made_of_an_image(scope: dict[str, Any]) -> None:
    model = wan_of_an_image()
    arguments = inputs(model, text=512)
    result = output(transformed(model, **scope), arguments)
    assert relative_error(result, output(patched(model, **scope), arguments)) < 1e-6
    assert relative_error(result, output(model, arguments)) > 1e-3
    assert torch.equal(output(transformed(model, 0, **scope), arguments), output(model, arguments))


@supports("Wan and LTX-Video with a time step for each token", "works", group="Diffusion transformers")
@pytest.mark.parametrize("name", ["wan", "ltx"])
@scopes
def test_each_token_of_a_video_may_have_a_time_step_of_its_own(scope: dict[str, Any], name: str) -> None:
    model, arguments = MODELS[name](), inputs(MODELS[name]())
    steps = torch.rand(2, FRAMES * (SIDE // 2) ** 2, generator=torch.Generator().manual_seed(0))
    told = {**arguments, "timestep": 100 * steps}
    result = output(transformed(model, **scope), told)
    assert relative_error(result, output(patched(model, **scope), told)) < 1e-6
    assert relative_error(result, output(transformed(model, **scope), arguments)) > 1e-3
    assert torch.equal(output(transformed(model, 0, **scope), told), output(model, told))


@refuses("LTX-Video told coordinates, as for conditions", "the grid cannot be read from them")
@scopes
def test_a_video_that_is_told_by_coordinates_alone_is_refused_in_words(scope: dict[str, Any]) -> None:
    arguments = inputs(MODELS["ltx"]())
    sides = {name: arguments.pop(name) for name in ("num_frames", "height", "width")}
    places = torch.cartesian_prod(*[torch.arange(float(side)) for side in sides.values()])
    arguments["video_coords"] = places.mT.expand(2, -1, -1)
    model = MODELS["ltx"]()
    assert torch.equal(output(transformed(model, 0, **scope), arguments), output(model, arguments))
    with pytest.raises(
        ValueError, match=r"192 tokens are not those of 0 frames of 0 x 0, the grid .* beside coordinates as well"
    ):
        output(transformed(model, **scope), arguments)


@scopes
def test_several_pictures_of_qwen_are_told_by_their_shapes(scope: dict[str, Any]) -> None:
    one = inputs(qwen())
    tokens = torch.cat([one["hidden_states"], one["hidden_states"][:, :24]], dim=1)
    arguments = {**one, "hidden_states": tokens, "img_shapes": [[(1, 8, 8), (1, 4, 6)]] * 2}
    assert output(transformed(qwen(), **scope), arguments).shape == (2, 88, 8)
    assert torch.equal(output(transformed(qwen(), 0, **scope), arguments), output(qwen(), arguments))


@compiled(*LATER)
def test_a_model_compiles_as_one_graph_for_each_ratio_and_never_again(
    scope: dict[str, Any], name: str, fresh_dynamo: None, counter: Any
) -> None:
    model = MODELS[name]()
    result, arguments = transformed(model, **scope), inputs(model)
    expected = {ratio: output(transformed(model, ratio, **scope), arguments) for ratio in (0.5, 0.25)}
    compiled = whole(result, counter)
    for ratio in (0.5, 0.25, 0.5, 0.25):
        tome_fx.set_ratio(result, ratio)
        assert relative_error(output(compiled, arguments), expected[ratio]) < 1e-6
    assert_no_break_and(counter, compiles=2)


@pytest.mark.slow
@compiled(*OF_EACH_KIND)
def test_sizes_compile_no_more_often_than_in_the_original_and_never_on_return(
    scope: dict[str, Any], name: str, fresh_dynamo: None, counter: Any
) -> None:
    model, counts = MODELS[name](), []
    for one in (copy.deepcopy(model), transformed(model, **scope)):
        torch._dynamo.reset()
        counter.frame_count = 0
        compiled, seen = whole(one, counter), []
        for height, width in ((SIDE, SIDE), (SIDE, 2 * SIDE), (SIDE, SIDE), (SIDE, 2 * SIDE)):
            arguments = inputs(model, height, width)
            assert relative_error(output(compiled, arguments), output(one, arguments)) < 1e-6
            seen.append(counter.frame_count)
        counts.append(seen)
    stock, merged = counts
    assert merged == stock
    assert stock[1:] == [stock[1]] * 3


@compiled(*OF_EACH_KIND)
def test_a_dynamic_ratio_is_one_compile(scope: dict[str, Any], name: str, fresh_dynamo: None, counter: Any) -> None:
    model = MODELS[name]()
    result, arguments = transformed(model, dynamic_ratio=True, **scope), inputs(model)
    compiled = whole(result, counter)
    for ratio in (0.5, 0.25, 0.7, 0.0):
        tome_fx.set_ratio(result, ratio)
        expected = output(transformed(model, ratio, **scope), arguments)
        assert relative_error(output(compiled, arguments), expected) < 1e-6
    assert_no_break_and(counter, compiles=1)


@supports("compile_repeated_blocks, where diffusers names them", "works", group="Diffusion transformers")
@pytest.mark.parametrize("name", ["flux", *slow("qwen", "chroma", "flux2", "wan", "ltx")])
@scopes
def test_compiled_by_blocks_a_model_has_no_more_graphs_than_the_original(
    scope: dict[str, Any], name: str, fresh_dynamo: None, counter: Any
) -> None:
    model, arguments = MODELS[name](), inputs(MODELS[name]())
    stock = by_block(copy.deepcopy(model), counter)
    output(stock, arguments)
    of_stock = counter.frame_count
    torch._dynamo.reset()
    counter.frame_count = 0
    result = by_block(transformed(model, **scope), counter)
    assert relative_error(output(result, arguments), output(transformed(model, **scope), arguments)) < 1e-6
    assert counter.frame_count == of_stock > 0


def test_options_that_mean_nothing_in_a_transformer_are_errors_that_say_so() -> None:
    with pytest.raises(
        ValueError, match=r"merge_crossattn=True does nothing in FluxTransformer2DModel, .* pass merge_block=True"
    ):
        tome_fx.transform(flux(), merge_crossattn=True)
    with pytest.raises(TransformError, match=r"attention of SD3Transformer2DModel takes keys .*: merge_queries=False"):
        tome_fx.transform(sd3(), merge_queries=False)
    with pytest.raises(
        ValueError, match=r"max_downsample=2 does nothing in PixArtTransformer2DModel, .*; leave it out"
    ):
        transformed(pixart(), max_downsample=2)
    with pytest.raises(ValueError, match="merge_mlp=True does nothing with merge_block=True"):
        transformed(sd3(), merge_mlp=True)


@pytest.mark.parametrize("name", ["sd3", "sd3_controlnet", "qwen", "chroma", "auraflow", "wan"])
@scopes
def test_weights_that_are_asked_for_where_no_mask_is_taken_are_an_error_in_words(
    scope: dict[str, Any], name: str
) -> None:
    with pytest.raises(TransformError, match=r"takes no mask.*: prop_attn=True cannot be served"):
        transformed(MODELS[name](), prop_attn=True, **scope)


@pytest.mark.parametrize("name", ["pixart", "flux", "flux_controlnet", "flux2", "cogvideox"])
@scopes
def test_weights_that_are_asked_for_are_those_of_the_default(scope: dict[str, Any], name: str) -> None:
    model, arguments = MODELS[name](), inputs(MODELS[name]())
    assert torch.equal(
        output(transformed(model, prop_attn=True, **scope), arguments), output(transformed(model, **scope), arguments)
    )
    assert (
        relative_error(
            output(transformed(model, **scope), arguments),
            output(transformed(model, prop_attn=False, **scope), arguments),
        )
        > 1e-4
    )


class Own:
    """A processor of a user's, which takes a mask and may attend to other keys."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


@supports(
    "Attention backends without a mask",
    "works with a condition",
    "merged tokens are not weighed",
    group="Diffusion transformers",
)
@pytest.mark.parametrize("compiled", [False, *slow(True)])
@scopes
def test_a_backend_that_takes_no_mask_is_given_no_weights_and_asked_for_them_is_an_error_in_words(
    scope: dict[str, Any], compiled: bool, fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)  # which diffusers sets for all models
    models = [tome_fx.transform(copy.deepcopy(flux()), prop_attn=prop, **scope) for prop in (None, False, True)]
    weighed = output(models[0], inputs(flux()))
    for model in models:
        model.set_attention_backend("_native_flash")
    first, plain, asked = (whole(model, "eager") if compiled else model for model in models)
    result = output(plain, inputs(flux()))
    assert torch.equal(output(first, inputs(flux())), result)
    assert relative_error(weighed, result) > 1e-5
    if not compiled:  # else dynamo's words are around it
        with pytest.raises(TransformError, match="goes by the attention backend _native_flash, which adds no mask"):
            output(asked, inputs(flux()))


@scopes
def test_processors_that_are_not_diffusers_are_not_given_weights_unless_these_are_asked_for(
    scope: dict[str, Any],
) -> None:
    model = copy.deepcopy(flux())
    model.set_attn_processor({name: Own(processor) for name, processor in model.attn_processors.items()})
    arguments = inputs(model)
    assert torch.equal(
        output(transformed(model, **scope), arguments), output(transformed(flux(), prop_attn=False, **scope), arguments)
    )
    asked = output(transformed(model, prop_attn=True, **scope), arguments)
    assert torch.equal(asked, output(transformed(flux(), **scope), arguments))
    assert "Own is none of diffusers'" in str(tome_fx.explain(transformed(model, **scope), SIDE, SIDE))


@scopes
def test_a_mask_of_the_users_for_every_token_is_refused_with_merged_ones(scope: dict[str, Any]) -> None:
    mask = torch.ones(2, 1, 1, 5 + 64)
    arguments = {**inputs(flux()), "joint_attention_kwargs": {"attention_mask": mask}}
    with pytest.raises(
        TransformError, match=r"attention_mask was given to transformer_blocks.0, whose tokens are merged"
    ):
        output(transformed(flux(), **scope), arguments)
    assert torch.equal(output(transformed(flux(), 0, **scope), arguments), output(flux(), arguments))


def test_caches_that_keep_tokens_are_refused_where_there_are_merged_ones() -> None:
    result = transformed(flux())
    result.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(TransformError, match=r"keeps what it sees in transformer_blocks.0, whose tokens are merged"):
        output(result, inputs(flux()))


@refuses("Qwen-Image with zero_cond_t", "its forward goes through pictures one by one")
def test_a_qwen_that_modulates_by_picture_is_refused_with_the_reason() -> None:
    model = type(qwen()).from_config(qwen().config, zero_cond_t=True)
    with pytest.raises(TransformError, match=r"zero_cond_t=True cannot have merged tokens: its forward goes through"):
        transformed(model)


def test_models_that_are_not_known_are_refused_with_those_that_are() -> None:
    with pytest.raises(
        TypeError, match=f"model must be a .*, {', '.join(list(FACTS)[:-1])} or {list(FACTS)[-1]}, got Linear"
    ):
        transformed(nn.Linear(2, 2))


@refuses("Sana, Z-Image, Lumina 2, HunyuanVideo", "convolutions over the grid, or branches on data")
def test_models_that_cannot_have_merged_tokens_are_refused_with_the_reason() -> None:
    sana = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
    )
    with pytest.raises(
        TransformError, match="SanaTransformer2DModel cannot have merged tokens: its feed-forwards are conv"
    ):
        transformed(sana)
    import diffusers

    assert all(inspect.isclass(getattr(diffusers, known)) for known in (*FACTS, *CANNOT))


@some
@scopes
@pytest.mark.parametrize("flag", [0, 1, np.False_])
def test_a_flag_is_taken_for_what_it_is_in_a_condition(scope: dict[str, Any], name: str, flag: Any) -> None:
    result, arguments = transformed(MODELS[name](), **scope), inputs(MODELS[name]())
    assert type(result(**arguments, return_dict=flag)) is type(result(**arguments, return_dict=bool(flag)))


@models
@scopes
def test_explain_counts_what_merging_saves(scope: dict[str, Any], name: str) -> None:
    report, facts = (
        tome_fx.explain(transformed(MODELS[name](), **scope), 2 * SIDE, SIDE),
        FACTS[type(MODELS[name]()).__name__],
    )
    around = ("block",) if scope["merge_block"] else ("attn",)
    assert [(row.height, row.width, row.kept, row.scopes) for row in report.rows] == [
        (SIDE, SIDE // 2, (facts.frames or 1) * SIDE**2 // 4, around)
    ] * len(report.rows)
    assert (1.15 if scope["merge_block"] else 1.0) < report.bound < 4
    assert all(row.flops_after < row.flops_before for row in report.rows)
    assert ("takes no mask" in str(report)) == bool(facts.unweighed)
    assert report.levels == ()


def test_explain_counts_a_prompt_as_long_as_that_of_the_pipeline() -> None:
    flops = []
    family: Any = family_of(flux())
    for given in ({}, {"text_tokens": 512}, {"text_tokens": 77}):
        arguments = family.example_inputs(flux(), SIDE, SIDE, batch=1, device="meta", **given)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            skeleton(flux())(**arguments)
        flops.append(counter.get_total_flops())
    assert tome_fx.explain(transformed(flux()), SIDE, SIDE).flops_before == flops[0] == flops[1] > flops[2]


def test_explain_asks_for_whole_tokens() -> None:
    with pytest.raises(
        ValueError, match="height must be a multiple of 2, the latents of a token of FluxTransformer2DModel"
    ):
        tome_fx.explain(transformed(flux()), 9, 8)


@pytest.mark.slow
@compiled(*OF_EACH_KIND)
def test_diagnose_finds_nothing_to_mend(scope: dict[str, Any], name: str, fresh_dynamo: None) -> None:
    result = transformed(MODELS[name](), **scope)
    with torch.no_grad():
        compiled: Any = torch.compile(result, backend="eager", fullgraph=True)
        found = tome_fx.diagnose(compiled, **inputs(result))
    assert found.healthy, str(found)
    assert (found.graphs_first_call, found.graphs_second_call) == (1, 0)
    assert f"merging around {'block' if scope['merge_block'] else 'attn'}" in str(found)


@models
@scopes
def test_a_deep_copy_has_a_ratio_of_its_own(scope: dict[str, Any], name: str) -> None:
    result = transformed(MODELS[name](), **scope)
    other = copy.deepcopy(result)
    tome_fx.set_ratio(other, 0.25)
    arguments = inputs(result)
    assert torch.equal(output(result, arguments), output(transformed(MODELS[name](), **scope), arguments))
    assert torch.equal(output(other, arguments), output(transformed(MODELS[name](), 0.25, **scope), arguments))


@pytest.mark.parametrize("name", ["flux", "pixart"])
@scopes
def test_what_is_saved_is_the_plain_model(scope: dict[str, Any], name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    transformed(model, **scope).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(output(loaded, inputs(model)), output(model, inputs(model)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["pixart", "flux"])
@scopes
def test_code_that_inductor_writes_computes_the_same(scope: dict[str, Any], name: str, fresh_dynamo: None) -> None:
    result, arguments = transformed(MODELS[name](), **scope), inputs(MODELS[name]())
    compiled: Any = torch.compile(result, fullgraph=True)
    assert relative_error(output(compiled, arguments), output(result, arguments)) < 1e-5


@pytest.mark.slow
@compiled(*LATER)
def test_a_model_can_be_exported(scope: dict[str, Any], name: str) -> None:
    result, arguments = transformed(MODELS[name](), **scope), inputs(MODELS[name]())
    with torch.no_grad():
        program = torch.export.export(result, (), {**arguments, "return_dict": False})
        found = flattened(program.module()(**arguments, return_dict=False))
    assert relative_error(found, output(result, arguments)) < 1e-6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")  # torch's own
@pytest.mark.parametrize("name", ["pixart", "flux"])
@scopes
def test_an_exported_model_is_packaged_ahead_of_time(scope: dict[str, Any], name: str, tmp_path: Path) -> None:
    result, arguments = transformed(MODELS[name](), **scope), {**inputs(MODELS[name]()), "return_dict": False}
    expected = output(result, inputs(MODELS[name]()))
    with torch.no_grad():
        program = torch.export.export(result, (), arguments)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        found = torch._inductor.aoti_load_package(package)(**arguments)
    assert relative_error(flattened(found), expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "flux", "qwen"])
@scopes
def test_a_kind_of_call_that_was_never_met_can_be_exported(scope: dict[str, Any], name: str) -> None:
    model = MODELS[name]()
    result = transformed(model, seed=11, use_rand=True, **scope)  # options of no other test, so that graphs are new
    arguments = {**inputs(model), **control(model)}
    with torch.no_grad():
        program = torch.export.export(result, (), {**arguments, "return_dict": False})
        found = flattened(program.module()(**arguments, return_dict=False))
    assert relative_error(found, output(result, arguments)) < 1e-6


@scopes
def test_a_plan_for_a_transformer_may_be_tomesds_but_for_the_level(scope: dict[str, Any]) -> None:
    options = {name: value for name, value in tome_fx.TOMESD.items() if name != "max_downsample"}
    arguments = inputs(flux())
    result = output(transformed(flux(), **options, **scope), arguments)
    assert relative_error(result, output(patched(flux(), **options, **scope), arguments)) < 1e-6

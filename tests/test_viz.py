"""Pictures of what is merged show the slot maps that blocks merged by, and what cannot be shown is refused in words.

Transformers' are in test_transformer_tools.py.
"""

import copy
import sys
from typing import Any

import pytest
import torch
from support.maps import PIXELS, SHOWN, STEPS, cells, columns, mapped, rows
from support.models import inputs, one_stage

import tome_fx
from bench import models
from tome_fx import viz


def pipeline(unet: Any) -> tuple[Any, dict[str, Any]]:
    """A pipeline of the UNet, and what it is called with."""
    prompts = torch.randn(2, 1, 5, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(0))
    return models.pipeline(unet), {"prompt_embeds": prompts[0], "negative_prompt_embeds": prompts[1]}


def test_each_group_is_painted_in_its_mean_colour_and_the_rest_is_left() -> None:
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    slot = torch.arange(16)
    slot[[1, 2]] = 0  # three tokens of 4 x 4 pixels in the first row
    result = viz.painted(image, slot, 4, 4)
    mean = image[:, :4, :12].mean((1, 2))
    assert torch.allclose(result[:, :3, :11], mean[:, None, None].expand(3, 3, 11), atol=1e-6)
    assert torch.equal(result[:, 4:], image[:, 4:])
    assert torch.equal(result[:, :4, 12:], image[:, :4, 12:])


def test_groups_are_outlined() -> None:
    image = torch.ones(3, 16, 16)
    slot = torch.arange(16)
    slot[[5, 6]] = 4
    result = viz.painted(image, slot, 4, 4)
    for border in (result[:, 4, :12], result[:, 7, :12], result[:, 4:8, 11]):  # no neighbour is at the left
        assert (border < 1).all()
    assert (result[:, 5:7, :11] == 1).all()
    assert (result[:, 4:8, 12:] == 1).all()


def test_slots_are_recorded_call_by_call_and_the_model_is_left_without_hooks() -> None:
    unet = tome_fx.transform(one_stage(), 0.5)
    given = inputs(unet)
    with torch.no_grad(), viz.recorded_slots(unet) as recorded:
        unet(**given)
        tome_fx.set_ratio(unet, 0)
        unet(**given)
        tome_fx.set_ratio(unet, 0.25)
        unet(**given)
    assert recorded.calls == 3
    assert len(recorded.slots) == 3
    for slots in recorded.slots.values():
        kept = {call: len(slot.unique()) for call, slot in slots.items()}
        assert kept == {0: 32 * 32 // 2, 2: 32 * 32 * 3 // 4}
    assert not any(module._forward_pre_hooks for module in unet.modules())


def test_a_map_has_a_row_for_each_transformer_and_a_column_for_the_image_and_three_calls() -> None:
    pipe, call = pipeline(tome_fx.transform(one_stage(), 0.5))
    figure = mapped(pipe, call)
    assert columns(figure) == SHOWN
    assert rows(figure) == [
        "down_blocks.0.attentions.0 .transformer_blocks.0",
        "up_blocks.0.attentions.0 .transformer_blocks.0",
        "up_blocks.0.attentions.1 .transformer_blocks.0",
    ]
    image, *maps = cells(figure)[:4]
    assert all((each != image).any() for each in maps)
    call |= {"height": PIXELS, "width": PIXELS, "num_inference_steps": STEPS, "output_type": "pt"}
    (expected,) = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    scale = viz.SIDE // PIXELS
    assert torch.equal(torch.as_tensor(image)[::scale, ::scale], expected.permute(1, 2, 0))


def test_a_call_that_merges_nothing_shows_the_image() -> None:
    unet = tome_fx.transform(one_stage(), 0.5)
    schedule = tome_fx.RatioSchedule.late(unet)
    figure = mapped(*pipeline(unet), callback_on_step_end=schedule)
    image, first, _, last = cells(figure)[:4]
    assert (first == image).all()
    assert (last != image).any()


def compiled(unet: Any) -> Any:
    unet.compile(backend="eager")
    return unet


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: pipeline(one_stage()),
            "expected one transformed model in StableDiffusionPipeline, found none: pass mod",
        ),
        (
            lambda: pipeline(tome_fx.transform(one_stage(), 0)),
            "no block has a slot map to draw: none has at a ratio of 0",
        ),
        (
            lambda: pipeline(tome_fx.transform(one_stage(), 0.5, merge_block=True)),
            "no block has a slot map to draw: none has at a ratio of 0 or with merge_block=True",
        ),
        (
            lambda: pipeline(compiled(tome_fx.transform(copy.deepcopy(one_stage()), 0.5))),
            "UNet2DConditionModel is compiled, and compiled code calls no hooks",
        ),
    ],
    ids=["not transformed", "ratio 0", "whole blocks", "compiled"],
)
def test_what_cannot_be_drawn_is_refused_in_words(make: Any, message: str) -> None:
    with pytest.raises(tome_fx.TransformError, match=message):
        mapped(*make())


@pytest.mark.parametrize(
    ("pipe", "given", "message"),
    [
        (None, {}, "^pipe must be a pipeline of diffusers, got a NoneType$"),
        (one_stage(), {}, "^pipe must be a pipeline of diffusers, got a UNet2DConditionModel$"),
        (
            pipeline(one_stage())[0],
            {"output_type": "latent"},
            "output_type must be left out, for images are drawn; got 'latent'",
        ),
    ],
    ids=["nothing", "a model", "an output type"],
)
def test_what_a_map_is_not_made_of_is_an_error_that_names_it(pipe: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        viz.merge_map(pipe, "a prompt", **given)


def test_a_pipeline_that_makes_no_images_is_refused_in_words() -> None:
    pipe, call = pipeline(tome_fx.transform(one_stage(), 0.5))
    with pytest.raises(tome_fx.TransformError, match="StableDiffusionPipeline has made no images"):
        mapped(pipe, call, return_dict=False)


def test_where_there_is_no_matplotlib_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    called: list[None] = []
    pipe, call = pipeline(tome_fx.transform(one_stage(), 0.5))
    pipe.unet.register_forward_pre_hook(lambda *_: called.append(None))
    with pytest.raises(ImportError, match="pip install matplotlib"):
        mapped(pipe, call)
    assert not called

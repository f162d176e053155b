"""`explain` counts what a transform does: tokens by the grid, FLOPs by running the model on meta tensors."""

import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from support.models import controlnet, inputs, sd15, sdxl
from torch.utils.flop_counter import FlopCounterMode

import tome_fx

MODELS = {"sd15": sd15, "sdxl": sdxl, "controlnet": controlnet}


@pytest.mark.parametrize("name", MODELS)
def test_what_the_sites_save_is_what_the_model_saves(name: str) -> None:
    scopes = {"merge_crossattn": True, "merge_mlp": True}
    report = tome_fx.explain(tome_fx.transform(MODELS[name](), max_downsample=8, **scopes), 32, 24)
    saved = sum(row.flops_before - row.flops_after for row in report.rows)
    assert saved == report.flops_before - report.flops_after > 0
    assert report.bound == report.flops_before / report.flops_after > 1


def test_the_totals_are_what_a_real_run_counts() -> None:
    unet = sd15()
    model = tome_fx.transform(unet, max_downsample=2)
    report = tome_fx.explain(model, 32, 32)
    given = inputs(unet, 32, 32, batch=1, text_tokens=77)
    for counted, module in ((report.flops_before, copy.deepcopy(unet)), (report.flops_after, model)):
        module.set_attn_processor(AttnProcessor())  # the counter knows no formula for the fused attention of a CPU
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(**given)
        assert counter.get_total_flops() == counted


def test_rows_have_the_grid_of_every_level_merged_at() -> None:
    model = tome_fx.transform(sd15(), 0.5, max_downsample=4, sx=3, sy=2, merge_attn=False, merge_mlp=True)
    report = tome_fx.explain(model, 17, 23)
    grids = {(row.height, row.width) for row in report.rows}
    assert grids == {(17, 23), (9, 12), (5, 6)}
    for row in report.rows:
        assert row.tokens == row.height * row.width
        assert row.merged == int(row.tokens * 0.5)
        assert row.kept == row.tokens - row.merged
        assert row.scopes == ("ff",)
        assert model.get_submodule(row.path).__class__.__name__ == "BasicTransformerBlock"


def test_a_grid_that_holds_no_whole_cell_merges_nothing_and_says_so() -> None:
    report = tome_fx.explain(tome_fx.transform(sd15(), 0.5, max_downsample=8, sx=4, sy=4), 16, 16)
    idle = [row for row in report.rows if (row.height, row.width) == (2, 2)]
    assert idle
    assert all(row.merged == 0 and row.kept == 4 and row.flops_before == row.flops_after for row in idle)
    assert str(report).count("0: no whole 4 x 4 cell") == len(idle)


def test_a_ratio_of_no_whole_token_says_so() -> None:
    report = tome_fx.explain(tome_fx.transform(sd15(), 0.1, max_downsample=8), 16, 16)
    assert [row.note for row in report.rows if row.tokens == 4] == ["no whole token at ratio 0.1"]


def test_ratio_zero_has_a_bound_of_one() -> None:
    report = tome_fx.explain(tome_fx.transform(sd15(), 0), 16, 16)
    assert report.bound == 1


def test_printing_shows_every_site_the_total_and_the_bound() -> None:
    report = tome_fx.explain(tome_fx.transform(sd15(), 0.25), 32, 32)
    text = str(report)
    assert "ratio 0.25" in text
    assert all(row.path in text for row in report.rows)
    assert f"{report.flops_before / 1e9:.3f}" in text
    assert f"{report.bound:.3f}x" in text


@pytest.mark.parametrize(("side", "bound"), [(64, 1.11), (96, 1.21), (128, 1.33), (256, 1.76)])
def test_the_bounds_of_stable_diffusion_are_those_computed_by_hand(side: int, bound: float) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    assert tome_fx.explain(tome_fx.transform(unet), side, side).bound == pytest.approx(bound, abs=0.006)


def test_the_model_is_left_as_it_is() -> None:
    model = tome_fx.transform(sd15())
    given = inputs(model, 16, 16)
    with torch.no_grad():
        before = model(**given).sample
        tome_fx.explain(model, 32, 32)
        assert torch.equal(model(**given).sample, before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (torch.nn.Linear(1, 1), 8, 8),
            TypeError,
            "UNet2DConditionModel, ControlNetModel, UNetMotionModel or UNet3DConditionModel, got Linear",
        ),
        ((sd15(), 8, 8), tome_fx.TransformError, "UNet2DConditionModel is not transformed"),
        ((tome_fx.transform(sd15()), 0, 8), ValueError, "height must be at least 1 latent, got 0"),
        ((tome_fx.transform(sd15()), 8, -3), ValueError, "width must be at least 1 latent, got -3"),
        ((tome_fx.transform(sd15()), 8, 8.0), TypeError, "width must be an int, got 8.0 of type float"),
        ((tome_fx.transform(sd15()), True, 8), TypeError, "height must be an int, got True of type bool"),
    ],
)
def test_bad_input_is_named(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tome_fx.explain(*arguments)


@pytest.mark.parametrize("how", ["wrapped", "in place", "by blocks"])
def test_a_compiled_model_is_explained_like_one_that_is_not(how: str) -> None:
    model = tome_fx.transform(sd15())
    expected = tome_fx.explain(model, 16, 16)
    if how == "wrapped":
        model = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:
        model.compile_repeated_blocks(backend="eager")
    assert tome_fx.explain(model, 16, 16) == expected

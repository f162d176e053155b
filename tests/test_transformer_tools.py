"""What test_viz.py and test_command.py say of UNets holds for transformers as well; several processes do not."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, DDIMScheduler, FluxPipeline, PixArtSigmaPipeline, StableDiffusion3Pipeline
from support import transformers as diffusion
from support.features import REFUSED, supports
from support.maps import SHOWN, STEPS, columns, mapped, rows
from support.transformers import MODELS, SIDE, flux, pixart, sd3
from test_transformer_pipelines import (
    THREE,
    TWO,
    WITHOUT_TEXT,
    coder,
    euler,
    of_flux_controlnet,
    of_kontext,
    prompt,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

import tome_fx
from tome_fx import viz
from tome_fx.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


def of_flux(model: Any) -> tuple[Any, dict[str, Any]]:
    return FluxPipeline(euler(), coder(2), transformer=model, **TWO), prompt(negative=False)


def of_sd3(model: Any) -> tuple[Any, dict[str, Any]]:
    return StableDiffusion3Pipeline(model, euler(), coder(4), **THREE), prompt()


def of_pixart(model: Any) -> tuple[Any, dict[str, Any]]:
    scheduler = DDIMScheduler(clip_sample=False)
    pipe = PixArtSigmaPipeline(transformer=model, scheduler=scheduler, vae=coder(4), **WITHOUT_TEXT)
    call = prompt(pooled=False, mask="prompt_attention_mask")
    return pipe, {**call, "negative_prompt": None, "use_resolution_binning": False}


@pytest.mark.parametrize(
    ("of", "model", "blocks"),
    [(of_flux, flux, 5), (of_sd3, sd3, 4), (of_pixart, pixart, 3)],
    ids=["flux", "sd3", "pixart"],
)
def test_blocks_of_a_transformer_that_merge_alike_share_a_row(of: Any, model: Any, blocks: int) -> None:
    figure = mapped(*of(tome_fx.transform(model(), 0.5)))
    assert columns(figure) == SHOWN
    assert rows(figure) == [f"transformer_blocks.0 and {blocks - 1} more"]


def test_blocks_that_merge_on_their_own_have_a_row_each() -> None:
    figure = mapped(*of_flux(tome_fx.transform(flux(), 0.5, share_match=False)))
    names = [f"transformer_blocks.{i}" for i in range(2)] + [f"single_transformer_blocks.{i}" for i in range(3)]
    assert rows(figure) == names


@pytest.mark.parametrize("name", ["flux", "chroma", "flux2", "auraflow"])
def test_slots_of_text_and_image_are_those_of_the_image(name: str) -> None:
    model = tome_fx.transform(MODELS[name](), 0.5)
    with viz.recorded_slots(model) as recorded:
        for step in range(STEPS):
            diffusion.output(model, diffusion.inputs(model, seed=step))
    first, *others = recorded.slots.values()
    assert all(
        slot.shape == (64,) and int(slot.min()) == 0 for slots in recorded.slots.values() for slot in slots.values()
    )
    assert all(torch.equal(first[call], other[call]) for other in others for call in range(STEPS))


def test_one_of_several_models_is_drawn_where_it_is_named() -> None:
    pipe, call = of_flux_controlnet(tome_fx.transform)
    with pytest.raises(
        tome_fx.TransformError, match="in FluxControlNetPipeline, found transformer, controlnet: pass mod"
    ):
        mapped(pipe, call)
    assert rows(mapped(pipe, call, model=pipe.controlnet)) == ["transformer_blocks.0 and 1 more"]


def test_frames_of_a_video_are_not_drawn() -> None:
    model = tome_fx.transform(MODELS["wan"](), 0.5)
    with viz.recorded_slots(model) as recorded:
        diffusion.output(model, diffusion.inputs(model))
    with pytest.raises(tome_fx.TransformError, match=r"expected the 8 x 8 tokens of one image in blocks\.0, found 192"):
        viz.drawn(torch.zeros(3, 8, 8), recorded, (SIDE, SIDE))


def test_tokens_of_two_pictures_are_not_drawn() -> None:
    with pytest.raises(
        tome_fx.TransformError, match=r"expected the 8 x 8 tokens of one image in transformer_blocks\.0, f"
    ):
        mapped(*of_kontext(tome_fx.transform))


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # by diffusers' own ControlNet
@pytest.mark.parametrize(
    ("name", "part"),
    [("flux", "transformer"), ("flux_controlnet", ""), ("sd3", ""), ("pixart", ""), ("qwen", ""), ("wan", "")],
)
def test_the_command_explains_a_transformer_of_a_folder(name: str, part: str, tmp_path: Path, capsys: Any) -> None:
    MODELS[name]().save_config(tmp_path / part)
    main(["explain", str(tmp_path), "--height", str(SIDE), "--width", str(SIDE), "--merge-block"])
    expected = tome_fx.explain(tome_fx.transform(MODELS[name](), merge_block=True), SIDE, SIDE)
    assert capsys.readouterr().out == f"{expected}\n"


@supports("Context parallelism", REFUSED, "each process would merge its part of the tokens", "Diffusion transformers")
@pytest.mark.parametrize("merge_block", [False, True])
@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_a_model_whose_tokens_are_shared_out_among_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, merge_block: bool
) -> None:
    monkeypatch.setattr(diffusion, "TEXT", 6)  # tokens of text are shared out too
    result = tome_fx.transform(copy.deepcopy(diffusion.MODELS[name]()), merge_block=merge_block)
    arguments = diffusion.inputs(result)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)  # by which diffusers counts CPUs as well
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        result.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        with pytest.raises(tome_fx.TransformError, match="by enable_parallelism"):
            diffusion.output(result, arguments)
    finally:
        dist.destroy_process_group()

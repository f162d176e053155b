"""`explain` counts what a transform does: tokens by the grid, FLOPs by running the model's structure on meta tensors.

What a model is run with, such as offloading, quantization or hooks, is not called, changes no count and stays as it is.
What the model's config asks for is given, or refused in words.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel, UNet3DConditionModel, UNetMotionModel
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from support.models import blocks, controlnet, inputs, sd15, sdxl, transformers, two_stages
from support.speed import slow, slow_but
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import tome_fx

MODELS = {"sd15": sd15, "sdxl": sdxl, "controlnet": controlnet}


@pytest.mark.parametrize("name", MODELS)
def test_what_the_sites_save_is_what_the_model_saves(name: str) -> None:
    scopes = {"merge_crossattn": True, "merge_mlp": True}
    report = tome_fx.explain(tome_fx.transform(MODELS[name](), max_downsample=8, tile=16, **scopes), 32, 24)
    saved = sum(row.flops_before - row.flops_after for row in report.rows)
    assert saved == report.flops_before - report.flops_after > 0
    assert report.bound == report.flops_before / report.flops_after > 1


def test_the_totals_are_what_a_real_run_counts() -> None:
    unet = sd15()
    model = tome_fx.transform(unet, max_downsample=2, tile=16)
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


def test_blocks_in_a_row_that_are_alike_are_one_line_with_the_numbers_of_each() -> None:
    report = tome_fx.explain(tome_fx.transform(sdxl(), max_downsample=8), 32, 32)
    stack = "mid_block.attentions.0.transformer_blocks"
    first, *alike = [row for row in report.rows if row.path.startswith(stack)]
    assert first.flops_after > alike[0].flops_after == alike[-1].flops_after  # which match nothing themselves
    shown = [line.split() for line in str(report).splitlines() if line.startswith(stack)]
    assert [line[0] for line in shown] == [f"{stack}.0", f"{stack}.1"]
    assert shown[1][1:3] == ["-", str(len(alike))]
    assert "A line of several blocks has the numbers of each." in str(report)
    assert "several blocks" not in str(tome_fx.explain(tome_fx.transform(sd15()), 16, 16))
    assert [line[-1] for line in shown] == [f"{row.flops_after / 1e9:.3f}" for row in (first, alike[0])]


@pytest.mark.parametrize(
    ("side", "whole_grid", "tiles"),
    [
        *slow((64, 1.11, 1.12), (96, 1.21, 1.24)),
        (128, 1.33, 1.39),
        *slow((256, 1.76, 1.96)),
    ],
)
def test_the_bounds_of_stable_diffusion_are_those_computed_by_hand(side: int, whole_grid: float, tiles: float) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    for tile, bound in ((None, whole_grid), (32, tiles)):
        report = tome_fx.explain(tome_fx.transform(unet, tile=tile), side, side)
        assert report.bound == pytest.approx(bound, abs=0.006)
        tokens, kept, channels = side**2, side**2 // 2, 320
        by_hand = 4 * channels * (tokens**2 - kept**2) + 4 * 2 * channels**2 * (tokens - kept)
        pairs = (tokens // 4) * (tokens * 3 // 4) if tile is None else (tokens // 1024) * 256 * 768
        saved = by_hand - 2 * channels * pairs
        assert {row.flops_before - row.flops_after for row in report.rows} == {saved}
        assert report.flops_before - report.flops_after == 5 * saved


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
            "UNet2DConditionModel, ControlNetModel, UNetMotionModel, UNet3DConditionModel, .*, got Linear",
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


@pytest.mark.parametrize("how", ["wrapped", *slow("in place", "by blocks")])
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


# ------------------------------------------------------------------------------------- what a model may be run with


@functools.cache
def plain_report() -> tome_fx.Report:
    return tome_fx.explain(tome_fx.transform(two_stages()), 16, 16)


def pipeline(unet: Any, kind: str = "StableDiffusionPipeline", **options: Any) -> Any:
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    return getattr(diffusers, kind)(**parts, unet=unet, scheduler=scheduler, requires_safety_checker=False, **options)


def ip_adapter(unet: Any) -> None:
    paths = [path.removesuffix(".processor") for path in unet.attn_processors if "attn2" in path]
    widths = {f"{2 * i + 1}": unet.get_submodule(path).to_q.out_features for i, path in enumerate(paths)}
    weights = {f"{i}.to_{name}_ip.weight": torch.randn(widths[i], 16) for i in widths for name in "kv"}
    projection = {"proj.weight": torch.randn(64, 8), "proj.bias": torch.zeros(64)}
    projection |= {"norm.weight": torch.ones(16), "norm.bias": torch.zeros(16)}
    pipeline(unet).load_ip_adapter({"image_proj": projection, "ip_adapter": weights}, "", "", image_encoder_folder=None)


def pag(unet: Any) -> None:
    pipe = pipeline(unet, "StableDiffusionPAGPipeline", pag_applied_layers=["mid", "down_blocks.0"])
    pipe._set_pag_attn_processor(pipe.pag_applied_layers, do_classifier_free_guidance=True)


def model_offload(unet: Any) -> None:
    accelerate.cpu_offload_with_hook(unet, "cpu")


def sequential_offload(unet: Any) -> None:
    accelerate.cpu_offload(unet, "cpu", offload_buffers=True)


def device_map(unet: Any) -> None:
    accelerate.dispatch_model(unet, {"": "cpu"}, main_device="cpu", force_hooks=True)


def disk_offload(unet: Any, folder: Path) -> None:
    accelerate.disk_offload(unet, str(folder), "cpu")


def group_offload(unet: Any) -> None:
    cpu = torch.device("cpu")
    unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def layerwise_casting(unet: Any) -> None:
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def torchao(unet: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(unet, quantization.Int8WeightOnlyConfig())


def bitsandbytes(unet: Any, bits: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    for path, module in list(unet.named_modules()):
        if type(module) is nn.Linear:
            made = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
            layer = made(module.in_features, module.out_features, bias=module.bias is not None)
            layer.load_state_dict(module.state_dict())
            unet.set_submodule(path, layer.to("cpu"))


def refusing_hooks(unet: Any) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a hook was called")

    for module in (unet, unet.mid_block, next(iter(blocks(unet).values())).attn1):
        module.register_forward_pre_hook(refuse)
        module.register_forward_hook(refuse)


class Refusing(nn.Module):
    """A user's attention processor with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a processor was called")


def forward_of_a_block(unet: Any) -> None:
    block = next(iter(blocks(unet).values()))
    block.forward = lambda *_, **__: Refusing()()


def compiled_forward(unet: Any) -> None:
    unet.forward = torch.compile(unet.forward, backend="eager")


def compiled_stage(unet: Any) -> None:
    unet.mid_block = torch.compile(unet.mid_block, backend="eager")


def tokens_in_chunks(unet: Any) -> None:
    for block in blocks(unet).values():
        block.set_chunk_feed_forward(7, dim=1)  # which the number of tokens is no multiple of


def lora(unet: Any, name: str = "one", rank: int = 4) -> None:
    unet.add_adapter(LoraConfig(r=rank, target_modules=["to_q", "to_out.0", "proj_in"], init_lora_weights=False), name)


def lora_disabled(unet: Any) -> None:
    lora(unet)
    unet.disable_lora()


def weight_norm(unet: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(unet.conv_in)


def shared_module(unet: Any) -> None:
    for block in blocks(unet).values():
        block.norm2 = block.norm1
        object.__setattr__(block, "owner", [unet])


FEATURES: dict[str, Callable[[Any], Any]] = {
    "IP-Adapter": ip_adapter,
    "PAG": pag,
    "model offload": model_offload,
    "sequential offload": sequential_offload,
    "device_map": device_map,
    "group offload": group_offload,
    "layerwise casting": layerwise_casting,
    "torchao": torchao,
    "bitsandbytes, 4 bits": lambda unet: bitsandbytes(unet, 4),
    "bitsandbytes, 8 bits": lambda unet: bitsandbytes(unet, 8),
    "hooks": refusing_hooks,
    "processor": lambda unet: unet.set_attn_processor(Refusing()),
    "sliced attention": lambda unet: unet.set_attention_slice("max"),
    "forward of a block": forward_of_a_block,
    "compiled forward": compiled_forward,
    "compiled stage": compiled_stage,
    "chunked feed-forward": tokens_in_chunks,
    "fused QKV": lambda unet: unet.fuse_qkv_projections(),
    "FreeU": lambda unet: unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6),
    "LoRA disabled": lora_disabled,
    "weight norm": weight_norm,
    "shared modules": shared_module,
    "training": lambda unet: unet.train(),
    "checkpointing": lambda unet: (unet.train(), unet.enable_gradient_checkpointing()),
    "float16": lambda unet: unet.to(torch.float16),
    "bfloat16": lambda unet: unet.to(torch.bfloat16),
    "float8": lambda unet: unet.to(torch.float8_e4m3fn),
    "meta": lambda unet: unet.to("meta"),
}


def state(model: Any) -> dict[str, Any]:
    """What every module holds, by name: the objects themselves, and what is in its dicts."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[path] = {
            name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()
        } | {"class": type(module)}
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two states are of the same objects."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return one is other or (type(one) in (int, float, str, tuple) and one == other)


class Meta(TorchDispatchMode):
    """Every operation is on the meta device: none computes, copies or allocates a value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {tensor.device.type for tensor in tree_leaves((args, kwargs, result)) if isinstance(tensor, Tensor)}
        assert devices <= {"meta"}, f"{func} on {devices}"
        return result


QUIET = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


# The rest is of kinds of which one is here: adapters, offloading, quantization, hooks and processors, compiled parts
AT_HAND = ("IP-Adapter", "PAG", "model offload", "bitsandbytes, 4 bits", "hooks", "compiled stage", "fused QKV", "meta")


@QUIET
@pytest.mark.parametrize("name", slow_but(AT_HAND, FEATURES))
def test_what_a_model_is_run_with_is_not_called_changes_no_count_and_stays(name: str) -> None:
    expected = plain_report()
    model = tome_fx.transform(copy.deepcopy(two_stages()), 0.5)
    FEATURES[name](model)
    before = state(model)
    with Meta():  # type: ignore[no-untyped-call]
        report = tome_fx.explain(model, 16, 16)
    unweighed = name in ("PAG", "processor")  # which says so, and takes nothing from the count
    assert any(row.unweighed for row in report.rows) == unweighed
    assert replace(report, rows=tuple(replace(row, unweighed="") for row in report.rows)) == expected
    assert same(state(model), before)


def test_a_dynamic_ratio_is_counted_like_a_static_one() -> None:
    expected = tome_fx.explain(tome_fx.transform(two_stages(), 0.25), 16, 16)
    model = tome_fx.transform(two_stages(), 0.5, dynamic_ratio=True)
    tome_fx.set_ratio(model, 0.25)
    with Meta():  # type: ignore[no-untyped-call]
        assert tome_fx.explain(model, 16, 16) == expected


def test_the_packed_weights_of_bitsandbytes_are_what_is_explained() -> None:
    model = copy.deepcopy(two_stages())
    bitsandbytes(model, 4)
    assert next(iter(blocks(model).values())).attn1.to_q.weight.shape != (32, 32)


def test_a_model_offloaded_to_disk_is_explained(tmp_path: Path) -> None:
    expected = plain_report()
    model = tome_fx.transform(copy.deepcopy(two_stages()))
    disk_offload(model, tmp_path)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert tome_fx.explain(model, 16, 16) == expected


@QUIET
@pytest.mark.parametrize("names", [("one",), ("one", "two")])
def test_the_layers_of_a_lora_are_counted(names: tuple[str, ...]) -> None:
    model = tome_fx.transform(copy.deepcopy(two_stages()))
    for rank, name in enumerate(names, 3):
        lora(model, name, rank)
    model.set_adapter(list(names))
    report = tome_fx.explain(model, 16, 16)
    assert report.flops_after > plain_report().flops_after
    assert report.flops_after == counted(model)


@QUIET
def test_a_lora_over_quantized_weights_counts_as_over_plain_ones() -> None:
    plain, quantized = (tome_fx.transform(copy.deepcopy(two_stages())) for _ in range(2))
    bitsandbytes(quantized, 4)
    lora(plain)
    lora(quantized)
    assert tome_fx.explain(quantized, 16, 16) == tome_fx.explain(plain, 16, 16)


def counted(model: Any, **options: Any) -> int:
    """The FLOPs of a real run for one image."""
    model.set_attn_processor(AttnProcessor())  # the counter knows no formula for the fused attention of a CPU
    given = inputs(model, 16, 16, batch=1, text_tokens=77)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**given, **options)
    count: int = counter.get_total_flops()
    return count


def test_an_ip_adapter_of_a_model_with_a_projected_prompt_is_left_out() -> None:
    """As of Kolors: the adapter has put the projection aside."""
    options = {"encoder_hid_dim": 24, "encoder_hid_dim_type": "text_proj"}
    expected = tome_fx.explain(tome_fx.transform(made(**options)), 16, 16)
    model = tome_fx.transform(made(**options))
    ip_adapter(model)
    assert tome_fx.explain(model, 16, 16) == expected
    assert model.config.encoder_hid_dim_type == "ip_image_proj"


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process only."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_sharded_model_is_explained(alone: None) -> None:
    expected = plain_report()
    model = tome_fx.transform(copy.deepcopy(two_stages()))
    mesh = init_device_mesh("cpu", (1,))
    linear = next(module for module in model.modules() if isinstance(module, nn.Linear))
    for module in (linear, *blocks(model).values(), *transformers(model).values(), model):
        fully_shard(module, mesh=mesh)
    assert tome_fx.explain(model, 16, 16) == expected


MOTION = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
    "cross_attention_dim": 16,
    "num_attention_heads": 2,
    "motion_num_attention_heads": 2,
    "layers_per_block": 1,
    "norm_num_groups": 2,
}


def test_free_noise_changes_no_count() -> None:
    model = tome_fx.transform(UNetMotionModel(**MOTION).eval())
    expected = tome_fx.explain(model, 16, 16)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    adapter = diffusers.MotionAdapter((8, 16), 1, motion_num_attention_heads=2, motion_norm_num_groups=2)
    pipe = diffusers.AnimateDiffPipeline(**parts, motion_adapter=adapter, unet=model, scheduler=scheduler)
    pipe.enable_free_noise(context_length=16, context_stride=4)
    assert tome_fx.explain(pipe.unet, 16, 16) == expected
    pipe.enable_free_noise_split_inference()
    report = tome_fx.explain(pipe.unet, 16, 16)
    assert (report.flops_before, report.flops_after) == (expected.flops_before, expected.flops_after)


@pytest.mark.parametrize("kind", [UNetMotionModel, UNet3DConditionModel])
def test_of_a_clip_one_frame_is_counted(kind: Any) -> None:
    options: dict[str, Any] = dict(MOTION)
    if kind is UNet3DConditionModel:
        del options["num_attention_heads"], options["motion_num_attention_heads"]
        options |= {"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "attention_head_dim": 4}
        options["up_block_types"] = ("UpBlock3D", "CrossAttnUpBlock3D")
    model = tome_fx.transform(kind(**options).eval())
    group_offload(model)
    report = tome_fx.explain(model, 16, 16)
    assert report.bound > 1


# ----------------------------------------------------------------------------------------- what a config may ask for


def made(**config: Any) -> UNet2DConditionModel:
    """`two_stages()` with another config."""
    with torch.random.fork_rng(devices=[]):
        return UNet2DConditionModel.from_config(two_stages().config, **config).eval()


CONFIGS: dict[str, dict[str, Any]] = {
    "widths that no layer asks for": {"cross_attention_dim": (16, 99), "mid_block_type": None},
    "no prompt": {
        "block_out_channels": (32, 64),
        "cross_attention_dim": (32, 64),
        "down_block_types": 2 * ("CrossAttnDownBlock2D",),
        "up_block_types": 2 * ("CrossAttnUpBlock2D",),
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 8,
        "class_embeddings_concat": True,
    },
    "classes": {"num_class_embeds": 5},
    "class time step": {"class_embed_type": "timestep"},
    "class identity": {"class_embed_type": "identity"},
    "class projection": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 8},
    "guidance scale": {"time_cond_proj_dim": 12},
    "projected text": {"encoder_hid_dim": 24},
    "projected text and image": {"encoder_hid_dim": 24, "encoder_hid_dim_type": "text_image_proj"},
    "projected image": {"encoder_hid_dim": 24, "encoder_hid_dim_type": "image_proj"},
    "added text": {"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
    "added text and image": {"addition_embed_type": "text_image"},
    "added image": {"addition_embed_type": "image", "encoder_hid_dim": 24, "encoder_hid_dim_type": "image_proj"},
    "added hint": {
        "addition_embed_type": "image_hint",
        "encoder_hid_dim": 24,
        "encoder_hid_dim_type": "image_proj",
        "in_channels": 8,
    },
    "few added numbers": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 20,
    },
}


QUICK = ("no prompt", "classes", "guidance scale", "projected text", "added text and image", "added hint")


@pytest.mark.parametrize("name", slow_but(QUICK, CONFIGS))
def test_what_the_config_asks_for_is_given_and_counted(name: str) -> None:
    unet = made(**CONFIGS[name])
    model = tome_fx.transform(unet)
    report = tome_fx.explain(model, 16, 16)
    assert report.flops_after == counted(model)
    assert report.flops_before == counted(unet)
    with torch.no_grad():
        model(**inputs(model, 16, 16, batch=2))


def test_the_guidance_scale_of_a_distilled_model_is_embedded_and_counted() -> None:
    report = tome_fx.explain(tome_fx.transform(made(time_cond_proj_dim=12)), 16, 16)
    without = plain_report()
    assert report.flops_before - without.flops_before == 2 * 12 * 32  # one linear layer


def test_prop_attn_is_counted_as_it_runs() -> None:
    model = tome_fx.transform(two_stages(), prop_attn=True)
    assert tome_fx.explain(model, 16, 16).flops_after == counted(model)


def test_a_controlnet_projects_no_prompt() -> None:
    net = diffusers.ControlNetModel.from_unet(made(encoder_hid_dim=24), conditioning_embedding_out_channels=(8, 8))
    assert net.encoder_hid_proj.in_features == 24
    assert tome_fx.explain(tome_fx.transform(net), 16, 16).bound > 1


def test_prompts_of_several_widths_are_refused_in_words() -> None:
    stages = {"down_block_types": 2 * ("CrossAttnDownBlock2D",), "up_block_types": 2 * ("CrossAttnUpBlock2D",)}
    model = tome_fx.transform(made(cross_attention_dim=(16, 24), **stages))
    with pytest.raises(tome_fx.TransformError, match="prompts of the widths 16, 24, which no one prompt has"):
        tome_fx.explain(model, 16, 16)


@pytest.mark.parametrize("name", ["addition_embed_type", "encoder_hid_dim_type"])
def test_an_embedding_that_is_not_known_is_refused_in_words(name: str) -> None:
    model = tome_fx.transform(copy.deepcopy(two_stages()))
    model.register_to_config(**{name: "smell"})
    with pytest.raises(tome_fx.TransformError, match=f"no example inputs for {name}='smell'"):
        tome_fx.explain(model, 16, 16)


def test_a_module_that_needs_values_is_refused_in_words() -> None:
    class Asking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    model = tome_fx.transform(copy.deepcopy(two_stages()))
    model.conv_act = Asking()
    with pytest.raises(tome_fx.TransformError, match=r"FLOPs of UNet2DConditionModel at 16 x 16 .* without values: "):
        tome_fx.explain(model, 16, 16)


def test_a_match_that_a_transformer_s_blocks_share_is_counted_once() -> None:
    report = tome_fx.explain(tome_fx.transform(sdxl(), 0.5, max_downsample=8, share_match=True), 32, 32)
    saved = sum(row.flops_before - row.flops_after for row in report.rows)
    assert saved == report.flops_before - report.flops_after

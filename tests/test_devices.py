"""A transformed model on whatever holds, moves or speeds up a model: it computes what the stock model does there.

What `transform` must equal is the stock model with wrapped children (`support.wrapped`) and the same feature enabled.
What cannot be served, or only in the other order, is an error that names it.
"""

import contextlib
import copy
import functools
import io
import pickle
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from diffusers import DDIMScheduler, PyramidAttentionBroadcastConfig, StableDiffusionPipeline
from diffusers.hooks import LayerSkipConfig, apply_layer_skip, apply_pyramid_attention_broadcast
from support.models import blocks, inputs, output, relative_error, transformers, two_stages
from support.wrapped import wrapped
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tome_fx import TransformError, set_ratio, transform

CPU = torch.device("cpu")
FIRST, MIDDLE = (f"{stage}.attentions.0.transformer_blocks" for stage in ("down_blocks.0", "mid_block"))
DEVICES, ACCELERATORS = "Memory and devices", "Other accelerators"
WORKS, CONDITION, REFUSED = "works", "works with a condition", "refused"
AFTER = "enabled after transform"

Enable = Callable[[Any], Any]


def merged(model: Any, ratio: float = 0.5) -> Any:
    return transform(model, ratio, use_rand=False)


def own() -> Any:
    """A model to change: what `transform` makes of it shares its weights."""
    return copy.deepcopy(two_stages())


def expected_of(model: Any, ratio: float = 0.5) -> Any:
    """The model with wrapped children, or the model itself where nothing is to merge."""
    return wrapped(model, ratio) if ratio else model


def steps(model: Any, count: int = 4) -> list[Tensor]:
    """What the model makes of the inputs of a few steps, one after the other."""
    return [output(model, inputs(two_stages(), seed=step)) for step in range(count)]


def equal(ours: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))


def supports(feature: str, verdict: str, condition: str = "", group: str = DEVICES) -> pytest.MarkDecorator:
    return pytest.mark.supports(group, feature, verdict, condition)


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
    assert equal(steps(merged(model)), steps(wrapped(two_stages())))


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
    assert torch.equal(output(result, arguments), output(wrapped(stock), arguments))
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
        assert torch.equal(output(result, arguments), output(wrapped(stock, ratio), arguments))
    assert 1e-4 < relative_error(output(stock, arguments), output(two_stages(), arguments)) < 0.1


# ------------------------------------------------------------------------------------------------ copies and files


@supports("Deep copies", WORKS)
@pytest.mark.parametrize("enable", [None, model_offload, sequential_offload], ids=["plain", "model", "sequential"])
def test_a_deep_copy_merges_too_and_has_a_ratio_of_its_own(enable: Enable | None) -> None:
    result = merged(own())
    if enable is not None:
        enable(result)
    twin = copy.deepcopy(result)
    arguments = inputs(two_stages())
    half, quarter = (output(wrapped(two_stages(), ratio), arguments) for ratio in (0.5, 0.25))
    for changed, left in ((twin, result), (result, twin)):
        assert torch.equal(output(changed, arguments), half)
        set_ratio(changed, 0.25)
        assert torch.equal(output(changed, arguments), quarter)
        assert torch.equal(output(left, arguments), half)
        set_ratio(changed, 0.5)


@supports("Pickling", REFUSED)
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


# ------------------------------------------------------------------------------------------------ several processes


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process only."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(model: Any, arguments: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**arguments).sample.square().mean().backward()
    return {name.removeprefix("module."): parameter.grad.clone() for name, parameter in model.named_parameters()}


def image(unet: Any) -> Tensor:
    """Latents after three steps, from a seed."""
    arguments = inputs(unet, 16, 16, batch=1)
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    scheduler.set_timesteps(3)
    for step in scheduler.timesteps:
        noise = output(unet, {**arguments, "timestep": step})
        arguments["sample"] = scheduler.step(noise, step, arguments["sample"]).prev_sample
    sample: Tensor = arguments["sample"]
    return sample


@supports("DistributedDataParallel", WORKS)
def test_distributed_data_parallel_gives_the_gradients_of_the_transformed_model(alone: None) -> None:
    arguments = inputs(two_stages())
    result = merged(own().train())
    parallel = DistributedDataParallel(result)
    for ratio in (0.5, 0.25):
        set_ratio(result, ratio)
        expected = gradients(merged(own().train(), ratio), arguments)
        ours = gradients(parallel, arguments)
        assert ours.keys() == expected.keys()
        assert all(torch.equal(gradient, expected[name]) for name, gradient in ours.items())


@pytest.fixture
def sharded(alone: None) -> Enable:
    mesh = init_device_mesh("cpu", (1,))

    def shard(model: Any) -> None:
        for module in (*blocks(model).values(), *transformers(model).values(), model):
            fully_shard(module, mesh=mesh)

    return shard


FSDP = supports("FSDP", CONDITION, "sharded after transform, the ratio stays")


@FSDP
def test_a_model_sharded_after_the_transform_merges_and_its_ratio_cannot_be_set(sharded: Enable) -> None:
    arguments = inputs(two_stages())
    result = merged(own())
    sharded(result)
    expected = output(wrapped(two_stages()), arguments)
    assert torch.equal(output(result, arguments), expected)
    with pytest.raises(TransformError, match="as fully_shard does"):
        set_ratio(result, 0.25)
    assert torch.equal(output(result, arguments), expected)
    assert all(issubclass(kind, dist.fsdp.FSDPModule) for kind in map(type, blocks(result).values()))


@FSDP
def test_a_model_that_is_sharded_already_is_refused(sharded: Enable) -> None:
    model = own()
    sharded(model)
    with pytest.raises(TransformError, match=r"(?i)fsdp|shard"):
        transform(model)


RANK = """
import copy, sys
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from support.models import inputs, two_stages
from test_devices import gradients, image
from torch.nn.parallel import DistributedDataParallel
from tome_fx import transform

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
found = {"image": image(transform(two_stages()))}
model = DistributedDataParallel(transform(copy.deepcopy(two_stages()).train()))
found["gradients"] = gradients(model, inputs(two_stages(), seed=rank))
torch.save(found, f"{rank}.pt")
dist.destroy_process_group()
"""


@supports("Distributed inference", WORKS)
@supports("DistributedDataParallel", WORKS)
def test_two_processes_of_torchrun_make_the_same_image_and_share_their_gradients(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "rank.py"]
    subprocess.run([*run, str(Path(__file__).parent)], cwd=tmp_path, check=True, timeout=600)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    expected = image(transform(two_stages()))
    assert all(torch.equal(rank["image"], expected) for rank in ranks)
    alone = [gradients(transform(own().train()), inputs(two_stages(), seed=rank)) for rank in range(2)]
    for name, gradient in ranks[0]["gradients"].items():
        assert torch.equal(gradient, ranks[1]["gradients"][name])
        mean = (alone[0][name] + alone[1][name]) / 2
        assert relative_error(gradient, mean) < 1e-5
    assert any(relative_error(alone[0][name], alone[1][name]) > 1e-2 for name in alone[0])


# ------------------------------------------------------------------------------------------------ other accelerators


@contextlib.contextmanager
def deep_cache(unet: Any, times: Tensor) -> Iterator[None]:
    helper = pytest.importorskip("DeepCache").DeepCacheSDHelper(
        pipe=types.SimpleNamespace(unet=unet, scheduler=types.SimpleNamespace(timesteps=times))
    )
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()
    yield
    helper.disable()


@supports("DeepCache", CONDITION, AFTER, ACCELERATORS)
def test_deep_cache_skips_the_steps_that_it_skips_in_the_stock_model() -> None:
    times = torch.tensor([900, 700, 500, 300])

    def run(unet: Any) -> list[Tensor]:
        arguments = inputs(two_stages())
        with torch.no_grad():  # by position, as DeepCache looks for the time there
            return [unet(arguments["sample"], time, arguments["encoder_hidden_states"]).sample for time in times]

    result, stock = merged(two_stages()), wrapped(two_stages())
    without = run(stock)
    with deep_cache(stock, times), deep_cache(result, times):
        ours = run(result)
        assert equal(ours, run(stock))
    assert equal(run(result), without)
    assert [torch.equal(one, other) for one, other in zip(ours, without, strict=True)] == [True, False, True, False]
    model = own()
    with deep_cache(model, times), pytest.raises(TransformError, match="replaced on the instance"):
        transform(model)


def broadcast(unet: Any, **every: int) -> None:
    config = PyramidAttentionBroadcastConfig(**every, current_timestep_callback=lambda: 500)
    apply_pyramid_attention_broadcast(unet, config)


def skip(unet: Any, where: str, **options: Any) -> None:
    apply_layer_skip(unet, LayerSkipConfig(indices=[0], fqn=where, **options))


BROADCAST = supports(
    "Pyramid Attention Broadcast", CONDITION, "enabled after transform, on attention that is not merged", ACCELERATORS
)
SELF = functools.partial(broadcast, spatial_attention_block_skip_range=2)
CROSS = functools.partial(broadcast, cross_attention_block_skip_range=2)
SKIPPING = supports("Layer skipping", CONDITION, AFTER, ACCELERATORS)


def skips(*choices: dict[str, bool]) -> list[Any]:
    """Each choice of what to skip, in a block that is merged and in one that is not."""
    rows = [(where, options) for where in (FIRST, MIDDLE) for options in choices]
    ids = [f"{where.split('.')[0]}-{'-'.join(options)}" for where, options in rows]
    enables = [functools.partial(skip, where=where, **options) for where, options in rows]
    return [pytest.param(enable, id=name, marks=SKIPPING) for enable, name in zip(enables, ids, strict=True)]


SCORES = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}
PARTS = skips({"skip_ff": False}, {"skip_attention": False}, SCORES)
SKIPS = [*skips({}), *PARTS]  # with no options: the whole block


@BROADCAST
def test_a_cache_of_merged_attention_is_refused_by_name_as_each_step_merges_other_tokens() -> None:
    result = merged(two_stages())
    SELF(result)
    with pytest.raises(TransformError, match=r"(?i)pyramid[ _]?attention[ _]?broadcast"):
        steps(result)


@pytest.mark.parametrize("enable", [pytest.param(CROSS, id="broadcast", marks=BROADCAST), *SKIPS])
def test_what_keeps_or_skips_whole_tokens_does_so_as_in_the_stock_model(enable: Enable) -> None:
    result, stock = merged(two_stages()), wrapped(two_stages())
    enable(result)
    enable(stock)
    ours = steps(result)
    assert equal(ours, steps(stock))
    assert not equal(ours, steps(merged(two_stages())))


# Not the whole block: Dynamo cannot trace how diffusers then looks for an argument, in the stock model either.
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("enable", [*SETTINGS, TORCHAO, pytest.param(CROSS, id="broadcast", marks=BROADCAST), *PARTS])
def test_what_compiles_whole_in_the_stock_model_does_so_in_the_result(enable: Enable, counter: Any) -> None:
    graphs = []
    for model in (own(), merged(own())):
        enable(model)
        torch._dynamo.reset()  # no graph of one counts for the other
        counter.clear()
        compiled = steps(torch.compile(model, fullgraph=True, backend=counter), 2)
        graphs.append(counter.frame_count)
        assert equal(compiled, steps(model, 2))
    assert graphs[0] == graphs[1] >= 1


@pytest.mark.parametrize(
    "enable",
    [
        *HOOKS,
        *SKIPS,
        *(pytest.param(one, id=name, marks=BROADCAST) for name, one in {"self": SELF, "cross": CROSS}.items()),
    ],
)
def test_what_replaces_a_forward_is_refused_when_it_comes_first(enable: Enable, in_tmp_path: None) -> None:
    model = own()
    enable(model)
    with pytest.raises(TransformError, match=r"forward of .* is replaced on the instance.*transform the model first"):
        transform(model)

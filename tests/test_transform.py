"""The contract of `transform`.

The result is a model of the same type that shares every tensor; the model given stays as it is, bit for bit. What
the result computes is what the original computes with wrapped children (`support.wrapped`), whatever optional inputs
and features of diffusers are used with it. What is saved is the plain model. An argument or a model that cannot be
served is an error which names the argument, what is allowed and what came, and changes nothing.
"""

import contextlib
import copy
import functools
import itertools
import math
import re
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from support.models import (
    blocks,
    controlnet,
    gligen,
    inputs,
    mask,
    objects,
    one_stage,
    output,
    relative_error,
    sd15,
    sd21,
    sdxl,
    threads,
    transformers,
    two_stages,
)
from support.wrapped import wrapped
from torch import Tensor, fx, nn

import tome_fx
from tome_fx import TransformError, ops, transform
from tome_fx.families.unet import find_sites
from tome_fx.graph import specialize

MODELS = [sd15, sd21, sdxl, controlnet, gligen, two_stages]
SCOPES = {"merge_attn": "attn1", "merge_crossattn": "attn2", "merge_mlp": "ff"}

# torch's own, on the first import of its compiler in a process
compiles = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


def state(model: nn.Module) -> list[Any]:
    """All that a model is made of, for comparison: classes, attributes and tensors, by identity."""

    def look(value: Any) -> Any:
        return {name: id(item) for name, item in value.items()} if isinstance(value, dict) else id(value)

    return [
        (path, type(module), {name: look(value) for name, value in vars(module).items()})
        for path, module in model.named_modules()
    ]


@contextlib.contextmanager
def untouched(model: nn.Module, **options: Any) -> Iterator[None]:
    """Assert that the model comes out of the block as it went in: structure, weights and output."""
    arguments = inputs(model, 16, 16)
    before = state(model), output(model, arguments), {name: t.clone() for name, t in model.state_dict().items()}
    yield
    assert state(model) == before[0]
    assert all(torch.equal(tensor, before[2][name]) for name, tensor in model.state_dict().items())
    assert torch.equal(output(model, arguments), before[1])


def rewritten(model: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if hasattr(type(module), "graph")}


def calls(graph: fx.Graph) -> Counter[Any]:
    return Counter(node.target for node in graph.nodes)


def sources(model: nn.Module) -> dict[str, str]:
    return {path: module.graph.python_code("self").src for path, module in rewritten(model).items()}


def gradients(model: Any, arguments: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**arguments).sample.square().mean().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found.values())
    return found


# ------------------------------------------------------------------------------------------------ what is returned


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


@pytest.mark.parametrize("build", MODELS)
def test_self_attention_sees_merged_tokens_as_if_by_wrapped_children(build: Callable[[], Any]) -> None:
    model = build()
    arguments = inputs(model, 17, 24)
    ours = output(transform(model, ratio=0.4, use_rand=False), arguments)
    assert torch.equal(ours, output(wrapped(model, ratio=0.4), arguments))
    assert relative_error(ours, output(model, arguments)) > 1e-3


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("build", MODELS)
def test_proportional_attention_sees_every_token_in_the_place_of_its_slots_mean(
    build: Callable[[], Any], ratio: float
) -> None:
    arguments = inputs(build())
    plain, ours = (output(transform(build(), ratio, use_rand=False, prop_attn=p), arguments) for p in (False, True))
    assert relative_error(ours, output(wrapped(build(), ratio, prop_attn=True), arguments)) < 1e-5
    assert relative_error(ours, plain) > 1e-4


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


# ------------------------------------------------------------------------------------------------ the graphs


@pytest.mark.parametrize("chosen", [c for n in (1, 2, 3) for c in itertools.combinations(SCOPES, n)])
def test_a_block_has_one_merge_and_one_unmerge_around_each_module_asked_for(chosen: tuple[str, ...]) -> None:
    result = transform(sdxl(), ratio=0.25, **{name: name in chosen for name in SCOPES})
    modules = [SCOPES[name] for name in chosen]
    for block in blocks(result).values():
        nodes = {node.target: node for node in block.graph.nodes}
        assert calls(block.graph)[ops.merge] == calls(block.graph)[ops.unmerge] == len(chosen)
        assert calls(block.graph)["slots"] == 1
        for module in ("attn1", "attn2", "ff"):
            node = nodes[module]
            (user,) = node.users
            if module in modules:
                assert node.args[0].target is ops.merge
                assert node.args[0].args[1:] == (nodes["slots"],)
                assert user.target is ops.unmerge
                assert user.args == (node, nodes["slots"])
            else:
                assert node.args[0].target is not ops.merge
                assert user.target is not ops.unmerge
        printed = str(block.graph)
        assert printed.count("target=tome_fx.ops.merge]") == printed.count("target=tome_fx.ops.unmerge]") == len(chosen)


@pytest.mark.parametrize(
    "build, max_downsample", [(sd15, None), (sd15, 1), (sd15, 2), (sd15, 4), (sd15, 8), (sdxl, None), (sdxl, 4)]
)
def test_the_levels_reached_have_one_match_per_block_and_the_others_none(
    build: Callable[[], Any], max_downsample: int | None
) -> None:
    model = build()
    result = transform(model, max_downsample=max_downsample)
    level = {site.transformer: site.downsample for site in find_sites(model)}
    deepest = max_downsample or min(level.values())
    assert set(level.values()) == ({1, 2, 4, 8} if build is sd15 else {2, 4})
    for path, transformer in transformers(result).items():
        assert hasattr(transformer, "graph") == (level[path] <= deepest)
        if level[path] <= deepest:
            assert calls(transformer.graph)[ops.match] == len(transformer.transformer_blocks)
            assert str(transformer.graph).count("target=tome_fx.ops.match]") == len(transformer.transformer_blocks)
            by_name = {node.target: node for node in transformer.graph.nodes}
            for i in range(len(transformer.transformer_blocks)):
                call = by_name[f"transformer_blocks.{i}"]
                match = call.kwargs["slots"]
                assert match.target is ops.match
                assert match.args[0] is call.args[0]  # matched by what the block is given, not by an older state


@pytest.mark.parametrize("build", MODELS)
def test_transforming_twice_prints_the_same_code(build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    once = sources(transform(model, merge_mlp=True))
    monkeypatch.setattr(specialize, "_classes", {})  # as in a new process
    assert sources(transform(model, merge_mlp=True)) == once
    assert len(once) > len(blocks(model))


def test_sdxl_merges_at_its_finest_attention_by_default() -> None:
    result = transform(sdxl(), ratio=0.5)
    merged = {path for path in transformers(result) if path in rewritten(result)}
    assert merged == {
        f"{stage}.attentions.{i}" for stage, n in (("down_blocks.1", 1), ("up_blocks.1", 2)) for i in range(n)
    }
    arguments = inputs(result)
    assert torch.equal(output(result, arguments), output(transform(sdxl(), ratio=0.5, max_downsample=2), arguments))
    assert relative_error(output(result, arguments), output(sdxl(), arguments)) > 1e-3


# ------------------------------------------------------------------------------------------------ use_rand and seed


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


def test_all_blocks_choose_alike_and_the_grid_is_used_evenly() -> None:
    result = transform(sdxl(), max_downsample=8)
    nodes = [node for t in transformers(result).values() for node in t.graph.nodes if node.target is ops.match]
    seeds = {node.kwargs["seed"] for node in nodes}
    assert len(nodes) == len(blocks(result))
    assert len(seeds) == 1
    pattern = ops.destinations_first(64, 64, 2, 2, seeds.pop(), torch.device("cpu"))[: 32 * 32]
    corner = (pattern // 64 % 2) * 2 + pattern % 2
    share = corner.bincount(minlength=4) / len(corner)
    assert ((share - 0.25).abs() < 4 * math.sqrt(0.25 * 0.75 / len(corner))).all()


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


# ------------------------------------------------------------------------------------------------ features of diffusers


def test_a_controlnet_and_its_unet_run_together() -> None:
    arguments, condition = inputs(sd15()), inputs(controlnet(), seed=1)
    samples = []
    changes: tuple[Callable[[Any], Any], ...] = (copy.deepcopy, transform)
    for change in changes:
        guide, unet = change(controlnet()), change(sd15())
        assert isinstance(guide, ControlNetModel)
        with torch.no_grad():
            down, middle = guide(**condition, return_dict=False)
        extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        samples.append(output(unet, {**arguments, **extra}))
    plain, merged = samples
    assert 1e-3 < relative_error(merged, plain) < 0.3
    assert relative_error(output(sd15(), arguments), plain) > 0.01  # the ControlNet has a say at all


@pytest.mark.parametrize(
    "extra, acts",
    [
        ({"encoder_attention_mask": mask()}, True),
        ({"cross_attention_kwargs": {"scale": 0.5}}, False),  # there is no LoRA to scale
        ({"cross_attention_kwargs": {}}, False),
        ({"timestep": 10}, True),
        ({"timestep": 9.5}, True),
    ],
    ids=["mask", "scale", "empty", "int", "float"],
)
def test_an_optional_input_has_its_effect_and_merging_goes_on(extra: dict[str, Any], acts: bool) -> None:
    model = two_stages()
    arguments = inputs(model)
    result = transform(model, ratio=0.5, use_rand=False)
    without = output(result, arguments)
    for _ in range(2):  # the second call finds the graph that the first one traced
        ours = output(result, {**arguments, **extra})
        assert torch.equal(ours, output(wrapped(model), {**arguments, **extra}))
        assert relative_error(ours, output(model, {**arguments, **extra})) > 1e-3
        assert (relative_error(ours, without) > 1e-3) == acts
    assert torch.equal(output(result, arguments), without)


@pytest.mark.filterwarnings("ignore:`Transformer2DModelOutput` is deprecated:FutureWarning")  # diffusers' own
def test_the_output_is_a_tuple_or_an_output_object_as_asked() -> None:
    result = transform(two_stages())
    arguments = inputs(result)
    with torch.no_grad():
        (sample,) = result(**arguments, return_dict=False)
        assert torch.equal(result(**arguments).sample, sample)
        (transformer, *_) = transformers(result).values()
        image = torch.ones(1, 32, 8, 8)
        (tokens,) = transformer(image, torch.ones(1, 5, 16), return_dict=False)
        assert torch.equal(transformer(image, torch.ones(1, 5, 16)).sample, tokens)


def test_grounded_generation_is_served_by_the_same_model_as_plain_generation() -> None:
    model = gligen()
    arguments = inputs(model)
    grounded = {**arguments, "cross_attention_kwargs": {"gligen": objects()}}
    result = transform(model, ratio=0.5, use_rand=False)
    for _ in range(2):
        for given in (arguments, grounded):
            assert torch.equal(output(result, given), output(wrapped(model), given))
    assert relative_error(output(result, grounded), output(result, arguments)) > 1e-3
    assert torch.equal(output(transform(model, ratio=0), grounded), output(model, grounded))


@pytest.mark.parametrize("options", [{}, {"merge_mlp": True}], ids=str)
def test_the_feed_forward_may_be_chunked_after_the_transform(options: dict[str, Any]) -> None:
    result = transform(two_stages(), ratio=0.5, **options)
    arguments = inputs(result)
    expected = output(result, arguments)
    for size, dim in ((1, 0), (256, 1), (None, 0)):
        for block in blocks(result).values():
            block.set_chunk_feed_forward(size, dim)
        sizes: list[Tensor] = []
        handle = next(iter(blocks(result).values())).ff.register_forward_hook(lambda *a, s=sizes: s.append(a[1][0]))
        assert relative_error(output(result, arguments), expected) < 1e-6
        handle.remove()
        tokens = 512 if options else 1024  # of the first block
        assert len(sizes) == {0: 2, 1: tokens // 256}[dim] if size else 1
        assert sum(s.numel() for s in sizes) == 2 * tokens * 32


def test_chunks_that_do_not_divide_merged_tokens_are_diffusers_error() -> None:
    result = transform(two_stages(), ratio=0.5, merge_mlp=True)
    for block in blocks(result).values():
        block.set_chunk_feed_forward(1024, 1)
    with pytest.raises(ValueError, match="chunk"):
        output(result, inputs(result))


def test_gradients_reach_the_shared_parameters() -> None:
    model = copy.deepcopy(two_stages()).train()
    gradients(transform(model, ratio=0.5, merge_crossattn=True, merge_mlp=True), inputs(model))
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("ratio", [0, 0.5])
def test_gradients_are_those_of_wrapped_children(ratio: float) -> None:
    model = copy.deepcopy(two_stages()).train()
    expected = gradients(wrapped(model, ratio), inputs(model))
    ours = gradients(transform(model, ratio=ratio, use_rand=False), inputs(model))
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        assert relative_error(gradient, expected[name]) < 1e-4, name


@pytest.mark.parametrize("options", [{}, {"merge_crossattn": True, "merge_mlp": True}], ids=str)
def test_gradient_checkpointing_changes_no_gradient(options: dict[str, Any]) -> None:
    model = copy.deepcopy(two_stages()).train()
    arguments = inputs(model)
    result = transform(model, ratio=0.5, **options)
    expected = {name: gradient.clone() for name, gradient in gradients(result, arguments).items()}
    sample = output(result, arguments)
    result.enable_gradient_checkpointing()
    runs = [0]
    (block, *_) = blocks(result).values()
    handle = block.attn1.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    checkpointed = gradients(result, arguments)
    handle.remove()
    assert runs == [2]  # once forward, once again for the backward
    for name, gradient in checkpointed.items():
        assert torch.equal(gradient, expected[name]), name
    assert torch.equal(output(result, arguments), sample)
    result.disable_gradient_checkpointing()
    assert torch.equal(output(result, arguments), sample)


def test_hooks_and_processors_that_were_there_before_go_on_working_for_their_owner() -> None:
    class Telling(AttnProcessor2_0):  # type: ignore[misc]
        def __init__(self, store: list[str]) -> None:
            super().__init__()
            self.store = store

        def hook(self, *_: Any) -> None:
            self.store.append("bound")

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            self.store.append("processor")
            return super().__call__(*args, **kwargs)

    def note(store: list[str], *_: Any) -> None:
        store.append("partial")

    def tell(*_: Any) -> None:
        seen.append("function")

    def count(module: Any, *_: Any) -> None:
        module.calls = getattr(module, "calls", 0) + 1

    seen: list[str] = []
    model = copy.deepcopy(two_stages())
    path, block = next(iter(blocks(model).items()))
    block.attn1.set_processor(Telling(seen))
    block.attn1.register_forward_pre_hook(Telling(seen).hook)
    block.attn1.register_forward_hook(functools.partial(note, seen))
    block.attn1.register_forward_hook(tell)
    block.attn1.register_forward_hook(types.MethodType(count, block))
    result = transform(model)
    tome_fx.explain(result, 8, 8)
    assert not seen, "explain has run what is the user's"
    output(result, inputs(model))
    assert seen == ["bound", "processor", "partial", "function"]
    assert not hasattr(block, "calls"), "a hook that is the model's own counts in the original"
    assert result.get_submodule(path).calls == 1


def test_hooks_and_processors_are_put_on_the_result_without_touching_the_original() -> None:
    model = two_stages()
    arguments = inputs(model)
    with untouched(model):
        result = transform(model, ratio=0.5)
        expected = output(result, arguments)
        add_hook_to_module(result.mid_block, ModelHook())
        assert torch.equal(output(result, arguments), expected)
        result.set_attention_slice(1)
        assert relative_error(output(result, arguments), expected) < 1e-5


# ------------------------------------------------------------------------------------------------ bad arguments


BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"ratio": "0.5"}, TypeError, r"ratio must be a number, got '0\.5' of type str"),
    ({"ratio": None}, TypeError, r"ratio must be a number, got None of type NoneType"),
    ({"ratio": True}, TypeError, r"ratio must be a number, got True of type bool"),
    ({"ratio": torch.tensor(0.5)}, TypeError, r"ratio must be a number, got tensor\(0\.5"),
    ({"ratio": -0.1}, ValueError, r"ratio must be between 0 and 0\.75.*2 x 2; got -0\.1"),
    ({"ratio": 0.76}, ValueError, r"ratio must be between 0 and 0\.75.*2 x 2; got 0\.76"),
    ({"ratio": 0.84, "sx": 3}, ValueError, r"ratio must be between 0 and 0\.8333.*3 x 2; got 0\.84"),
    ({"ratio": 50}, ValueError, r"ratio must be between 0 and 0\.75.*got 50"),
    ({"ratio": math.nan}, ValueError, r"ratio must be between 0 and 0\.75.*got nan"),
    ({"ratio": math.inf}, ValueError, r"ratio must be between 0 and 0\.75.*got inf"),
    ({"max_downsample": 3}, ValueError, r"max_downsample must be None or one of \(1, 2, 4, 8\), got 3"),
    ({"max_downsample": 0}, ValueError, r"max_downsample must be None or one of \(1, 2, 4, 8\), got 0"),
    ({"max_downsample": 2.0}, TypeError, r"max_downsample must be an int, got 2\.0 of type float"),
    ({"max_downsample": True}, TypeError, r"max_downsample must be an int, got True of type bool"),
    ({"sx": 0}, ValueError, r"sx must be at least 1 token, got 0"),
    ({"sy": -2}, ValueError, r"sy must be at least 1 token, got -2"),
    ({"sx": 2.0}, TypeError, r"sx must be an int, got 2\.0 of type float"),
    ({"sy": "2"}, TypeError, r"sy must be an int, got '2' of type str"),
    ({"sx": True}, TypeError, r"sx must be an int, got True of type bool"),
    ({"sx": 1, "sy": 1, "ratio": 0}, ValueError, r"sx and sy of 1 x 1 leave no source to merge"),
    ({"sx": 33}, ValueError, r"sx must be at most 32, .*sample_size of 32; got 33"),
    ({"sy": 64}, ValueError, r"sy must be at most 32, .*sample_size of 32; got 64"),
    ({"use_rand": 1}, TypeError, r"use_rand must be True or False, got 1"),
    ({"use_rand": None}, TypeError, r"use_rand must be True or False, got None"),
    ({"merge_attn": "yes"}, TypeError, r"merge_attn must be True or False, got 'yes'"),
    ({"merge_crossattn": 1}, TypeError, r"merge_crossattn must be True or False, got 1"),
    ({"merge_mlp": 0}, TypeError, r"merge_mlp must be True or False, got 0"),
    ({"merge_attn": False}, ValueError, r"nothing to merge: at least one of merge_attn, merge_crossattn, merge_mlp"),
    ({"seed": -1}, ValueError, r"seed must be between 0 and 2\*\*32 - 1, got -1"),
    ({"seed": 2**32}, ValueError, r"seed must be between 0 and 2\*\*32 - 1, got 4294967296"),
    ({"seed": 1.0}, TypeError, r"seed must be an int, got 1\.0 of type float"),
    ({"seed": None}, TypeError, r"seed must be an int, got None of type NoneType"),
    ({"seed": 1, "use_rand": False}, ValueError, r"seed=1 does nothing with use_rand=False"),
]


@pytest.mark.parametrize("options, error, message", BAD_OPTIONS)
def test_a_bad_option_is_an_error_that_says_which_what_and_what_came(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with untouched(two_stages()), pytest.raises(error, match=message):
        transform(two_stages(), **options)


def test_options_go_by_name_and_an_unknown_one_is_an_error() -> None:
    with pytest.raises(TypeError, match="positional"):
        transform(two_stages(), 0.5, 1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="generator"):
        transform(two_stages(), generator=torch.Generator())  # type: ignore[call-arg]


def test_a_stride_may_be_as_large_as_the_finest_grid_with_attention() -> None:
    with untouched(sdxl()):
        assert isinstance(transform(sdxl(), sx=16, sy=16), UNet2DConditionModel)
        with pytest.raises(ValueError, match=r"sx must be at most 16, .*sample_size of 32; got 17"):
            transform(sdxl(), sx=17)
        with pytest.raises(ValueError, match=r"sy must be at most 16, .*sample_size of 32; got 17"):
            transform(sdxl(), sy=17)


# ------------------------------------------------------------------------------------------------ bad models


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Linear(2, 2), r"got Linear$"),
        (None, r"got NoneType$"),
        (types.SimpleNamespace(unet=None), r"got SimpleNamespace; pass pipe\.unet, not the pipeline$"),
    ],
    ids=["linear", "none", "pipeline"],
)
def test_what_is_not_a_unet_is_a_type_error(model: Any, message: str) -> None:
    with pytest.raises(TypeError, match=r"model must be a UNet2DConditionModel, .*, " + message):
        transform(model)


@pytest.mark.parametrize("build", [sd15, controlnet])
def test_a_model_that_is_transformed_already_is_an_error(build: Callable[[], Any]) -> None:
    result = transform(build(), ratio=0.25)
    with (
        untouched(result),
        pytest.raises(TransformError, match=r"transformed already: .*set_ratio, or transform the original"),
    ):
        transform(result, ratio=0.5)


@compiles
@pytest.mark.parametrize(
    "how, where",
    [
        ("wrapper", r"\(OptimizedModule\)"),
        ("whole", r"\(UNet2DConditionModel\)"),
        ("part", r", at mid_block \(UNetMidBlock2DCrossAttn\)"),
        ("blocks", r", at down_blocks\.0\.attentions\.0\.transformer_blocks\.0 \(BasicTransformerBlock\)"),
    ],
)
def test_a_model_that_is_compiled_already_is_an_error(how: str, where: str) -> None:
    model: Any = copy.deepcopy(two_stages())
    compiled: Any = model
    if how == "wrapper":
        compiled = torch.compile(model, backend="eager")
    elif how == "whole":
        model.compile()
    elif how == "part":
        model.mid_block.compile()
    else:
        model.compile_repeated_blocks()
    before = state(model)
    with pytest.raises(TransformError, match=r"compiled already.*" + where + r".*transform it first, then compile"):
        transform(compiled)
    assert state(model) == before


def test_a_forward_that_is_replaced_on_an_instance_is_an_error() -> None:
    model = copy.deepcopy(two_stages())
    add_hook_to_module(model.mid_block, ModelHook())
    with (
        untouched(model),
        pytest.raises(TransformError, match=r"forward of mid_block \(UNetMidBlock2DCrossAttn\) is repl"),
    ):
        transform(model)


@pytest.mark.parametrize("middle", [None, "UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn"])
def test_a_unet_without_a_block_over_image_tokens_is_an_error(middle: str | None) -> None:
    model = UNet2DConditionModel(
        block_out_channels=(8, 8),
        norm_num_groups=2,
        layers_per_block=1,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        mid_block_type=middle,
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    before = state(model)
    with pytest.raises(
        TransformError, match=r"no transformer block over image tokens in UNet2DCond.*DownBlock2D.*UpBl"
    ):
        transform(model)
    assert state(model) == before


def test_levels_that_hold_no_block_are_an_error() -> None:
    message = (
        r"max_downsample=1 reaches no block of UNet2DConditionModel: its finest attention.* of 2; pass max_downsample=2"
    )
    with untouched(sdxl()), pytest.raises(TransformError, match=message):
        transform(sdxl(), max_downsample=1)


# ------------------------------------------------------------------------------------------------ calls that cannot be


@compiles
@pytest.mark.supports(
    "Optional inputs", "attention_mask", "works with a condition", "merge_attn=False, or a ratio of 0"
)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_mask_over_merged_tokens_is_an_error_when_called(compiled: bool) -> None:
    result: Any = transform(two_stages(), ratio=0.5)
    arguments = inputs(result)
    expected = output(result, arguments)
    model = torch.compile(result, backend="eager", fullgraph=True) if compiled else result
    try:
        with pytest.raises(
            Exception, match=r"attention_mask was given to attn1.*merge_attn=True.*merge_attn=False"
        ) as info:
            output(model, {**arguments, "attention_mask": torch.ones(2, 1024)})
    finally:
        torch._dynamo.reset()
    assert compiled or info.type is TransformError
    assert torch.equal(output(result, arguments), expected)


def test_a_mask_over_tokens_that_are_not_merged_is_served() -> None:
    model = two_stages()
    result = transform(model, merge_attn=False, merge_mlp=True, ratio=0)
    path, stock = next(iter(blocks(model).items()))
    block = result.get_submodule(path)
    assert isinstance(block, BasicTransformerBlock)
    tokens, text = torch.ones(2, 64, 32).cumsum(1), torch.ones(2, 5, 16)
    mask = torch.zeros(2, 1, 64).index_fill(2, torch.arange(9), -10000.0)
    with torch.no_grad():
        ours = block(tokens, attention_mask=mask, encoder_hidden_states=text)
        assert torch.equal(ours, stock(tokens, attention_mask=mask, encoder_hidden_states=text))


def test_the_package_says_what_it_offers() -> None:
    assert all(hasattr(tome_fx, name) for name in tome_fx.__all__)
    assert tome_fx.transform is transform


def test_a_lora_loaded_into_the_result_acts_there_and_leaves_the_original_alone() -> None:
    lora = LoraConfig(r=2, target_modules=["to_q", "proj_in", "ff.net.0.proj"], init_lora_weights=False)
    original, arguments = two_stages(), inputs(two_stages())
    before = output(original, arguments)
    loaded = transform(original, use_rand=False)
    loaded.add_adapter(lora)
    assert torch.equal(output(original, arguments), before)
    assert not any("lora" in name for name, _ in original.named_modules())
    stock = copy.deepcopy(original)
    stock.add_adapter(lora)
    stock.load_state_dict(loaded.state_dict())
    assert torch.equal(output(loaded, arguments), output(transform(stock, use_rand=False), arguments))
    assert relative_error(output(loaded, arguments), output(transform(original, use_rand=False), arguments)) > 1e-3


def test_encoder_states_may_be_a_tuple_and_reach_cross_attention_whole() -> None:
    seen = []

    class Whole(AttnProcessor2_0):  # type: ignore[misc]
        def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **kwargs: Any) -> Any:
            if isinstance(encoder_hidden_states, tuple):
                seen.append(len(encoder_hidden_states))
                encoder_hidden_states = encoder_hidden_states[0]
            return super().__call__(attn, hidden_states, encoder_hidden_states, **kwargs)

    model, arguments = transform(two_stages()), inputs(two_stages())
    expected = output(model, arguments)
    model.set_attn_processor(Whole())
    text = arguments["encoder_hidden_states"]
    assert torch.equal(output(model, {**arguments, "encoder_hidden_states": (text, [text])}), expected)
    assert seen == [2] * len(blocks(model))


def test_ip_adapter_masks_with_merged_cross_attention_are_an_error() -> None:
    masks = {"cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 1, 32, 32)]}}
    with pytest.raises(TransformError, match=r"ip_adapter_masks was given to attn2.*merge_crossattn=False"):
        output(transform(two_stages(), merge_crossattn=True), {**inputs(two_stages()), **masks})


@pytest.mark.supports(
    "Optional inputs", "attention_mask", "works with a condition", "merge_attn=False, or a ratio of 0"
)
def test_ratio_0_serves_a_mask_as_the_original_does() -> None:
    tokens = one_stage()
    arguments = {**inputs(tokens), "attention_mask": torch.ones(2, 32 * 32)}
    assert torch.equal(output(transform(tokens, ratio=0), arguments), output(tokens, arguments))


def test_proportional_attention_to_the_prompt_is_an_error() -> None:
    model = UNet2DConditionModel.from_config(two_stages().config, only_cross_attention=(True, False))
    with pytest.raises(TransformError, match=r"attends to the prompt in a block of only_cross_attention.*prop_attn=Tr"):
        transform(model, prop_attn=True)
    output(transform(model), inputs(model, 16, 16))


def test_a_module_that_is_not_there_to_merge_around_is_an_error() -> None:
    model = copy.deepcopy(two_stages())
    for block in blocks(model).values():
        block.attn2 = None
    transform(model)
    with pytest.raises(TransformError, match="expected one call each of attn1, attn2, found calls of attn1, ff"):
        transform(model, merge_crossattn=True)


def test_the_graph_in_the_readme_is_the_one_that_is_printed() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    shown = re.findall(r"^    (?:norm1|merge|attn1|unmerge|add) = .*$", readme, re.MULTILINE)
    block = next(iter(blocks(transform(two_stages())).values()))
    printed = block.graph.python_code("self").src.splitlines()
    assert len(shown) == 5
    assert all(line in printed for line in shown)

"""What `transform` makes is what the stock model makes with wrapped children, bit for bit: fx is kept honest.

The oracle (`support.wrapped`) runs diffusers' own forwards and traces nothing, so that what a graph might freeze, drop
or reorder is seen here, over models, kinds of calls and options. It is itself held to tomesd, without any of ours.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import tomesd
import torch
from diffusers import UNet2DConditionModel
from support.models import (
    clips,
    controlnet,
    gligen,
    inputs,
    mask,
    motion,
    objects,
    one_stage,
    output,
    relative_error,
    sd15,
    sd21,
    sdxl,
    two_stages,
)
from support.wrapped import wrapped
from torch import Tensor
from torch.utils._pytree import tree_leaves

import tome_fx
from tome_fx import transform

Build = Callable[[], Any]
SIZE = 17, 24  # an odd side, and an aspect that is not square


@functools.cache
def conditioned() -> UNet2DConditionModel:
    """`two_stages()` with classes, and an embedding of the guidance as consistency models have one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel.from_config(two_stages().config, num_class_embeds=2, time_cond_proj_dim=8).eval()


MODELS: dict[str, Build] = {
    build.__name__: build for build in (two_stages, sdxl, conditioned, sd15, sd21, gligen, controlnet, motion, clips)
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "ratio-0": {"ratio": 0},
    "ratio-0.25": {"ratio": 0.25},
    "ratio-0.75": {"ratio": 0.75},
    "down-to-2": {"max_downsample": 2},
    "down-to-8": {"max_downsample": 8},
    "flat": {"sx": 3, "sy": 1},
    "large": {"sx": 4, "sy": 4, "ratio": 0.9},
    "random": {"use_rand": True},
    "seeded": {"use_rand": True, "seed": 7},
    "crossattn": {"merge_crossattn": True},
    "mlp-alone": {"merge_attn": False, "merge_mlp": True},
    "everything": {"merge_crossattn": True, "merge_mlp": True, "max_downsample": 8},
    "tiles-of-4": {"tile": 4},
    "tiles-of-6": {"tile": 6},
    "plain": {"prop_attn": False},
    "each-block": {"share_match": False, "max_downsample": 8},
    "keys": {"merge_queries": False},
    "keys-unweighed": {"merge_queries": False, "prop_attn": False},
    "blocks": {"merge_block": True},
    "blocks-unweighed": {"merge_block": True, "prop_attn": False},
    "blocks-down-to-8": {"merge_block": True, "max_downsample": 8},
    "blocks-each-by-itself": {"merge_block": True, "max_downsample": 8, "share_match": False},
    "tomesd": tome_fx.TOMESD,
    "dynamic": {"dynamic_ratio": True},
    "dynamic-0": {"dynamic_ratio": True, "ratio": 0},
    "dynamic-everything": {"dynamic_ratio": True, "ratio": 0.3, "merge_crossattn": True, "merge_mlp": True},
}
FAST = ("two_stages",)
STACKED = ("each-block", "blocks-each-by-itself")  # options that say something where transformers have several blocks


def agree(ours: Any, expected: Any) -> bool:
    """Whether two outputs are of one type and hold the same tensors, bit for bit."""
    assert type(ours) is type(expected)
    pairs = list(zip(tree_leaves(ours), tree_leaves(expected), strict=True))
    assert all(isinstance(tensor, Tensor) and tensor.isfinite().all() for pair in pairs for tensor in pair)
    return bool(pairs) and all(torch.equal(*pair) for pair in pairs)


def each(slow: Callable[[str, str], bool], names: dict[str, Any]) -> list[Any]:
    """Every model with each of the names, those that are slow marked."""
    return [
        pytest.param(build, name, id=f"{model}-{name}", marks=[pytest.mark.slow] if slow(model, name) else [])
        for model, build in MODELS.items()
        for name in names
    ]


@pytest.mark.parametrize(
    "build, name",
    each(
        lambda model, name: not (model in FAST or name == "default" or (model == "sdxl" and name in STACKED)), OPTIONS
    ),
)
def test_options_act_as_in_the_stock_model_with_wrapped_children(build: Build, name: str) -> None:
    model, options = build(), {"use_rand": False, "tile": 16, **OPTIONS[name]}
    arguments = inputs(model, *SIZE)
    ours = output(transform(model, **options), arguments)
    assert torch.equal(ours, output(wrapped(model, **options), arguments))
    assert (relative_error(ours, output(model, arguments)) > 1e-4) == (options.get("ratio") != 0)


@pytest.mark.slow
def test_every_option_changes_what_the_oracle_makes() -> None:
    builds = sd15, sdxl  # four levels of one block to a transformer, and two of several
    made = {
        name: [output(wrapped(build(), **options), inputs(build(), *SIZE)) for build in builds]
        for name, options in OPTIONS.items()
    }

    def differ(one: str, other: str) -> list[float]:
        return [relative_error(*pair) for pair in zip(made[one], made[other], strict=True)]

    for same, other in (("dynamic", "default"), ("dynamic-0", "ratio-0")):
        assert max(differ(same, other)) < 1e-5
        del made[same]
    for i, one in enumerate(made):
        assert all(max(differ(one, other)) > 1e-4 for other in list(made)[:i]), one


@pytest.mark.parametrize(
    "build, name", each(lambda model, _: model not in FAST, dict.fromkeys(("0.25", "0.5", "0.75")))
)
def test_proportional_attention_is_that_to_every_token_in_the_place_of_its_slots_mean(build: Build, name: str) -> None:
    model, ratio = build(), float(name)
    arguments = inputs(model, *SIZE)
    plain, ours = (output(transform(model, ratio, use_rand=False, prop_attn=p), arguments) for p in (False, True))
    assert relative_error(ours, output(wrapped(model, ratio, copies=True), arguments)) < 1e-5
    assert relative_error(ours, plain) > 1e-4


# ------------------------------------------------------------------------------------------------ kinds of calls


def positional(arguments: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """All arguments that every model has go by position, as some pipelines and tomesd's users give them."""
    order = ("sample", "timestep", "encoder_hidden_states")
    return tuple(arguments.pop(name) for name in order), arguments


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tuple": {"return_dict": False},
    "mask": {"encoder_attention_mask": mask()},
    "mask-of-bools": {"encoder_attention_mask": mask().bool()},
    "keywords": {"cross_attention_kwargs": {"scale": 0.5}},
    "no-keywords": {"cross_attention_kwargs": {}},
    "objects": {"cross_attention_kwargs": {"gligen": objects()}},
    "mask-and-keywords": {"encoder_attention_mask": mask(), "cross_attention_kwargs": {"scale": 2.0}},
    "classes": {"class_labels": torch.tensor([1, 0])},
    "guidance": {"timestep_cond": torch.ones(2, 8)},
    "int": {"timestep": 10},
    "float": {"timestep": 9.5},
    "times": {"timestep": torch.tensor([10, 900])},
    "scale": {"conditioning_scale": 0.3, "guess_mode": True},
}


def takes(build: Build, name: str) -> bool:
    """Whether a call of this kind means something to the model."""
    if name in ("objects", "classes", "guidance"):
        return build is (gligen if name == "objects" else conditioned)
    known = inspect.signature(build().forward).parameters
    return set(CALLS[name]) <= {*known}


def calls() -> list[Any]:
    return [p for p in each(lambda model, name: model not in FAST and name != "tuple", CALLS) if takes(*p.values)]


@pytest.mark.parametrize("by_position", [False, True], ids=["keyword", "positional"])
@pytest.mark.parametrize("build, name", calls())
def test_any_kind_of_call_gives_what_the_stock_model_gives_with_wrapped_children(
    build: Build, name: str, by_position: bool
) -> None:
    model = build()
    needed = {"class_labels": torch.tensor([0, 0])} if build is conditioned else {}
    arguments = {**inputs(model, *SIZE), **needed, **CALLS[name]}
    args, kwargs = positional(arguments) if by_position else ((), arguments)
    result = transform(model, 0.5, use_rand=False)
    with torch.no_grad():
        expected = wrapped(model)(*args, **kwargs)
        for _ in range(2):  # a kind of call is traced when it comes first, and found when it comes again
            assert agree(result(*args, **kwargs), expected)
        assert not agree(model(*args, **kwargs), expected)


def test_every_kind_of_call_is_made_of_some_model() -> None:
    assert {name for _, name in (p.values for p in calls())} == set(CALLS)


@pytest.mark.parametrize("build", [two_stages, gligen])
def test_kinds_of_calls_that_take_turns_do_not_disturb_one_another(build: Build) -> None:
    model = build()
    result, oracle = transform(model, 0.5, use_rand=False), wrapped(model)
    names = [name for name in CALLS if takes(build, name)]
    with torch.no_grad():
        for name in [*names, *reversed(names)]:
            arguments = {**inputs(model, *SIZE), **CALLS[name]}
            assert agree(result(**arguments), oracle(**arguments)), name


def test_a_mask_over_tokens_reaches_self_attention_that_is_not_merged() -> None:
    model, options = one_stage(), {"merge_attn": False, "merge_mlp": True}
    height, width = SIZE
    hidden = torch.ones(2, height * width).index_fill(1, torch.arange(9), 0)
    arguments = {**inputs(model, *SIZE), "attention_mask": hidden}
    ours = output(transform(model, use_rand=False, **options), arguments)
    assert torch.equal(ours, output(wrapped(model, **options), arguments))
    assert relative_error(ours, output(wrapped(model, **options), inputs(model, *SIZE))) > 1e-4


# ------------------------------------------------------------------------------------------------ the oracle itself


@pytest.mark.parametrize("options", [{}, {"merge_crossattn": True, "merge_mlp": True}], ids=["attn", "everything"])
@pytest.mark.parametrize("build", [sd15, sd21, two_stages])
def test_the_oracle_agrees_with_tomesd_to_the_last_digits(build: Build, options: dict[str, bool]) -> None:
    model = copy.deepcopy(build()).double()
    arguments = inputs(model)
    theirs = output(tomesd.apply_patch(copy.deepcopy(model), 0.4, use_rand=False, **options), arguments)
    assert relative_error(output(wrapped(model, 0.4, **tome_fx.TOMESD, **options), arguments), theirs) < 1e-12


def test_the_oracle_keeps_names_and_types_and_leaves_the_model_given_as_it_is() -> None:
    model = two_stages()
    before = {path: type(module) for path, module in model.named_modules()}
    result = wrapped(model, merge_crossattn=True, merge_mlp=True)
    assert {path: type(module) for path, module in model.named_modules()} == before
    assert list(result.state_dict()) == list(model.state_dict())
    for path, module in result.named_modules():
        assert isinstance(module, before[path])
        assert type(module).__name__ == before[path].__name__


@pytest.mark.parametrize("ratio", [0, 0.25, 0.5])
def test_one_match_for_the_blocks_of_a_transformer_is_what_the_oracle_makes_of_it(ratio: float) -> None:
    arguments = inputs(sdxl())
    options: dict[str, Any] = {"max_downsample": 8, "use_rand": False}
    once, each_block = (
        output(transform(sdxl(), ratio, share_match=share_match, **options), arguments) for share_match in (True, False)
    )
    assert torch.equal(once, output(wrapped(sdxl(), ratio, share_match=True, **options), arguments))
    assert torch.equal(once, each_block) == (ratio == 0)

"""The oracle: diffusers' own forwards with merging around the children of each block, and no graph anywhere.

`transform` must equal it bit for bit. Only the operations on tokens, the arithmetic of the grid and the list of sites
are shared with it.

A child is wrapped by a subclass of its own class, which merges in `__call__`, and not by a module around it: names,
attributes and types stay what diffusers, peft, accelerate and torchao look for, so that any feature can be switched on
before or after. It is `__call__` and not `forward` or a hook, since what users put on `attn1` sees merged tokens.
"""

import copy
from collections import defaultdict
from dataclasses import replace
from typing import Any

from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import Tensor, nn

from tome_fx import ops
from tome_fx.families.unet import merged_sites
from tome_fx.plan import Grid, Plan

# What a block calls that each option merges around
CHILDREN = {"merge_attn": "attn1", "merge_crossattn": "attn2", "merge_mlp": "ff"}


def wrapped(model: Any, ratio: float = 0.5, *, copies: bool = False, **options: Any) -> Any:
    """A copy of the model that merges as `transform` of the same options does.

    Destinations are the top left tokens if not asked otherwise. With `copies` keys and values are the means in the
    place of all tokens and nothing is weighed, which is what weights stand for.
    """
    result, plan = copy.deepcopy(model), Plan(ratio, **{"use_rand": False, **options})
    # The grid of a transformer's image and the slot map of its blocks' tokens, one of each for all or for each block.
    seen: dict[str, dict[str, Any]] = defaultdict(dict)
    for site in merged_sites(model, plan) if plan.matches else []:
        key = site.transformer if plan.share_match else site.path
        first = key not in seen
        transformer, block = result.get_submodule(site.transformer), result.get_submodule(site.path)
        _wrap_site(transformer, block, plan, seen[key], first, copies)
    return result


def _wrap_site(transformer: Any, block: Any, plan: Plan, seen: dict[str, Any], first: bool, copies: bool) -> None:
    def measure(call: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.clear()
        height, width = hidden_states.shape[-2:]
        seen["grid"] = Grid(height, width, plan.sx, plan.sy, plan.ratio, plan.dynamic_ratio)
        return call(hidden_states, *args, **kwargs)

    def match(call: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        grid = seen["grid"]
        options = {"kept": grid.kept, "sx": plan.sx, "sy": plan.sy, "seed": plan.cell_seed, "tile": plan.tile}
        if first:  # again where checkpointing calls it again, which no stack of several merged blocks would bear
            seen["slots"] = ops.match(hidden_states, grid.height, grid.width, **options)
            seen["first"] = hidden_states
            seen["merged"] = seen["now"] = ops.merge(hidden_states, seen["slots"])
        return call(hidden_states, *args, **kwargs)

    def merge(call: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        tokens = ops.merge(hidden_states, seen["slots"])
        return ops.unmerge(call(tokens, *args, **kwargs), seen["slots"])

    def merge_attention(call: Any, hidden_states: Tensor, *_: Any, **kwargs: Any) -> Any:
        tokens = ops.merge(hidden_states, seen["slots"])
        if copies:
            kwargs["encoder_hidden_states"] = ops.unmerge(tokens, seen["slots"])
        elif weighed(block.attn1):
            kwargs["attention_mask"] = ops.log_sizes(hidden_states, seen["slots"], block.attn1.heads)
        if plan.merge_queries:
            return ops.unmerge(call(tokens, **kwargs), seen["slots"])
        return call(hidden_states, **{**kwargs, "encoder_hidden_states": tokens})

    def merge_block(call: Any, hidden_states: Tensor, *_: Any, **kwargs: Any) -> Any:
        if weighed(block.attn1):
            kwargs["attention_mask"] = ops.log_sizes(hidden_states, seen["slots"], block.attn1.heads)
        seen["now"] = call(seen["now"], **kwargs)
        return seen["first"] + ops.unmerge(seen["now"] - seen["merged"], seen["slots"])

    def weighed(attention: Any) -> bool:
        known = type(attention.processor).__module__.startswith("diffusers.")
        mixes = "PAG" in type(attention.processor).__name__
        own = known and not mixes and not block.only_cross_attention
        return own if plan.prop_attn is None else plan.prop_attn

    known = TransformerBlockRegistry.get(type(block))  # where layer skipping looks up what a block returns
    _wrap(transformer, measure)
    if plan.merge_block:
        _wrap(block, merge_block)
    _wrap(block, match)
    TransformerBlockRegistry.register(type(block), replace(known, _cached_parameter_indices=None))
    for option, child in CHILDREN.items():
        if getattr(plan, option) and not plan.merge_block:
            _wrap(block.get_submodule(child), merge_attention if child == "attn1" else merge)


def _wrap(module: nn.Module, around: Any) -> None:
    """Have every call of the module go through `around`, which is given what it may call and the arguments."""
    cls = type(module)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(lambda *given, **named: cls.__call__(self, *given, **named), *args, **kwargs)

    module.__class__ = type(cls.__name__, (cls,), {"__call__": __call__, "__module__": cls.__module__})

"""Diffusion transformers: attention or whole blocks run on merged tokens, by the graph of the model's own forward.

What differs between models and their blocks is data (facts.py, blocks.py). Where whole blocks are merged they are left
as they are, so that adapters, processors, hooks and compilation by blocks are none of merging's business.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from tome_fx.families.blocks import BLOCKS, Block
from tome_fx.families.facts import CANNOT, FACTS, Facts
from tome_fx.families.levels import Level
from tome_fx.families.refusals import CheckBlock, CheckMergedStack, CheckStack
from tome_fx.families.sites import Site
from tome_fx.families.unet import register_for_layer_skipping
from tome_fx.families.weights import WEIGH, WeighingProcessor, why_unweighed_by_default
from tome_fx.graph.calls import positional
from tome_fx.graph.rewrite import MatchPass, MergePass, StackPass
from tome_fx.graph.scopes import Matching, Scope, Stack
from tome_fx.graph.specialize import Check, Pass, specialize
from tome_fx.graph.structure import kind
from tome_fx.plan import MERGING, PARTS, Plan, TransformError

NAMES = tuple(FACTS)
TOKENS = "hidden_states"
EXAMPLE = 16  # latents along a side of the image that is traced first; any would do


def serves(model: object) -> bool:
    """Whether the model is one of these.

    Raises:
        TransformError: It is a transformer that cannot have merged tokens.
    """
    names = _names_in_diffusers(model)
    for name in names & CANNOT.keys():
        raise TransformError(f"{name} cannot have merged tokens: {CANNOT[name]}")
    return not names.isdisjoint(FACTS)


def example_inputs(
    model: nn.Module,
    height: int,
    width: int,
    *,
    batch: int = 2,
    text_tokens: int | None = None,
    frames: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Random arguments for a forward of the model, such as a pipeline would give it.

    Args:
        model: One of these.
        height: Latent rows.
        width: Latent columns.
        batch: Images.
        text_tokens: Length of the prompt; None for that which the model's pipelines give it.
        frames: Latent frames of a video; None for as many as the model's pipelines make. Not for models of images.
        device: Of the tensors; "meta" for shapes alone.
        dtype: Of the tensors.

    Raises:
        ValueError: A side is no whole number of tokens.
    """
    facts = _facts(model)
    for name, size in (("height", height), ("width", width)):
        if size % facts.downsample(model):
            raise ValueError(
                f"{name} must be a multiple of {facts.downsample(model)}, the latents of a token of "
                f"{type(model).__name__}; got {size}"
            )

    def random(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, device=device, dtype=dtype)

    more = {"frames": facts.frames if frames is None else frames} if facts.frames else {}
    return facts.inputs(model, height, width, facts.text if text_tokens is None else text_tokens, random, **more)


def merged_sites(model: nn.Module, plan: Plan) -> list[Site]:
    """Every block over image tokens.

    Raises:
        TransformError: The plan asks for what transformers cannot do.
        ValueError: An option would do nothing.
    """
    facts = _facts(model)
    _refuse_options(model, facts, plan)
    config: Any = model.config
    channels = config.num_attention_heads * config.attention_head_dim
    frames = max(1, facts.frames // facts.patch(model)[0])
    return [Site("", path, facts.downsample(model), channels, frames) for path in _blocks(model, facts)]


def levels(model: nn.Module, plan: Plan) -> list[Level]:
    """None: all blocks of a transformer have the same tokens, and are merged in."""
    return []


def merged_around(plan: Plan) -> tuple[str, ...]:
    """What the plan merges around, in words: parts of a block, or the block."""
    parts = tuple(part.removeprefix("merge_") for part in PARTS if getattr(plan, part))
    return ("block",) if plan.merge_block else parts


def rewritten_classes(model: nn.Module, plan: Plan) -> dict[str, type[nn.Module]]:
    """The new class of the model itself, whose path is empty, and of its blocks where parts of them are merged.

    Raises:
        TransformError: The plan asks for what transformers cannot do, or the model cannot be traced.
        ValueError: An option would do nothing.
    """
    facts = _facts(model)
    blocks = tuple(site.block for site in merged_sites(model, plan))
    stack = _stack(model, facts, blocks, plan)
    matching = Matching(plan.sx, plan.sy, plan.cell_seed, plan.tile, once=plan.share_match)
    rewrite: Pass = MatchPass(stack, matching)
    check: Check = CheckStack(blocks)
    if plan.merge_block:
        rewrite = StackPass(stack, matching, WEIGH[plan.prop_attn])
        check = CheckTransformer(blocks, facts.attention, bool(plan.prop_attn))
    classes = {} if plan.merge_block else {block: _rewritten_block(model, block, facts, plan) for block in blocks}
    register_for_layer_skipping(set(classes.values()))
    inputs = example_inputs(model, EXAMPLE, EXAMPLE, device="meta")
    classes[""] = specialize(
        model,
        rewrite,
        example={**{name: kind(value) for name, value in inputs.items()}, "return_dict": False},  # as pipelines call it
        calls=facts.calls,
        reads=facts.reads,
        returns=facts.returns,
        check=check,
    )
    return classes


def _stack(model: nn.Module, facts: Facts, blocks: tuple[str, ...], plan: Plan) -> Stack:
    """The blocks of the model, as a pass for the whole of them or for what they hand on to their parts needs them."""
    modules = [model.get_submodule(block) for block in blocks]
    texts: list[str | None] = [TOKENS if block.rpartition(".")[0] in facts.joint else None for block in blocks]
    if not plan.merge_block:
        known = [_known(module, block) for module, block in zip(modules, blocks, strict=True)]
        texts = [text or kind_of_block.text for text, kind_of_block in zip(texts, known, strict=True)]
    return Stack(
        blocks,
        tokens=TOKENS,
        arguments=tuple(map(positional, modules)),
        grid_inputs=facts.grid_inputs,
        grid=facts.grid,
        grid_arguments=() if facts.line else facts.patch(model),
        line=facts.line,
        frames=bool(facts.frames),
        ratio=f"{MERGING}.ratio",
        result=facts.result_of(model),
        adapted=facts.adapted_for(plan),
        weights=facts.weights,
        attention=facts.attention[0],
        per_token=facts.per_token if plan.merge_block or facts.weigh else (),  # other blocks refuse for themselves
        option="merge_block" if plan.merge_block else "merge_attn",
        skips=True,  # as skip_layers of Stable Diffusion 3 does
        texts=tuple(texts),
    )


def _rewritten_block(model: nn.Module, path: str, facts: Facts, plan: Plan) -> type[nn.Module]:
    """The new class of a block in parts of which tokens are merged."""
    block = model.get_submodule(path)
    known = _known(block, path)
    scopes = known.scopes_in(block, plan)
    weigh = WEIGH[plan.prop_attn] if facts.weights else None
    return specialize(
        block,
        MergePass(scopes, plan.merge_queries, weigh),
        example=known.example,
        calls=("_chunked_feed_forward",),
        counts=known.counts,
        check=CheckBlock(scopes, plan.merge_queries, weigh=bool(plan.prop_attn)),
    )


def weighing_processors(model: nn.Module, plan: Plan) -> dict[str, WeighingProcessor]:
    """Processors for self-attention that has diffusers' own and weighs merged tokens, by its path in the model."""
    facts = _facts(model)
    if plan.prop_attn is False or facts.weights is None or not (plan.merge_attn or plan.merge_block):
        return {}
    paths = [f"{path}.{facts.attention[0]}" for path in _blocks(model, facts)]
    own = [path for path in paths if type(getattr(model.get_submodule(path), "processor", None)) is AttnProcessor2_0]
    return {path: WeighingProcessor() for path in own}


def why_unweighed(model: nn.Module, site: Site) -> str:
    """Why merged tokens are not weighed in a block where nobody has asked for it; empty where they are."""
    facts = _facts(model)
    attention = model.get_submodule(f"{site.path}.{facts.attention[0]}")
    reason = facts.unweighed or why_unweighed_by_default(attention)
    return f"{type(getattr(attention, 'processor', None)).__name__} {reason}" if reason else ""


def plain_processor(model: nn.Module, attention: Any) -> object:
    """The processor that attention of the model has when nobody has put in another."""
    own = getattr(attention, "_default_processor_cls", None)
    if own is None:
        module, _, name = _facts(model).processor.rpartition(".")
        own = getattr(importlib.import_module(f"diffusers.models.{module}"), name)
    return own()


@dataclass(frozen=True)
class CheckTransformer:
    """Called before the forward of a transformer: refuses what cannot be around merged tokens, where there are any.

    Args:
        blocks: Names of its blocks.
        attention: Names of the attention in a block; the first of them is that whose keys are merged.
        weigh: Whether weights were asked for, so that what cannot weigh is refused.
    """

    blocks: tuple[str, ...]
    attention: tuple[str, ...]
    weigh: bool = False

    def __call__(self, model: nn.Module) -> None:
        """Look at the blocks and their attention.

        Raises:
            TransformError: A hook or a processor keeps what it saw, or leaves out the weights.
        """
        first, *others = (Scope(name, tokens=TOKENS, option="merge_block") for name in self.attention)
        scopes = (replace(first, weights="attention_mask"), *others)
        CheckMergedStack(self.blocks, scopes, self.weigh)(model)


def _names_in_diffusers(model: object) -> set[str]:
    """Names of the classes of diffusers that the model is of."""
    return {cls.__name__ for cls in type(model).__mro__ if cls.__module__.partition(".")[0] == "diffusers"}


def _facts(model: nn.Module) -> Facts:
    return next(facts for name, facts in FACTS.items() if name in _names_in_diffusers(model))


def _known(block: nn.Module, path: str) -> Block:
    for name in _names_in_diffusers(block) & BLOCKS.keys():
        return BLOCKS[name]
    raise TransformError(
        f"parts of a block are merged in {', '.join(BLOCKS)}, and {path} is a {type(block).__name__}: pass "
        "merge_block=True, which merges around whole blocks"
    )


def _blocks(model: nn.Module, facts: Facts) -> Iterator[str]:
    for name in facts.blocks:
        for number, _ in model.get_submodule(name).named_children():
            yield f"{name}.{number}"


def _refuse_options(model: nn.Module, facts: Facts, plan: Plan) -> None:
    name = type(model).__name__
    config: Any = model.config
    for setting, reason in facts.cannot:
        if value := config.get(setting):
            raise TransformError(f"{name} with {setting}={value!r} cannot have merged tokens: {reason}")
    if not plan.merge_block:
        _refuse_parts(model, facts, plan)
    if plan.max_downsample is not None:
        raise ValueError(
            f"max_downsample={plan.max_downsample!r} does nothing in {name}, whose tokens are all of one level; "
            "leave it out"
        )
    if plan.prop_attn and facts.unweighed:
        raise TransformError(f"attention of {name} {facts.unweighed}: prop_attn=True cannot be served. Leave it out")


def _refuse_parts(model: nn.Module, facts: Facts, plan: Plan) -> None:
    """Refuse parts that blocks do not have, or that cannot be merged by themselves."""
    name = type(model).__name__
    scopes = [scope for path in _blocks(model, facts) for scope in _known(model.get_submodule(path), path).scopes]
    there = sorted({scope.option for scope in scopes})
    for option in PARTS:
        if getattr(plan, option) and option not in there:
            raise ValueError(
                f"{option}=True does nothing in {name}, in whose blocks tokens are merged by {', '.join(there)} alone; "
                "leave it out, or pass merge_block=True, which merges around whole blocks"
            )
    if not plan.merge_queries and not any(scope.keys for scope in scopes):
        raise TransformError(
            f"attention of {name} takes keys and values from the tokens that attend: merge_queries=False cannot be "
            "served. Leave it out"
        )

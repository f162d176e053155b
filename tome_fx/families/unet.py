"""UNets and ControlNets: where their image tokens are, what of them is copied, and how their blocks are rewritten."""

import contextlib
import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any, TypeVar

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnAddedKVProcessor2_0, AttnProcessor2_0
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.unets.unet_3d_condition import UNet3DConditionModel
from diffusers.models.unets.unet_motion_model import UNetMotionModel
from torch import nn

from tome_fx import ops
from tome_fx.families import inputs
from tome_fx.families.levels import Level, levels_of
from tome_fx.families.refusals import CheckBlock, CheckMergedStack, CheckStack
from tome_fx.families.sites import Site as Site
from tome_fx.families.weights import WEIGH, WeighingProcessor, why_unweighed_by_default
from tome_fx.graph.calls import positional
from tome_fx.graph.rewrite import MatchPass, MergePass, StackPass
from tome_fx.graph.scopes import Matching, Scope, Stack
from tome_fx.graph.specialize import specialize
from tome_fx.plan import MERGING, Plan, TransformError, downsampled

VIDEO = (UNetMotionModel, UNet3DConditionModel)  # frames of a clip, which are a batch of images to what is rewritten
MODELS = (UNet2DConditionModel, ControlNetModel, *VIDEO)
NAMES = tuple(model.__name__ for model in MODELS)
Model = TypeVar("Model", bound=nn.Module)

# The modules of a BasicTransformerBlock that may see merged tokens, in the order in which they run.
SCOPES = (
    Scope(
        "attn1",
        tokens="hidden_states",
        keys="encoder_hidden_states",
        weights="attention_mask",
        per_token=("attention_mask",),
        option="merge_attn",
    ),
    Scope(
        "attn2",
        tokens="hidden_states",
        per_token=("ip_adapter_masks",),
        option="merge_crossattn",
    ),
    Scope("ff", tokens="hidden_states", option="merge_mlp"),
)
BLOCK = tuple(replace(scope, option="merge_block") for scope in SCOPES)  # the same, where whole blocks see them


def serves(model: object) -> bool:
    """Whether the model is one of these."""
    return isinstance(model, MODELS)


def example_inputs(model: nn.Module, height: int, width: int, **options: Any) -> dict[str, Any]:
    """Random arguments for a forward of the model; of a clip one frame, if not asked otherwise. See inputs.py."""
    frames = 1 if isinstance(model, VIDEO) else None
    return inputs.example_inputs(model, height, width, **{"frames": frames, **options})


def find_sites(model: nn.Module) -> list[Site]:
    """Every block over image tokens, in the order of `model.named_modules()`."""
    sites: list[Site] = []
    for prefix, stage, downsample in _stages(model):
        for path, transformer in stage.named_modules(prefix=prefix):
            if isinstance(transformer, Transformer2DModel) and transformer.is_input_continuous:
                for i, block in enumerate(transformer.transformer_blocks):
                    if isinstance(block, BasicTransformerBlock):
                        sites.append(Site(path, f"transformer_blocks.{i}", downsample, block.dim))
    return sites


def merged_sites(model: nn.Module, plan: Plan) -> list[Site]:
    """The sites that the plan reaches.

    Raises:
        TransformError: The plan reaches no block of the model.
    """
    sites = find_sites(model)
    merged = {level.downsample for level in levels(model, plan) if level.merged} if sites else set()
    if not sites or _namesakes(model):
        found = sorted({type(stage).__name__ for _, stage, _ in _stages(model)})
        raise TransformError(
            f"found {'not every' if sites else 'no'} transformer block over image tokens in {type(model).__name__}: "
            f"expected a BasicTransformerBlock in a Transformer2DModel, found the stages {', '.join(found)}"
            f"{_namesakes(model)}"
        )
    return [site for site in sites if site.downsample in merged]


def levels(model: nn.Module, plan: Plan) -> list[Level]:
    """The levels of the model, from the finest on, and which of them the plan reaches.

    Raises:
        TransformError: The plan reaches no block of the model.
    """
    sites = find_sites(model)
    depth = Counter(site.transformer for site in sites)
    first = {site.transformer: site for site in reversed(sites)}.values()
    return levels_of(model, [(site.downsample, site.channels, depth[site.transformer]) for site in first], plan)


def scopes_of(plan: Plan) -> tuple[Scope, ...]:
    """The modules of a block that the plan merges around; none where it merges around whole blocks."""
    return tuple(scope for scope in SCOPES if getattr(plan, scope.option) and not plan.merge_block)


def merged_around(plan: Plan) -> tuple[str, ...]:
    """What the plan merges around, in words: modules of a block, or the block."""
    return ("block",) if plan.merge_block else tuple(scope.module for scope in scopes_of(plan))


def rewritten_classes(model: nn.Module, plan: Plan) -> dict[str, type[nn.Module]]:
    """The new class for each module that the plan changes, by its path in the model.

    Raises:
        TransformError: The plan reaches no block of the model.
        ValueError: A stride is larger than the model's token grid.
    """
    chosen = merged_sites(model, plan)
    _refuse_large_strides(model, plan, min(site.downsample for site in chosen))
    scopes = scopes_of(plan)
    for site in chosen:
        _refuse_unusual_block(model.get_submodule(site.path), site, plan)

    # Blocks that nothing is matched for are rewritten too: handed no slot map they do what they did, and blocks of
    # merged and unmerged levels compile as one (NOTE [One class per structure]).
    weigh = WEIGH[plan.prop_attn]
    classes = {
        site.path: specialize(
            model.get_submodule(site.path),
            MergePass(scopes, plan.merge_queries, weigh),
            example={"hidden_states": "3d", "encoder_hidden_states": "3d"},
            calls=("_chunked_feed_forward",),
            check=CheckBlock(scopes, plan.merge_queries, weigh=bool(plan.prop_attn)),
        )
        for site in find_sites(model)
        if not plan.merge_block
    }
    register_for_layer_skipping(set(classes.values()))
    matching = Matching(plan.sx, plan.sy, plan.cell_seed, plan.tile, once=plan.share_match)
    for path in dict.fromkeys(site.transformer for site in chosen):
        blocks = tuple(site.block for site in chosen if site.transformer == path)
        stack = Stack(
            blocks,
            tokens="hidden_states",
            arguments=tuple(positional(model.get_submodule(f"{path}.{block}")) for block in blocks),
            grid_inputs=("hidden_states",),
            grid=ops.grid_of,
            ratio=f"{MERGING}.ratio",
            weights="attention_mask",
            attention="attn1",
            per_token=("attention_mask", "cross_attention_kwargs.ip_adapter_masks") if plan.merge_block else (),
            option="merge_block",
        )
        classes[path] = specialize(
            model.get_submodule(path),
            StackPass(stack, matching, weigh) if plan.merge_block else MatchPass(stack, matching),
            example={"hidden_states": "4d", "encoder_hidden_states": "3d", "return_dict": False},
            check=CheckMergedStack(blocks, BLOCK, bool(plan.prop_attn)) if plan.merge_block else CheckStack(blocks),
        )
    return classes


def weighing_processors(model: nn.Module, plan: Plan) -> dict[str, WeighingProcessor]:
    """Processors for self-attention that has diffusers' own and weighs merged tokens, by its path in the model."""
    weighed = plan.prop_attn is not False and (plan.merge_attn or plan.merge_block)
    paths = [f"{site.path}.attn1" for site in merged_sites(model, plan) if weighed]
    own = [path for path in paths if type(getattr(model.get_submodule(path), "processor", None)) is AttnProcessor2_0]
    return {path: WeighingProcessor() for path in own}


def why_unweighed(model: nn.Module, site: Site) -> str:
    """Why merged tokens are not weighed in a block where nobody has asked for it; empty where they are."""
    attention: Any = model.get_submodule(f"{site.path}.attn1")
    reason = why_unweighed_by_default(attention)
    return f"{type(getattr(attention, 'processor', None)).__name__} {reason}" if reason else ""


def plain_processor(model: nn.Module, attention: Any) -> object:
    """The processor that attention of the model has when nobody has put in another."""
    return AttnProcessor2_0() if attention.added_kv_proj_dim is None else AttnAddedKVProcessor2_0()


def share(model: Model, more: Iterable[object] = ()) -> Model:
    """A copy of the model with a structure and a state of its own, and the same parameters, buffers and `more`."""
    shared = {id(same): same for same in chain(model.parameters(), model.buffers(), more)}
    try:
        return copy.deepcopy(model, dict(shared))
    except Exception as error:
        if what := _not_copied(model, shared):
            raise TransformError(f"{what} cannot be copied: take that off before the transform. {error}") from error
        raise TransformError(f"the structure of {type(model).__name__} cannot be copied: {error}") from error


def _not_copied(model: nn.Module, shared: Mapping[int, object]) -> str:
    """The attribute of one of the model's modules that cannot be copied, in words; empty if it is none by itself."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            try:
                if name not in ("_parameters", "_buffers", "_modules"):
                    copy.deepcopy(value, dict(shared))
            except Exception:
                return f"{name} of {path or 'model'} ({type(module).__name__})"
    return ""


def placed_by_users(model: nn.Module) -> Iterator[object]:
    """What users have put into the model and may hold on to: attention processors and hooks, whatever these refer to.

    A copy would fill a copy of their owner's store. Those that are modules, or bound to one, are the model's own.
    """
    for module in model.modules():
        hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
        for value in (getattr(module, "processor", None), *chain.from_iterable(found.values() for found in hooks)):
            if not isinstance(value, nn.Module) and not isinstance(getattr(value, "__self__", None), nn.Module):
                yield value


def register_for_layer_skipping(classes: Iterable[Any]) -> None:
    """Enter rewritten blocks where diffusers' layer skipping looks up what a block takes and returns.

    That register is private to diffusers: where there is none, or another, or the block itself is not known there,
    layers of a transformed model cannot be skipped, and all else works.
    """
    for cls in classes:
        with contextlib.suppress(ImportError, AttributeError, TypeError, ValueError):
            from diffusers.hooks._helpers import TransformerBlockRegistry

            known = TransformerBlockRegistry.get(cls.original)
            TransformerBlockRegistry.register(cls, replace(known, _cached_parameter_indices=None))


def _stages(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """The stages of a UNet or ControlNet in the order of its modules: path, stage, latents per token."""
    unet: Any = model
    factor, factors = 1, {}
    for stage in unet.down_blocks:
        factors[stage] = factor
        factor *= 2 if getattr(stage, "downsamplers", None) else 1
    factors[unet.mid_block] = factor
    for stage in getattr(unet, "up_blocks", ()):
        factors[stage] = factor
        factor //= 2 if getattr(stage, "upsamplers", None) else 1
    for path, stage in model.named_modules():
        if stage in factors:
            yield path, stage, factors[stage]


def _namesakes(model: nn.Module) -> str:
    """Classes in the model that bear the name of one of diffusers and are none of its, in words; empty without any."""
    ours = (BasicTransformerBlock, Transformer2DModel)
    names = [cls.__name__ for cls in ours]
    found = {type(part) for part in model.modules() if type(part).__name__ in names and not isinstance(part, ours)}
    places = sorted(f"{cls.__module__}.{cls.__qualname__}" for cls in found)
    return f"; not diffusers' class of that name: {', '.join(places)}" if places else ""


def _refuse_unusual_block(block: nn.Module, site: Site, plan: Plan) -> None:
    """Of a block of only_cross_attention attn1 attends to the prompt; positional embeddings go by a token's place."""
    if getattr(block, "only_cross_attention", False):
        found = f"attn1 of {site.path} attends to the prompt in a block of only_cross_attention, whose tokens are not"
        if plan.prop_attn:
            raise TransformError(
                f"{found} merged: prop_attn=True has no merged tokens to weigh there. Leave prop_attn out"
            )
        if not plan.merge_queries:
            raise TransformError(f"{found} merged: merge_queries=False has no keys to merge there. Leave it out")
    if plan.merge_block and getattr(block, "pos_embed", None) is not None:
        raise TransformError(
            f"{site.path} adds an embedding of its place to each token, and merged tokens have none: merge_block=True "
            "cannot serve it. Leave it out"
        )


def _refuse_large_strides(model: nn.Module, plan: Plan, finest: int) -> None:
    """A stride larger than the grid it is laid on finds no cell, at the size that the model is made for."""
    config: Any = model.config
    size = config.get("sample_size")
    if size is None:  # a ControlNet's config does not say
        return
    height, width = (size, size) if isinstance(size, int) else size
    for name, stride, side in (("sx", plan.sx, width), ("sy", plan.sy, height)):
        if stride > downsampled(side, finest):
            raise ValueError(
                f"{name} must be at most {downsampled(side, finest)}, the side of the finest token grid at the model's "
                f"own sample_size of {size}; got {stride}"
            )

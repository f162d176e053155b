"""The public verbs: check the arguments, copy the structure, swap the classes.

NOTE [A class of the model's own]
dynamo compiles one code object at most 8 times, and every UNet of a process has the same forward. So a transformed
model is of a class derived from its own, which bears its name and whose forward is a copy with a code object that
belongs to the plan: each ratio has the limit to itself, and models of the same plan share what is compiled. The code
does nothing that the original's does not, and the class is equal to the original. It is the class that has it, not the
instance: a forward bound to one model would be that model's in every shallow copy of it, such as the replicas of
`nn.DataParallel`, and would keep the model alive in a
reference cycle.

NOTE [One ratio]
The ratio is one attribute of one object, which the modules that match tokens share and read when they run. So a change
of it is one assignment, and no module can be left behind. A thread that is compiling reads it more than once, so
nothing is changed while one does. The class, which is changed after it, only says whose compile limit is used.
"""

import contextlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from tome_fx import ops
from tome_fx.families.refusals import name_of
from tome_fx.families.registry import family_of
from tome_fx.families.unet import Model, placed_by_users, share
from tome_fx.graph.dispatch import within
from tome_fx.graph.specialize import has_own_code, with_own_code
from tome_fx.plan import MERGING, Plan, TransformError


def transform(
    model: Model,
    ratio: float = 0.5,
    *,
    tile: int | None = 32,
    max_downsample: int | str | None = None,
    sx: int = 2,
    sy: int = 2,
    use_rand: bool = True,
    seed: int = 0,
    merge_attn: bool = True,
    merge_queries: bool = True,
    merge_crossattn: bool = False,
    merge_mlp: bool = False,
    merge_block: bool = False,
    prop_attn: bool | None = None,
    share_match: bool = True,
    dynamic_ratio: bool = False,
) -> Model:
    """Give a model token merging: similar image tokens are averaged before attention and copied back after it.

    Returns a new model which shares every parameter and buffer with the one given. It is of a class derived from that
    one's, which bears its name and is equal to it. The model given is left as it is. The result runs eagerly, and
    `torch.compile(..., fullgraph=True)` takes it whole.

    Args:
        model: A `UNet2DConditionModel`, `ControlNetModel`, `UNetMotionModel` or `UNet3DConditionModel`, not compiled
            and not transformed yet. Of the last two the blocks over single frames are merged in, those over time never.
            Or a transformer: a `PixArtTransformer2DModel`, `SD3Transformer2DModel`, `SD3ControlNetModel`,
            `FluxTransformer2DModel`, `FluxControlNetModel`, `QwenImageTransformer2DModel`, `ChromaTransformer2DModel`,
            `Flux2Transformer2DModel`, `AuraFlowTransformer2DModel`, `CogView4Transformer2DModel`, `HunyuanDiT2DModel`,
            `CogVideoXTransformer3DModel`, `LTXVideoTransformer3DModel` or `WanTransformer3DModel`. Of a video each
            frame is matched by itself.
        ratio: Share of the tokens to remove, from 0 (the original, bit for bit) to `1 - 1 / (sx * sy)`. Half is
            where images still look the same, says the paper.
        tile: Side of the squares of tokens within which tokens are matched and ranked. The work of matching then grows
            with the tokens and not with their square. 32 is the largest side whose tokens a GPU puts in order within
            one kernel; smaller tiles move an image further. None compares the whole grid, as tomesd does, and is the
            same on grids of at most `tile` tokens a side. At least `sx` and `sy`.
        max_downsample: Merge at the levels whose tokens are at most this many latents wide: 1, 2, 4 or 8; "finest" is
            the finest level that has attention, 1 for Stable Diffusion 1 and 2, 2 for SDXL. None is that level and
            those where merging saves more than its launches cost on a GPU, at the size in the model's config: both
            levels of SDXL, and of Stable Diffusion 1 the finest, or with `merge_block` three. `tome_fx.explain` shows
            them.
        sx: Width of the cells that give one destination each, in tokens.
        sy: Height of the cells, in tokens. 2 x 2 lets up to three quarters of the tokens merge.
        use_rand: Choose the destination in each cell pseudo-randomly, which avoids the pattern of a regular grid.
            False takes the top left token of every cell.
        seed: For `use_rand`, from 0 to 2**32 - 1. The choice is a pure function of seed and cell: the same in every
            block, step, batch and run, compiled or not. No random number generator is read or advanced.
        merge_attn: Merge around self-attention, where the cost is quadratic.
        merge_queries: Merge queries as well as keys and values. False leaves every token its own query, so that nothing
            is copied back: it saves less and moves the image far less.
        merge_crossattn: Merge around cross-attention as well. Costs quality for little speed.
        merge_mlp: Merge around the feed-forward as well. Costs quality.
        merge_block: Merge around whole blocks: norms, attention, cross-attention and feed-forward see merged tokens,
            and each token receives the change of the merged one that it belongs to. Saves most, above all where most of
            the work is outside attention, as in SDXL and Flux, and costs quality. Where places are turned into queries
            and keys, a merged token has the place of its destination.
        prop_attn: Weigh each merged token in self-attention by how many tokens it stands for, which keeps the image far
            closer to the original. None does so wherever it can be done: with the attention processors of diffusers,
            but for those that take no mask, as in SD 3, Qwen-Image and Wan, or attend across the batch, as
            perturbed-attention guidance does. True refuses a model where it cannot, and trusts processors that are not
            diffusers'. False is what tomesd does.
        share_match: Match before the first block of each transformer alone and merge in all its blocks by that, which
            costs a decibel; SDXL's transformers have up to ten blocks. False matches before every block, as tomesd
            does.
        dynamic_ratio: Make the number of kept tokens a dynamic size, so that one compiled graph serves every ratio
            that `set_ratio` gives it. The ratio is then a whole number of thousandths, and at 0 tokens are still
            matched. False compiles once for each ratio, and 0 is free.

    Raises:
        TypeError: An argument is of the wrong type; `model` is a pipeline, say.
        ValueError: An option is out of range, or would do nothing.
        TransformError: The model cannot be transformed: it has no block that the options reach, is transformed
            already, is compiled already, has offloading hooks in place, or another library has patched it.

    Source: Bolya and Hoffman, "Token Merging for Fast Stable Diffusion" (2023), https://arxiv.org/abs/2303.17604.
    """
    plan = Plan(
        ratio=ratio,
        tile=tile,
        max_downsample=max_downsample,
        sx=sx,
        sy=sy,
        use_rand=use_rand,
        seed=seed,
        merge_attn=merge_attn,
        merge_queries=merge_queries,
        merge_crossattn=merge_crossattn,
        merge_mlp=merge_mlp,
        merge_block=merge_block,
        prop_attn=prop_attn,
        share_match=share_match,
        dynamic_ratio=dynamic_ratio,
    )
    _check_model(model)
    family = family_of(model)
    result = share(model, placed_by_users(model))
    for module in result.modules():
        vars(module).pop("forward", None)  # the class's own, which hooks leave there: it would hide the rewritten one
    merging = Merging(plan)
    setattr(result, MERGING, merging)
    for path, cls in family.rewritten_classes(model, plan).items():
        result.get_submodule(path).__class__ = cls
    for path in {site.transformer for site in family.merged_sites(model, plan)}:
        setattr(result.get_submodule(path), MERGING, merging)
    for path, processor in family.weighing_processors(model, plan).items():
        result.get_submodule(path).processor = processor
    result.__class__ = _own_class(type(result), plan)
    return result


def set_ratio(model: nn.Module, ratio: float) -> None:
    """Change the ratio of a transformed model in place, compiled or not; its weights and all else stay.

    A model compiled whole compiles once more on its first call at a new ratio and not at all at a ratio it has had
    before; with `dynamic_ratio=True` it never compiles again. Block by block, blocks compile once more for the second
    number of kept tokens that they see, and then serve any. Waits for a compile in another thread to end. A call that
    runs meanwhile in another thread takes the new ratio from its next transformer on.

    Args:
        model: What `transform` returned, or what `torch.compile` made of it. A deep copy of it keeps its own ratio; a
            shallow copy shares the ratio as it shares the blocks.
        ratio: Share of the tokens to remove, as for `transform`.

    Raises:
        TypeError: `ratio` is not a number, or `model` of a kind that cannot be transformed.
        ValueError: `ratio` is out of range. The model is left as it was.
        TransformError: The model is not transformed, or its class was derived anew since, as `fully_shard` does.
    """
    model, merging = transformed(model)
    plan = replace(merging.plan, ratio=ratio)
    left = has_own_code(vars(model).get("forward"))  # by hooks that were taken off; it is the class's that was then
    if plan != merging.plan or left:
        own = _own_class(type(model), plan)
        with _nothing_compiling():
            merging.ratio = ops.as_read(plan.ratio, dynamic=plan.dynamic_ratio)
            model.__class__ = own
            if left:
                vars(model).pop("forward", None)


def _own_class(base: type[nn.Module], plan: Plan) -> Any:
    """See NOTE [A class of the model's own]. Models with a dynamic ratio share what is compiled, whatever it is."""
    return with_own_code(base, replace(plan, ratio=0.0) if plan.dynamic_ratio else plan)


class Merging:
    """What a transformed model and those of its modules that match tokens know of its merging; one object for them all.

    Args:
        plan: What is merged. The attribute of this name has the present ratio.
    """

    def __init__(self, plan: Plan) -> None:
        self.options = plan
        # The one thing that changes: see NOTE [One ratio].
        self.ratio = ops.as_read(plan.ratio, dynamic=plan.dynamic_ratio)

    @property
    def plan(self) -> Plan:
        """The options, with the ratio of now."""
        return replace(self.options, ratio=ops.ratio_of(self.ratio))


@contextlib.contextmanager
def _nothing_compiling() -> Iterator[None]:
    """Wait for a compile in another thread, and have one that starts meanwhile wait: see NOTE [One ratio]."""
    convert_frame = sys.modules.get("torch._dynamo.convert_frame")  # not there before anything was compiled
    with contextlib.nullcontext() if convert_frame is None else convert_frame.compile_lock:
        yield


def transformed(model: nn.Module) -> tuple[nn.Module, Merging]:
    """The model itself, out of what `torch.compile` wraps around it, and its merging.

    Raises:
        TypeError: `model` is of a kind that cannot be transformed at all.
        TransformError: The model is not transformed.
    """
    model = getattr(model, "_orig_mod", model)
    family_of(model)
    merging = getattr(model, MERGING, None)
    if merging is None:
        raise TransformError(f"{type(model).__name__} is not transformed: pass what tome_fx.transform returned")
    return model, merging


def compiled_parts(model: nn.Module) -> list[nn.Module]:
    """The modules that are compiled, in whatever way; not those within another one, which are part of its graph.

    A hook wrapped around a compiled forward, as offloading does it, leaves it compiled.
    """
    by_forward = any(
        hasattr(forward, "_torchdynamo_orig_callable") and not hasattr(forward, "_torchdynamo_disable")
        for forward in within(vars(model).get("forward"))
    )
    if by_forward or hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        return [model]
    return list(dict.fromkeys(part for child in model.children() for part in compiled_parts(child)))


def _check_model(model: nn.Module) -> None:
    if hasattr(model, "_orig_mod"):
        name = type(model).__name__
        raise TransformError(f"model is compiled already ({name}): transform it first, then compile the result")
    family_of(model)
    if hasattr(model, MERGING):
        raise TransformError(
            "model is transformed already: change its ratio with tome_fx.set_ratio, or transform the original instead"
        )
    if parts := compiled_parts(model):
        where = _where(model, parts[0])
        raise TransformError(f"model is compiled already, at {where}: transform it first, then compile the result")
    for module in model.modules():
        if type(module).__module__.partition(".")[0] == "tomesd":
            raise TransformError(
                f"model is patched by tomesd, at {_where(model, module)}: take that back with "
                "tomesd.remove_patch(model), then transform it"
            )
        forward = vars(module).get("forward")
        if forward is None or getattr(forward, "__func__", None) is type(module).forward:
            continue
        own: Any = type(module).forward
        if any(inner is inspect.unwrap(own) for inner in within(forward)):
            raise TransformError(
                f"forward of {_where(model, module)} is replaced on the instance by {name_of(forward)} around it, as "
                "offloading hooks do: transform the model first, then put that around the result"
            )
        raise TransformError(
            f"forward of {_where(model, module)} is replaced on the instance by {name_of(forward)}, which merging "
            "would not go by: transform a model without that patch. What wraps a whole model can be put around the "
            "result"
        )


def _where(model: nn.Module, module: nn.Module) -> str:
    path = next(path for path, found in model.named_modules() if found is module)
    return f"{path or 'model'} ({type(module).__name__})"

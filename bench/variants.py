"""What is compared: each variant makes a UNet that merges from the stock one, and shares its weights.

A UNet is called with its sample by position: tomesd reads the image's size there.
"""

import copy
import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, fx
from torch.utils._pytree import tree_map

import tome_fx
from bench.cases import DEFAULTS, ROUNDED, STOCK, Case, Options, options
from bench.models import DTYPES
from bench.peers import downsampled, patched, windowed
from tome_fx import ops
from tome_fx.families.unet import share
from tome_fx.families.weights import WEIGH
from tome_fx.graph import nodes
from tome_fx.graph.specialize import Pass, specialize


def merged(unet: UNet2DConditionModel, case: Case) -> UNet2DConditionModel:
    """Our transform."""
    return tome_fx.transform(unet, case.ratio, **dict(case.options))


def rounded(unet: UNet2DConditionModel, dtype: torch.dtype) -> Callable[..., Any]:
    """A copy with weights of its own in that type; what goes in and comes out keeps its own, and so does the time."""
    own = copy.deepcopy(unet).to(dtype)

    def cast(values: Any, to: torch.dtype) -> Any:
        return tree_map(lambda value: value.to(to) if isinstance(value, Tensor) else value, values)

    def call(sample: Tensor, timestep: Tensor, **inputs: Any) -> Any:
        return cast(own(sample.to(dtype), timestep=timestep, **cast(inputs, dtype)), sample.dtype)

    return call


def no_match(tokens: Tensor, height: int, width: int, *, kept: int | None, **_: Any) -> ops.SlotMap | None:
    """The oracle's match: nothing is computed; views of the tokens carry N and K."""
    return None if kept is None else ops.SlotMap(tokens, tokens, tokens[:, :kept])


def first_tokens(tokens: Tensor, slots: ops.SlotMap | None) -> Tensor:
    """The oracle's merge: keep the first K tokens."""
    return tokens if slots is None else tokens[:, : slots.start.shape[1]]


def first_keys(tokens: Tensor, slots: ops.SlotMap | None) -> Tensor | None:
    """The oracle's merge of keys and values alone."""
    return None if slots is None else first_tokens(tokens, slots)


def repeat_tokens(tokens: Tensor, slots: ops.SlotMap | None) -> Tensor:
    """The oracle's unmerge: repeat the K tokens up to N."""
    if slots is None:
        return tokens
    count, kept = slots.slot.shape[1], tokens.shape[1]
    return tokens.repeat(1, -(-count // kept), 1)[:, :count]


def repeat_result(tokens: Tensor, merged: Tensor, result: Tensor, slots: ops.SlotMap | None) -> Tensor:
    """The oracle's unmerge of whole blocks."""
    return repeat_tokens(result, slots)


def no_weights(module: Any, tokens: Tensor, slots: ops.SlotMap | None) -> Tensor | None:
    """The oracle's weights: zeros, of which attention makes what it makes of ours."""
    return None if slots is None else tokens.new_zeros(tokens.shape[0] * module.heads, 1, slots.start.shape[1])


FREE: dict[Any, Callable[..., Any]] = {
    ops.match: no_match,
    ops.merge: first_tokens,
    ops.unmerge: repeat_tokens,
    ops.changed: repeat_result,
    nodes.merged_keys: first_keys,
    **{weigh: no_weights for weigh in WEIGH.values() if weigh},
}


@dataclass(frozen=True)
class Free:
    """A pass of ours, with functions that cost next to nothing in the place of its operations."""

    inner: Pass

    def __call__(self, graph: fx.Graph) -> None:
        """Change the graph in place."""
        self.inner(graph)
        for node in graph.nodes:
            node.target = FREE.get(node.target, node.target)


def oracle(unet: UNet2DConditionModel, case: Case) -> UNet2DConditionModel:
    """The lower bound: our graph, whose operations cost nothing. The variant that reaches into generated classes."""
    result = merged(unet, case)
    for module in result.modules():
        cls: Any = type(module)
        if hasattr(cls, "rewrite"):
            structure, (kinds, _) = cls.structure, next(iter(cls.graphs))
            example = {p.name: kind for p, kind in zip(structure.parameters, kinds, strict=True)}
            module.__class__ = specialize(
                module, Free(cls.rewrite), example=example, calls=structure.calls, check=cls.check
            )
    return result


@dataclass(frozen=True)
class Variant:
    """A way to make a UNet that merges.

    Args:
        make: Makes it of a UNet that may be changed in place, of a case without a schedule, and of the step's number.
        ratio: The only one that it has, or None where one may choose.
        heeds: The options of `tome_fx.transform` that it has.
        each_step: Whether it is another one in every step.
    """

    make: Callable[[UNet2DConditionModel, Case, int], Callable[..., Any]]
    ratio: float | None = None
    heeds: Collection[str] = frozenset(DEFAULTS)
    each_step: bool = False


OF_TOMESD = ("sx", "sy", "use_rand", "merge_attn", "merge_crossattn", "merge_mlp")
# ToDo drops three of four keys and values, and in a window of HiDiffusion's a query sees one in four.
VARIANTS: dict[str, Variant] = {
    STOCK: Variant(lambda unet, case, step: unet, ratio=0, heeds=()),
    "tome_fx": Variant(lambda unet, case, step: merged(unet, case)),
    # what 0.1 did without being told otherwise
    "v0.1": Variant(
        lambda unet, case, step: merged(unet, replace(case, options=options(**tome_fx.TOMESD, **dict(case.options)))),
        heeds=DEFAULTS.keys() - tome_fx.TOMESD.keys(),
    ),
    # other destinations in every step, as tomesd draws them
    "each-step": Variant(
        lambda unet, case, step: merged(unet, replace(case, options=options(**dict(case.options), seed=step))),
        heeds=DEFAULTS.keys() - {"seed", "use_rand"},
        each_step=True,
    ),
    "oracle": Variant(lambda unet, case, step: oracle(unet, case)),
    "tomesd": Variant(lambda unet, case, step: patched(unet, case), heeds=OF_TOMESD),
    "todo": Variant(lambda unet, case, step: downsampled(unet), ratio=0.75, heeds=()),
    "hidiffusion": Variant(lambda unet, case, step: windowed(unet, step), ratio=0.75, heeds=(), each_step=True),
    **{
        name: Variant(lambda unet, case, step: rounded(unet, DTYPES[case.variant]), ratio=0, heeds=())
        for name in ROUNDED
    },
}


def case_for(variant: str, ratio: float, given: Options) -> Case:
    """A case of the variant with as much of this as it heeds."""
    chosen = VARIANTS[variant]
    heeded = tuple((name, value) for name, value in given if name in chosen.heeds)
    return Case(variant, ratio if chosen.ratio is None else chosen.ratio, heeded)


def check(case: Case) -> None:
    """Refuse what the variant would pass over.

    Raises:
        ValueError: Named are the option, what is allowed and what came.
    """
    chosen = VARIANTS[case.variant]
    if chosen.ratio is not None and (case.ratio != chosen.ratio or case.schedule):
        raise ValueError(f"ratio must be {chosen.ratio:g} for {case.variant}, got {case.ratios_told}")
    for name, value in case.options:
        if name not in chosen.heeds:
            allowed = ", ".join(sorted(chosen.heeds)) or "none"
            raise ValueError(f"options must be of {allowed} for {case.variant}, got {name}={value!r}")


def apply(case: Case, unet: UNet2DConditionModel, steps: int = 1) -> Any:
    """What is called in the place of `unet`, which itself is left as it is; a pipeline calls it once a step."""
    variant = VARIANTS[case.variant]

    @cache
    def made(ratio: float, step: int) -> Callable[..., Any]:
        return variant.make(share(unet), replace(case, ratio=ratio, schedule=()), step)

    calls = [made(ratio, step if variant.each_step else 0) for step, ratio in enumerate(case.ratios(steps))]
    if len(set(calls)) == 1:
        return calls[0]
    turns = itertools.cycle(calls)
    return lambda *args, **inputs: next(turns)(*args, **inputs)


def predict(call: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    """What a model, or what stands in its place, makes of its inputs, of which the tokens or latents come first."""
    (_, first), *others = inputs.items()
    result: Tensor = call(first, **dict(others)).sample
    return result

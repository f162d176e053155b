"""What is compared: each variant makes a UNet that merges from the stock one, and shares its weights.

A UNet is called with its sample by position: tomesd reads the image's size there.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor, fx

import tome_fx
from bench.cases import SCOPES, STOCK, Case
from bench.peers import downsampled, patched
from tome_fx import ops
from tome_fx.families.unet import share
from tome_fx.graph.specialize import Pass, specialize


def merged(unet: UNet2DConditionModel, case: Case, **options: Any) -> UNet2DConditionModel:
    """Our transform."""
    scope = SCOPES[case.scope]
    return tome_fx.transform(unet, case.ratio, max_downsample=case.max_downsample, **scope, **options)


def each_step(unet: UNet2DConditionModel, case: Case, steps: int) -> Callable[..., Any]:
    """Other destinations in every step, as tomesd draws them; a pipeline calls its UNet once a step."""
    turns = itertools.cycle([merged(unet, case, seed=step) for step in range(steps)])
    return lambda *args, **inputs: next(turns)(*args, **inputs)


@dataclass(frozen=True)
class Free:
    """A pass of ours, with functions that cost next to nothing in the place of its operations."""

    inner: Pass

    def __call__(self, graph: fx.Graph) -> None:
        """Change the graph in place."""
        self.inner(graph)
        functions: dict[Any, Any] = {ops.match: no_match, ops.merge: first_tokens, ops.unmerge: repeat_tokens}
        for node in graph.nodes:
            node.target = functions.get(node.target, node.target)


def oracle(unet: UNet2DConditionModel, case: Case) -> UNet2DConditionModel:
    """The lower bound: our graph with free matching and merging. The variant that reaches into generated classes."""
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


def no_match(tokens: Tensor, height: int, width: int, *, kept: int, **_: Any) -> ops.SlotMap:
    """The oracle's match: nothing is computed; views of the tokens carry N and K."""
    return ops.SlotMap(tokens, tokens, tokens[:, :kept])


def first_tokens(tokens: Tensor, slots: ops.SlotMap | None) -> Tensor:
    """The oracle's merge: keep the first K tokens."""
    return tokens if slots is None else tokens[:, : slots.start.shape[1]]


def repeat_tokens(tokens: Tensor, slots: ops.SlotMap | None) -> Tensor:
    """The oracle's unmerge: repeat the K tokens up to N."""
    if slots is None:
        return tokens
    count, kept = slots.slot.shape[1], tokens.shape[1]
    return tokens.repeat(1, -(-count // kept), 1)[:, :count]


# Made of a UNet that the variant may change in place, of its case and of how many steps an image takes
VARIANTS: dict[str, Callable[[UNet2DConditionModel, Case, int], Callable[..., Any]]] = {
    STOCK: lambda unet, case, steps: unet,
    "tome_fx": lambda unet, case, steps: merged(unet, case),
    "prop_attn": lambda unet, case, steps: merged(unet, case, prop_attn=True),
    "dynamic": lambda unet, case, steps: merged(unet, case, dynamic_ratio=True),
    "top-left": lambda unet, case, steps: merged(unet, case, use_rand=False),
    "each-step": each_step,
    "one-match": lambda unet, case, steps: merged(unet, case, share_match=True),
    "oracle": lambda unet, case, steps: oracle(unet, case),
    "tomesd": lambda unet, case, steps: patched(unet, case),
    "todo": lambda unet, case, steps: downsampled(unet),
}


def apply(case: Case, unet: UNet2DConditionModel, steps: int = 1) -> Any:
    """What is called in the place of `unet`, which itself is left as it is."""
    return VARIANTS[case.variant](share(unet), case, steps)

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
class Then:
    """A pass of ours, and after it a change of the graph."""

    inner: Pass
    change: Callable[[fx.Graph], None]

    def __call__(self, graph: fx.Graph) -> int:
        """Run both."""
        count = self.inner(graph)
        self.change(graph)
        return count


def changed(unet: UNet2DConditionModel, change: Callable[[fx.Graph], None]) -> UNet2DConditionModel:
    """A transformed UNet, in place, whose graphs are changed once more: all of bench that reaches into the library."""
    for module in unet.modules():
        cls: Any = type(module)
        if hasattr(cls, "rewrite"):
            template = cls._template
            example = {p.name: k for p, k in zip(template.parameters, next(iter(cls.graphs))[0], strict=True)}
            module.__class__ = specialize(
                module, Then(cls.rewrite, change), example=example, live=template.live, leaves=template.leaves
            )
    return unet


def one_match(graph: fx.Graph) -> None:
    """Drop all matches but the first: one for the stacked blocks of a transformer."""
    first, *others = [node for node in graph.nodes if node.target is ops.match] or [None]
    for node in others:
        node.replace_all_uses_with(first)
        graph.erase_node(node)


def free(graph: fx.Graph) -> None:
    """The oracle's graph: no matching, a slice for merge and a repeat for unmerge."""
    functions: dict[Any, Any] = {ops.match: no_match, ops.merge: first_tokens, ops.unmerge: repeat_tokens}
    for node in graph.nodes:
        node.target = functions.get(node.target, node.target)


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
    "one-match": lambda unet, case, steps: changed(merged(unet, case), one_match),
    "oracle": lambda unet, case, steps: changed(merged(unet, case), free),
    "tomesd": lambda unet, case, steps: patched(unet, case),
    "todo": lambda unet, case, steps: downsampled(unet),
}


def apply(case: Case, unet: UNet2DConditionModel, steps: int = 1) -> Any:
    """What is called in the place of `unet`, which itself is left as it is."""
    return VARIANTS[case.variant](share(unet), case, steps)

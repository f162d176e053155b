"""What cannot be around merged tokens, found when a block is called: what keeps, smooths or mixes tokens by place.

It is told by what it does where that can be seen: a hook that remembers, a hook within attention that is not about
weights, a processor that keeps the attention probabilities. Processors that mix the images of a batch cannot be told
from others and are known by name. What works by place and shows none of this is not found; see the README's limits.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tome_fx.families import maps
from tome_fx.graph.dispatch import is_generated
from tome_fx.graph.scopes import Scope
from tome_fx.ops import SlotMap
from tome_fx.plan import TransformError

# Of perturbed-attention guidance and of text-to-video zero: they attend in parts of the batch, or across it, and would
# give some images the weights of others.
MIXING_PROCESSORS = (
    "PAGIdentitySelfAttnProcessor2_0",
    "PAGCFGIdentitySelfAttnProcessor2_0",
    "CrossFrameAttnProcessor",
    "CrossFrameAttnProcessor2_0",
)
# Hooks in these modules move or cast weights and leave tokens as they are.
HOOKS_OF_WEIGHTS = ("diffusers.hooks.group_offloading", "diffusers.hooks.layerwise_casting")


@dataclass(frozen=True)
class CheckBlock:
    """Called before the forward of a rewritten block: refuses what its merged tokens cannot be given to."""

    scopes: tuple[Scope, ...]
    weigh: bool

    def __call__(self, block: nn.Module, slots: SlotMap | None) -> None:
        """Look at the modules that see merged tokens.

        Raises:
            TransformError: A hook or a processor keeps what it saw, needs tokens in the order of the grid, mixes the
                images of the batch, or leaves out the weights.
        """
        for scope in self.scopes if slots is not None else ():
            module = getattr(block, scope.module)
            _refuse_hooks(module, scope)
            processor = getattr(module, "processor", None)
            if processor is not None:
                self._refuse_processor(processor, scope)

    def _refuse_processor(self, processor: Any, scope: Scope) -> None:
        name, weighed = type(processor).__name__, self.weigh and scope.weights is not None
        if weighed and name in MIXING_PROCESSORS:
            raise TransformError(
                f"{name} attends in parts of the batch or across it, and would mix up the weights that prop_attn=True "
                "gives tokens. Leave it out, or transform with prop_attn=False"
            )
        if weighed and maps.drops_mask(type(processor)):
            raise TransformError(
                f"{name} takes no notice of attention_mask, by which prop_attn=True would weigh merged tokens. Leave "
                "it out, or transform with prop_attn=False"
            )
        for store in maps.stores(type(processor)):
            # In self-attention stores of another object are common and leave its maps unread.
            if store.elsewhere and scope.weights is not None:
                continue
            if all(getattr(processor, condition, True) for condition in store.conditions):
                raise TransformError(
                    f"{name} keeps the attention probabilities that it sees in {scope.module}, whose tokens are merged "
                    f"({scope.option}=True): they have no row for each pixel. Leave it out there, or transform with "
                    f"{scope.option}=False"
                )


@dataclass(frozen=True)
class CheckStack:
    """Called before the forward of a module that hands its blocks slot maps: each must be able to take one."""

    blocks: tuple[str, ...]

    def __call__(self, module: nn.Module) -> None:
        """Look at the forward of each block.

        Raises:
            TransformError: Another library or the user has replaced one, so that nothing would be merged in it.
        """
        if torch.compiler.is_compiling():  # dynamo cannot look at functions so; a replaced forward refuses its slot map
            return
        for path in self.blocks:
            block = module.get_submodule(path)
            if not any(is_generated(part.forward) for part in block.modules()):  # it may be wrapped in another module
                found = f"forward of {path} in a {type(module).__name__} is replaced by {name_of(block.forward)}"
                raise TransformError(f"{found} since the transform: {NOTHING_MERGED}")


NOTHING_MERGED = (
    "nothing would be merged there. Take the other forward back (tomesd.remove_patch takes back tomesd's), or leave "
    "this model untransformed"
)


def name_of(forward: Any) -> str:
    """Where a forward comes from."""
    function = inspect.unwrap(forward)
    function = getattr(function, "__func__", function)
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"


def _refuse_hooks(module: nn.Module, scope: Scope) -> None:
    for part in module.modules():
        registry = getattr(part, "_diffusers_hook", None)
        for hook in () if registry is None else registry.hooks.values():
            name = type(hook).__name__
            if hook._is_stateful:
                raise TransformError(
                    f"{name} keeps what it sees in {scope.module}, whose tokens are merged ({scope.option}=True) and "
                    f"are others in every step. Leave it out there, or transform with {scope.option}=False"
                )
            if part is not module and type(hook).__module__ not in HOOKS_OF_WEIGHTS:
                raise TransformError(
                    f"{name} changes tokens within {scope.module}, where they are merged ({scope.option}=True) and "
                    f"lie on no grid. Leave it out there, or transform with {scope.option}=False"
                )

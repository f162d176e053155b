"""What cannot be around merged tokens, found when a block is called: what keeps, smooths or mixes tokens by place.

It is told by what it does where that can be seen: a hook that remembers, a hook within attention that is not about
weights, a processor that keeps the attention probabilities. Processors that mix the images of a batch cannot be told
from others and are known by name. What works by place and shows none of this is not found; see the limits in
docs/support.md.
"""

import functools
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import nn

from tome_fx.families import maps
from tome_fx.families.weights import why_unweighed
from tome_fx.graph.dispatch import is_generated
from tome_fx.graph.scopes import Scope
from tome_fx.ops import SlotMap, ratio_of
from tome_fx.plan import MERGING, TransformError

# Hooks in these modules move or cast weights and leave tokens as they are.
HOOKS_OF_WEIGHTS = ("diffusers.hooks.group_offloading", "diffusers.hooks.layerwise_casting")


@dataclass(frozen=True)
class CheckBlock:
    """Called before the forward of a rewritten block: refuses what its merged tokens cannot be given to.

    Args:
        scopes: The modules that see them.
        queries: Whether queries are merged, where self-attention is.
        weigh: Whether weights were asked for, so that what cannot weigh is refused.
    """

    scopes: tuple[Scope, ...]
    queries: bool = True
    weigh: bool = False

    def __call__(self, block: nn.Module, slots: SlotMap | None) -> None:
        """Look at the modules that see merged tokens, unless nothing is merged.

        Raises:
            TransformError: A hook or a processor keeps what it saw, needs tokens in the order of the grid, mixes the
                images of the batch, or leaves out the weights.
        """
        if slots is not None:
            self.refuse(block)

    def refuse(self, block: nn.Module) -> None:
        """What a call does where tokens are merged."""
        for scope in self.scopes:
            module = getattr(block, scope.module, None)
            if module is None:  # as attn2 of a block without a prompt
                continue
            _refuse_hooks(module, scope)
            processor = getattr(module, "processor", None)
            if processor is not None:
                self._refuse_processor(module, processor, scope)

    def _refuse_processor(self, module: nn.Module, processor: Any, scope: Scope) -> None:
        name = type(processor).__name__
        if self.weigh and scope.weights is not None and (reason := why_unweighed(module)):
            raise TransformError(
                f"{name} {reason}: prop_attn=True cannot weigh merged tokens there. Leave it out, or leave prop_attn "
                "out, which then weighs them everywhere else"
            )
        if not self.queries and scope.keys is not None and maps.ignores(type(processor), scope.keys):
            raise TransformError(
                f"{name} takes no notice of {scope.keys}, by which merge_queries=False gives it merged keys and "
                "values. Leave it out, or merge the queries too"
            )
        fused = getattr(module, "fused_projections", False) and maps.uses(type(processor), "to_qkv")
        if not self.queries and scope.keys is not None and fused:  # a module stays so when diffusers takes it back
            raise TransformError(
                "merge_queries=False merges keys and values alone, and fuse_qkv_projections has made one projection of "
                "them and the queries. Take it back with unfuse_qkv_projections, or merge the queries too"
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
            TransformError: Another library or the user has replaced one, so that nothing would be merged in it; or
                tokens are shared out among processes.
        """
        if not _merges_nothing(module):
            _refuse_shares_of_tokens(module)
        if torch.compiler.is_compiling():  # dynamo cannot look at functions so; a replaced forward refuses its slot map
            return
        for path in self.blocks:
            block = module.get_submodule(path)
            if not any(is_generated(part.forward) for part in block.modules()):  # it may be wrapped in another module
                found = f"forward of {path} in a {type(module).__name__} is replaced by {name_of(block.forward)}"
                raise TransformError(f"{found} since the transform: {NOTHING_MERGED}")


@dataclass(frozen=True)
class CheckMergedStack:
    """Called before the forward of a module whose blocks see merged tokens, whole: refuses what cannot be among them.

    Args:
        blocks: Their names.
        scopes: What is in them that keeps or needs tokens by place.
        weigh: Whether weights were asked for, so that what cannot weigh is refused.
    """

    blocks: tuple[str, ...]
    scopes: tuple[Scope, ...]
    weigh: bool = False

    def __call__(self, module: nn.Module) -> None:
        """Look at the blocks, unless nothing is matched: at a dynamic ratio of 0 tokens are.

        Raises:
            TransformError: As `CheckBlock` does, of the blocks and what is in them; or tomesd merges in them, or tokens
                are shared out among processes.
        """
        if _merges_nothing(module):
            return
        _refuse_shares_of_tokens(module)
        for path in self.blocks:
            block = module.get_submodule(path)
            if _is_of_tomesd(type(block)):
                raise TransformError(
                    f"{path} in a {type(module).__name__} is patched by tomesd since the transform, and its tokens are "
                    "merged already: take that back with tomesd.remove_patch(model)"
                )
            _refuse_stateful_hooks(block, path, "merge_block")
            CheckBlock(self.scopes, weigh=self.weigh).refuse(block)


NOTHING_MERGED = (
    "nothing would be merged there. Take the other forward back (tomesd.remove_patch takes back tomesd's), or leave "
    "this model untransformed"
)


def _merges_nothing(module: nn.Module) -> bool:
    """Whether the ratio is a static 0; a dynamic one matches all the same."""
    ratio = getattr(module, MERGING).ratio
    return isinstance(ratio, str) and not ratio_of(ratio)


def _refuse_shares_of_tokens(module: nn.Module) -> None:
    parallel = getattr(module, "_parallel_config", None)  # what diffusers' enable_parallelism leaves
    if parallel is not None and parallel.context_parallel_config is not None:
        raise TransformError(
            f"{type(module).__name__} has its tokens shared out among processes, by enable_parallelism, and each would "
            "merge within its own share: leave a model untransformed that runs so"
        )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_of_tomesd(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "tomesd"


def name_of(forward: Any) -> str:
    """Where a forward comes from: by its code, for a decorated function bears the name of what it is around."""
    function = getattr(forward, "__func__", forward)
    if isinstance(function, functools.partial) and isinstance(function.func, FunctionType):  # accelerate's hooks
        function = function.func
    if not isinstance(function, FunctionType):
        return f"{type(function).__module__}.{type(function).__qualname__}"
    code: Any = function.__code__
    return f"{function.__globals__.get('__name__', '?')}.{getattr(code, 'co_qualname', code.co_name)}"  # before 3.11


def _refuse_hooks(module: nn.Module, scope: Scope) -> None:
    _refuse_stateful_hooks(module, scope.module, scope.option)
    for part in module.modules():
        for hook in _hooks(part):
            if part is not module and type(hook).__module__ not in HOOKS_OF_WEIGHTS:
                raise TransformError(
                    f"{type(hook).__name__} changes tokens within {scope.module}, where they are merged "
                    f"({scope.option}=True) and lie on no grid. Leave it out there, or transform with "
                    f"{scope.option}=False"
                )


def _refuse_stateful_hooks(module: nn.Module, name: str, option: str) -> None:
    for hook in (hook for part in module.modules() for hook in _hooks(part)):
        if hook._is_stateful:
            raise TransformError(
                f"{type(hook).__name__} keeps what it sees in {name}, whose tokens are merged ({option}=True) and are "
                f"others in every step. Leave it out there, or transform with {option}=False"
            )


def _hooks(module: nn.Module) -> list[Any]:
    """Those that diffusers keeps for a module."""
    registry: Any = getattr(module, "_diffusers_hook", None)
    return [] if registry is None else list(registry.hooks.values())

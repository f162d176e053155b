"""What cannot be around merged tokens, found when a block is called: what keeps, smooths or mixes tokens by place.

It is told by what it does where that can be seen: a hook that remembers, a hook within attention that is not about
weights, a processor that keeps the attention probabilities. Processors that mix the images of a batch cannot be told
from others and are known by name. What works by place and shows none of this is not found; see the README's limits.
"""

import ast
import functools
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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
            TransformError: One of them keeps what it sees for a later call, which merges others, or takes its tokens
                for pixels, or would mix up the weights of images.
        """
        for scope in self.scopes if slots is not None else ():
            module = getattr(block, scope.module)
            _refuse_hooks(module, scope)
            processor = type(getattr(module, "processor", None))
            if self.weigh and scope.weights is not None and processor.__name__ in MIXING_PROCESSORS:
                raise TransformError(
                    f"{processor.__name__} attends in parts of the batch or across it, and would mix up the weights "
                    "that prop_attn=True gives tokens. Leave it out, or transform with prop_attn=False"
                )
            if keeps_probabilities(processor, scope.weights is None):
                raise TransformError(
                    f"{processor.__name__} keeps the attention probabilities that it sees in {scope.module}, whose "
                    f"tokens are merged ({scope.option}=True): they have no row for each pixel. Leave it out there, or "
                    f"transform with {scope.option}=False"
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
            if not is_generated(block.forward):
                raise TransformError(
                    f"forward of {path} is replaced by {name_of(block.forward)} since the transform: {ADVICE}"
                )


ADVICE = (
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


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def keeps_probabilities(processor: type, hands_on: bool) -> bool:
    """Whether an attention processor keeps the probabilities that it computes, as far as its source shows.

    Args:
        processor: Its class.
        hands_on: Count it too where they are stored on another object, or handed to one that the processor refers to.
            In self-attention such stores are common and leave its maps unread.
    """
    return _keeps_probabilities(processor, hands_on)


@functools.cache
def _keeps_probabilities(processor: type, hands_on: bool) -> bool:
    function: Any = processor.__call__
    if issubclass(processor, nn.Module) and function is nn.Module.__call__:
        function = processor.forward
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # no source, such as that of a builtin or of an interactive session
        return False
    nodes = list(ast.walk(tree))
    names = {
        target.id
        for node in nodes
        if isinstance(node, ast.Assign) and _is_probabilities(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def holds(value: ast.AST) -> bool:
        return _is_probabilities(value) or any(isinstance(n, ast.Name) and n.id in names for n in ast.walk(value))

    for node in nodes:
        if isinstance(node, ast.Assign) and holds(node.value):
            owners = [_owner(target) for target in node.targets]
            if "self" in owners or (hands_on and any(owners)):
                return True
        elif isinstance(node, ast.Call) and _owner(node.func) == "self" and any(map(holds, node.args)):
            method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if hands_on or method in ("append", "add", "extend", "update"):
                return True
    return False


def _is_probabilities(value: ast.AST) -> bool:
    """A call of `get_attention_scores` or of a softmax, whatever is done with its result afterwards."""
    called = [node.func for node in ast.walk(value) if isinstance(node, ast.Call)]
    names = {node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "") for node in called}
    return bool(names & {"get_attention_scores", "softmax"})


def _owner(target: ast.AST) -> str:
    """The variable of whose attribute this is a part, or a call; empty for a variable, or an item of one."""
    attribute = False
    while isinstance(target, (ast.Attribute, ast.Subscript, ast.Call)):
        attribute |= isinstance(target, ast.Attribute)
        target = target.func if isinstance(target, ast.Call) else target.value
    return target.id if attribute and isinstance(target, ast.Name) else ""

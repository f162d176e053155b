"""What the tests of the passes share: functions that call modules, two tracers, ways to read a graph."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from tome_fx import ops, plan
from tome_fx.graph.scopes import Matching
from tome_fx.graph.structure import Structure
from tome_fx.graph.trace import trace as trace_call

RATIO = 0.5
MATCHING = Matching(sx=2, sy=2, seed=7)


def log_sizes(module: nn.Module, tokens: Tensor, slots: ops.SlotMap | None) -> Tensor | None:
    """What attention adds to its scores."""
    return ops.log_sizes(tokens, slots)


def checkpointed(function: nn.Module, *args: Tensor, **kwargs: Any) -> Any:
    """A function that is handed a module and its arguments, as checkpointing is."""
    return function(*args, **kwargs)


def chunked(size: int, function: nn.Module, tokens: Any) -> Tensor:
    """The same, with an argument before the module."""
    return torch.cat([function(chunk) for chunk in tokens.split(size, dim=-2)], dim=-2)


def positional(function: nn.Module, *args: Any) -> Any:
    """The same, without keywords: the function that diffusers' `enable_gradient_checkpointing` sets."""
    return function(*args)


def by_template(module: nn.Module) -> fx.Graph:
    """Traced by our own tracer."""
    structure = Structure.of(module, type(module), ("checkpointed", "chunked", "positional"))
    kinds = ("4d", "4d") if len(structure.parameters) == 2 else ("3d",)
    return trace_call(structure, kinds, structure.settings(module))


class LeafTracer(fx.Tracer):
    """torch.fx's own tracer; every child is a leaf, and so are the functions above."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=(checkpointed, chunked, positional))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, nn.Module):
            return self.create_node("get_attr", self.path_of_module(a), (), {})
        return super().create_arg(a)


def by_fx(module: nn.Module) -> fx.Graph:
    return LeafTracer().trace(module)


tracers = pytest.mark.parametrize("trace", [by_template, by_fx])
Trace = Callable[[nn.Module], fx.Graph]


def counts(graph: fx.Graph) -> Counter[Any]:
    """How often each target is in a graph."""
    return Counter(node.target for node in graph.nodes)


def code(graph: fx.Graph) -> list[str]:
    """The lines of the generated forward, without the parts that free what is not needed any more."""
    lines = graph.python_code("self").src.splitlines()
    return [re.sub(r";  [\w =]+ = None", "", line).strip() for line in lines if line.strip()]


def is_call_of(node: fx.Node, module: str) -> bool:
    arguments = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
    return (node.op == "call_module" and node.target == module) or module in [a.target for a in arguments]


def matched(x: Tensor, height: int, width: int, seed: int | None) -> ops.SlotMap | None:
    return ops.match(x, height, width, kept=plan.kept(height, width, RATIO), sx=2, sy=2, seed=seed)

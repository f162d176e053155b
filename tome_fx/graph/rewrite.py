"""The two passes: each changes a graph in place, putting in match, merge and unmerge nodes.

Nothing here knows diffusers. A graph is a `torch.fx.Graph`; what to act on is described by the caller, as a `Stack` of
blocks that share a grid and as `Scope`s, the modules in a block that see merged tokens.
"""

import operator
from collections.abc import Collection
from dataclasses import dataclass

from torch import fx

from tome_fx import ops
from tome_fx.graph import nodes
from tome_fx.graph.calls import Call, calls_of
from tome_fx.graph.scopes import Scope, Stack
from tome_fx.plan import TransformError


@dataclass(frozen=True)
class MatchPass:
    """The pass for a module that calls a stack of blocks: a slot map for each of them, or one for all.

    Args:
        stack: The blocks and their grid.
        sx: Width of a cell, in tokens.
        sy: Height of a cell, in tokens.
        seed: Of the destinations, for `ops.match`.
        once: Match before the first block alone, and hand every block that slot map.
    """

    stack: Stack
    sx: int
    sy: int
    seed: int | None
    once: bool = False

    def __call__(self, graph: fx.Graph) -> None:
        """Change the graph in place.

        Raises:
            TransformError: A block of the stack is not called exactly once.
        """
        _require_one_call_each(graph, self.stack.blocks)
        insert_match(graph, self.stack, sx=self.sx, sy=self.sy, seed=self.seed, once=self.once)


@dataclass(frozen=True)
class MergePass:
    """The pass for a block: the module of each scope sees merged tokens, at whatever ratio.

    Args:
        scopes: The modules.
        weigh: Weigh merged tokens by how many they stand for, in the scopes that take weights.
    """

    scopes: tuple[Scope, ...]
    weigh: bool = False

    def __call__(self, graph: fx.Graph) -> None:
        """Change the graph in place.

        Raises:
            TransformError: The module of a scope is not called exactly once.
        """
        _require_one_call_each(graph, tuple(scope.module for scope in self.scopes))
        insert_merge(graph, self.scopes, weigh=self.weigh)


def insert_match(graph: fx.Graph, stack: Stack, *, sx: int, sy: int, seed: int | None, once: bool = False) -> int:
    """Plan a merge before each block of the stack and hand the block its slot map.

    Before::

        x = self.block(tokens)

    After::

        grid = grid_of(image); height = grid[0]; width = grid[1]
        kept = kept(height, width, self.tome_fx.ratio)
        match = match(tokens, height, width, kept=kept, sx=2, sy=2, seed=7)
        x = self.block(tokens, slots=match)

    A block that is called through a function, which may pass positional arguments alone, gets its slot map as the last
    of them.

    Args:
        graph: Changed in place.
        stack: The blocks and their grid.
        sx: Width of a cell, in tokens.
        sy: Height of a cell, in tokens.
        seed: Of the destinations, for `ops.match`.
        once: Match before the first block alone.

    Returns:
        How many blocks were given a slot map.
    """
    calls = list(calls_of(graph, stack.blocks))
    if not calls:
        return 0
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    image = next((node for node in inputs if node.target == stack.image), None)
    if image is None:
        raise TransformError(f"expected an input {stack.image}, found {', '.join(str(node.target) for node in inputs)}")
    with graph.inserting_before(inputs[-1].next):
        grid = graph.call_function(stack.grid, (image,))
        height, width = (graph.call_function(operator.getitem, (grid, side)) for side in (0, 1))
        kept = graph.call_function(ops.kept, (height, width, graph.get_attr(stack.ratio)))
    slots: fx.Node | None = None
    for call in calls:
        if slots is None or not once:
            with graph.inserting_before(call.node):
                slots = graph.call_function(
                    ops.match,
                    (call.argument(stack.tokens), height, width),
                    {"kept": kept, "sx": sx, "sy": sy, "seed": seed},
                )
        call.add(slots, "slots", defaults=stack.defaults[stack.blocks.index(call.module)])
    return len(calls)


def insert_merge(graph: fx.Graph, scopes: Collection[Scope], *, weigh: bool = False) -> int:
    """Let the module of each scope see merged tokens; adds the input `slots`.

    Before::

        y = self.module(x)

    After::

        merge = merge(x, slots)
        y = self.module(merge)
        unmerge = unmerge(y, slots)

    and where tokens are weighed and the scope takes weights::

        log_sizes = log_sizes(x, slots)
        y = attend(self.module, merge, attention_mask=log_sizes)

    Args:
        graph: Changed in place.
        scopes: The modules.
        weigh: Weigh merged tokens by how many they stand for.

    Returns:
        How many modules were wrapped.
    """
    by_name = {scope.module: scope for scope in scopes}
    calls = list(calls_of(graph, by_name))
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(inputs[-1]):
        slots = graph.placeholder("slots", default_value=None)
    for call in calls:
        scope = by_name[call.module]
        tokens = call.argument(scope.tokens)
        with graph.inserting_before(call.node):
            for name in scope.per_token:
                if call.node.kwargs.get(name) is not None:
                    details = (call.node.kwargs[name], slots, name, scope.module, scope.option)
                    checked = graph.call_function(nodes.refused_if_merged, details)
                    call.node.update_kwarg(name, checked)
            merged = graph.call_function(ops.merge, (tokens, slots))
            call.replace(scope.tokens, merged)
            if weigh and scope.weights is not None:
                call = _weighed(call, scope.weights, graph.call_function(ops.log_sizes, (tokens, slots)))
        _unmerge(call.node, scope.result, slots)
    return len(calls)


def _weighed(call: Call, name: str, weights: fx.Node) -> Call:
    """The call as one of `attend`, with the weights in the place of its mask."""
    node = call.node
    mask = node.kwargs.get(name)
    with node.graph.inserting_before(node):
        value = weights if mask is None else node.graph.call_function(nodes.either, (weights, mask))
        if call.first == 0:
            module = node.graph.get_attr(call.module)
            attention = node.graph.call_function(nodes.attend, (module, *node.args), {**node.kwargs, name: value})
            node.replace_all_uses_with(attention)
            node.graph.erase_node(node)
            return Call(attention, call.module, 1)
    node.update_kwarg(name, value)
    return call


def _unmerge(node: fx.Node, result: int | None, slots: fx.Node) -> None:
    """Have everybody who reads tokens off the node's result read them unmerged."""
    tokens = [node]
    if result is not None:
        tokens = [user for user in node.users if user.target is operator.getitem and user.args[1] == result]
    for merged in tokens:
        with node.graph.inserting_after(merged):
            restored = node.graph.call_function(ops.unmerge, (merged, slots))
        merged.replace_all_uses_with(restored)
        restored.update_arg(0, merged)  # its own input, which has been replaced as well


def _require_one_call_each(graph: fx.Graph, modules: tuple[str, ...]) -> None:
    """Every module asked for must be there: a merge that is left out silently is an option that does nothing."""
    if sorted(call.module for call in calls_of(graph, modules)) != sorted(modules):
        called = sorted(str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr"))
        raise TransformError(f"expected one call each of {', '.join(modules)}, found calls of {', '.join(called)}")

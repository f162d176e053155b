"""The passes: each changes a graph in place, putting in match, merge and unmerge nodes.

Nothing here knows diffusers. A graph is a `torch.fx.Graph`; what to act on is described by the caller, as a `Stack` of
blocks that share a grid and as `Scope`s, the modules in a block that see merged tokens.
"""

import operator
from collections.abc import Collection
from dataclasses import dataclass

from torch import fx

from tome_fx import ops
from tome_fx.graph import nodes
from tome_fx.graph.calls import Call, Parameters, calls_of, replaced_after
from tome_fx.graph.scopes import Matching, Scope, Stack, Weigh
from tome_fx.graph.stacks import AdaptedArguments, Runs, Sequences, arguments_of, is_joint, matched_calls
from tome_fx.plan import TransformError


@dataclass(frozen=True)
class MatchPass:
    """The pass for a module that calls a stack of blocks: hands them slot maps, to merge by within.

    Args:
        stack: The blocks and their grid.
        matching: How they are matched.
    """

    stack: Stack
    matching: Matching

    def __call__(self, graph: fx.Graph) -> None:
        """Change the graph in place.

        Raises:
            TransformError: A block of the stack is not called exactly once, or none is where a call may skip some.
        """
        _require_calls_of_stack(graph, self.stack)
        insert_match(graph, self.stack, self.matching)


@dataclass(frozen=True)
class StackPass:
    """The pass for a module that calls a stack of blocks: they see merged tokens, whole, and are left as they are.

    Args:
        stack: The blocks and their grid.
        matching: How they are matched.
        weigh: Gives the weights of merged tokens by how many they stand for; None weighs none.
    """

    stack: Stack
    matching: Matching
    weigh: Weigh | None = None

    def __call__(self, graph: fx.Graph) -> None:
        """Change the graph in place.

        Raises:
            TransformError: A block of the stack is not called exactly once, or none is where a call may skip some.
        """
        _require_calls_of_stack(graph, self.stack)
        insert_merge_of_blocks(graph, self.stack, self.matching, self.weigh)


@dataclass(frozen=True)
class MergePass:
    """The pass for a block: the module of each scope sees merged tokens, at whatever ratio.

    Args:
        scopes: The modules.
        queries: Whether the tokens that attend are merged too, or keys and values alone, in scopes that have `keys`.
        weigh: Gives the weights of merged tokens by how many they stand for, in the scopes that take them; None weighs
            none.
    """

    scopes: tuple[Scope, ...]
    queries: bool = True
    weigh: Weigh | None = None

    def __call__(self, graph: fx.Graph) -> None:
        """Change the graph in place.

        Raises:
            TransformError: The module of a scope is not called exactly once.
        """
        _require_one_call_each(graph, tuple(scope.module for scope in self.scopes))
        insert_merge(graph, self.scopes, queries=self.queries, weigh=self.weigh)


def insert_match(graph: fx.Graph, stack: Stack, matching: Matching) -> int:
    """Plan a merge before each block of the stack, or before the first, and hand the blocks their slot maps.

    Before::

        x = self.block(tokens)

    After::

        grid = grid_of(image); height = grid[0]; width = grid[1]
        kept = kept(height, width, self.tome_fx.ratio)
        match = match(tokens, height, width, kept=kept, sx=2, sy=2, seed=7, tile=16)
        x = self.block(tokens, slots=match)

    A block that is called through a function, which may pass positional arguments alone, gets its slot map as the last
    of them. Arguments that a block hands on to what sees merged tokens are given to it for these.

    Returns:
        How many blocks were given a slot map.
    """
    matched, adapted, sequences = matched_calls(graph, stack, matching), AdaptedArguments(stack), Sequences(stack)
    for call, slots in matched:
        parameters = arguments_of(stack, call)
        with graph.inserting_before(call.node):
            _refuse_per_token(call, stack.per_token, parameters, slots, stack.option)
            adapted.give(call, parameters, slots)
            whole = sequences.slots(call, parameters, slots)
        call.append("slots", whole, parameters)
    return len(matched)


def insert_merge_of_blocks(graph: fx.Graph, stack: Stack, matching: Matching, weigh: Weigh | None = None) -> int:
    """Let each block of the stack see merged tokens, and add to each token what its slot is changed by.

    Before::

        x = self.block(tokens)

    After::

        merge = merge(tokens, slots)
        y = self.block(merge)
        x = tokens + unmerge(y - merge, slots)

    Where blocks of one match follow on one another, what one returns is what the next would merge, as a merge undoes an
    unmerge: tokens are merged before the first of them and unmerged after the last.

    Returns:
        How many blocks see merged tokens.
    """
    matched, runs = matched_calls(graph, stack, matching), Runs()
    adapted, sequences = AdaptedArguments(stack), Sequences(stack)
    for call, slots in matched:
        parameters = arguments_of(stack, call)
        with graph.inserting_before(call.node):
            _refuse_per_token(call, stack.per_token, parameters, slots, stack.option)
            adapted.give(call, parameters, slots)
            run = runs.through(call.argument(stack.tokens), sequences.slots(call, parameters, slots))
            call.replace(stack.tokens, run.inside)
            if weigh and stack.weights is not None:
                call = _weighed(call, stack.weights, run.tokens, slots, weigh, parameters, stack.attention)
        runs.left(run, *_results(call.node, None if is_joint(stack, call) else stack.result))
    for end in runs.ends:
        if not end.users:  # the run went on
            graph.erase_node(end)
    return len(matched)


def insert_merge(
    graph: fx.Graph, scopes: Collection[Scope], *, queries: bool = True, weigh: Weigh | None = None
) -> int:
    """Let the module of each scope see merged tokens; adds the input `slots`.

    Before::

        y = self.module(x)

    After::

        merge = merge(x, slots)
        y = self.module(merge)
        unmerge = unmerge(y, slots)

    where keys and values alone are merged::

        keys = merged_keys(x, slots)
        y = self.module(x, encoder_hidden_states=keys)

    and where tokens are weighed and the scope takes weights::

        weights = weigh(self.module, x, slots)
        y = attend(self.module, merge, attention_mask=weights)

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
        keys = None if queries else scope.keys
        with graph.inserting_before(call.node):
            _refuse_per_token(call, scope.per_token, None, slots, scope.option)
            if keys:
                call.node.update_kwarg(keys, graph.call_function(nodes.merged_keys, (tokens, slots)))
            else:
                call.replace(scope.tokens, graph.call_function(ops.merge, (tokens, slots)))
            if weigh and scope.weights is not None:
                call = _weighed(call, scope.weights, tokens, slots, weigh)
        if not keys:
            for merged in _results(call.node, scope.result):
                replaced_after(merged, ops.unmerge, (merged, slots))
    return len(calls)


def _refuse_per_token(
    call: Call,
    names: tuple[str, ...],
    parameters: Parameters,
    slots: fx.Node,
    option: str,
) -> None:
    """Have arguments with an entry for each token refused when tokens are merged."""
    for name in names:
        outer, _, inner = name.partition(".")
        value = call.given(outer, parameters)
        if value is not None:
            details = (value, slots, inner or outer, call.module, option, inner)
            call.give(outer, call.node.graph.call_function(nodes.refused_if_merged, details), parameters)


def _weighed(
    call: Call,
    name: str,
    tokens: fx.Node,
    slots: fx.Node,
    weigh: Weigh,
    parameters: Parameters = None,
    attention: str = "",
) -> Call:
    """The call as one of `attend`, if it is the module's own, with the weights in the place of its mask.

    They are those of the module, or of the attention at a path in it.
    """
    graph = call.node.graph
    module = graph.get_attr(call.module)
    weighing = graph.get_attr(f"{call.module}.{attention}") if attention else module
    weights = graph.call_function(weigh, (weighing, tokens, slots))
    mask = call.given(name, parameters)
    call.give(name, weights if mask is None else graph.call_function(nodes.either, (weights, mask)), parameters)
    if call.first:
        return call
    attended = graph.call_function(nodes.attend, (module, *call.node.args), dict(call.node.kwargs))
    call.node.replace_all_uses_with(attended)
    graph.erase_node(call.node)
    return Call(attended, call.module, 1)


def _results(node: fx.Node, place: int | tuple[int, ...] | None) -> list[fx.Node]:
    """The nodes that are the tokens which a module returns, at these places of a tuple or alone."""
    if place is None:
        return [node]
    places = place if isinstance(place, tuple) else (place,)
    return [user for user in node.users if user.target is operator.getitem and user.args[1] in places]


def _require_calls_of_stack(graph: fx.Graph, stack: Stack) -> None:
    called = {call.module for call in calls_of(graph, stack.blocks)} if stack.skips else ()
    _require_one_call_each(graph, tuple(called) or stack.blocks)


def _require_one_call_each(graph: fx.Graph, modules: tuple[str, ...]) -> None:
    """Every module asked for must be there: a merge that is left out silently is an option that does nothing."""
    if sorted(call.module for call in calls_of(graph, modules)) != sorted(modules):
        called = sorted(str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr"))
        raise TransformError(f"expected one call each of {', '.join(modules)}, found calls of {', '.join(called)}")

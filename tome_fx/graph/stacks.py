"""What passes for a stack of blocks go by: the slot map of each call, and what else is others for merged tokens."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from tome_fx import ops
from tome_fx.graph import nodes
from tome_fx.graph.calls import Call, Parameters, calls_of, replaced_after
from tome_fx.graph.scopes import Matching, Stack
from tome_fx.plan import TransformError


def matched_calls(graph: fx.Graph, stack: Stack, matching: Matching) -> list[tuple[Call, fx.Node]]:
    """Each call of a block with the slot map of its tokens, put in before it or before the first of them."""
    calls = list(calls_of(graph, stack.blocks))
    if not calls:
        return []
    inputs = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
    for name in stack.grid_inputs:
        if name not in inputs:
            raise TransformError(f"expected an input {name}, found {', '.join(inputs)}")
    shown = [inputs[name] for name in stack.grid_inputs]
    with graph.inserting_before(list(inputs.values())[-1].next):
        grid = graph.call_function(stack.grid, (*shown, *stack.grid_arguments))
        sides = [graph.call_function(operator.getitem, (grid, side)) for side in range(2 + stack.frames)]
        *before, height, width = sides
        kept = graph.call_function(ops.kept, (height, width, graph.get_attr(stack.ratio)))
    function: Callable[..., object] = ops.match_frames if stack.frames else ops.match
    if stack.line is not None:
        function, first = ops.match_along, calls[0]
        with graph.inserting_before(first.node):
            arguments = *shown, first.argument(stack.tokens), matching.sx, matching.sy
            before = [graph.call_function(stack.line, arguments)]
        matching = matching.along
    options: dict[str, Any] = {
        "kept": kept,
        "sx": matching.sx,
        "sy": matching.sy,
        "seed": matching.seed,
        "tile": matching.tile,
    }
    matched: list[tuple[Call, fx.Node]] = []
    for call in calls:
        if matched and matching.once:
            matched.append((call, matched[0][1]))
            continue
        with graph.inserting_before(call.node):
            tokens = call.argument(stack.tokens)
            if is_joint(stack, call):
                tokens = graph.call_function(nodes.of_grid, (tokens, *sides))
            slots = graph.call_function(function, (tokens, *before, height, width), options)
        matched.append((call, slots))
    return matched


class AdaptedArguments:
    """Gives blocks the arguments that are others where tokens are merged; what is made of the same is made once."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.places: dict[fx.Node, fx.Node] = {}  # by the slot map
        self.made: dict[object, fx.Node] = {}  # by what they are made of

    def give(self, call: Call, parameters: Parameters, slots: fx.Node) -> None:
        """Put them in before the call."""
        graph = call.node.graph
        names = [name for argument in self.stack.adapted for name in (argument.name, *argument.beside)]
        given = {name: call.given(name, parameters) for name in names}
        for argument in self.stack.adapted:
            value, *beside = (given[name] for name in (argument.name, *argument.beside))
            key = argument.name, slots, str(value)
            if key not in self.made:
                self.made[key] = graph.call_function(argument.made, (value, slots, self._places(slots), *beside))
            made = self.made[key]
            if argument.chosen is not None:
                made = graph.call_function(argument.chosen, (graph.get_attr(call.module), value, made))
            call.give(argument.name, made, parameters)

    def _places(self, slots: fx.Node) -> fx.Node:
        if slots not in self.places:
            *before, height, width = slots.args[1:]
            options = {name: value for name, value in slots.kwargs.items() if name != "kept"}
            if before:
                options["frames" if self.stack.frames else "line"] = before[0]
            self.places[slots] = slots.graph.call_function(ops.places, (slots, height, width), options)
        return self.places[slots]


class Sequences:
    """Tells what blocks are over: the grid, or text and the grid, whose slot map is made once for each of the grid."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.of_both: dict[fx.Node, fx.Node] = {}  # by the slot map of the grid

    def slots(self, call: Call, parameters: Parameters, slots: fx.Node) -> fx.Node:
        """The slot map of all that a block is over; put in before the call."""
        name, graph = _text(self.stack, call), call.node.graph
        if name is None:
            return slots
        if slots not in self.of_both:
            text = call.given(name, parameters)
            if is_joint(self.stack, call):
                text = graph.call_function(nodes.of_text, (call.argument(name), slots))
            self.of_both[slots] = graph.call_function(ops.after_text, (slots, text))
        return self.of_both[slots]


@dataclass
class Run:
    """Blocks that follow on one another under one slot map.

    Args:
        tokens: What goes into the first of them, before it is merged.
        merged: The same, merged.
        inside: What goes into the next of them.
        slots: The slot map.
    """

    tokens: fx.Node
    merged: fx.Node
    inside: fx.Node
    slots: fx.Node


class Runs:
    """Finds the run that a block goes on with; see `insert_merge_of_blocks`."""

    def __init__(self) -> None:
        self.ends: dict[fx.Node, Run] = {}  # by the unmerged tokens that a run would give if it ended there

    def through(self, tokens: fx.Node, slots: fx.Node) -> Run:
        """The run that these tokens come out of, or a new one."""
        if tokens in self.ends and self.ends[tokens].slots is slots:
            return self.ends[tokens]
        merged = tokens.graph.call_function(ops.merge, (tokens, slots))
        return Run(tokens, merged, merged, slots)

    def left(self, run: Run, *results: fx.Node) -> None:
        """The tokens that a block of the run has given: everybody who reads them reads them unmerged."""
        for result in results:
            end = replaced_after(result, ops.changed, (run.tokens, run.merged, result, run.slots))
            self.ends[end] = Run(run.tokens, run.merged, result, run.slots)


def arguments_of(stack: Stack, call: Call) -> Parameters:
    """Names and defaults of the positional arguments of the block that is called."""
    return stack.arguments[stack.blocks.index(call.module)]


def _text(stack: Stack, call: Call) -> str | None:
    return dict(zip(stack.blocks, stack.texts, strict=False)).get(call.module)


def is_joint(stack: Stack, call: Call) -> bool:
    """Whether the tokens of a block are text and grid."""
    return _text(stack, call) == stack.tokens

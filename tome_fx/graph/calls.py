"""Where a graph calls a named module, and with what."""

import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from torch import fx, nn

from tome_fx.graph.specialize import original
from tome_fx.plan import TransformError

# Names and defaults of a module's positional parameters, in order; None where they are not known.
Parameters = tuple[tuple[str, Any], ...] | None


class Call(NamedTuple):
    """A call of a named module: itself, or through a function that takes it followed by its arguments.

    `first` is the place of the module's first argument among those of the node: 0, or after the module.
    """

    node: fx.Node
    module: str
    first: int

    def argument(self, name: str) -> fx.Node:
        """The argument that the module calls `name`, or its first one if that is given by position."""
        if name in self.node.kwargs:
            return self.node.kwargs[name]  # type: ignore[return-value]
        if len(self.node.args) <= self.first:
            raise TransformError(
                f"expected the tokens of {self.module} as its first argument or as {name}, found a call with "
                f"{', '.join(self.node.kwargs) or 'no arguments'}"
            )
        return self.node.args[self.first]  # type: ignore[return-value]

    def replace(self, name: str, value: fx.Node) -> None:
        """Put another value where `argument` finds it."""
        if name in self.node.kwargs:
            self.node.update_kwarg(name, value)
        else:
            self.node.update_arg(self.first, value)

    def given(self, name: str, parameters: Parameters) -> Any:
        """What the module is given for `name`, by keyword or at its place among its positional parameters, or None."""
        place = self.first + _place(name, parameters)
        return self.node.args[place] if place < len(self.node.args) else self.node.kwargs.get(name)

    def give(self, name: str, value: fx.Node, parameters: Parameters) -> None:
        """Give the module another value for `name`: by keyword, or by position if it is called through a function."""
        place = _place(name, parameters)
        if self.first + place < len(self.node.args):
            self.node.update_arg(self.first + place, value)
        elif self.first == 0 or parameters is None:
            self.node.update_kwarg(name, value)
        else:
            self._extend(value, [default for _, default in parameters[:place]])

    def append(self, name: str, value: fx.Node, parameters: Parameters) -> None:
        """Give the module one more argument, the last that it takes by position."""
        if self.first == 0:
            self.node.update_kwarg(name, value)
            return
        if parameters is None:
            raise TransformError(
                f"{self.module} takes any number of arguments by position, and is called through "
                f"{self.node.target}, which may pass no others: it cannot be handed what to merge"
            )
        self._extend(value, [default for _, default in parameters])

    def _extend(self, value: fx.Node, defaults: list[Any]) -> None:
        """The value by position, after all of the module's arguments that have these defaults."""
        count = len(self.node.args) - self.first
        self.node.args = (*self.node.args, *defaults[count:], value)


def positional(module: nn.Module) -> Parameters:
    """Names and defaults of all arguments that a module takes by position; None if it takes any number."""
    forward: Any = original(type(module)).forward
    parameters = list(inspect.signature(inspect.unwrap(forward)).parameters.values())[1:]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return tuple((p.name, p.default) for p in parameters if p.kind <= p.POSITIONAL_OR_KEYWORD)


def _place(name: str, parameters: Parameters) -> int:
    """The place of a parameter among the positional ones; beyond them all where it is none."""
    names = [known for known, _ in parameters or ()]
    return names.index(name) if name in names else sys.maxsize


def calls_of(graph: fx.Graph, modules: Collection[str]) -> Iterator[Call]:
    """Every call of a named module, in order."""
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target in modules:
            yield Call(node, node.target, 0)
        for place, argument in enumerate(node.args):
            if isinstance(argument, fx.Node) and argument.op == "get_attr" and argument.target in modules:
                yield Call(node, str(argument.target), place + 1)


def replaced_after(node: fx.Node, function: Callable[..., object], arguments: tuple[fx.Node, ...]) -> fx.Node:
    """Have everybody who reads the node read what the function makes of it and of other arguments."""
    with node.graph.inserting_after(node):
        result = node.graph.call_function(function, arguments)
    node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
    return result

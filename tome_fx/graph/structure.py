"""What the graph of a forward depends on, and what modules must have in common to share their graphs.

NOTE [What a graph depends on]
A forward in Python branches: on which optional inputs are given, on the keys of a dict, on a flag or a number of its
module. A graph does not. So a graph is traced for one kind of call: the `kind` of each argument and the `setting` of
each plain attribute at that moment. All else is looked up on the module when the graph runs: weights, children, and
attributes that are floats, objects or functions. What modules must have in common to share their graphs is their
`Structure`.
"""

import inspect
import json
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from inspect import Parameter
from types import FunctionType
from typing import Any

import torch
from torch import nn

# Not float: dynamo may make one symbolic, which no choice of a graph can hang on. It is looked up.
PLAIN = (bool, int, str, type(None))
HALF = " float16"  # what the kind of a tensor of this type ends with, where a forward asks for it


def kind(value: Any, half: bool = False) -> Hashable:
    """What a graph depends on in an argument: None and bools whole, the keys of a dict, the rank of a tensor.

    Of a list or a tuple of tensors that of each, after the name of its type. Of a list, a tuple, a set or a range of
    whole numbers, such as those of layers, the numbers. What holds anything else is opaque.

    Args:
        value: The argument.
        half: Whether the graph depends on which tensors are of float16 as well: see `Structure.half`.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, dict):
        return tuple([(name, kind(item, half)) for name, item in value.items()])
    if type(value) in (list, tuple) and all(isinstance(item, torch.Tensor) for item in value):
        return (type(value).__name__, *[kind(item, half) for item in value])
    if type(value) in (list, tuple, set, frozenset, range) and all(type(item) is int for item in value):
        numbers = sorted(value) if type(value) in (set, frozenset) else value
        # A number that has changed is symbolic to dynamo, unless it is a key of a dict.
        return (type(value).__name__, *[next(iter({item: None})) for item in numbers])
    if not isinstance(value, torch.Tensor):
        return "opaque"
    return f"{value.ndim}d{HALF}" if half and value.dtype is torch.float16 else f"{value.ndim}d"


def setting(value: Any) -> Hashable:
    """What a graph depends on in an attribute: its value if that is plain, or `...` for what is looked up."""
    return value if isinstance(value, PLAIN) else ...


Count = Callable[[nn.Module], int]  # tells of a child how many values it returns
Returns = Callable[..., tuple[Hashable, ...]]  # tells, of what a child is called with, the kinds of what it returns


@dataclass(frozen=True)
class Structure:
    """What modules have in common whose graphs are shared, and no weight of theirs. Equal structures hash alike.

    Args:
        base: The class whose forward is traced.
        forward: That forward, as it is now: a class can be patched.
        methods: All functions of the class, of which the forward may call some.
        calls: Names of functions to call from the graph, not to trace into: globals of the module of `base.forward`.
        plain: Names of attributes that are None, a bool, an int or a string; their values belong to each kind of call.
        data: Names of lists and dicts of plain values, such as a config, each with itself as JSON. They are taken for
            constants.
        objects: Names of attributes that are anything else, looked up when a graph runs.
        tensors: Names of parameters and buffers.
        children: Names of child modules, each with the length of a `ModuleList` or None for any other.
        absent: Names of tensors and children that are None.
        constants: The lists and dicts themselves.
        reads: Plain attributes of children that the forward branches on, by `child.attribute`, with their values. They
            are taken for constants as well.
        counts: Children that return a tuple whose length the forward asks for, by name, each with what tells that
            length. It belongs to each kind of call, as plain attributes do.
        returns: Children that return a tuple whose values the forward branches on, by name, each with what tells the
            `kind` of each value.
    """

    base: type[nn.Module]
    forward: Callable[..., Any]
    methods: tuple[Callable[..., Any], ...]
    calls: tuple[str, ...]
    plain: tuple[str, ...]
    data: tuple[tuple[str, str], ...]
    objects: tuple[str, ...]
    tensors: tuple[str, ...]
    children: tuple[tuple[str, int | None], ...]
    absent: tuple[str, ...]
    constants: dict[str, Any] = field(compare=False)
    reads: tuple[tuple[str, Any], ...] = ()
    counts: tuple[tuple[str, Count], ...] = ()
    returns: tuple[tuple[str, Returns], ...] = ()

    @classmethod
    def of(
        cls,
        module: nn.Module,
        base: type[nn.Module],
        calls: tuple[str, ...] = (),
        reads: tuple[str, ...] = (),
        counts: tuple[tuple[str, Count], ...] = (),
        returns: tuple[tuple[str, Returns], ...] = (),
    ) -> "Structure":
        """The structure of a module of the class `base`, or of one derived from it with another forward.

        Args:
            module: The module.
            base: The class whose forward is traced.
            calls: Functions to call from the graph.
            reads: Names of attributes that the forward reads of its children, and of the items of its module lists.
            counts: Children whose results are counted.
            returns: Children whose results are branched on.
        """
        internals = vars(nn.Module()).keys() - {"training"}
        attributes = {name: value for name, value in vars(module).items() if name not in (*internals, "forward")}
        plain = [name for name, value in attributes.items() if isinstance(value, PLAIN)]
        data = {name: text for name, value in attributes.items() if name not in plain and (text := _as_json(value))}
        tensors = (*module._parameters.items(), *module._buffers.items())
        children = module._modules.items()
        return cls(
            base=base,
            forward=base.forward,
            methods=tuple(_methods(base)),
            calls=calls,
            plain=tuple(plain),
            data=tuple(data.items()),
            objects=tuple(name for name in attributes if name not in plain and name not in data),
            tensors=tuple(name for name, tensor in tensors if tensor is not None),
            children=tuple(
                (name, len(child) if isinstance(child, nn.ModuleList) else None)
                for name, child in children
                if child is not None
            ),
            absent=tuple(name for name, value in (*tensors, *children) if value is None),
            constants={name: attributes[name] for name in data},
            reads=tuple(
                (f"{path}.{name}", getattr(part, name))
                for path, part in _parts(module)
                for name in reads
                if isinstance(getattr(part, name, ...), PLAIN)
            ),
            counts=counts,
            returns=returns,
        )

    @property
    def function(self) -> Any:
        """The forward itself, out of its decorators."""
        return inspect.unwrap(self.forward)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The parameters of forward, without self."""
        return tuple(inspect.signature(self.function).parameters.values())[1:]

    @property
    def half(self) -> bool:
        """Whether the forward asks which tensors are of float16, whose numbers it may clip."""
        return "float16" in self.function.__code__.co_names

    def settings(self, module: nn.Module) -> tuple[Hashable, ...]:
        """The `setting` of each of the module's plain attributes now, and how many tensors counted children return."""
        plain = [setting(getattr(module, name)) for name in self.plain]
        return (*plain, *[count(getattr(module, name)) for name, count in self.counts])


def _methods(base: type[nn.Module]) -> Iterator[Callable[..., Any]]:
    """The functions of a class and of those that it derives from, but for what all modules have."""
    for cls in base.__mro__[: base.__mro__.index(nn.Module)]:
        yield from (value for value in vars(cls).values() if isinstance(value, FunctionType))


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children of a module by name; in the place of a list of modules, those in it."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{item}", part) for item, part in child.named_children())
        else:
            yield name, child


def _as_json(value: Any) -> str | None:
    """A list or a dict as text, or None where it is neither or holds more than plain values."""
    if not isinstance(value, (list, tuple, dict)):
        return None
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # the latter two of one that holds itself
        return None

"""Trace one `forward` for one kind of call into a `torch.fx.Graph`, every child module a leaf.

`torch.fx.symbolic_trace` cannot: it patches `nn.Module.__call__` for the whole process while it runs, renames the
inputs that it is told the value of, and stops at the first question about a tensor's rank. Here a stand-in for the
module is traced instead. Its children record their calls, so nothing is patched and every input keeps its name.

NOTE [What a graph depends on]
A forward in Python branches: on which optional inputs are given, on the keys of a dict, on a flag or a number of its
module. A graph does not. So a graph is traced for one kind of call: the `kind` of each argument and the `setting` of
each plain attribute at that moment. All else is looked up on the module when the graph runs: weights, children, and
attributes that are floats, objects or functions. What modules must have in common to share their graphs is their
`Structure`.
"""

import dataclasses
import dis
import inspect
import json
import operator
import sys
import types
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from inspect import Parameter
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import GraphAppendingTracer

from tome_fx.graph.nodes import call
from tome_fx.plan import TransformError

# Not float: dynamo may make one symbolic, which no choice of a graph can hang on. It is looked up.
PLAIN = (bool, int, str, type(None))


def kind(value: Any) -> Hashable:
    """What a graph depends on in an argument: None and bools whole, the keys of a dict, the rank of a tensor."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, dict):
        return tuple([(name, kind(item)) for name, item in value.items()])
    return f"{value.ndim}d" if isinstance(value, torch.Tensor) else "opaque"


def setting(value: Any) -> Hashable:
    """What a graph depends on in an attribute: its value if that is plain, or `...` for what is looked up."""
    return value if isinstance(value, PLAIN) else ...


@dataclass(frozen=True)
class Structure:
    """What modules have in common whose graphs are shared, and no weight of theirs. Equal structures hash alike.

    Args:
        base: The class whose forward is traced.
        calls: Names of functions to call from the graph, not to trace into: globals of the module of `base.forward`.
        plain: Names of attributes that are None, a bool, an int or a string; their values belong to each kind of call.
        data: Names of lists and dicts of plain values, such as a config, each with itself as JSON. They are taken for
            constants.
        objects: Names of attributes that are anything else, looked up when a graph runs.
        tensors: Names of parameters and buffers.
        children: Names of child modules, each with the length of a `ModuleList` or None for any other.
        absent: Names of tensors and children that are None.
        constants: The lists and dicts themselves.
    """

    base: type[nn.Module]
    calls: tuple[str, ...]
    plain: tuple[str, ...]
    data: tuple[tuple[str, str], ...]
    objects: tuple[str, ...]
    tensors: tuple[str, ...]
    children: tuple[tuple[str, int | None], ...]
    absent: tuple[str, ...]
    constants: dict[str, Any] = field(compare=False)

    @classmethod
    def of(cls, module: nn.Module, base: type[nn.Module], calls: tuple[str, ...] = ()) -> "Structure":
        """The structure of a module of the class `base`, or of one derived from it with another forward."""
        internals = vars(nn.Module()).keys() - {"training"}
        attributes = {name: value for name, value in vars(module).items() if name not in (*internals, "forward")}
        plain = [name for name, value in attributes.items() if isinstance(value, PLAIN)]
        data = {name: text for name, value in attributes.items() if name not in plain and (text := _as_json(value))}
        tensors = (*module._parameters.items(), *module._buffers.items())
        children = module._modules.items()
        return cls(
            base=base,
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
        )

    @property
    def function(self) -> Any:
        """The forward itself, out of its decorators."""
        return inspect.unwrap(self.base.forward)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The parameters of forward, without self."""
        return tuple(inspect.signature(self.function).parameters.values())[1:]

    def settings(self, module: nn.Module) -> tuple[Hashable, ...]:
        """The `setting` of each of the module's plain attributes now."""
        return tuple(setting(getattr(module, name)) for name in self.plain)


def trace(structure: Structure, kinds: tuple[Hashable, ...], settings: tuple[Hashable, ...]) -> fx.Graph:
    """The graph of a call whose arguments are of these kinds, to a module whose plain attributes have these values.

    Args:
        structure: Of the module.
        kinds: The `kind` of each of the structure's parameters; of `*args` and `**kwargs` that of a dict of them.
        settings: From `Structure.settings`.
    """
    graph = fx.Graph()
    tracer = _Tracer(graph)
    positional: list[Any] = []
    by_name: dict[str, Any] = {}
    for parameter, what in zip(structure.parameters, kinds, strict=True):
        value = _argument(tracer, tracer.placeholder(parameter), what)
        if parameter.kind is Parameter.VAR_POSITIONAL:
            positional += value.values()
        elif parameter.kind is Parameter.VAR_KEYWORD:
            by_name |= value
        elif parameter.kind is Parameter.KEYWORD_ONLY:
            by_name[parameter.name] = value
        else:
            positional.append(value)

    names = dict(structure.function.__globals__)
    names |= {name: _Function(tracer, names[name]) for name in structure.calls if name in names}
    forward = types.FunctionType(structure.function.__code__, names, closure=structure.function.__closure__)
    with torch.enable_grad():  # so that a flag for training alone decides what is traced
        graph.output(tracer.create_arg(forward(_standin(tracer, structure, settings), *positional, **by_name)))
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return graph


class _Proxy(fx.Proxy):
    """A proxy that is taken apart like fx's own, but leaves no circle of frames, which would keep callers' models."""

    def __getattr__(self, name: str) -> "_Attribute":
        return _Attribute(self, name)

    def __iter__(self) -> Any:
        itself: Any = self
        frame = sys._getframe(1)
        code, at = frame.f_code.co_code, frame.f_lasti
        del frame
        if dis.opname[code[at]] == "UNPACK_SEQUENCE":  # as many as there are names for
            return iter([itself[i] for i in range(code[at + 1])])
        return self.tracer.iter(self)


class _Attribute(_Proxy, fx.proxy.Attribute):
    """An attribute of a proxy."""


class _Ranked(_Proxy):
    """A proxy that knows its rank: that of image tokens `[B, N, C]`, and of what is computed from them, if not told."""

    ndim = 3


class _Object(_Proxy):
    """An attribute that is looked up when the graph runs; if a function, it is called through `call`."""

    def __call__(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", call, (self, *args), kwargs)


class _Tracer(GraphAppendingTracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Ranked(node, self)

    def placeholder(self, parameter: Parameter) -> fx.Node:
        default = parameter.default
        if default is Parameter.empty and parameter.kind > Parameter.POSITIONAL_OR_KEYWORD:
            default = None  # a graph takes all inputs by position, where none without a default may follow one with it
        return self.graph.placeholder(parameter.name, default_value=default)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, _Child):
            return self.graph.get_attr(a.name)
        if dataclasses.is_dataclass(a) and not isinstance(a, type):  # an output class, which may be a dict as well
            fields = {f.name: self.create_arg(getattr(a, f.name)) for f in dataclasses.fields(a)}
            return self.create_node("call_function", type(a), (), fields)
        return super().create_arg(a)


class _Child:
    """Stands for a child module: a call of it is a call_module node, as an argument it is a get_attr node.

    What a child is made of may change after the trace, so that a forward which asks is not traced.
    """

    def __init__(self, tracer: _Tracer, name: str) -> None:
        self.tracer = tracer
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_module", self.name, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise TransformError(f"it reads {name} of its child {self.name}, which a graph cannot depend on")

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # what isinstance asks for
        raise TransformError(f"it asks for the class of its child {self.name}, which a graph cannot depend on")


class _Function:
    """Stands for a function that the graph is to call and not to enter."""

    def __init__(self, tracer: _Tracer, function: Callable[..., Any]) -> None:
        self.tracer = tracer
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", self.function, args, kwargs)


def _standin(tracer: _Tracer, structure: Structure, settings: tuple[Hashable, ...]) -> nn.Module:
    """A module of the structure's class that has nothing of its own: plain values, and what records its use."""
    standin = structure.base.__new__(structure.base)
    nn.Module.__init__(standin)
    values = dict(zip(structure.plain, settings, strict=True))
    objects = [*structure.objects, *(name for name, value in values.items() if value is ...)]
    children: dict[str, Any] = {
        name: _Child(tracer, name) if size is None else [_Child(tracer, f"{name}.{i}") for i in range(size)]
        for name, size in structure.children
    }
    vars(standin).update(
        {**structure.constants, **values},
        **{name: _Object(tracer.graph.get_attr(name), tracer) for name in objects},
        _parameters={name: _Proxy(tracer.graph.get_attr(name), tracer) for name in structure.tensors},
        _modules={**children, **dict.fromkeys(structure.absent)},
    )
    return standin


def _argument(tracer: _Tracer, node: fx.Node, what: Hashable) -> Any:
    """The value that forward is given for an argument of this kind."""
    if what is None or isinstance(what, bool):
        return what
    if isinstance(what, tuple):
        return {
            name: _argument(tracer, tracer.graph.call_function(operator.getitem, (node, name)), item)
            for name, item in what
        }
    proxy = _Ranked(node, tracer)
    if what != "opaque":
        proxy.ndim = int(str(what)[:-1])
    return proxy


def _as_json(value: Any) -> str | None:
    """A list or a dict as text, or None where it is neither or holds more than plain values."""
    if not isinstance(value, (list, tuple, dict)):
        return None
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # the latter two of one that holds itself
        return None

"""Trace one `forward` for one kind of call into a `torch.fx.Graph`, every child module a leaf.

`torch.fx.symbolic_trace` cannot: it patches `nn.Module.__call__` for the whole process while it runs, renames the
inputs that it is told the value of, and stops at the first question about a tensor's rank. Here a stand-in for the
module is traced instead. Its children record their calls, so nothing is patched and every input keeps its name.
"""

import dataclasses
import dis
import operator
import sys
import types
from collections.abc import Callable, Hashable
from inspect import Parameter
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import GraphAppendingTracer

from tome_fx.graph.nodes import call, returning
from tome_fx.graph.structure import HALF, Returns, Structure
from tome_fx.plan import TransformError


def trace(structure: Structure, kinds: tuple[Hashable, ...], settings: tuple[Hashable, ...]) -> fx.Graph:
    """The graph of a call whose arguments are of these kinds, to a module whose plain attributes have these values.

    Args:
        structure: Of the module.
        kinds: The `kind` of each of the structure's parameters; of `*args` and `**kwargs` that of a dict of them.
        settings: From `Structure.settings`.
    """
    graph = fx.Graph()
    tracer = _Tracer(graph)
    tracer.half = str(kinds[0]).endswith(HALF) if structure.half else None
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
    """A proxy that is taken apart like fx's own, but leaves no cycle of frames, which would keep callers' models."""

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
    """An attribute of a proxy. A forward may ask for float16: what is computed is of the type of the first input."""

    __hash__ = fx.Proxy.__hash__

    def __eq__(self, other: object) -> Any:
        tracer: Any = self.tracer
        if self.attr == "dtype" and other is torch.float16 and tracer.half is not None:
            return tracer.half
        return self.tracer.create_proxy("call_function", operator.eq, (self, other), {})


class _Ranked(_Proxy):
    """A proxy that knows its rank. An input's comes from its kind; what is computed is taken for tokens `[B, N, C]`."""

    ndim = 3


class _Object(_Proxy):
    """An attribute that is looked up when the graph runs; if a function, it is called through `call`."""

    def __call__(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", call, (self, *args), kwargs)


class _Tracer(GraphAppendingTracer):
    half: bool | None = None  # whether the tokens are of float16; None where the forward does not ask

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

    What a child is made of may change after the trace, so that a forward which asks is not traced: but for what was
    said to be constant.
    """

    def __init__(
        self,
        tracer: _Tracer,
        name: str,
        constants: dict[str, Any],
        count: int | None = None,
        returns: Returns | None = None,
    ) -> None:
        self.tracer = tracer
        self.name = name
        self.count = count  # of the values that it returns, where the forward asks
        self.returns = returns  # tells their kinds, where the forward asks
        vars(self).update(constants)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.count is None:
            result = self.tracer.create_proxy("call_module", self.name, args, kwargs)
            if self.returns is None:
                return result
            return _argument(self.tracer, result.node, ("tuple", *self.returns(*args, **kwargs)))
        results: Any = self.tracer.create_proxy("call_function", returning, (self.count, self, *args), kwargs)
        return tuple(results[i] for i in range(self.count))

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
    values = dict(zip(structure.plain, settings, strict=False))
    counts: dict[str, Any] = dict(zip([name for name, _ in structure.counts], settings[len(values) :], strict=True))
    objects = [*structure.objects, *(name for name, value in values.items() if value is ...)]
    reads, returns = dict(structure.reads), dict(structure.returns)

    def child(path: str) -> _Child:
        read = {name.removeprefix(f"{path}."): value for name, value in reads.items() if name.startswith(f"{path}.")}
        return _Child(tracer, path, read, counts.get(path), returns.get(path))

    children: dict[str, Any] = {
        name: child(name) if size is None else [child(f"{name}.{i}") for i in range(size)]
        for name, size in structure.children
    }
    parameters = {name: _Proxy(tracer.graph.get_attr(name), tracer) for name in structure.tensors}
    children |= dict.fromkeys(structure.absent)
    # Also as plain attributes, which are found first: torch.export has every look-up of a module's own go through it.
    plain = {name: value for name, value in (parameters | children).items() if not hasattr(structure.base, name)}
    vars(standin).update(
        {**plain, **structure.constants, **values},
        **{name: _Object(tracer.graph.get_attr(name), tracer) for name in objects},
        _parameters=parameters,
        _modules=children,
    )
    return standin


def _argument(tracer: _Tracer, node: fx.Node, what: Hashable) -> Any:
    """The value that forward is given for an argument of this kind."""
    if what is None or isinstance(what, (bool, int)):
        return what
    if isinstance(what, tuple) and what and isinstance(what[0], str):
        items = [
            _argument(tracer, tracer.graph.call_function(operator.getitem, (node, i)), item)
            for i, item in enumerate(what[1:])
        ]
        return items if what[0] == "list" else tuple(items)
    if isinstance(what, tuple):
        return {
            name: _argument(tracer, tracer.graph.call_function(operator.getitem, (node, name)), item)
            for name, item in what
        }
    proxy = _Ranked(node, tracer)
    if what != "opaque":
        proxy.ndim = int(str(what).removesuffix(HALF)[:-1])
    return proxy

"""Trace one `forward` for one kind of call into a `torch.fx.Graph`, every child module a leaf.

`torch.fx.symbolic_trace` cannot: it patches `nn.Module.__call__` for the whole process while it runs, renames the
inputs that it is told the value of, and stops at the first question about a tensor's rank. Here a stand-in for the
module is traced instead. Its children record their calls, so nothing is patched and every input keeps its name.
"""

import dataclasses
import inspect
import json
import operator
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import GraphAppendingTracer

SINGLE = -1  # in the place of a list's length: a child that is no list


def kind(value: Any) -> Hashable:
    """What a graph depends on in an argument: None and bools whole, the keys of a dict, the rank of a tensor."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, dict):
        return tuple([(name, kind(item)) for name, item in value.items()])
    return f"{value.ndim}d" if isinstance(value, torch.Tensor) else "opaque"


class Template:
    """What a trace needs of a module, and no weight of it: class, plain attributes, names of children.

    Args:
        base: The class whose forward is to be traced.
        module: Of that class, or of one derived from it with another forward.
        live: Names of attributes that forward reads and that are given anew for each trace.
        leaves: Names of functions to call from the graph, not to trace into: globals of forward's module or
            attributes of `module`. Each takes a child module, then the arguments to call it with.
    """

    def __init__(
        self, base: type[nn.Module], module: nn.Module, live: tuple[str, ...], leaves: tuple[str, ...]
    ) -> None:
        self.base = base
        self.live = live
        self.leaves = leaves
        self.parameters = tuple(inspect.signature(self.base.forward).parameters.values())[1:]
        internals = vars(nn.Module()).keys() - {"training"}
        self.attributes = {
            name: value
            for name, value in vars(module).items()
            if name not in internals and not callable(value) and not isinstance(value, torch.Tensor)
        }
        self.tensors = [name for name, _ in module.named_parameters(recurse=False)]
        self.tensors += [name for name, _ in module.named_buffers(recurse=False)]
        self.children = {
            name: None if child is None else len(child) if isinstance(child, nn.ModuleList) else SINGLE
            for name, child in module._modules.items()
        }

    @property
    def key(self) -> Hashable:
        """What a trace can depend on that is not a weight or a width."""
        flags = tuple((k, v) for k, v in self.attributes.items() if isinstance(v, (bool, str)) and k not in self.live)
        return self.base, self.live, self.leaves, flags, tuple(self.tensors), tuple(self.children.items())

    @property
    def data(self) -> str | None:
        """All plain attributes as one string, or None where one of them is more than data."""
        try:
            return json.dumps(self.attributes)
        except TypeError:
            return None

    def trace(self, signature: tuple[Hashable, ...], flags: tuple[Hashable, ...]) -> fx.Graph:
        """The graph of a call whose arguments are of these kinds, while the live attributes have these values."""
        graph = fx.Graph()
        tracer = _Tracer(graph)
        arguments = [
            _argument(tracer, tracer.placeholder(parameter), what)
            for parameter, what in zip(self.parameters, signature, strict=True)
        ]
        standin = self.base.__new__(self.base)
        nn.Module.__init__(standin)
        vars(standin).update(self.attributes, **dict(zip(self.live, flags, strict=True)))
        vars(standin).update(_modules={n: _child(tracer, n, size) for n, size in self.children.items()})
        vars(standin).update(_parameters={n: fx.Proxy(graph.get_attr(n), tracer) for n in self.tensors})

        forward = self.base.forward
        names = dict(forward.__globals__)
        for leaf in self.leaves:
            if leaf in names:
                names[leaf] = _Leaf(tracer, names[leaf])
            else:
                vars(standin)[leaf] = _Leaf(tracer, call, leaf)
        forward = types.FunctionType(forward.__code__, names, closure=forward.__closure__)
        with torch.enable_grad():  # so that a flag for training alone decides what is traced
            graph.output(tracer.create_arg(forward(standin, *arguments)))
        graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        return graph


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function that is itself a value of the graph."""
    return function(*args, **kwargs)


class _Tokens(fx.Proxy):
    """A proxy that knows its rank. Whatever is computed from image tokens `[B, N, C]` is of rank 3 here."""

    ndim = 3


class _Tracer(GraphAppendingTracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Tokens(node, self)

    def placeholder(self, parameter: inspect.Parameter) -> fx.Node:
        return self.graph.placeholder(parameter.name, default_value=parameter.default)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, _Child):
            return self.graph.get_attr(a.name)
        if dataclasses.is_dataclass(a) and not isinstance(a, type):  # an output class, which may be a dict as well
            fields = {f.name: self.create_arg(getattr(a, f.name)) for f in dataclasses.fields(a)}
            return self.create_node("call_function", type(a), (), fields)
        return super().create_arg(a)


class _Child:
    """Stands for a child module: a call of it is a call_module node, as an argument it is a get_attr node."""

    def __init__(self, tracer: _Tracer, name: str) -> None:
        self.tracer = tracer
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_module", self.name, args, kwargs)


class _Leaf:
    """Stands for a function that the graph calls; for an attribute of the module, through `call`."""

    def __init__(self, tracer: _Tracer, function: Callable[..., Any], attribute: str | None = None) -> None:
        self.tracer = tracer
        self.function = function
        self.attribute = attribute

    def __call__(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        if self.attribute is not None:
            args = (self.tracer.proxy(self.tracer.graph.get_attr(self.attribute)), *args)
        return self.tracer.create_proxy("call_function", self.function, args, kwargs)


def _child(tracer: _Tracer, name: str, size: int | None) -> _Child | list[_Child] | None:
    if size is None:
        return None
    return _Child(tracer, name) if size == SINGLE else [_Child(tracer, f"{name}.{i}") for i in range(size)]


def _argument(tracer: _Tracer, node: fx.Node, what: Hashable) -> Any:
    """The value that forward is given for an argument of this kind."""
    if what is None or isinstance(what, bool):
        return what
    if isinstance(what, tuple):
        return {
            name: _argument(tracer, tracer.graph.call_function(operator.getitem, (node, name)), item)
            for name, item in what
        }
    proxy = _Tokens(node, tracer)
    if what != "opaque":
        proxy.ndim = int(str(what)[:-1])
    return proxy

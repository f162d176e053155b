"""A class whose `forward` is generated from the traced and rewritten graph of another class's `forward`.

NOTE [One graph per call signature]
A forward in Python branches: on which optional inputs are given, on the keys of a dict, on a flag. An fx graph
does not. So there is one graph per call signature: the first call of a new kind is traced, and `forward` itself
only picks. Nothing is dropped, nothing is assumed, and no feature of a model needs a case of its own.
Under torch.compile the pick happens while dynamo traces. A signature is made of what dynamo guards on anyway, and
`_variant` is declared constant, so that a kind of call first met while compiling is traced on the spot.

NOTE [One class per distinct graph]
Dynamo keeps compiled code per code object. Modules that differ in weights and widths alone share a class and so
their code; modules rewritten with other options get another, so that they do not fill one another's cache. A class
stays for the life of the process: transforming anew with options had before compiles nothing.
"""

import copyreg
import linecache
import threading
import types
from collections.abc import Callable, Hashable, Mapping
from hashlib import sha256
from typing import Any, NoReturn

import torch
from torch import fx, nn

from tome_fx.graph.trace import Template, kind
from tome_fx.plan import TransformError

Pass = Callable[[fx.Graph], int]


class Rewritten(type):
    """The type of generated classes. Bearing another class's name, they could not be found by it when unpickled."""


def _refuse_pickling(cls: type) -> NoReturn:
    raise TypeError(
        f"a transformed model cannot be pickled ({cls.__name__} is a generated class): save it with save_pretrained, "
        "or pickle the model that was transformed, and transform what is loaded"
    )


copyreg.pickle(Rewritten, _refuse_pickling)

_classes: dict[Hashable, type[nn.Module]] = {}
_codes: dict[Hashable, types.CodeType] = {}
_lock = threading.RLock()


def specialize(
    module: nn.Module,
    rewrite: Pass,
    *,
    example: Mapping[str, Hashable],
    live: tuple[str, ...] = (),
    leaves: tuple[str, ...] = (),
) -> type[nn.Module]:
    """The class whose forward is the rewritten graph of `module`'s; `module` itself is untouched.

    The class derives from the module's own and bears its name, for those who look for either. `graphs` maps each
    kind of call met so far to its graph, `graph` is the first of them, and `rewrite` is the pass.

    Args:
        module: Its class, its flags and the names of its children decide the graph; its weights do not.
        rewrite: The pass that every graph goes through. Equal passes share a class, so it must be hashable. Its method
            `check`, if it has one, is called before each forward with the module and the inputs that the pass added.
        example: A call to trace at once: the `kind` of each argument given, by name.
        live: Attributes that forward reads and that users change later; part of what tells calls apart.
        leaves: Functions that the graph calls instead of entering them; see `Template`.

    Raises:
        TransformError: From the pass, where it cannot serve the example.
    """
    template = Template(original(type(module)), module, live, leaves)
    kinds = tuple(example.get(p.name, kind(p.default)) for p in template.parameters)
    flags = tuple(template.attributes[name] for name in live)
    with _lock:
        # First by all that the graph can depend on, which costs no trace, then by what it does depend on.
        known = (template.key, template.data, rewrite, kinds, flags)
        if template.data is None or known not in _classes:
            graph = _rewritten(template, rewrite, kinds, flags)
            key = (template.key, rewrite, graph.python_code("self").src)
            if key not in _classes:
                _classes[key] = _new_class(template, rewrite, (kinds, flags), graph)
            _classes[known] = _classes[key]
        return _classes[known]


def _new_class(template: Template, rewrite: Pass, signature: Hashable, graph: fx.Graph) -> type[nn.Module]:
    base = template.base
    cls: Any = Rewritten(base.__name__, (base,), {"__module__": base.__module__, "__doc__": base.__doc__})
    cls.__qualname__ = base.__qualname__
    cls.rewrite = staticmethod(rewrite)
    cls.graph, cls.graphs, cls._methods = graph, {}, {}
    cls._template = template
    _add(cls, signature, graph)
    cls.forward = _dispatcher(cls)
    return cls  # type: ignore[no-any-return]


def original(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that `specialize` derived this one from, or the class itself.

    Raises:
        TransformError: Something else has derived the class from one of ours, as sharding does.
    """
    if not isinstance(cls, Rewritten):
        return cls
    if "rewrite" not in vars(cls):
        raise TransformError(
            f"{cls.__name__} was derived from the class of a transformed block, as fully_shard does: what is merged "
            "can be changed before that only"
        )
    return cls.__base__  # type: ignore[return-value]


def with_own_code(function: types.FunctionType, key: Hashable) -> types.FunctionType:
    """A copy of the function whose code object is one for each key: to dynamo another function, to a reader the same.

    The code's name is the same in every process and tells keys apart, for dynamo remembers by name which sizes were
    dynamic.
    """
    code = function.__code__
    with _lock:
        if (code, key) not in _codes:
            digest = sha256(repr(key).encode()).hexdigest()[:12]
            _codes[code, key] = code.replace(co_name=f"{code.co_name}_{digest}")
        code = _codes[code, key]
    result = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    result.__kwdefaults__ = function.__kwdefaults__
    vars(result).update(vars(function))
    return result


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _variant(cls: Any, kinds: tuple[Hashable, ...], flags: tuple[Hashable, ...]) -> str:
    """The name of the method that serves this kind of call; see NOTE [One graph per call signature]."""
    with _lock:
        if (kinds, flags) not in cls.graphs:
            _add(cls, (kinds, flags), _rewritten(cls._template, cls.rewrite, kinds, flags))
        name: str = cls._methods[kinds, flags]
        return name


def _rewritten(template: Template, rewrite: Pass, kinds: tuple[Hashable, ...], flags: tuple[Hashable, ...]) -> fx.Graph:
    try:
        graph = template.trace(kinds, flags)
    except Exception as error:
        call = ", ".join(f"{p.name}: {k}" for p, k in zip(template.parameters, kinds, strict=True) if k is not None)
        raise TransformError(
            f"could not trace {template.base.__name__}.forward for a call of {call}: {error}"
        ) from error
    rewrite(graph)
    graph.lint()
    return graph


def _add(cls: Any, signature: Hashable, graph: fx.Graph) -> None:
    name = f"forward_{len(cls.graphs)}"
    code = graph.python_code("self")
    setattr(cls, name, _function(code.src, code.globals, f"{cls.__name__}.{name}"))
    cls._methods[signature] = name
    cls.graphs[signature] = graph  # last: a thread or a call that finds the graph finds its method


def _dispatcher(cls: Any) -> types.FunctionType:
    """A forward with the inputs of the original and those the pass added, which calls the method for its arguments.

    Its source is generated so that each class has a code object of its own: see NOTE [One class per distinct graph].
    """
    given = [parameter.name for parameter in cls._template.parameters]
    inputs = [node for node in cls.graph.nodes if node.op == "placeholder"]
    names = [node.target for node in inputs]
    heads = [node.target if not node.args else f"{node.target}=None" for node in inputs]
    check = getattr(cls.rewrite, "check", None)
    source = (
        f"def forward(self, {', '.join(heads)}):\n"
        + (f"    check({', '.join(['self', *names[len(given) :]])})\n" if check else "")
        + f"    kinds = ({''.join(f'kind({name}), ' for name in given)})\n"
        f"    flags = ({''.join(f'self.{name}, ' for name in cls._template.live)})\n"
        f"    return getattr(self, variant(type(self), kinds, flags))({', '.join(names)})\n"
    )
    forward = _function(source, {"kind": kind, "variant": _variant, "check": check}, f"{cls.__name__}.forward")
    forward.__defaults__ = tuple(node.args[0] for node in inputs if node.args)
    return forward


def _function(source: str, names: dict[str, Any], title: str) -> types.FunctionType:
    """Compile the source of one function named forward, such that tracebacks and debuggers show its lines."""
    filename = f"<tome_fx {title} {sha256(source.encode()).hexdigest()[:12]}>"  # the same in every process
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), names)
    function: types.FunctionType = names["forward"]
    return function

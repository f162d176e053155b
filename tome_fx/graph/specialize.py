"""A class whose `forward` is generated from the traced and rewritten graph of another class's `forward`.

NOTE [One graph per call signature]
A forward in Python branches, an fx graph does not (NOTE [What a graph depends on] in structure.py). So there is one
graph per call signature: the first call of a new kind is traced, and `forward` itself only picks. Nothing is dropped,
and all that is assumed is that what a forward computes has three dimensions, as tokens have. No feature of a model
needs a case of its own. Under torch.compile the pick happens while dynamo traces. A signature is made of what dynamo
guards on anyway, and `_method_for` is declared constant, so that a kind of call first met while compiling is traced on
the spot.

NOTE [One class per structure]
Dynamo keeps compiled code per code object. Modules of one `Structure` share a class and so their code; modules
rewritten with other options get another, so that they do not fill one another's cache. A class stays for the life of
the process: transforming anew with options had before compiles nothing.
"""

import copyreg
import threading
import types
from collections.abc import Callable, Hashable, Mapping
from hashlib import sha256
from inspect import Parameter
from typing import Any, NoReturn

import torch
from torch import fx, nn

from tome_fx.graph.dispatch import compiled, copied, dispatcher, redecorated
from tome_fx.graph.structure import Count, Returns, Structure, kind
from tome_fx.graph.trace import trace
from tome_fx.plan import TransformError

Pass = Callable[[fx.Graph], object]  # what it returns is not looked at
Check = Callable[..., None]


class Rewritten(type):
    """The type of generated classes. Bearing another class's name, they could not be found by it when unpickled.

    Each holds `original`, the class that it was derived from; one made by `specialize` also its `structure`, the pass
    `rewrite`, what to `check`, its `graphs` by call signature, and `graph`, the first of them. It is made for modules
    that exist: called like any class, as `type(model).from_config` does, it makes a module of the original.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """A module of the original class."""
        return original(cls)(*args, **kwargs)  # type: ignore[arg-type]


def _refuse_pickling(cls: type) -> NoReturn:
    raise TypeError(
        f"a transformed model cannot be pickled ({cls.__name__} is a generated class): save it with save_pretrained, "
        "or pickle the model that was transformed, and transform what is loaded"
    )


class Alias(Rewritten):
    """The type of classes that do just what their original does, and so are equal to it.

    Where diffusers compares a model's type with those it knows, as `from_pipe` does, it finds it. Hashes differ, so
    that dicts keyed by class, as that of `fully_shard`, tell them apart.
    """

    __hash__ = type.__hash__

    def __eq__(cls, other: object) -> bool:
        """Whether the other class is this one or its original, or what that was made of in turn."""
        known: Any = cls
        while other is not known and isinstance(known, Rewritten):
            known = vars(known).get("original")
        return other is known


copyreg.pickle(Rewritten, _refuse_pickling)
copyreg.pickle(Alias, _refuse_pickling)

OF_MANY = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)  # kinds of parameters that name no argument

_classes: dict[Hashable, type[nn.Module]] = {}
_own_codes: set[types.CodeType] = set()
_lock = threading.RLock()


def specialize(
    module: nn.Module,
    rewrite: Pass,
    *,
    example: Mapping[str, Hashable],
    calls: tuple[str, ...] = (),
    reads: tuple[str, ...] = (),
    counts: tuple[tuple[str, Count], ...] = (),
    returns: tuple[tuple[str, Returns], ...] = (),
    check: Check | None = None,
) -> type[nn.Module]:
    """The class whose forward is the rewritten graph of `module`'s; `module` itself is untouched.

    The class derives from the module's own and bears its name, for those who look for either. `graphs` maps each
    call signature met so far to its graph, `graph` is the first of them, and `rewrite` is the pass.

    Args:
        module: Its class, its plain attributes and the names of its children decide the graph; its weights do not.
        rewrite: The pass that every graph goes through. Equal passes share a class, so it must be hashable.
        example: A call to trace at once: the `kind` of each argument given, by name.
        calls: Functions that the graph calls instead of entering them; see `Structure`.
        reads: Attributes that the forward reads of its children; see `Structure.of`.
        counts: Children whose results the forward counts; see `Structure`.
        returns: Children whose results the forward branches on; see `Structure`.
        check: Called before each forward with the module and the inputs that the pass added. Hashable as well.

    Raises:
        TransformError: From the trace or the pass, where it cannot serve the example; or the forward names none of its
            arguments.
    """
    base: Any = original(type(module))
    structure = Structure.of(module, base, calls, reads, counts, returns)
    if all(p.kind in OF_MANY for p in structure.parameters):
        raise TransformError(
            f"forward of {base.__module__}.{base.__qualname__} names none of its arguments: to be traced it must name "
            f"{', '.join(example)}, or wrap a forward that does by functools.wraps"
        )
    kinds = tuple(example.get(p.name, _kind_of_default(p)) for p in structure.parameters)
    signature = kinds, structure.settings(module)
    key = (structure, rewrite, check)
    with _lock:
        if key not in _classes:
            graph = _rewritten(structure, rewrite, *signature)
            cls: Any = _derived(base)
            cls.structure, cls.rewrite, cls.check = structure, staticmethod(rewrite), check and staticmethod(check)
            cls.graph, cls.graphs, cls._methods = graph, {}, {}
            cls.forward = redecorated(structure.forward, structure.function, dispatcher(cls, graph, _method_for))
            _add(cls, signature, graph)
            _classes[key] = cls
        elif signature not in _classes[key].graphs:  # type: ignore[attr-defined]
            _method_for(_classes[key], *signature)
        return _classes[key]


def with_own_code(base: type[nn.Module], key: Hashable) -> type[nn.Module]:
    """A class that does what `base` does, with a code object of its own for each key, so with compiled code of its own.

    The code's name is the same in every process and tells keys apart, for dynamo remembers by name which sizes were
    dynamic.

    Args:
        base: The class, or what this has made of it for another key, which has the forward that was copied for that.
        key: Whom the code is for.

    Raises:
        TransformError: What the class has for a forward is no function.
    """
    forward: Any = vars(base).get("copied", base.forward)
    base = _made_of(base) if isinstance(base, Alias) else base
    if not isinstance(forward, types.FunctionType):
        raise TransformError(f"forward of {base.__module__}.{base.__qualname__} must be a function, found {forward!r}")
    with _lock:
        if (base, forward, key) not in _classes:
            cls: Any = _derived(base, Alias)
            name = f"{forward.__code__.co_name}_{sha256(repr(key).encode()).hexdigest()[:12]}"
            cls.forward = copied(forward, code=forward.__code__.replace(co_name=name))
            cls.copied = forward
            _own_codes.add(cls.forward.__code__)
            _classes[base, forward, key] = cls  # by the forward too, for a class can be patched
        return _classes[base, forward, key]


def has_own_code(forward: Any) -> bool:
    """Whether a forward is one of `with_own_code`, for whichever key, bound to a module."""
    return getattr(forward, "__code__", None) in _own_codes


def original(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a generated one was derived from in the end, or the class itself.

    Raises:
        TransformError: Something else has derived the class from one of ours, as sharding does.
    """
    while isinstance(cls, Rewritten):
        cls = _made_of(cls)
    return cls


def _made_of(cls: type[nn.Module]) -> type[nn.Module]:
    if "original" not in vars(cls):
        raise TransformError(
            f"{cls.__name__} was derived from the class of a transformed module, as fully_shard does: what is merged "
            "can be changed before that only. Call transform or set_ratio first"
        )
    return cls.original  # type: ignore[no-any-return, attr-defined]


def _derived(base: type[nn.Module], kind_of_class: type[Rewritten] = Rewritten) -> Any:
    """A class derived from `base` that passes for it."""
    names = {"__module__": base.__module__, "__doc__": base.__doc__, "__qualname__": base.__qualname__}
    if not issubclass(kind_of_class, type(base)):  # such as ABCMeta
        kind_of_class = type(kind_of_class.__name__, (kind_of_class, type(base)), {})
    return kind_of_class(base.__name__, (base,), {**names, "original": base})


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _method_for(cls: Any, kinds: tuple[Hashable, ...], settings: tuple[Hashable, ...]) -> str:
    """The name of the method that serves this kind of call; see NOTE [One graph per call signature]."""
    with _lock:
        if (kinds, settings) not in cls.graphs:
            first, _ = next(iter(cls.graphs))
            _add(cls, (kinds, settings), _rewritten(cls.structure, cls.rewrite, kinds, settings, first))
        name: str = cls._methods[kinds, settings]
        return name


def _rewritten(
    structure: Structure,
    rewrite: Pass,
    kinds: tuple[Hashable, ...],
    settings: tuple[Hashable, ...],
    first: tuple[Hashable, ...] | None = None,
) -> fx.Graph:
    """The graph of a kind of call; an error tells what the first kind that was traced had not."""
    try:
        graph = trace(structure, kinds, settings)
    except Exception as error:
        call = ", ".join(f"{p.name}: {k}" for p, k in zip(structure.parameters, kinds, strict=True) if k is not None)
        reason = str(error)
        if isinstance(error, AttributeError) and isinstance(error.obj, structure.base):
            reason = (
                f"the module had no {error.name} when it was transformed: load what brings it first, then transform"
            )
        given = zip(structure.parameters, kinds, first or kinds, strict=True)
        if more := [p.name for p, mine, theirs in given if mine is not None and theirs is None]:
            reason += (
                f". A call without {', '.join(more)} was traced before: leave out what the model can do without, or "
                "call the one that was transformed"
            )
        raise TransformError(
            f"could not trace {structure.base.__module__}.{structure.base.__qualname__}.forward for a call of {call}: "
            f"{reason}"
        ) from error
    try:
        rewrite(graph)
    except TransformError as error:
        raise TransformError(f"{structure.base.__module__}.{structure.base.__qualname__}: {error}") from error
    graph.lint()
    return graph


def _add(cls: Any, signature: Hashable, graph: fx.Graph) -> None:
    name = f"forward_{len(cls.graphs)}"
    code = graph.python_code("self")
    setattr(cls, name, compiled(code.src, code.globals, f"{cls.__name__}.{name}"))
    cls._methods[signature] = name
    cls.graphs[signature] = graph  # last: a thread or a call that finds the graph finds its method


def _kind_of_default(parameter: Parameter) -> Hashable:
    """The kind of an argument that is not given."""
    return () if parameter.kind in OF_MANY else kind(parameter.default)

"""Functions made of functions: the forward that picks a graph's method, and copies with another code or closure."""

import functools
import linecache
import types
from collections.abc import Callable, Iterator
from hashlib import sha256
from inspect import Parameter
from typing import Any

from torch import fx, nn

from tome_fx.graph.structure import kind, setting
from tome_fx.plan import TransformError

FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)

_dispatchers: set[types.CodeType] = set()


def dispatcher(cls: Any, graph: fx.Graph, method_for: Callable[..., str]) -> types.FunctionType:
    """A forward with the inputs of the original and those the pass added, which calls the method for its arguments.

    For a forward(self, x, *, scale=1.0) whose module has the plain attributes dim and training, and a pass that adds
    slots, it reads::

        def forward(self, x, slots=None, *, scale=None):
            _check(self, slots)
            _method = _method_for(_cls, (_kind(x), _kind(scale), ), (_setting(self.dim), _setting(self.training), ))
            return getattr(self, _method)(x, scale, slots)

    Its source is generated so that each class has a code object of its own: see NOTE [One class per structure].

    Args:
        cls: The class that it is for, with its `structure` and `check`; not one that is derived from it later.
        graph: A rewritten one, for the inputs that the pass added.
        method_for: Names the method for a kind of call.
    """
    structure, check = cls.structure, cls.check
    own = {parameter.name: parameter for parameter in structure.parameters}
    placeholders = {node.target: node for node in graph.nodes if node.op == "placeholder"}
    added = [
        Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=node.args[0])
        for name, node in placeholders.items()
        if name not in own
    ]
    parameters = _with_added(list(own.values()), added)
    kinds = "".join(f"{_kind_call(p, structure.half)}, " for p in own.values())
    settings = "".join(f"_setting(self.{name}), " for name in structure.plain)
    settings += "".join(f"_counts[{i}](self.{name}), " for i, (name, _) in enumerate(structure.counts))
    source = (
        f"def forward(self, {_parameter_list(parameters)}):\n"
        + (f"    _check(self, {', '.join(p.name for p in added)})\n" if check else "")
        + f"    _method = _method_for(_cls, ({kinds}), ({settings}))\n"
        f"    return getattr(self, _method)({', '.join(placeholders)})\n"
    )
    names = {"_kind": kind, "_setting": setting, "_method_for": method_for, "_check": check, "_cls": cls}
    names["_counts"] = tuple(count for _, count in structure.counts)
    forward = compiled(source, names, f"{structure.base.__name__}.forward")
    defaults = {p.name: p.default for p in parameters if p.default is not Parameter.empty}
    by_name = [p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY]
    forward.__defaults__ = tuple(value for name, value in defaults.items() if name not in by_name)
    forward.__kwdefaults__ = {name: defaults[name] for name in by_name if name in defaults} or None
    _dispatchers.add(forward.__code__)
    return forward


def _with_added(own: list[Parameter], added: list[Parameter]) -> list[Parameter]:
    """The added ones come last among those that may go by position; after *args there are none, so by name alone."""
    kinds = [p.kind for p in own]
    if Parameter.VAR_POSITIONAL in kinds:
        added = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in added]
    last = Parameter.KEYWORD_ONLY if Parameter.VAR_POSITIONAL in kinds else Parameter.POSITIONAL_OR_KEYWORD
    place = sum(k <= last for k in kinds)
    return [*own[:place], *added, *own[place:]]


def _parameter_list(parameters: list[Parameter]) -> str:
    """The parameters as source; a default is None here and is set on the function."""
    heads: list[str] = []
    for p in parameters:
        if p.kind is Parameter.KEYWORD_ONLY and not any(head.startswith("*") for head in heads):
            heads.append("*")
        stars = "*" * (p.kind is Parameter.VAR_POSITIONAL) + "**" * (p.kind is Parameter.VAR_KEYWORD)
        heads.append(f"{stars}{p.name}{'' if p.default is Parameter.empty else '=None'}")
    return ", ".join(heads)


def _kind_call(parameter: Parameter, half: bool) -> str:
    value = parameter.name
    if parameter.kind is Parameter.VAR_POSITIONAL:
        value = f"dict(enumerate({value}))"
    elif isinstance(parameter.default, bool):  # a flag, taken as a condition of the forward takes it
        value = f"{value} if {value} is None else bool({value})"
    return f"_kind({value}{', half=True' if half else ''})"


def compiled(source: str, names: dict[str, Any], title: str) -> types.FunctionType:
    """Compile the source of one function named forward, such that tracebacks and debuggers show its lines."""
    filename = f"<tome_fx {title} {sha256(source.encode()).hexdigest()[:12]}>"  # the same in every process
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), names)
    function: types.FunctionType = names["forward"]
    return function


def is_generated(function: Any) -> bool:
    """Whether a module's forward is one of ours, or goes on to one; see `within`."""
    return any(getattr(inner, "__code__", None) in _dispatchers for inner in within(function))


def within(function: Any) -> Iterator[Any]:
    """The function and those that it goes on to, as far as can be seen; one at a time, for as a rule the first will do.

    Decorators say what they wrap, and what does not refers to it in its closure: by itself, or as diffusers' hooks do
    in the oldest version supported, by an object that holds it as its `forward` or `original_forward`. That case can go
    when no supported version needs it.
    """
    found: list[Any] = []
    pending = [function]
    while pending:
        inner = pending.pop()
        inner = getattr(inner, "__func__", inner)
        if any(inner is known for known in found):
            continue
        found.append(inner)
        yield inner
        cells = [cell.cell_contents for cell in getattr(inner, "__closure__", None) or () if _is_filled(cell)]
        objects = [cell for cell in cells if not isinstance(cell, nn.Module)]
        held = [getattr(cell, name, None) for cell in objects for name in ("forward", "original_forward")]
        others = [getattr(inner, "__wrapped__", None), getattr(inner, "func", None), *cells, *held]
        pending += [other for other in others if isinstance(other, FUNCTIONS)]


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def redecorated(outer: Any, inner: types.FunctionType, new: types.FunctionType) -> types.FunctionType:
    """The function `outer`, which decorators have made of `inner`, made of `new` instead.

    Raises:
        TransformError: A decorator does not hold what it wraps in its closure, where another could take its place.
    """
    if outer is inner:
        return new
    wrapped = outer.__wrapped__
    cells = getattr(outer, "__closure__", None) or ()
    if not any(cell.cell_contents is wrapped for cell in cells):
        raise TransformError(
            f"the decorator of {inner.__module__}.{inner.__qualname__} hides what it wraps: it must be a function that "
            "refers to it, as functools.wraps has it"
        )
    replacement = redecorated(wrapped, inner, new)
    closure = tuple(types.CellType(replacement) if cell.cell_contents is wrapped else cell for cell in cells)
    result = copied(outer, code=outer.__code__.replace(), closure=closure)
    result.__wrapped__ = replacement  # type: ignore[attr-defined]
    return result


def copied(function: Any, **changed: Any) -> types.FunctionType:
    """A copy of a function with another code or closure."""
    result = types.FunctionType(
        changed.get("code", function.__code__),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        changed.get("closure", function.__closure__),
    )
    result.__kwdefaults__ = function.__kwdefaults__
    vars(result).update(vars(function))
    return result

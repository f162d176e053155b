"""What an attention processor does with attention probabilities and with its arguments, as far as its source shows."""

import ast
import functools
import inspect
import textwrap
from typing import Any, NamedTuple

import torch
from torch import nn

PROBABILITIES = ("get_attention_scores", "softmax")  # functions that give them
CONSUMERS = ("bmm", "matmul", "einsum", "baddbmm")  # and such as make tokens of them, which may be kept


class Store(NamedTuple):
    """A place where probabilities are kept.

    Args:
        elsewhere: They are kept on another object, or handed to one that the processor refers to.
        conditions: Names of the processor's attributes that must be true for it.
    """

    elsewhere: bool
    conditions: tuple[str, ...]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def stores(processor: type) -> tuple[Store, ...]:
    """Where a processor of this class keeps the attention probabilities that it computes."""
    return _read(_function(processor)).stores


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def ignores(processor: type, argument: str) -> bool:
    """Whether a processor of this class takes an argument of this name and never looks at it."""
    reading = _read(_function(processor))
    return bool(reading.takes(argument)) and not reading.takes(argument) & reading.names_read


class _Reading(NamedTuple):
    stores: tuple[Store, ...] = ()
    names_read: frozenset[str] = frozenset()
    arguments: frozenset[str] = frozenset()
    of_many: str | None = None  # the argument that takes all others by keyword

    def takes(self, name: str) -> set[str]:
        """The argument that has what is given for this name."""
        if name in self.arguments:
            return {name}
        return {self.of_many} if self.of_many else set()


def _function(processor: type) -> Any:
    """What is called of a processor."""
    if issubclass(processor, nn.Module) and processor.__call__ is nn.Module.__call__:
        return processor.forward
    return processor.__call__


@functools.cache  # by the function, as users put another in the place of a class's
def _read(function: Any) -> _Reading:
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # without a source, as of a builtin, nothing can be told
        return _Reading()
    if not isinstance(definition, ast.FunctionDef) or not definition.args.args:
        return _Reading()
    reader = _Reader(definition.args.args[0].arg)
    for statement in definition.body:
        reader.visit(statement)
    given = definition.args
    names = frozenset(argument.arg for argument in (*given.args, *given.kwonlyargs))
    return _Reading(tuple(reader.stores), frozenset(reader.names_read), names, given.kwarg.arg if given.kwarg else None)


class _Reader(ast.NodeVisitor):
    """Follows the variables that hold probabilities, in the order of the source."""

    def __init__(self, itself: str) -> None:
        self.itself = itself  # the name of the processor in its method, as a rule self
        self.holding: set[str] = set()
        self.conditions: tuple[str, ...] = ()
        self.stores: list[Store] = []
        self.names_read: set[str] = set()

    def visit_Name(self, node: ast.Name) -> None:
        """Note what is read."""
        if isinstance(node.ctx, ast.Load):
            self.names_read.add(node.id)

    def visit_If(self, node: ast.If) -> None:
        """What is in its body happens under its conditions, of which the processor's own attributes are noted."""
        self.visit(node.test)
        parts = node.test.values if isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And) else []
        own = [part.attr for part in (*parts, node.test) if isinstance(part, ast.Attribute) and self._is_own(part)]
        before, self.conditions = self.conditions, (*self.conditions, *own)
        for statement in node.body:
            self.visit(statement)
        self.conditions = before
        for statement in node.orelse:
            self.visit(statement)

    def visit_Assign(self, node: ast.Assign) -> None:
        """Variables that take probabilities hold them; attributes that do are a store."""
        self._assigned(node.targets, node.value)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """As an assignment."""
        if node.value is not None:
            self._assigned([node.target], node.value)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        """As an assignment."""
        self._assigned([node.target], node.value)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """Probabilities given to a method of something that the processor refers to are kept, or handed on."""
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        if _owner(node.func) == self.itself and any(map(self._holds, given)):
            kept = isinstance(node.func, ast.Attribute) and node.func.attr in ("append", "add", "extend", "insert")
            self.stores.append(Store(not kept, self.conditions))
        self.generic_visit(node)

    def _assigned(self, targets: list[ast.expr], value: ast.expr) -> None:
        if not self._holds(value):
            return
        parts = [part for t in targets for part in (t.elts if isinstance(t, (ast.Tuple, ast.List)) else [t])]
        self.holding |= {part.id for part in parts if isinstance(part, ast.Name)}
        owners = [owner for part in parts if (owner := _owner(part))]
        self.stores += [Store(owner != self.itself, self.conditions) for owner in owners]

    def _holds(self, value: ast.expr) -> bool:
        """Whether the value is made of probabilities and is not what they make of the values of attention."""
        if isinstance(value, ast.BinOp) and isinstance(value.op, ast.MatMult):
            return False
        if isinstance(value, ast.Name):
            return value.id in self.holding
        if isinstance(value, ast.Call):
            name = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
            if name in (*PROBABILITIES, *CONSUMERS):
                return name in PROBABILITIES
        return any(isinstance(part, ast.expr) and self._holds(part) for part in ast.iter_child_nodes(value))

    def _is_own(self, part: ast.Attribute) -> bool:
        return isinstance(part.value, ast.Name) and part.value.id == self.itself


def _owner(target: ast.AST) -> str:
    """The variable of whose attribute this is a part, or a call; empty for a variable, or an item of one."""
    attribute = False
    while isinstance(target, (ast.Attribute, ast.Subscript, ast.Call)):
        attribute |= isinstance(target, ast.Attribute)
        target = target.func if isinstance(target, ast.Call) else target.value
    return target.id if attribute and isinstance(target, ast.Name) else ""

"""The contract of `tome_fx.graph`, on modules that have nothing to do with diffusers.

A forward is traced once for every kind of call, with its own names for its inputs and every child a leaf, and
nothing outside of the trace is changed. The class made of the graphs passes for the original's, does what the
original did, is shared by modules whose traces are equal and by no others, and meets new kinds of calls where they
come: eagerly, while compiling, and in two threads at once.
"""

import copy
import functools
import gc
import inspect
import sys
import threading
import traceback
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from tome_fx.graph.nodes import call
from tome_fx.graph.rewrite import insert_merge
from tome_fx.graph.scopes import Scope
from tome_fx.graph.specialize import Pass, specialize
from tome_fx.graph.structure import Structure, kind
from tome_fx.graph.trace import trace
from tome_fx.plan import TransformError

TOKENS: Mapping[str, Hashable] = {"x": "3d"}


def nothing(graph: fx.Graph) -> int:
    """A pass that changes nothing."""
    return 0


def doubled(child: Callable[..., Any], *args: Any) -> Any:
    """A function that the tests have graphs call. Traced into, it would be a call of the child and a product."""
    return child(*args) * 2


@dataclass
class Output:
    """What a forward returns under its own type."""

    sample: Tensor
    extra: Any = None


@dataclass
class DictOutput(OrderedDict[str, Any]):
    """An output class that is a dict as well, as diffusers' are."""

    sample: Tensor

    def __post_init__(self) -> None:
        for field in fields(self):
            self[field.name] = getattr(self, field.name)


class Branches(nn.Module):
    """A forward that branches on all that a kind of call is made of."""

    def __init__(self, width: int = 4, negate: bool = False, mode: str = "sum") -> None:
        super().__init__()
        self.proj = nn.Linear(width, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.missing = None
        self.scale = nn.Parameter(torch.ones(width) * 3)
        self.register_buffer("shift", torch.ones(width))
        self.negate, self.mode = negate, mode
        self.twice: Any = False

    def forward(self, x: Tensor, context: Tensor | None = None, options: Any = None, flag: bool = False) -> Any:
        """Do one thing or another."""
        x = self.proj(x) * self.scale + self.shift
        for block in self.blocks:
            x = block(x) * x.ndim
        if self.missing is not None or self.negate:
            x = -x
        if self.mode == "square":
            x = x * x
        if context is not None:
            x = x + (context if context.ndim == 3 else context[:, None])
        if options is not None and options.get("bias") is not None:
            x = x + options["bias"]
        if self.twice:
            x = x * 2
        return (x,) if flag else x


class Leaves(nn.Module):
    """Functions that are called from the graph: one a global of this file, one an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.through: Any = lambda child, x: child(x) * 3

    def forward(self, x: Tensor, plain: bool = False) -> Any:
        if torch.is_grad_enabled():
            return doubled(self.proj, x) + self.through(self.proj, x)
        raise AssertionError("traced as if no gradient could be asked for")


class Returns(nn.Module):
    """Hands its tokens back in whatever it was made with."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        y = x + 1
        if self.kind == "dataclass":
            return Output(y, extra=(x, Output(x)))
        return DictOutput(sample=y) if self.kind == "dict" else (y, {"x": x})


def inputs() -> dict[str, Tensor]:
    x, context, bias = torch.randn(3, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    return {"x": x, "context": context, "rank2": context[:, 0], "bias": bias}


def kinds_of_calls() -> list[dict[str, Any]]:
    i = inputs()
    return [
        {"x": i["x"]},
        {"x": i["x"], "context": i["context"]},
        {"x": i["x"], "context": i["rank2"]},
        {"x": i["x"], "options": {}},
        {"x": i["x"], "options": {"bias": None}},
        {"x": i["x"], "options": {"bias": None, "unread": i["bias"]}},
        {"x": i["x"], "flag": True},
    ]


def specialized(module: nn.Module, rewrite: Pass = nothing, **options: Any) -> Any:
    """A copy of the module, of its specialized class."""
    cls = specialize(module, rewrite, **{"example": TOKENS, **options})
    result = copy.deepcopy(module)
    result.__class__ = cls
    return result


def assert_same_output(actual: Any, expected: Any) -> None:
    """The same types all the way down, and equal tensors."""
    assert type(actual) is type(expected)
    if isinstance(expected, Tensor):
        assert torch.equal(actual, expected)
    elif isinstance(expected, Output):
        assert_same_output(vars(actual), vars(expected))
    elif isinstance(expected, dict):
        assert_same_output(list(actual.items()), list(expected.items()))
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_same_output(a, e)
    else:
        assert actual == expected


@pytest.mark.parametrize(
    "value, expected",
    [
        (None, None),
        (True, True),
        (False, False),
        (torch.zeros(2, 3), "2d"),
        (torch.zeros(()), "0d"),
        ({}, ()),
        ({"b": torch.zeros(1), "a": {"c": None}}, (("b", "1d"), ("a", (("c", None),)))),
        (1, "opaque"),
        (0.0, "opaque"),
        ("text", "opaque"),
        ((torch.zeros(1), None), "opaque"),
        ([torch.zeros(1), torch.zeros(1, 2)], ("list", "1d", "2d")),
        ((torch.zeros(1),), ("tuple", "1d")),
        ([7, 9], ("list", 7, 9)),
        ([7, True], "opaque"),
        ([], ("list",)),
        ((), ("tuple",)),
        (range(2, 4), ("range", 2, 3)),
        ({9, 7}, ("set", 7, 9)),
        ({torch.zeros(1)}, "opaque"),
    ],
)
def test_a_kind_holds_none_bools_keys_ranks_and_numbers_in_sequences_and_no_other_value(
    value: Any, expected: Hashable
) -> None:
    assert kind(value) == expected
    assert type(kind(value)) is type(expected)


@pytest.mark.parametrize("negate, mode, twice", [(False, "sum", False), (True, "square", True)])
def test_every_kind_of_call_has_one_graph_and_does_what_the_original_does(negate: bool, mode: str, twice: bool) -> None:
    class Own(Branches):
        """A class that no other test has called."""

    module = Own(negate=negate, mode=mode)
    module.twice = twice
    result = specialized(module)
    cls = type(result)
    assert len(cls.graphs) == 1
    assert cls.graph is next(iter(cls.graphs.values()))
    for again in range(2):
        for number, arguments in enumerate(kinds_of_calls(), start=1):
            assert_same_output(result(**arguments), module(**arguments))
            assert len(cls.graphs) == (number if not again else len(kinds_of_calls()))
    result(inputs()["x"][:1, :3])
    assert len(cls.graphs) == len(kinds_of_calls()), "a size or a value is taken for a kind"


def test_an_item_of_a_dict_that_forward_reads_reaches_it() -> None:
    module, i = Branches(), inputs()
    result = specialized(module)
    for options in ({"bias": i["bias"]}, {"bias": i["context"], "unread": None}):
        assert_same_output(result(i["x"], options=options), module(i["x"], options=options))


class Lists(nn.Module):
    """Layers that a call may leave out, with residuals between them; those that are last in something add none."""

    def __init__(self, last: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        for number, layer in enumerate(self.layers):
            vars(layer)["last"] = number == last

    def forward(self, x: Tensor, residuals: Any = None, skipped: Any = None) -> Any:
        for number, layer in enumerate(self.layers):
            if skipped is None or number not in skipped:
                x = layer(x)
            if residuals is not None and not layer.last:
                x = x + residuals[number % len(residuals)]
        return x


def calls_with_lists() -> list[dict[str, Any]]:
    i = inputs()
    return [
        {},
        {"residuals": [i["context"]]},
        {"residuals": (i["context"], i["bias"])},
        {"skipped": [0]},
        {"skipped": [1, 2]},
        {"skipped": [1], "residuals": [i["bias"]]},
    ]


def test_lists_of_tensors_and_of_numbers_reach_a_forward_as_lists() -> None:
    module = Lists()
    result = specialized(module, reads=("last",))
    before = len(type(result).graphs)
    for arguments in calls_with_lists():
        assert_same_output(result(inputs()["x"], **arguments), module(inputs()["x"], **arguments))
    assert len(type(result).graphs) == before + len(calls_with_lists()) - 1


class Halves(nn.Module):
    """Returns two values, the second of them where it is given one."""

    def forward(self, x: Tensor, extra: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return x.mean(1), None if extra is None else extra * 2


class Branching(nn.Module):
    """A forward that goes by the rank of what its child returns, and by whether it is there."""

    def __init__(self) -> None:
        super().__init__()
        self.halves = Halves()

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        found: tuple[Tensor, Tensor | None] = self.halves(x, extra)
        mean, more = found
        if mean.ndim == 2:
            mean = mean[:, None]
        return x + mean if more is None else x + mean + more


def test_a_forward_may_branch_on_what_a_child_returns_where_its_kinds_are_told() -> None:
    def of_halves(x: Any, extra: Any = None) -> tuple[Hashable, ...]:
        return "2d", None if extra is None else "3d"

    module: Any = Branching()
    result: Any = copy.deepcopy(module)
    result.__class__ = specialize(module, nothing, example=TOKENS, returns=(("halves", of_halves),))
    x = inputs()["x"]
    for arguments in ((x,), (x, x)):
        assert torch.equal(result(*arguments), module(*arguments))
    assert len(type(result).graphs) == 2


def test_lists_are_taken_while_compiling_whatever_numbers_are_in_them(fresh_dynamo: None, counter: Any) -> None:
    module = Lists()
    compiled: Any = torch.compile(specialized(module, reads=("last",)), backend=counter, fullgraph=True)
    for arguments in 2 * calls_with_lists():
        assert_same_output(compiled(inputs()["x"], **arguments), module(inputs()["x"], **arguments))
    assert counter.frame_count == len(calls_with_lists())


def test_attributes_of_children_that_are_said_to_be_read_are_constants_of_the_structure() -> None:
    assert specialize(Lists(), nothing, example=TOKENS, reads=("last",)) is specialize(
        Lists(), nothing, example=TOKENS, reads=("last",)
    )
    arguments = {"residuals": [inputs()["bias"]]}
    for last in (0, 1):
        module = Lists(last)
        assert_same_output(
            specialized(module, reads=("last",))(inputs()["x"], **arguments), module(inputs()["x"], **arguments)
        )
    with pytest.raises(TransformError, match=r"it reads last of its child layers.0, which a graph cannot depend on"):
        specialize(Lists(), nothing, example={**TOKENS, "residuals": ("list", "3d")})


def test_inputs_keep_their_names_and_defaults() -> None:
    module = Branches()
    structure = Structure.of(module, type(module))
    for kinds in (("3d", None, None, False), ("3d", "3d", (("bias", "3d"),), True)):
        graph = trace(structure, kinds, structure.settings(module))
        graph.lint()
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        assert [node.name for node in placeholders] == ["x", "context", "options", "flag"]
        assert [node.target for node in placeholders] == ["x", "context", "options", "flag"]
    forward = inspect.signature(type(specialized(module)).forward)
    original = inspect.signature(Branches.forward)
    assert [(p.name, p.default) for p in forward.parameters.values()] == [
        (p.name, p.default) for p in original.parameters.values()
    ]


def test_children_and_tensors_of_the_module_are_looked_up_when_the_graph_runs() -> None:
    module = Branches()
    result = specialized(module)
    called = {node.target for node in type(result).graph.nodes if node.op == "call_module"}
    assert called == {"proj", "blocks.0", "blocks.1"}
    for changed in (module, result):
        changed.scale = nn.Parameter(torch.full((4,), 0.5))
        changed.shift = torch.full((4,), 7.0)
        changed.proj = nn.Identity()
    assert_same_output(result(inputs()["x"]), module(inputs()["x"]))


def test_nothing_is_patched_while_a_trace_runs() -> None:
    names = ("__call__", "__getattr__", "__setattr__", "_call_impl", "register_parameter")
    before = [getattr(nn.Module, name) for name in names]
    during: list[list[Any]] = []

    class Watching(Branches):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            during.append([getattr(nn.Module, name) for name in names] + [torch.relu, torch.is_grad_enabled])
            y: Tensor = self.proj(x)
            return y

    specialize(Watching(), nothing, example=TOKENS)
    assert during == [[*before, torch.relu, torch.is_grad_enabled]]
    assert [getattr(nn.Module, name) for name in names] == before


def test_a_trace_leaves_the_module_as_it_is_and_keeps_none_of_its_weights() -> None:
    class Own(Branches):
        """A class that no other test has called."""

    module = Own()
    before = dict(vars(module)), {name: tensor.clone() for name, tensor in module.state_dict().items()}
    specialize(module, nothing, example=TOKENS)
    assert vars(module) == before[0]
    assert type(module) is Own
    assert_same_output(dict(module.state_dict()), before[1])
    weight = weakref.ref(module.proj.weight)
    del module, before
    gc.collect()
    assert weight() is None


def test_a_plain_attribute_that_changes_is_a_new_kind_of_call() -> None:
    class Own(Branches):
        """A class that no other test has called."""

    module = Own()
    result = specialized(module)
    for value, graphs in ((True, 2), (False, 2), (None, 3), (True, 3), (2, 4)):
        module.twice = result.twice = value
        assert_same_output(result(inputs()["x"]), module(inputs()["x"]))
        assert len(type(result).graphs) == graphs


def test_named_functions_and_functions_of_the_module_are_called_from_the_graph_and_not_entered() -> None:
    module = Leaves()
    result = specialized(module, calls=("doubled",))
    nodes = {node.name: node for node in type(result).graph.nodes}
    assert [node.op for node in nodes.values()].count("call_module") == 0
    assert nodes["doubled"].target is doubled
    assert nodes["doubled"].args == (nodes["proj"], nodes["x"])
    assert nodes["call"].target is call
    assert nodes["call"].args == (nodes["through"], nodes["proj_1"], nodes["x"])
    assert (nodes["through"].op, nodes["through"].target) == ("get_attr", "through")
    assert_same_output(result(inputs()["x"]), module(inputs()["x"]))
    module.through = result.through = lambda child, x: child(x) - x
    assert_same_output(result(inputs()["x"]), module(inputs()["x"]))
    with torch.no_grad():
        result(inputs()["x"], plain=True)  # a new kind: traced as if a gradient could be asked for


@pytest.mark.parametrize("output", ["dataclass", "dict", "tuple"])
def test_an_output_class_is_returned_as_such(output: str) -> None:
    module = Returns(output)
    assert_same_output(specialized(module)(inputs()["x"]), module(inputs()["x"]))


def test_the_class_keeps_name_module_and_family() -> None:
    class Own(Branches):
        """A class with a qualified name that is longer than its name."""

    cls = specialize(Own(), nothing, example=TOKENS)
    assert cls is not Own
    assert issubclass(cls, Own)
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(cls, name) == getattr(Own, name)
    assert cls.rewrite is nothing  # type: ignore[attr-defined]


def test_the_pass_is_given_every_graph_and_what_it_inserts_is_run() -> None:
    seen = []

    def negate(graph: fx.Graph) -> int:
        seen.append(graph)
        (output,) = [node for node in graph.nodes if node.op == "output"]
        with graph.inserting_before(output):
            output.args = (graph.call_function(torch.neg, (output.args[0],)),)
        return 1

    module = Branches()
    result = specialized(module, negate)
    for arguments in kinds_of_calls()[:3]:
        assert_same_output(result(**arguments), -module(**arguments))
    assert seen == list(type(result).graphs.values())


def fewer_children() -> nn.Module:
    module = Branches()
    del module.blocks[1]
    return module


def without_a_child() -> nn.Module:
    module = Branches()
    module.register_module("extra", None)
    return module


@pytest.mark.parametrize(
    "other",
    [
        Branches,
        lambda: Branches(width=8),
        lambda: Branches(negate=True),
        lambda: Branches(mode="square"),
        lambda: Branches().eval(),
    ],
    ids=["weights", "width", "flag", "string", "eval mode"],
)
def test_modules_of_equal_structure_share_a_class_and_each_does_its_own(
    other: Callable[[], nn.Module],
) -> None:
    first, second = (specialize(m, nothing, example=TOKENS) for m in (Branches(), other()))
    assert first is second
    assert first.forward.__code__ is second.forward.__code__
    module: Any = other()
    x = torch.randn(2, 6, module.proj.in_features)
    assert_same_output(specialized(module)(x), module(x))


@pytest.mark.parametrize(
    "other, options",
    [
        (fewer_children, {}),
        (without_a_child, {}),
        (Branches, {"calls": ("doubled",)}),
        (Branches, {"check": lambda module: None}),
        (Branches, {"rewrite": lambda graph: 0}),
    ],
    ids=["length of a list", "a child of None", "calls", "check", "pass"],
)
def test_modules_that_differ_in_what_decides_the_graph_share_nothing(
    other: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    first = specialize(Branches(), nothing, example=TOKENS)
    second = specialize(other(), **{"rewrite": nothing, "example": TOKENS, **options})
    assert first is not second
    assert first.forward.__code__ is not second.forward.__code__


def test_a_copy_is_of_the_same_class_and_has_weights_of_its_own() -> None:
    result = specialized(Branches())
    twin = copy.deepcopy(result)
    assert type(twin) is type(result)
    assert_same_output(twin(**kinds_of_calls()[1]), result(**kinds_of_calls()[1]))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in result.parameters()}


def test_a_pass_that_refuses_a_call_is_heard_and_leaves_no_class_and_no_graph() -> None:
    class Own(Branches):
        """A class that no other test has called."""

    def refuse(graph: fx.Graph) -> int:
        if "add_1" in {node.name for node in graph.nodes}:
            raise TransformError("no context")
        return 0

    for _ in range(2):
        with pytest.raises(TransformError, match="no context"):
            specialize(Own(), refuse, example={**TOKENS, "context": "3d"})
    result = specialized(Own(), refuse)
    for _ in range(2):
        with pytest.raises(TransformError, match="no context"):
            result(inputs()["x"], inputs()["context"])
    assert len(type(result).graphs) == 1


def test_a_traceback_shows_the_generated_lines() -> None:
    result = specialized(Branches())
    with pytest.raises(RuntimeError) as caught:
        result(torch.zeros(2, 6, 5))
    text = "".join(traceback.format_exception(caught.value))
    assert "    proj = self.proj(x)" in text
    assert "return getattr(self, _method)(x, context, options, flag)" in text
    assert "<tome_fx Branches.forward_0 " in text


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_kind_first_met_while_compiling_is_one_compile_and_none_on_return() -> None:
    class Own(Branches):
        """A class that no other test has called."""

    compiles = []

    def backend(graph_module: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        compiles.append(graph_module)
        return graph_module.forward

    module = Own()
    result = specialized(module)
    compiled: Any = torch.compile(result, backend=backend, fullgraph=True)
    calls = kinds_of_calls()[:5]
    for again in range(2):
        for number, arguments in enumerate(calls, start=1):
            assert_same_output(compiled(**arguments), module(**arguments))
            assert len(compiles) == (number if not again else len(calls))
            assert len(type(result).graphs) == len(compiles)
    module.twice = result.twice = True
    assert_same_output(compiled(**calls[1]), module(**calls[1]))
    assert len(compiles) == len(type(result).graphs) == len(calls) + 1


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def at_once(functions: list[Callable[[], Any]]) -> list[Any]:
    """The results of functions that threads of their own begin at the same time."""
    start = threading.Barrier(len(functions))

    def run(function: Callable[[], Any]) -> Any:
        start.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as threads:
        return list(threads.map(run, functions))


@pytest.mark.usefixtures("hasty_threads")
def test_threads_that_meet_new_kinds_at_once_are_all_right() -> None:
    module = Branches()
    calls = [arguments for arguments in kinds_of_calls() for _ in range(2)]  # each kind from two threads
    for _ in range(3):
        result = specialized(module, functools.partial(nothing))  # a pass of its own, so a class of its own
        outputs = at_once([functools.partial(result, **arguments) for arguments in calls])
        assert_same_output(outputs, [module(**arguments) for arguments in calls])
        assert len(type(result).graphs) == len(kinds_of_calls())


@pytest.mark.usefixtures("hasty_threads")
def test_threads_that_specialize_equal_modules_at_once_get_one_class() -> None:
    for _ in range(5):
        rewrite = functools.partial(nothing)  # a pass of its own, so a class of its own
        classes = at_once([functools.partial(specialize, Branches(), rewrite, example=TOKENS) for _ in range(4)])
        assert len(set(classes)) == 1


class Scaled(nn.Module):
    """Reads one number in every call and another, or its absence, in some."""

    def __init__(self, by: int, shift: int | None = None) -> None:
        super().__init__()
        self.by, self.shift = by, shift
        self.lists = nn.ModuleList()

    def forward(self, x: Tensor, bias: float = 1.0, shifted: bool = False) -> Tensor:
        for child in self.lists:
            x = child(x)
        if shifted:
            x = x - 1 if self.shift is None else x + self.shift
        return x * self.by + bias


def test_numbers_that_forward_reads_are_each_modules_own_in_every_kind_of_call() -> None:
    x = torch.ones(1, 2, 3)
    for by, shift in ((2, 5), (3, 5), (3, 7), (3, None)):
        module: nn.Module = Scaled(by, shift)
        module.__class__ = specialize(module, nothing, example={"x": "3d"})
        assert torch.equal(module(x), x * by + 1)
        assert torch.equal(module(x, bias=0.5), x * by + 0.5)
        assert torch.equal(module(x, shifted=True), (x + (-1 if shift is None else shift)) * by + 1)


def test_an_attribute_that_becomes_a_function_is_called_from_the_graph() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)
            self.through: Any = None

        def forward(self, x: Tensor) -> Any:
            return self.proj(x) if self.through is None else self.through(self.proj, x)

    module, x = Late(), inputs()["x"]
    result = specialized(module)
    assert_same_output(result(x), module(x))
    seen: list[Any] = []
    for changed in (module, result):
        changed.through = lambda child, x: child(x) * 2 if seen.append(child) is None else None  # type: ignore[func-returns-value]
    assert_same_output(result(x), module(x))
    assert seen == [result.proj, module.proj]


class Signatures(nn.Module):
    """Every kind of parameter that Python has."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor, gain: Any = 2, *more: Any, bias: Any, last: Any = None, **options: Any) -> Any:
        x = self.proj(x) * gain + bias
        for item in more:
            x = x if item is None else x + item
        return x, last, options.get("named"), sorted(options)


@pytest.mark.parametrize("rewrite", [nothing, functools.partial(insert_merge, scopes=[Scope("proj", tokens="x")])])
def test_keyword_only_and_variable_parameters_are_those_of_the_original(rewrite: Any) -> None:
    module, i = Signatures(), inputs()
    result = specialized(module, rewrite, example={"x": "3d", "bias": "3d"})
    x, other = i["x"], i["bias"]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x,), {"bias": other}),
        ((x, 3), {"bias": 1.0}),
        ((x, 3, other, None), {"bias": other, "last": other}),
        ((), {"x": x, "bias": other, "named": other, "other": None}),
    ]
    for args, kwargs in calls:
        assert_same_output(result(*args, **kwargs), module(*args, **kwargs))
    with pytest.raises(TypeError, match="bias"):
        result(x)


def scaled(name: str) -> Callable[[Any], Any]:
    """A decorator as diffusers' `apply_lora_scale`: it takes an option out and does something around the forward."""

    def decorator(forward: Any) -> Any:
        @functools.wraps(forward)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            scale = kwargs.pop(name, 1.0)
            try:
                return forward(self, *args, **kwargs) * scale
            finally:
                self.calls += 1

        return wrapper

    return decorator


class Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.calls = nn.Linear(4, 4), 0

    @scaled("outer")
    @scaled("inner")
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.proj(x)
        return result


def test_decorators_are_seen_through_and_stay_around_the_rewritten_forward() -> None:
    module: Any = Decorated()
    x = inputs()["x"]
    result = specialized(module)
    assert [node.name for node in type(result).graph.nodes] == ["x", "proj", "output"]
    assert_same_output(result(x, outer=2.0, inner=3.0), module(x, outer=2.0, inner=3.0))
    assert result.calls == 2
    other = specialized(Decorated(), functools.partial(nothing))
    assert type(other).forward.__code__ is not type(result).forward.__code__, "they would share dynamo's cache"


def test_a_decorator_that_hides_what_it_wraps_is_an_error() -> None:
    class Wrapper:
        def __init__(self, function: Any) -> None:
            self.__wrapped__ = function

        def __get__(self, instance: Any, owner: Any = None) -> Any:
            return self if instance is None else functools.partial(self.__wrapped__, instance)

    class Hidden(nn.Module):
        @Wrapper
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(TransformError, match=r"the decorator of .*Hidden\.forward hides what it wraps"):
        specialize(Hidden(), nothing, example={"x": "3d"})


def test_a_generated_class_that_is_called_makes_a_module_of_the_original() -> None:
    cls = specialize(Branches(), nothing, example=TOKENS)
    assert type(cls()) is Branches


def test_what_cannot_be_traced_is_named_with_the_call() -> None:
    class Asking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(TransformError, match=r"could not trace .*\.Asking\.forward for a call of x: 3d: "):
        specialize(Asking(), nothing, example={"x": "3d"})

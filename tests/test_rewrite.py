"""The contract of `tome_fx.graph.rewrite`.

The passes change a graph in place at the modules they are told, at every call of these and at no other, and return
how many calls that was. Every merge has one unmerge, with the same slot map, and nobody reads a merged result past
its unmerge. The rewritten graph computes what the three operations give when they are written out by hand. None of
the modules here has anything to do with diffusers.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from tome_fx import ops, plan
from tome_fx.graph.rewrite import insert_match, insert_merge
from tome_fx.graph.trace import Template

RATIO = 0.5
STRIDES = {"sx": 2, "sy": 2}
MATCH: dict[str, Any] = {"image": "image", "ratio": RATIO, **STRIDES, "seed": 7}


def checkpointed(function: nn.Module, *args: Tensor, **kwargs: Any) -> Any:
    """A function that is handed a module and its arguments, as checkpointing is."""
    return function(*args, **kwargs)


def chunked(size: int, function: nn.Module, tokens: Any) -> Tensor:
    """The same, with an argument before the module."""
    return torch.cat([function(chunk) for chunk in tokens.split(size, dim=-2)], dim=-2)


def positional(function: nn.Module, *args: Any) -> Any:
    """The same, without keywords: the function that diffusers' `enable_gradient_checkpointing` sets."""
    return function(*args)


class Block(nn.Module):
    """What a transformer block is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.ff = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.attn(self.norm(x))
        y = y + self.ff(y)
        return y


class Repeated(Block):
    """One module called twice, and a result with several uses, one of them the output."""

    def forward(self, x: Tensor) -> Any:
        y = self.attn(x)
        return self.attn(y) + y * 2, y


SLOTS = "[B, N], [B, N], [B, K]"  # the shapes in a slot map


class Indirect(Block):
    """Modules called through functions."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + checkpointed(self.attn, self.norm(x))
        return x + chunked(4, self.ff, x)


class Shifted(nn.Module):
    """A block of the outer graph, rewritten already: its result tells which slot map it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 3)

    def forward(self, x: Tensor, gain: float = 1.0, slots: ops.SlotMap | None = None) -> Tensor:
        y: Tensor = self.proj(x) * gain
        return ops.unmerge(ops.merge(y, slots), slots)


class Stack(nn.Module):
    """An image in, blocks over its tokens, an image out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Shifted(), Shifted()

    def forward(self, noise: Tensor, image: Tensor) -> Tensor:
        tokens: Tensor = image.flatten(2).mT
        tokens = self.first(tokens, gain=2.0)
        tokens = checkpointed(self.second, tokens)
        return tokens.mT.reshape(image.shape) + noise


def by_template(module: nn.Module) -> fx.Graph:
    """Traced by our own tracer."""
    kinds = ("4d", "4d") if isinstance(module, Stack) else ("3d",)
    return Template(type(module), module, (), ("checkpointed", "chunked", "positional")).trace(kinds, ())


class LeafTracer(fx.Tracer):
    """torch.fx's own tracer; every child is a leaf, and so are the functions above."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=(checkpointed, chunked, positional))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, nn.Module):
            return self.create_node("get_attr", self.path_of_module(a), (), {})
        return super().create_arg(a)


def by_fx(module: nn.Module) -> fx.Graph:
    return LeafTracer().trace(module)


tracers = pytest.mark.parametrize("trace", [by_template, by_fx])
Trace = Callable[[nn.Module], fx.Graph]


def counts(graph: fx.Graph) -> Counter[Any]:
    """How often each target is in a graph."""
    return Counter(node.target for node in graph.nodes)


def code(graph: fx.Graph) -> list[str]:
    """The lines of the generated forward, without the parts that free what is not needed any more."""
    lines = graph.python_code("self").src.splitlines()
    return [re.sub(r";  [\w =]+ = None", "", line).strip() for line in lines if line.strip()]


def is_call_of(node: fx.Node, module: str) -> bool:
    arguments = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
    return (node.op == "call_module" and node.target == module) or module in [a.target for a in arguments]


def assert_paired(graph: fx.Graph) -> int:
    """Every merge feeds one call, whose result goes to one unmerge with the same slot map; returns their number."""
    graph.lint()
    merges = [node for node in graph.nodes if node.target is ops.merge]
    unmerges = [node for node in graph.nodes if node.target is ops.unmerge]
    for merge in merges:
        assert len(merge.users) == 1, f"{merge} has {len(merge.users)} readers"
        (call,) = merge.users
        assert call.target not in (ops.merge, ops.unmerge), f"{merge} is read by {call}, which is no module's call"
        assert len(call.users) == 1, f"{call} has {len(call.users)} readers"
        (unmerge,) = call.users
        assert unmerge.target is ops.unmerge, f"{call} is merged and read by {unmerge}"
        assert unmerge.args == (call, merge.args[1]), f"{unmerge} does not undo {merge}"
        unmerges.remove(unmerge)
    assert not unmerges, f"{unmerges} undo nothing"
    return len(merges)


@tracers
@pytest.mark.parametrize("modules", [(), ("absent",), ("attn",), ("ff", "attn"), ("norm", "attn", "ff")], ids=str)
@pytest.mark.parametrize("kind", [Block, Indirect])
def test_every_named_module_is_wrapped_in_one_merge_and_one_unmerge_and_no_other_is(
    kind: type[Block], modules: tuple[str, ...], trace: Trace
) -> None:
    graph = trace(kind())
    before = counts(graph)
    named = [name for name in modules if hasattr(Block(), name)]
    assert insert_merge(graph, modules) == len(named)
    assert assert_paired(graph) == len(named)
    assert counts(graph) - before == Counter({ops.merge: len(named), ops.unmerge: len(named), "slots": 1})
    assert not before - counts(graph), "a node is gone"
    for name in ("norm", "attn", "ff"):
        (node,) = [node for node in graph.nodes if is_call_of(node, name)]
        read, readers = {n.target for n in node.all_input_nodes}, {n.target for n in node.users}
        assert (ops.merge in read) == (ops.unmerge in readers) == (name in modules)


def test_the_code_of_a_merged_block_reads_as_the_docstring_says() -> None:
    graph = by_template(Block())
    insert_merge(graph, ("attn",))
    assert code(graph) == [
        "def forward(self, x, slots = None):",
        "norm = self.norm(x)",
        "merge = tome_fx_ops_merge(norm, slots)  # [B, K, C]",
        "attn = self.attn(merge)  # [B, K, C]",
        "unmerge = tome_fx_ops_unmerge(attn, slots)  # [B, N, C]",
        "add = x + unmerge",
        "ff = self.ff(add)",
        "add_1 = add + ff",
        "return add_1",
    ]


def test_the_code_of_proportional_attention_reads_as_the_docstring_says() -> None:
    graph = by_template(Block())
    assert insert_merge(graph, ("attn", "ff"), proportional=("attn",)) == assert_paired(graph) == 2
    assert code(graph)[1:6] == [
        "norm = self.norm(x)",
        "merge = tome_fx_ops_merge(norm, slots)  # [B, K, C]",
        "log_sizes = tome_fx_ops_log_sizes(norm, slots)  # [B, 1, K]",
        "attn = self.attn(merge, attention_mask = log_sizes)  # [B, K, C]",
        "unmerge = tome_fx_ops_unmerge(attn, slots)  # [B, N, C]",
    ]
    assert counts(graph)[ops.log_sizes] == 1


def test_the_code_of_an_outer_graph_matches_before_each_named_block() -> None:
    graph = by_template(Stack())
    assert insert_match(graph, ("first", "second"), **MATCH) == 2
    lines = code(graph)
    assert lines[:8] == [
        "def forward(self, noise, image):",
        "height = image.size(2)",
        "width = image.size(3)",
        "kept = tome_fx_plan_kept(height, width, 0.5)",
        "flatten = image.flatten(2)",
        "getattr_1 = flatten.mT",
        "match = tome_fx_ops_match(getattr_1, height, width, kept = kept, sx = 2, sy = 2, seed = 7)  # " + SLOTS,
        "first = self.first(getattr_1, gain = 2.0, slots = match)",
    ]
    assert (
        "match_1 = tome_fx_ops_match(first, height, width, kept = kept, sx = 2, sy = 2, seed = 7)  # " + SLOTS in lines
    )


@tracers
def test_a_block_that_is_not_named_gets_no_slot_map(trace: Trace) -> None:
    graph = trace(Stack())
    before = counts(graph)
    assert insert_match(graph, ("first", "absent"), **MATCH) == 1
    graph.lint()
    assert counts(graph) - before == Counter({ops.match: 1, plan.kept: 1, "size": 2})
    (second,) = [node for node in graph.nodes if is_call_of(node, "second")]
    assert second.kwargs == {}
    assert ops.match not in {node.target for node in second.all_input_nodes}


@tracers
def test_an_input_may_be_named_as_the_sizes_are(trace: Trace) -> None:
    class Named(Stack):
        def forward(self, height: Tensor, image: Tensor) -> Tensor:
            return super().forward(height, image)

    graph = trace(Named())
    insert_match(graph, ("first",), **MATCH)
    graph.lint()


@tracers
def test_where_no_block_is_named_the_outer_graph_stays_as_it_was(trace: Trace) -> None:
    graph = trace(Stack())
    before = code(graph)
    assert insert_match(graph, ("absent",), **MATCH) == 0
    assert code(graph) == before


@tracers
def test_every_use_of_a_result_reads_it_unmerged(trace: Trace) -> None:
    graph = trace(Repeated())
    assert insert_merge(graph, ("attn",)) == 2
    assert assert_paired(graph) == 2
    first, second = [node for node in graph.nodes if node.target is ops.unmerge]
    (output,) = [node for node in graph.nodes if node.op == "output"]
    assert output.args[0][1] is first
    assert {n.target for n in first.users} >= {ops.merge, "output"}
    assert len(first.users) == 3
    assert len(second.users) == 1


@tracers
def test_the_shape_of_what_the_pass_touches_is_in_the_metadata(trace: Trace) -> None:
    graph = trace(Indirect())
    insert_merge(graph, ("attn", "ff"))
    expected: dict[Any, str] = {ops.merge: "[B, K, C]", ops.unmerge: "[B, N, C]"}
    expected |= {checkpointed: "[B, K, C]", chunked: "[B, K, C]"}
    for node in graph.nodes:
        assert node.meta.get("shape") == expected.get(node.target)
    graph = trace(Stack())
    insert_match(graph, ("first",), **MATCH)
    assert {n.target: n.meta["shape"] for n in graph.nodes if "shape" in n.meta} == {
        ops.match: "[B, N], [B, N], [B, K]"
    }


@tracers
@pytest.mark.parametrize("kind", [Block, Repeated, Indirect, Stack])
def test_rewriting_the_same_module_again_prints_the_same_code(kind: type[nn.Module], trace: Trace) -> None:
    module = kind()
    printed = []
    for _ in range(2):
        graph = trace(module)
        if kind is Stack:
            insert_match(graph, ("first", "second"), **MATCH)
        else:
            insert_merge(graph, ("attn", "ff"))
        printed.append(graph.python_code("self").src)
    assert printed[0] == printed[1]


# Numerics: what the graph computes is what the same lines compute by hand.


def matched(x: Tensor, height: int, width: int, seed: int | None) -> ops.SlotMap | None:
    return ops.match(x, height, width, kept=plan.kept(height, width, RATIO), **STRIDES, seed=seed)


def tokens_and_slots() -> tuple[Tensor, ops.SlotMap]:
    x = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
    slots = matched(x, 3, 4, 1)
    assert slots is not None
    return x, slots


@tracers
@pytest.mark.parametrize("kind", [Block, Indirect])
def test_a_merged_block_computes_what_merge_and_unmerge_by_hand_give(kind: type[Block], trace: Trace) -> None:
    block, (x, slots) = kind(), tokens_and_slots()
    graph = trace(block)
    insert_merge(graph, ("attn", "ff"))
    rewritten = fx.GraphModule(block, graph)
    assert torch.equal(rewritten(x), block(x)), "a block that is given no slot map is not the original"
    y = x + ops.unmerge(block.attn(ops.merge(block.norm(x), slots)), slots)
    y = y + ops.unmerge(block.ff(ops.merge(y, slots)), slots)
    torch.testing.assert_close(rewritten(x, slots), y, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(y, block(x)), "merging has changed nothing, so this shows nothing"


@tracers
def test_an_outer_graph_computes_what_matches_by_hand_give(trace: Trace) -> None:
    stack = Stack()
    noise, image = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    graph = trace(stack)
    insert_match(graph, ("first", "second"), **MATCH)
    x = image.flatten(2).mT
    x = stack.first(x, gain=2.0, slots=matched(x, 4, 5, 7))
    x = stack.second(x, slots=matched(x, 4, 5, 7))
    expected = x.mT.reshape(image.shape) + noise
    torch.testing.assert_close(fx.GraphModule(stack, graph)(noise, image), expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(expected, stack(noise, image)), "merging has changed nothing, so this shows nothing"


@tracers
def test_a_block_called_through_a_function_without_keywords_is_handed_its_slot_map(trace: Trace) -> None:
    class Positional(Stack):
        def forward(self, noise: Tensor, image: Tensor) -> Tensor:
            result: Tensor = positional(self.first, image.flatten(2).mT)
            return result

    stack, image = Positional(), torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    graph = trace(stack)
    assert insert_match(graph, ("first",), **MATCH) == 1
    x = image.flatten(2).mT
    expected = stack.first(x, slots=matched(x, 4, 5, 7))
    torch.testing.assert_close(fx.GraphModule(stack, graph)(image, image), expected, rtol=1e-6, atol=1e-6)


# The checker of pairs is one that can fail.


def skip_the_unmerge(graph: fx.Graph, merge: fx.Node, call: fx.Node, unmerge: fx.Node) -> None:
    unmerge.replace_all_uses_with(call)
    graph.erase_node(unmerge)


def read_past_the_unmerge(graph: fx.Graph, merge: fx.Node, call: fx.Node, unmerge: fx.Node) -> None:
    next(user for user in unmerge.users if user.op != "output").replace_input_with(unmerge, call)


def undo_with_another_slot_map(graph: fx.Graph, merge: fx.Node, call: fx.Node, unmerge: fx.Node) -> None:
    unmerge.update_arg(1, next(iter(graph.nodes)))


def merge_for_two(graph: fx.Graph, merge: fx.Node, call: fx.Node, unmerge: fx.Node) -> None:
    next(user for user in unmerge.users if user.op != "output").replace_input_with(unmerge, merge)


def undo_twice(graph: fx.Graph, merge: fx.Node, call: fx.Node, unmerge: fx.Node) -> None:
    with graph.inserting_after(unmerge):
        again = graph.call_function(ops.unmerge, (unmerge, merge.args[1]))
    unmerge.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)


def merge_nothing(graph: fx.Graph, merge: fx.Node, call: fx.Node, unmerge: fx.Node) -> None:
    call.replace_all_uses_with(merge)


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (skip_the_unmerge, "has 3 readers"),
        (read_past_the_unmerge, "attn has 2 readers"),
        (undo_with_another_slot_map, "unmerge does not undo merge"),
        (merge_for_two, "merge has 2 readers"),
        (undo_twice, "undo nothing"),
        (merge_nothing, "merge has 2 readers"),
    ],
)
def test_the_check_for_pairs_sees_a_broken_pair(damage: Callable[..., None], complaint: str) -> None:
    graph = by_template(Repeated())
    insert_merge(graph, ("attn",))
    merge = next(node for node in graph.nodes if node.target is ops.merge)
    (call,) = merge.users
    (unmerge,) = call.users
    damage(graph, merge, call, unmerge)
    with pytest.raises(AssertionError, match=complaint):
        assert_paired(graph)

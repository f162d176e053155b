"""The contract of the pass for a block, of `tome_fx.graph.rewrite`.

The pass changes a graph in place at the modules it is told, at every call of these and at no other, and returns how
many calls that was. Every merge has one unmerge, with the same slot map, and nobody reads a merged result past its
unmerge; where queries stay whole, keys and values are merged and nothing is unmerged. The rewritten graph computes what
the operations give when they are written out by hand. None of the modules here has anything to do with diffusers.
"""

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.graphs import (
    Trace,
    by_template,
    checkpointed,
    chunked,
    code,
    counts,
    is_call_of,
    log_sizes,
    matched,
    tracers,
)
from torch import Tensor, fx, nn

from tome_fx import ops
from tome_fx.graph import nodes
from tome_fx.graph.rewrite import MergePass, insert_merge
from tome_fx.graph.scopes import Scope
from tome_fx.graph.structure import Structure
from tome_fx.graph.trace import trace as trace_call
from tome_fx.plan import TransformError


def scopes(*modules: str) -> list[Scope]:
    """Modules whose tokens are called x, and attention that takes weights."""
    return [Scope(name, tokens="x", weights="attention_mask" if name == "attn" else None) for name in modules]


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


class Indirect(Block):
    """Modules called through functions."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + checkpointed(self.attn, self.norm(x))
        return x + chunked(4, self.ff, x)


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
    assert insert_merge(graph, scopes(*modules)) == len(named)
    assert assert_paired(graph) == len(named)
    assert counts(graph) - before == Counter({ops.merge: len(named), ops.unmerge: len(named), "slots": 1})
    assert not before - counts(graph), "a node is gone"
    for name in ("norm", "attn", "ff"):
        (node,) = [node for node in graph.nodes if is_call_of(node, name)]
        read, readers = {n.target for n in node.all_input_nodes}, {n.target for n in node.users}
        assert (ops.merge in read) == (ops.unmerge in readers) == (name in modules)


# The printed code is what the README and the docstrings show: it is compared so that they stay true.


def test_the_code_of_a_merged_block_reads_as_the_docstring_says() -> None:
    graph = by_template(Block())
    insert_merge(graph, scopes("attn"))
    assert code(graph) == [
        "def forward(self, x, slots = None):",
        "norm = self.norm(x)",
        "merge = tome_fx_ops_merge(norm, slots)",
        "attn = self.attn(merge)",
        "unmerge = tome_fx_ops_unmerge(attn, slots)",
        "add = x + unmerge",
        "ff = self.ff(add)",
        "add_1 = add + ff",
        "return add_1",
    ]


def test_the_code_of_weighed_attention_reads_as_the_docstring_says() -> None:
    graph = by_template(Block())
    assert insert_merge(graph, scopes("attn", "ff"), weigh=log_sizes) == assert_paired(graph) == 2
    assert code(graph)[1:7] == [
        "norm = self.norm(x)",
        "merge = tome_fx_ops_merge(norm, slots)",
        "attn_1 = self.attn",
        "log_sizes = support_graphs_log_sizes(attn_1, norm, slots)",
        "attend = tome_fx_graph_nodes_attend(attn_1, merge, attention_mask = log_sizes)",
        "unmerge = tome_fx_ops_unmerge(attend, slots)",
    ]
    assert counts(graph)[log_sizes] == 1


@tracers
def test_every_use_of_a_result_reads_it_unmerged(trace: Trace) -> None:
    graph = trace(Repeated())
    assert insert_merge(graph, scopes("attn")) == 2
    assert assert_paired(graph) == 2
    first, second = [node for node in graph.nodes if node.target is ops.unmerge]
    (output,) = [node for node in graph.nodes if node.op == "output"]
    assert output.args[0][1] is first
    assert {n.target for n in first.users} >= {ops.merge, "output"}
    assert len(first.users) == 3
    assert len(second.users) == 1


@tracers
@pytest.mark.parametrize("kind", [Block, Repeated, Indirect])
def test_rewriting_the_same_module_again_prints_the_same_code(kind: type[nn.Module], trace: Trace) -> None:
    module = kind()
    printed = []
    for _ in range(2):
        graph = trace(module)
        insert_merge(graph, scopes("attn", "ff"))
        printed.append(graph.python_code("self").src)
    assert printed[0] == printed[1]


# Numerics: what the graph computes is what the same lines compute by hand.


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
    insert_merge(graph, scopes("attn", "ff"))
    rewritten = fx.GraphModule(block, graph)
    assert torch.equal(rewritten(x), block(x)), "a block that is given no slot map is not the original"
    y = x + ops.unmerge(block.attn(ops.merge(block.norm(x), slots)), slots)
    y = y + ops.unmerge(block.ff(ops.merge(y, slots)), slots)
    torch.testing.assert_close(rewritten(x, slots), y, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(y, block(x)), "merging has changed nothing, so this shows nothing"


def test_a_pass_asks_for_one_call_of_each_module() -> None:
    for modules in (("attn",), ("attn", "ff"), ("absent",)):
        with pytest.raises(
            TransformError, match=f"expected one call each of {', '.join(modules)}, found calls of attn"
        ):
            MergePass(tuple(scopes(*modules)))(by_template(Repeated()))


# What calls of blocks and of modules in them may look like.


class ByName(Block):
    """Tokens given by name, and results in a tuple."""

    def forward(self, x: Tensor) -> Tensor:
        _, y = self.attn(context=None, x=self.norm(x))
        result: Tensor = y + x
        return result


class Joint(nn.Module):
    """Attention over two streams, the second of which is the image's."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor, context: Tensor | None = None, attention_mask: Tensor | None = None) -> Any:
        result = self.proj(x)
        return context, result if attention_mask is None else result + attention_mask.mT


@tracers
@pytest.mark.parametrize("weigh", [False, True])
def test_tokens_may_be_given_by_name_and_come_back_in_a_tuple(trace: Trace, weigh: bool) -> None:
    block, (x, slots) = ByName(), tokens_and_slots()
    block.attn = Joint()  # type: ignore[assignment]
    graph = trace(block)
    scope = Scope("attn", tokens="x", result=1, weights="attention_mask")
    assert insert_merge(graph, [scope], weigh=log_sizes if weigh else None) == 1
    assert [n.args[1] for n in graph.nodes if n.target is ops.unmerge] == [slots_of(graph)]
    normed = block.norm(x)
    mask = ops.log_sizes(normed, slots) if weigh else None
    expected = ops.unmerge(block.attn(ops.merge(normed, slots), attention_mask=mask)[1], slots) + x
    torch.testing.assert_close(fx.GraphModule(block, graph)(x, slots), expected, rtol=1e-6, atol=1e-6)


def slots_of(graph: fx.Graph) -> fx.Node:
    slots: fx.Node = next(node for node in graph.nodes if node.target == "slots")
    return slots


def test_a_call_without_the_tokens_is_an_error_that_names_them() -> None:
    class Without(Block):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x + self.attn(other=x)
            return y

    with pytest.raises(
        TransformError, match=r"expected the tokens of attn as its first argument or as x, found .*other"
    ):
        insert_merge(by_template(Without()), scopes("attn"))


class Masked(Block):
    """Attention that is given a mask for each token."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = x + self.attn(self.norm(x), attention_mask=mask)
        return y


@pytest.mark.parametrize("weigh", [False, True])
def test_what_has_an_entry_for_each_token_is_refused_with_merged_ones_and_served_with_all(weigh: bool) -> None:
    block, (x, slots) = Masked(), tokens_and_slots()
    block.attn = Joint()  # type: ignore[assignment]
    structure = Structure.of(block, Masked)
    graph = trace_call(structure, ("3d", "3d"), structure.settings(block))
    scope = Scope("attn", "x", result=1, weights="attention_mask", per_token=("attention_mask",), option="merge_attn")
    (call,) = [node for node in graph.nodes if node.target == "attn"]
    with graph.inserting_after(call):
        tokens = graph.call_function(operator.getitem, (call, 1))
    call.replace_all_uses_with(tokens)
    tokens.update_arg(0, call)
    insert_merge(graph, [scope], weigh=log_sizes if weigh else None)
    rewritten, mask = fx.GraphModule(block, graph), torch.randn(2, 1, 12)
    assert torch.equal(rewritten(x, mask), x + block.attn(block.norm(x), attention_mask=mask)[1])
    with pytest.raises(
        TransformError, match=r"attention_mask was given to attn, whose tokens are merged \(merge_attn="
    ):
        rewritten(x, mask, slots)


class Wide(nn.Module):
    """Attention that adds keys of its own."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        keys = torch.cat([x, x[:1].expand_as(x)], dim=1)
        scores = x @ keys.mT
        return (scores if attention_mask is None else scores + attention_mask).softmax(-1) @ keys


def test_attention_to_other_keys_than_those_given_is_refused_in_words() -> None:
    x, slots = tokens_and_slots()
    merged = ops.merge(x, slots)
    with pytest.raises(
        TransformError, match=r"Wide failed on a mask, which is how merged tokens are weighed .* prop_attn=False"
    ):
        nodes.attend(Wide(), merged, attention_mask=ops.log_sizes(x, slots))
    assert nodes.attend(Wide(), merged).shape == merged.shape
    with pytest.raises(ZeroDivisionError):
        nodes.attend(lambda: 1 / 0)  # type: ignore[arg-type]


# Keys and values alone: what attends stays whole.


class Cross(nn.Module):
    """Attention to other tokens, where there are any."""

    def forward(self, x: Tensor, context: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        keys = x if context is None else context
        scores = x @ keys.mT
        return (scores if attention_mask is None else scores + attention_mask).softmax(-1) @ keys


class CrossBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Cross()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.attn(self.norm(x), context=None)
        y = y + self.ff(y)
        return y


class CrossThroughFunction(CrossBlock):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + checkpointed(self.attn, self.norm(x))
        return y + chunked(4, self.ff, y)


KEYS = Scope("attn", tokens="x", keys="context", weights="attention_mask")


def test_the_code_of_attention_to_merged_keys_reads_as_the_docstring_says() -> None:
    graph = by_template(CrossBlock())
    assert insert_merge(graph, [KEYS], queries=False) == 1
    assert code(graph)[1:5] == [
        "norm = self.norm(x)",
        "merged_keys = tome_fx_graph_nodes_merged_keys(norm, slots)",
        "attn = self.attn(norm, context = merged_keys)",
        "add = x + attn",
    ]


@tracers
@pytest.mark.parametrize("weigh", [False, True])
@pytest.mark.parametrize("kind", [CrossBlock, CrossThroughFunction])
def test_where_queries_stay_whole_merged_keys_are_attended_to_and_nothing_is_unmerged(
    kind: type[CrossBlock], trace: Trace, weigh: bool
) -> None:
    block, (x, slots) = kind(), tokens_and_slots()
    graph = trace(block)
    both = [KEYS, *scopes("ff")]  # a scope without keys is merged around as ever
    assert insert_merge(graph, both, queries=False, weigh=log_sizes if weigh else None) == 2
    assert assert_paired(graph) == 1
    rewritten = fx.GraphModule(block, graph)
    assert torch.equal(rewritten(x), block(x)), "a block that is given no slot map is not the original"
    assert nodes.merged_keys(x, None) is None, "attention is told to attend to its own tokens as if they were others"
    normed = block.norm(x)
    mask = ops.log_sizes(normed, slots) if weigh else None
    y = x + block.attn(normed, context=ops.merge(normed, slots), attention_mask=mask)
    y = y + ops.unmerge(block.ff(ops.merge(y, slots)), slots)
    torch.testing.assert_close(rewritten(x, slots), y, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(y, block(x)), "merging has changed nothing, so this shows nothing"


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
    insert_merge(graph, scopes("attn"))
    merge = next(node for node in graph.nodes if node.target is ops.merge)
    (call,) = merge.users
    (unmerge,) = call.users
    damage(graph, merge, call, unmerge)
    with pytest.raises(AssertionError, match=complaint):
        assert_paired(graph)

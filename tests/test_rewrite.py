"""The contract of `tome_fx.graph.rewrite`.

The passes change a graph in place at the modules they are told, at every call of these and at no other, and return
how many calls that was. Every merge has one unmerge, with the same slot map, and nobody reads a merged result past
its unmerge. The rewritten graph computes what the three operations give when they are written out by hand. None of
the modules here has anything to do with diffusers.
"""

import operator
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from tome_fx import ops, plan
from tome_fx.graph import nodes
from tome_fx.graph.rewrite import MatchPass, MergePass, insert_match, insert_merge
from tome_fx.graph.scopes import Scope, Stack
from tome_fx.graph.structure import Structure
from tome_fx.graph.trace import trace as trace_call
from tome_fx.plan import TransformError

RATIO = 0.5
STRIDES = {"sx": 2, "sy": 2}
MATCH: dict[str, Any] = {**STRIDES, "seed": 7}


def scopes(*modules: str) -> list[Scope]:
    """Modules whose tokens are called x, and attention that takes weights."""
    return [Scope(name, tokens="x", weights="attention_mask" if name == "attn" else None) for name in modules]


def stack(*blocks: str) -> Stack:
    """Blocks of the outer graph, which take x and gain."""
    defaults = ((None, 1.0),) * len(blocks)
    return Stack(blocks, tokens="x", defaults=defaults, image="image", grid=ops.grid_of, ratio="ratio")


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


class Outer(nn.Module):
    """An image in, blocks over its tokens, an image out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Shifted(), Shifted()
        self.ratio = ops.as_read(RATIO, dynamic=False)

    def forward(self, noise: Tensor, image: Tensor) -> Tensor:
        tokens: Tensor = image.flatten(2).mT
        tokens = self.first(tokens, gain=2.0)
        tokens = checkpointed(self.second, tokens)
        return tokens.mT.reshape(image.shape) + noise


def by_template(module: nn.Module) -> fx.Graph:
    """Traced by our own tracer."""
    structure = Structure.of(module, type(module), ("checkpointed", "chunked", "positional"))
    kinds = ("4d", "4d") if isinstance(module, Outer) else ("3d",)
    return trace_call(structure, kinds, structure.settings(module))


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
    assert insert_merge(graph, scopes("attn", "ff"), weigh=True) == assert_paired(graph) == 2
    assert code(graph)[1:7] == [
        "norm = self.norm(x)",
        "merge = tome_fx_ops_merge(norm, slots)",
        "log_sizes = tome_fx_ops_log_sizes(norm, slots)",
        "attn_1 = self.attn",
        "attend = tome_fx_graph_nodes_attend(attn_1, merge, attention_mask = log_sizes)",
        "unmerge = tome_fx_ops_unmerge(attend, slots)",
    ]
    assert counts(graph)[ops.log_sizes] == 1


def test_the_code_of_an_outer_graph_matches_before_each_named_block() -> None:
    graph = by_template(Outer())
    assert insert_match(graph, stack("first", "second"), **MATCH) == 2
    lines = code(graph)
    match = "tome_fx_ops_match({}, getitem, getitem_1, kept = kept, sx = 2, sy = 2, seed = 7)"
    assert lines[:10] == [
        "def forward(self, noise, image):",
        "grid_of = tome_fx_ops_grid_of(image)",
        "getitem = grid_of[0]",
        "getitem_1 = grid_of[1]",
        "ratio = self.ratio",
        "kept = tome_fx_ops_kept(getitem, getitem_1, ratio)",
        "flatten = image.flatten(2)",
        "getattr_1 = flatten.mT",
        f"match = {match.format('getattr_1')}",
        "first = self.first(getattr_1, gain = 2.0, slots = match)",
    ]
    assert f"match_1 = {match.format('first')}" in lines


@tracers
def test_a_stack_may_be_matched_once_for_all_of_its_blocks(trace: Trace) -> None:
    outer = Outer()
    noise, image = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    graph = trace(outer)
    MatchPass(stack("first", "second"), **MATCH, once=True)(graph)
    assert counts(graph)[ops.match] == 1
    tokens = image.flatten(2).mT
    slots = matched(tokens, 4, 5, 7)
    expected = outer.second(outer.first(tokens, gain=2.0, slots=slots), slots=slots).mT.reshape(image.shape) + noise
    torch.testing.assert_close(fx.GraphModule(outer, graph)(noise, image), expected, rtol=1e-6, atol=1e-6)


@tracers
def test_a_block_that_is_not_named_gets_no_slot_map(trace: Trace) -> None:
    graph = trace(Outer())
    before = counts(graph)
    assert insert_match(graph, stack("first", "absent"), **MATCH) == 1
    graph.lint()
    new = {ops.match: 1, ops.kept: 1, ops.grid_of: 1, operator.getitem: 2, "ratio": 1}
    assert counts(graph) - before == Counter(new)
    (second,) = [node for node in graph.nodes if is_call_of(node, "second")]
    assert second.kwargs == {}
    assert ops.match not in {node.target for node in second.all_input_nodes}


@tracers
def test_an_input_may_be_named_as_the_sizes_are(trace: Trace) -> None:
    class Named(Outer):
        def forward(self, height: Tensor, image: Tensor) -> Tensor:
            return super().forward(height, image)

    graph = trace(Named())
    insert_match(graph, stack("first"), **MATCH)
    graph.lint()


@tracers
def test_where_no_block_is_named_the_outer_graph_stays_as_it_was(trace: Trace) -> None:
    graph = trace(Outer())
    before = code(graph)
    assert insert_match(graph, stack("absent"), **MATCH) == 0
    assert code(graph) == before


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
@pytest.mark.parametrize("kind", [Block, Repeated, Indirect, Outer])
def test_rewriting_the_same_module_again_prints_the_same_code(kind: type[nn.Module], trace: Trace) -> None:
    module = kind()
    printed = []
    for _ in range(2):
        graph = trace(module)
        if kind is Outer:
            insert_match(graph, stack("first", "second"), **MATCH)
        else:
            insert_merge(graph, scopes("attn", "ff"))
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
    insert_merge(graph, scopes("attn", "ff"))
    rewritten = fx.GraphModule(block, graph)
    assert torch.equal(rewritten(x), block(x)), "a block that is given no slot map is not the original"
    y = x + ops.unmerge(block.attn(ops.merge(block.norm(x), slots)), slots)
    y = y + ops.unmerge(block.ff(ops.merge(y, slots)), slots)
    torch.testing.assert_close(rewritten(x, slots), y, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(y, block(x)), "merging has changed nothing, so this shows nothing"


@tracers
def test_an_outer_graph_computes_what_matches_by_hand_give(trace: Trace) -> None:
    outer = Outer()
    noise, image = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    graph = trace(outer)
    insert_match(graph, stack("first", "second"), **MATCH)
    x = image.flatten(2).mT
    x = outer.first(x, gain=2.0, slots=matched(x, 4, 5, 7))
    x = outer.second(x, slots=matched(x, 4, 5, 7))
    expected = x.mT.reshape(image.shape) + noise
    torch.testing.assert_close(fx.GraphModule(outer, graph)(noise, image), expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(expected, outer(noise, image)), "merging has changed nothing, so this shows nothing"


@tracers
def test_a_block_called_through_a_function_without_keywords_is_handed_its_slot_map(trace: Trace) -> None:
    class Positional(Outer):
        def forward(self, noise: Tensor, image: Tensor) -> Tensor:
            result: Tensor = positional(self.first, image.flatten(2).mT)
            return result

    outer, image = Positional(), torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    graph = trace(outer)
    assert insert_match(graph, stack("first"), **MATCH) == 1
    x = image.flatten(2).mT
    expected = outer.first(x, slots=matched(x, 4, 5, 7))
    torch.testing.assert_close(fx.GraphModule(outer, graph)(image, image), expected, rtol=1e-6, atol=1e-6)


def test_a_pass_asks_for_one_call_of_each_module() -> None:
    for modules in (("attn",), ("attn", "ff"), ("absent",)):
        with pytest.raises(
            TransformError, match=f"expected one call each of {', '.join(modules)}, found calls of attn"
        ):
            MergePass(tuple(scopes(*modules)))(by_template(Repeated()))
    with pytest.raises(TransformError, match="expected one call each of first, absent, found calls of"):
        MatchPass(stack("first", "absent"), **MATCH)(by_template(Outer()))


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
    assert insert_merge(graph, [scope], weigh=weigh) == 1
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
    insert_merge(graph, [scope], weigh=weigh)
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
    with pytest.raises(TransformError, match=r"Wide failed on the weights that prop_attn=True .* prop_attn=False"):
        nodes.attend(Wide(), merged, attention_mask=ops.log_sizes(x, slots))
    assert nodes.attend(Wide(), merged).shape == merged.shape
    with pytest.raises(ZeroDivisionError):
        nodes.attend(lambda: 1 / 0)  # type: ignore[arg-type]


def test_a_block_called_by_position_gets_its_slot_map_after_all_arguments_and_is_a_module() -> None:
    outer, image = Outer(), torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    graph = by_template(outer)
    insert_match(graph, stack("second"), **MATCH)
    (call,) = [node for node in graph.nodes if node.target is checkpointed]
    assert [str(argument) for argument in call.args] == ["second", "first", "1.0", "match"]
    seen: list[Any] = []
    outer.second.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    fx.GraphModule(outer, graph)(image, image)
    assert isinstance(seen[0], ops.SlotMap)


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

"""The contract of the passes for a stack of blocks, of `tome_fx.graph.rewrite`.

Blocks are handed slot maps, or see merged tokens, whole: at every call of those named and of no other. A graph matches
once or before each block. Blocks that follow on one another under one match are merged and unmerged once, and nobody
else reads what is merged. The rewritten graph computes what the operations give when they are written out by hand.
"""

import operator
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.graphs import (
    MATCHING,
    RATIO,
    Trace,
    by_template,
    checkpointed,
    code,
    counts,
    is_call_of,
    log_sizes,
    matched,
    positional,
    tracers,
)
from torch import Tensor, fx, nn

from tome_fx import ops
from tome_fx.graph.rewrite import MatchPass, StackPass, insert_match, insert_merge_of_blocks
from tome_fx.graph.scopes import Stack
from tome_fx.graph.structure import Structure
from tome_fx.graph.trace import trace as trace_call
from tome_fx.plan import TransformError


def stack(*blocks: str, **more: Any) -> Stack:
    """Blocks of the outer graph, which take x and gain."""
    arguments = ((("x", None), ("gain", 1.0)),) * len(blocks)
    return Stack(
        blocks, tokens="x", arguments=arguments, grid_inputs=("image",), grid=ops.grid_of, ratio="ratio", **more
    )


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


def test_the_code_of_an_outer_graph_matches_before_each_named_block() -> None:
    graph = by_template(Outer())
    assert insert_match(graph, stack("first", "second"), MATCHING) == 2
    lines = code(graph)
    match = "tome_fx_ops_match({}, getitem, getitem_1, kept = kept, sx = 2, sy = 2, seed = 7, tile = None)"
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
    MatchPass(stack("first", "second"), replace(MATCHING, once=True))(graph)
    assert counts(graph)[ops.match] == 1
    tokens = image.flatten(2).mT
    slots = matched(tokens, 4, 5, 7)
    expected = outer.second(outer.first(tokens, gain=2.0, slots=slots), slots=slots).mT.reshape(image.shape) + noise
    torch.testing.assert_close(fx.GraphModule(outer, graph)(noise, image), expected, rtol=1e-6, atol=1e-6)


@tracers
def test_a_block_that_is_not_named_gets_no_slot_map(trace: Trace) -> None:
    graph = trace(Outer())
    before = counts(graph)
    assert insert_match(graph, stack("first", "absent"), MATCHING) == 1
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
    insert_match(graph, stack("first"), MATCHING)
    graph.lint()


@tracers
def test_where_no_block_is_named_the_outer_graph_stays_as_it_was(trace: Trace) -> None:
    graph = trace(Outer())
    before = code(graph)
    assert insert_match(graph, stack("absent"), MATCHING) == 0
    assert code(graph) == before


@tracers
def test_rewriting_the_same_outer_graph_again_prints_the_same_code(trace: Trace) -> None:
    printed = []
    for _ in range(2):
        graph = trace(Outer())
        insert_match(graph, stack("first", "second"), MATCHING)
        printed.append(graph.python_code("self").src)
    assert printed[0] == printed[1]


@tracers
def test_an_outer_graph_computes_what_matches_by_hand_give(trace: Trace) -> None:
    outer = Outer()
    noise, image = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    graph = trace(outer)
    insert_match(graph, stack("first", "second"), MATCHING)
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
    assert insert_match(graph, stack("first"), MATCHING) == 1
    x = image.flatten(2).mT
    expected = outer.first(x, slots=matched(x, 4, 5, 7))
    torch.testing.assert_close(fx.GraphModule(outer, graph)(image, image), expected, rtol=1e-6, atol=1e-6)


def test_a_pass_asks_for_one_call_of_each_block() -> None:
    for rewrite in (MatchPass, StackPass):
        with pytest.raises(TransformError, match="expected one call each of first, absent, found calls of"):
            rewrite(stack("first", "absent"), MATCHING)(by_template(Outer()))


def test_a_block_called_by_position_gets_its_slot_map_after_all_arguments_and_is_a_module() -> None:
    outer, image = Outer(), torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    graph = by_template(outer)
    insert_match(graph, stack("second"), MATCHING)
    (call,) = [node for node in graph.nodes if node.target is checkpointed]
    assert [str(argument) for argument in call.args] == ["second", "first", "1.0", "match"]
    seen: list[Any] = []
    outer.second.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    fx.GraphModule(outer, graph)(image, image)
    assert isinstance(seen[0], ops.SlotMap)


# Whole blocks: they see merged tokens, and what each slot is changed by is added to its tokens.


class Plain(nn.Module):
    """A block that adds to its tokens, and more to those of a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 3)

    def forward(self, x: Tensor, gain: float = 1.0, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        y: Tensor = x + self.proj(x).tanh() * gain
        return y if mask is None else y + mask.mT * scale


class Stacked(nn.Module):
    """An image in, blocks over its tokens, an image out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Plain(), Plain(), Plain()
        self.ratio = ops.as_read(RATIO, dynamic=False)

    def run(self, tokens: Any) -> Any:
        return self.third(self.second(self.first(tokens, gain=2.0)))

    def forward(self, noise: Tensor, image: Tensor) -> Any:
        return self.run(image.flatten(2).mT).mT.reshape(image.shape) + noise


class Interrupted(Stacked):
    """Something comes between two of its blocks."""

    def run(self, tokens: Any) -> Any:
        return self.third(self.second(self.first(tokens, gain=2.0)) * 0.5)


class Kept(Stacked):
    """What a block returns is read elsewhere too."""

    def run(self, tokens: Any) -> Any:
        first = self.first(tokens, gain=2.0)
        return self.third(self.second(first)) + first


class Checkpointed(Stacked):
    """Blocks are called through functions, one of which takes no keywords."""

    def run(self, tokens: Any) -> Any:
        return checkpointed(self.third, positional(self.second, self.first(tokens, 2.0)))


BLOCKS = stack("first", "second", "third", weights="mask", option="merge_block")
BLOCKS = replace(BLOCKS, arguments=((("x", None), ("gain", 1.0), ("mask", None), ("scale", 1.0)),) * 3)


def by_hand(outer: Stacked, tokens: Tensor, *, once: bool, weigh: bool) -> Tensor:
    """Each block by itself: merged before it and unmerged after it."""
    slots = None
    of_run = Stacked.run if type(outer) is Checkpointed else type(outer).run

    class Around:
        def __init__(self, block: nn.Module) -> None:
            self.block = block

        def __call__(self, x: Tensor, **kwargs: Any) -> Tensor:
            nonlocal slots
            slots = slots if once and slots is not None else matched(x, 4, 5, 7)
            mask = ops.log_sizes(x, slots) if weigh else None
            merged = ops.merge(x, slots)
            return x + ops.unmerge(self.block(merged, mask=mask, **kwargs) - merged, slots)

    around: Any = type("", (), {name: Around(getattr(outer, name)) for name in ("first", "second", "third")})
    result: Tensor = of_run(around, tokens)
    return result


def test_the_code_of_merged_blocks_reads_as_the_docstring_says() -> None:
    graph = by_template(Stacked())
    assert insert_merge_of_blocks(graph, BLOCKS, replace(MATCHING, once=True)) == 3
    lines = code(graph)
    start = lines.index("getattr_1 = flatten.mT")
    assert lines[start + 1 : start + 7] == [
        "match = tome_fx_ops_match(getattr_1, getitem, getitem_1, kept = kept, sx = 2, sy = 2, seed = 7, tile = None)",
        "merge = tome_fx_ops_merge(getattr_1, match)",
        "first = self.first(merge, gain = 2.0)",
        "second = self.second(first)",
        "third = self.third(second)",
        "changed_2 = tome_fx_ops_changed(getattr_1, merge, third, match)",
    ]


@tracers
@pytest.mark.parametrize("weigh", [False, True])
@pytest.mark.parametrize(
    "kind, once, runs, ends",
    [
        (Stacked, True, 1, 1),
        (Stacked, False, 3, 3),
        (Interrupted, True, 2, 2),
        (Kept, True, 1, 2),
        (Kept, False, 3, 3),
        (Checkpointed, True, 1, 1),
        (Checkpointed, False, 3, 3),
    ],
)
def test_blocks_of_one_match_that_follow_on_one_another_are_merged_and_unmerged_once(
    kind: type[Stacked], once: bool, runs: int, ends: int, trace: Trace, weigh: bool
) -> None:
    outer = kind()
    noise, image = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    graph = trace(outer)
    StackPass(BLOCKS, replace(MATCHING, once=once), log_sizes if weigh else None)(graph)
    graph.lint()
    found = counts(graph)
    assert (found[ops.match], found[ops.merge], found[ops.changed]) == (1 if once else 3, runs, ends)
    tokens = image.flatten(2).mT
    expected = by_hand(outer, tokens, once=once, weigh=weigh).mT.reshape(image.shape) + noise
    torch.testing.assert_close(fx.GraphModule(outer, graph)(noise, image), expected, rtol=1e-5, atol=1e-5)
    plain = by_hand(outer, tokens, once=once, weigh=not weigh).mT.reshape(image.shape) + noise
    assert not torch.allclose(expected, plain), "weights have changed nothing, so this shows nothing"


@tracers
@pytest.mark.parametrize("kind", [Stacked, Interrupted, Kept, Checkpointed])
def test_blocks_whose_tokens_are_not_merged_give_what_they_gave(kind: type[Stacked], trace: Trace) -> None:
    outer = kind()
    outer.ratio = ops.as_read(0.0, dynamic=False)
    image = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    graph = trace(outer)
    insert_merge_of_blocks(graph, BLOCKS, MATCHING, log_sizes)
    assert torch.equal(fx.GraphModule(outer, graph)(image, image), outer(image, image))


class Scaled(nn.Module):
    """A block that is given a dict."""

    def forward(self, x: Tensor, given: dict[str, Any]) -> Tensor:
        result: Tensor = x * given["scale"]
        return result


class WithMasks(Stacked):
    """One block is given something for each token by name, and another in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.second = Scaled()  # type: ignore[assignment]

    def forward(self, noise: Tensor, image: Tensor, given: Any = None) -> Any:
        return self.second(self.first(image.flatten(2).mT, mask=noise), given)


@pytest.mark.parametrize("name, module", [("mask", "first"), ("given.per_pixel", "second")])
def test_what_has_an_entry_for_each_token_is_refused_by_merged_blocks_and_served_by_others(
    name: str, module: str
) -> None:
    outer = WithMasks()
    structure = Structure.of(outer, WithMasks)
    graph = trace_call(structure, ("3d", "4d", "opaque"), structure.settings(outer))
    arguments = (BLOCKS.arguments[0], (("x", None), ("given", None)))
    blocks = replace(BLOCKS, blocks=("first", "second"), arguments=arguments, per_token=(name,))
    assert insert_merge_of_blocks(graph, blocks, MATCHING) == 2
    rewritten: Any = fx.GraphModule(outer, graph)
    image, some, per_token = torch.randn(2, 3, 4, 5), torch.zeros(2, 1, 10), torch.randn(2, 1, 20)
    given = {"per_pixel": 1, "scale": 2.0}
    with pytest.raises(
        TransformError,
        match=rf"^{name.rpartition('.')[2]} was given to {module}, whose tokens are merged \(merge_block=True\)",
    ):
        rewritten(some, image, given)
    if module == "second":
        assert rewritten(some, image, {"scale": 2.0}).isfinite().all()
    rewritten.ratio = ops.as_read(0.0, dynamic=False)
    assert torch.equal(rewritten(per_token, image, given), outer(per_token, image, given))

"""The contract of graphs of blocks over image and text, on modules that have nothing to do with diffusers.

Image tokens are merged around a module that has text before them in its sequence, or returns several things of them.
A forward may count what a child returns, which may change, and ask whether its tokens are of float16.
"""

from typing import Any, cast

import pytest
import torch
from support.models import relative_error
from torch import Tensor, nn

from tome_fx import ops
from tome_fx.graph.nodes import returning
from tome_fx.graph.rewrite import MatchPass, MergePass
from tome_fx.graph.scopes import Adapted, Matching, Scope, Stack
from tome_fx.graph.specialize import specialize
from tome_fx.plan import TransformError

HEIGHT, WIDTH, KEPT = 6, 8, 24
TEXT = 3


class Joint(nn.Module):
    """Adds the mean of all tokens to each; returns them, the mean, and if that is asked for the tokens doubled."""

    def __init__(self, more: bool = False) -> None:
        super().__init__()
        self.more = more

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        mean = x.mean(1, keepdim=True)
        return (x + mean, mean, 2 * x)[: 3 if self.more else 2]


class Counting(nn.Module):
    """A forward that counts what its child returns, and clips numbers of float16."""

    def __init__(self, more: bool = False) -> None:
        super().__init__()
        self.attn = Joint(more)

    def forward(self, x: Tensor) -> Tensor:
        found = self.attn(x)
        y: Tensor = x * found[1]
        if len(found) == 2:
            own, _ = found
            y = y + own
        else:
            own, _, doubled = found
            y = y + own * doubled
        if y.dtype == torch.float16:
            y = y.clip(-100, 100)
        return y


def returned(child: nn.Module) -> int:
    """How many values the child returns."""
    return 3 if child.more else 2


class After(nn.Module):
    """A block whose child is given text and image in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: Tensor, text: Tensor, gain: Any = None) -> Tensor:
        length = text.shape[1]
        y = self.attn(torch.cat([text, x], dim=1))
        result: Tensor = x + y[:, length:] * y[:, :length].sum(1, keepdim=True) * (1.0 if gain is None else gain)
        return result


class Holder(nn.Module):
    """Two blocks in a row."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(After() for _ in range(2))
        self.ratio = ops.as_read(0.5, dynamic=False)
        self.requires_grad_(False)

    def forward(self, image: Tensor, text: Tensor, skipped: Any = None) -> Tensor:
        x = image.flatten(2).mT
        for number, block in enumerate(self.blocks):
            if skipped is None or number not in skipped:
                x = block(x, text)
        return x


def tokens(batch: int = 2) -> Tensor:
    return torch.randn(batch, HEIGHT * WIDTH, 4, generator=torch.Generator().manual_seed(0))


def slots_for(x: Tensor) -> ops.SlotMap:
    found = ops.match(x, HEIGHT, WIDTH, kept=KEPT, sx=2, sy=2, seed=None)
    assert found is not None
    return found


def counting(more: bool, result: Any = 0) -> Any:
    """A module of a class of its own whose child sees merged tokens."""

    class Own(Counting):
        """A class that no other test has called."""

    module: Any = Own(more)
    scope = Scope("attn", tokens="x", result=result)
    module.__class__ = specialize(module, MergePass((scope,)), example={"x": "3d"}, counts=(("attn", returned),))
    return module


@pytest.mark.parametrize("more", [False, True])
def test_what_a_child_returns_is_counted_and_unmerged_at_each_place(more: bool) -> None:
    module, x = counting(more, result=(0, 2)), tokens()
    slots = slots_for(x)
    assert torch.equal(module(x), Counting(more)(x))
    own, mean, *doubled = Joint(more)(ops.merge(x, slots))
    expected = ops.unmerge(own, slots) * (ops.unmerge(doubled[0], slots) if more else 1) + x * mean
    assert torch.equal(module(x, slots), expected)


def test_a_count_that_changes_is_another_graph() -> None:
    module, x = counting(False), tokens()
    for more in (False, True, False):
        module.attn.more = more
        assert torch.equal(module(x), Counting(more)(x))
    assert len(type(module).graphs) == 2


def test_a_child_that_returns_another_number_than_was_told_is_an_error() -> None:
    assert returning(2, Joint(), tokens())[0].shape == (2, HEIGHT * WIDTH, 4)
    with pytest.raises(TransformError, match=r"Joint returned 3 values where 2 were expected"):
        returning(2, Joint(more=True), tokens())


def test_tokens_of_float16_have_a_graph_of_their_own_where_a_forward_asks_for_them() -> None:
    module, x = counting(False), 1000 * tokens()
    for some in (x, x.bfloat16(), x.half(), x):
        assert torch.equal(module(some), Counting()(some))
    assert module(x.half()).max() == 100
    assert [signature[0] for signature in type(module).graphs] == [("3d",), ("3d float16",)]


def test_other_forwards_have_one_graph_for_tokens_of_all_types() -> None:
    module: Any = After()
    cls: Any = specialize(module, MergePass((Scope("attn", "x"),)), example={"x": "3d", "text": "3d"})
    module.__class__ = cls
    module(tokens(), tokens()[:, :TEXT])
    module.half()(tokens().half(), tokens()[:, :TEXT].half())
    assert len(cls.graphs) == 1


def test_a_block_may_put_text_before_the_image_and_be_handed_a_slot_map_of_both() -> None:
    x, module = tokens(), cast(Any, After())
    text, slots = x.flip(1)[:, :TEXT], slots_for(x)
    plain = module(x, text)
    joined = torch.cat([text, ops.merge(x, slots)], dim=1)
    y = module.attn(joined)
    expected = x + ops.unmerge(y[:, TEXT:], slots) * y[:, :TEXT].sum(1, keepdim=True)
    scope = Scope("attn", "input")
    module.__class__ = specialize(module, MergePass((scope,)), example={"x": "3d", "text": "3d"})
    assert torch.equal(module(x, text), plain)
    assert relative_error(module(x, text, slots=ops.after_text(slots, text)), expected) < 1e-6


def gain_of(value: Any, slots: ops.SlotMap | None, places: Tensor | None) -> Any:
    """Something that a block is given with merged tokens alone."""
    return None if places is None else 2.0


@pytest.mark.parametrize("skipped", [None, [0]])
def test_blocks_are_handed_slot_maps_and_what_they_hand_on_is_made_for_merged_tokens(skipped: Any) -> None:
    text, module = tokens()[:, :TEXT], cast(Any, Holder())
    image = tokens().mT.unflatten(2, (HEIGHT, WIDTH))
    x, slots = tokens(), slots_for(tokens())
    for number, block in enumerate(module.blocks):
        if skipped is None or number not in skipped:
            y = block.attn(torch.cat([text, ops.merge(x, slots)], dim=1))
            x = x + ops.unmerge(y[:, TEXT:], slots) * y[:, :TEXT].sum(1, keepdim=True) * 2.0
    scope = Scope("attn", "input")
    for block in module.blocks:
        block.__class__ = specialize(block, MergePass((scope,)), example={"x": "3d", "text": "3d"})
    stack = Stack(
        blocks=("blocks.0", "blocks.1"),
        tokens="x",
        arguments=2 * ((("x", ...), ("text", ...), ("gain", None)),),
        grid_inputs=("image",),
        grid=ops.grid_of,
        ratio="ratio",
        adapted=(Adapted("gain", gain_of),),
        skips=True,
        texts=("text", "text"),
    )
    rewrite = MatchPass(stack, Matching(once=True))
    module.__class__ = specialize(module, rewrite, example={"image": "4d", "text": "3d"})
    assert relative_error(module(image, text, skipped), x) < 1e-6
    graph = list(type(module).graphs.values())[-1]
    assert [node.target for node in graph.nodes].count(ops.after_text) == 1


def test_a_kind_of_call_may_first_be_met_while_exporting() -> None:
    class Own(After):
        """A class that no other test has called, with a parameter of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((4,), 2.0), requires_grad=False)

        def forward(self, x: Tensor, text: Tensor, gain: Any = None) -> Tensor:
            return super().forward(x, text, gain) * self.weight

    module: Any = Own()
    arguments = tokens(), tokens()[:, :TEXT], torch.tensor([3.0])
    expected = module(*arguments)
    scope = Scope("attn", "input")
    module.__class__ = specialize(module, MergePass((scope,)), example={"x": "3d", "text": "3d"})
    program = torch.export.export(module, arguments)
    assert torch.equal(program.module()(*arguments), expected)

"""The contract of the pass for whole blocks, on modules that have nothing to do with diffusers.

Blocks between which nobody looks at tokens see them merged once and give them back once; where tokens are added to or
looked at between two blocks, they are whole there. Arguments with something for each token are made anew for merged
ones, once for all blocks that are given the same. Tokens on a line are merged as those of a grid are.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import relative_error
from torch import Tensor, fx, nn

from tome_fx import ops
from tome_fx.graph.rewrite import StackPass
from tome_fx.graph.scopes import Adapted, Matching, Stack
from tome_fx.graph.specialize import specialize
from tome_fx.plan import TransformError

HEIGHT, WIDTH, KEPT = 6, 8, 24


class Block(nn.Module):
    """Tokens and text in, both out; a table has a row for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 3)

    def forward(self, text: Tensor, x: Tensor, table: Tensor | None = None, gain: Any = None) -> tuple[Tensor, Tensor]:
        attended = torch.cat([text, x], dim=1).mean(1, keepdim=True)
        y = self.proj(x + attended) * (1.0 if gain is None else gain)
        return text + attended, x + (y if table is None else y * table)


class Holder(nn.Module):
    """A stack of blocks, with residuals where they are given, and blocks left out where that is said."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.ratio = ops.as_read(0.5, dynamic=False)
        self.requires_grad_(False)

    def forward(
        self, image: Tensor, table: Tensor, ids: Any = None, residuals: Any = None, skipped: Any = None
    ) -> tuple[Tensor, Tensor]:
        x = image.flatten(2).mT
        text = x[:, :2]
        for number, block in enumerate(self.blocks):
            if skipped is None or number not in skipped:
                text, x = block(text, x=x, table=table)
            if residuals is not None and number == 1:
                x = x + residuals[0]
        return text, x


def row_of(table: Tensor, slots: ops.SlotMap | None, places: Tensor | None) -> Tensor:
    """The rows of the table that slots stand at."""
    return table if places is None else table[places]


def gain_of(value: Any, slots: ops.SlotMap | None, places: Tensor | None, text: Tensor) -> Any:
    """Something made of another argument: how many merged tokens there are to one of the text."""
    assert value is None
    return None if places is None else places.shape[1] / text.shape[1]


def half(image: Tensor, divisor: int) -> tuple[int, int]:
    height, width = ops.grid_of(image)
    return height // divisor, width * divisor


def along(image: Tensor, tokens: Tensor, sx: int, sy: int) -> Tensor:
    """Tokens of a grid as if they were told by coordinates."""
    height, width = ops.grid_of(image)
    place = torch.arange(height * width)
    return ops.line_of(torch.stack([place * 0, place // width, place % width], dim=1), sx, sy)


def one_row(image: Tensor) -> tuple[int, int]:
    height, width = ops.grid_of(image)
    return 1, height * width


ROWS = Adapted("table", row_of)
GAIN = Adapted("gain", gain_of, ("text",))
PARAMETERS = (("text", ...), ("x", ...), ("table", None), ("gain", None))


def stack(**changed: Any) -> Stack:
    options: dict[str, Any] = {
        "blocks": tuple(f"blocks.{i}" for i in range(4)),
        "tokens": "x",
        "arguments": 4 * (PARAMETERS,),
        "grid_inputs": ("image",),
        "grid": ops.grid_of,
        "ratio": "ratio",
        "result": 1,
        "adapted": (ROWS,),
        "skips": True,
    }
    return Stack(**{**options, **changed})


def rewritten(module: Any, *, tile: int | None = None, **changed: Any) -> Any:
    """The module, of the class that the pass makes for it."""
    matching = Matching(tile=tile, once=True)
    module.__class__ = specialize(module, StackPass(stack(**changed), matching), example={"image": "4d", "table": "2d"})
    return module


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randn(2, 3, HEIGHT, WIDTH, generator=generator),
        "table": torch.randn(HEIGHT * WIDTH, 3, generator=generator),
    }


def by_hand(module: Holder, image: Tensor, table: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Each block by itself, and image by image: tokens merged before it, and given back its change after it."""
    x = image.flatten(2).mT
    text, slots = x[:, :2], ops.match(x, HEIGHT, WIDTH, kept=KEPT, sx=2, sy=2, seed=None)
    places = ops.places(slots, HEIGHT, WIDTH, sx=2, sy=2, seed=None)
    assert places is not None
    for number, block in enumerate(module.blocks):
        gain = KEPT / 2 if number in options.get("gains", ()) else None
        if number not in options.get("skipped", ()):
            merged = ops.merge(x, slots)
            found = [block(text[[b]], merged[[b]], table[places[b]], gain) for b in range(2)]
            text, result = (torch.cat(parts) for parts in zip(*found, strict=True))
            x = ops.changed(x, merged, result, slots)
        if number == 1 and "residuals" in options:
            x = x + options["residuals"][0]
    return text, x


def calls(graph: fx.Graph) -> Counter[str]:
    return Counter(node.target.__name__ for node in graph.nodes if node.op == "call_function")


def residual() -> list[Tensor]:
    return [torch.randn(2, HEIGHT * WIDTH, 3, generator=torch.Generator().manual_seed(1))]


@pytest.mark.parametrize(
    "options, runs",
    [({}, 1), ({"residuals": residual()}, 2), ({"skipped": [0, 2]}, 1), ({"skipped": [1], "residuals": residual()}, 2)],
    ids=["alone", "residuals", "skipped", "both"],
)
def test_blocks_see_merged_tokens_and_what_is_between_them_sees_all(options: dict[str, Any], runs: int) -> None:
    module = Holder()
    expected = by_hand(module, **tensors(), **options)
    result = rewritten(module)(**tensors(), **options)
    for found, own in zip(result, expected, strict=True):
        assert relative_error(found, own) < 1e-6
    graph = list(type(module).graphs.values())[-1]  # type: ignore[attr-defined]
    found = calls(graph)
    assert found["match"] == found["places"] == found["row_of"] == 1
    assert found["merge"] == found["changed"] == runs


def loud(block: Any, value: Any, made: Any) -> Any:
    return made if block.loud else value


@pytest.mark.parametrize("chosen, gains", [(None, (0, 1, 2, 3)), (loud, (1, 2))], ids=["all", "some"])
def test_an_argument_may_be_made_of_others_once_and_be_there_for_merged_tokens_alone(
    chosen: Any, gains: tuple[int, ...]
) -> None:
    module = Holder()
    for number, block in enumerate(module.blocks):
        vars(block)["loud"] = number in gains
    expected = by_hand(module, **tensors(), gains=gains)
    plain = module(**tensors())
    result = rewritten(module, adapted=(ROWS, replace(GAIN, chosen=chosen)))(**tensors())
    for found, own in zip(result, expected, strict=True):
        assert relative_error(found, own) < 1e-6
    assert calls(list(type(module).graphs.values())[-1])["gain_of"] == 1  # type: ignore[attr-defined]
    module.ratio = ops.as_read(0.0, dynamic=False)
    assert all(map(torch.equal, module(**tensors()), plain))


def test_a_grid_is_made_of_further_arguments_too() -> None:
    module = rewritten(Holder(), grid=half, grid_arguments=(2,))
    (match,) = type(module).graph.find_nodes(op="call_function", target=ops.match)
    grid = match.args[1].args[0]
    assert (grid.target, grid.args[1]) == (half, 2)
    assert module(**tensors())[1].shape == (2, HEIGHT * WIDTH, 3)


@pytest.mark.parametrize("tile", [None, 4])
def test_tokens_on_a_line_are_merged_as_on_their_grid(tile: int | None) -> None:
    line, grid = Holder(), Holder()
    size = 16 if tile else 6
    image = torch.randn(2, 3, size, 8, generator=torch.Generator().manual_seed(0))
    given = {"image": image, "table": torch.randn(size * 8, 3, generator=torch.Generator().manual_seed(1))}
    found = rewritten(line, tile=tile, grid=one_row, line=along)(**given)
    expected = rewritten(grid, tile=tile)(**given)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-6
    assert calls(type(line).graph)["match_along"] == 1  # type: ignore[attr-defined]


class Video(Holder):
    """The same for a video, whose frames come before its rows and columns in the row of tokens."""


def of_frames(image: Tensor) -> tuple[int, int, int]:
    height, width = ops.grid_of(image)
    return height // 3, 3, width


def test_frames_are_merged_each_by_itself() -> None:
    module: Any = Video()
    given = tensors()
    result = rewritten(module, grid=of_frames, frames=True)(**given)
    (match,) = type(module).graph.find_nodes(op="call_function", target=ops.match_frames)
    (places,) = type(module).graph.find_nodes(op="call_function", target=ops.places)
    assert places.kwargs["frames"] is match.args[1]
    plain = Holder()
    x = given["image"].flatten(2).mT
    slots = ops.match_frames(x, HEIGHT // 3, 3, WIDTH, kept=3 * WIDTH - 3 * WIDTH // 2, sx=2, sy=2, seed=None)
    rows = ops.places(slots, 3, WIDTH, sx=2, sy=2, seed=None, frames=HEIGHT // 3)
    tokens, text = ops.merge(x, slots), x[:, :2]
    for block in plain.blocks:
        text, tokens = block(text, x=tokens, table=given["table"][rows])
    expected = text, ops.changed(x, ops.merge(x, slots), tokens, slots)
    for one, other in zip(result, expected, strict=True):
        assert relative_error(one, other) < 1e-6


class Joined(nn.Module):
    """Blocks over text and image in one sequence, which comes back alone."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.ratio = ops.as_read(0.5, dynamic=False)
        self.requires_grad_(False)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        x = torch.cat([text, image.flatten(2).mT], dim=1)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("once", [True, False])
def test_text_in_the_sequence_of_the_tokens_is_left_alone(once: bool) -> None:
    module: Any = Joined()
    image, text = tensors()["image"], torch.ones(2, 5, 3)
    plain, expected = module(image, text), torch.cat([text, image.flatten(2).mT], dim=1)
    for block in module.blocks:
        x = expected[:, 5:]
        if block is module.blocks[0] or not once:
            slots = ops.match(x, HEIGHT, WIDTH, kept=KEPT, sx=2, sy=2, seed=None)
        own = ops.changed(x, ops.merge(x, slots), block(ops.merge(x, slots)), slots)
        expected = torch.cat([block(expected[:, :5]), own], dim=1)
    blocks = ("blocks.0", "blocks.1")
    rewrite = StackPass(
        stack(blocks=blocks, arguments=2 * ((("input", ...),),), adapted=(), result=1, texts=("x", "x")),
        Matching(once=once),
    )
    module.__class__ = specialize(module, rewrite, example={"image": "4d", "text": "3d"})
    assert relative_error(module(image, text), expected) < 1e-6
    assert calls(type(module).graph)["merge"] == (1 if once else 2)
    module.ratio = ops.as_read(0.0, dynamic=False)
    assert torch.equal(module(image, text), plain)


def test_a_pass_asks_for_a_call_of_a_block_and_for_no_second_one() -> None:
    with pytest.raises(TransformError, match=r"expected one call each of blocks.7, found calls of blocks.0"):
        rewritten(Holder(), blocks=("blocks.7",), arguments=(PARAMETERS,))
    with pytest.raises(
        TransformError, match=r"expected one call each of blocks.0, blocks.1, blocks.2, blocks.3, found"
    ):
        rewritten(Holder(), skips=False)(**tensors(), skipped=[2])

"""Features of what holds, moves or speeds up a model, and what is asked of a transformed one that has them on."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from torch import Tensor

from support.models import inputs, output, two_stages
from support.wrapped import wrapped
from tome_fx import transform

CPU = torch.device("cpu")
TILE = 16  # of which the models' finest grids hold several
FIRST, MIDDLE = (f"{stage}.attentions.0.transformer_blocks" for stage in ("down_blocks.0", "mid_block"))
DEVICES, ACCELERATORS = "Memory and devices", "Other accelerators"
WORKS, CONDITION, REFUSED = "works", "works with a condition", "refused"
AFTER = "enabled after transform"
Enable = Callable[[Any], Any]


def merged(model: Any, ratio: float = 0.5) -> Any:
    """A transformed model whose destinations are those of `wrapped`."""
    return transform(model, ratio, use_rand=False, tile=TILE)


def own() -> Any:
    """A model to change: what `transform` makes of it shares its weights."""
    return copy.deepcopy(two_stages())


def expected_of(model: Any, ratio: float = 0.5) -> Any:
    """The model with wrapped children, or the model itself where nothing is to merge."""
    return wrapped(model, ratio, tile=TILE) if ratio else model


def steps(model: Any, count: int = 4) -> list[Tensor]:
    """What the model makes of the inputs of a few steps, one after the other."""
    return [output(model, inputs(two_stages(), seed=step)) for step in range(count)]


def equal(ours: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether the outputs of all steps are the same, bit for bit."""
    return all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))


def supports(feature: str, verdict: str, condition: str = "", group: str = DEVICES) -> pytest.MarkDecorator:
    """Marks a test, or a case of one, as showing a row of the support table."""
    return pytest.mark.supports(group, feature, verdict, condition)


def assert_compiles_as_the_stock_model(enable: Enable, counter: Any) -> None:
    """Assert that with the feature both models have as many graphs, which give what eager gives."""
    graphs = []
    for model in (own(), merged(own())):
        enable(model)
        torch._dynamo.reset()  # no graph of one counts for the other
        counter.clear()
        compiled = steps(torch.compile(model, fullgraph=True, backend=counter), 2)
        graphs.append(counter.frame_count)
        assert equal(compiled, steps(model, 2))
    assert graphs[0] == graphs[1] >= 1


def skip(unet: Any, where: str, **options: Any) -> None:
    """Have diffusers skip the blocks that `where` names, or parts of them."""
    apply_layer_skip(unet, LayerSkipConfig(indices=[0], fqn=where, **options))

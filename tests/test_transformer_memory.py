"""Merging takes less memory than it saves: the tensors that live at once, in models of real size, on no device."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import bounds, models
from tome_fx import transform


class Peak(TorchDispatchMode):
    """The most bytes that tensors made meanwhile have had at a time."""

    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = [tensor.untyped_storage() for tensor in held]  # of which views are not made anew
        self.alive = {id(storage): 0 for storage in self.held}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for storage in (part.untyped_storage() for part in tree_leaves(result) if isinstance(part, Tensor)):
            if id(storage) not in self.alive:
                self.alive[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, id(storage))
        self.bytes = max(self.bytes, sum(self.alive.values()))
        return result


def peak(model: nn.Module, arguments: dict[str, Any]) -> int:
    """Bytes of a call, besides the model's and those that it is given."""
    given = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    mode = Peak([*model.parameters(), *model.buffers(), *given])
    with torch.no_grad(), mode:
        model(**arguments)
    return mode.bytes


def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """A flash kernel's memory: without a device torch would write all scores, beside which a match is nothing."""
    return query.new_empty(*query.shape[:-1], value.shape[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name, width, height", bounds.IMAGES)
def test_a_call_needs_no_more_memory_than_one_of_the_stock_model(
    name: str, width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    model = models.build(bounds.MODELS[name], "meta")
    arguments = models.example(model, height // models.LATENT, width // models.LATENT, 2)
    stock = peak(model, arguments)
    for options, most in (({}, 1.0), ({"merge_block": True}, 0.9)):
        assert peak(transform(model, 0.5, **options), arguments) <= most * stock, options

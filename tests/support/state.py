"""What a model is made of, so that a test can tell that it was left alone."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from support.models import (
    inputs,
    output,
)


def state(model: nn.Module) -> list[Any]:
    """All that a model is made of, by identity: classes, attributes, tensors, and how often each was written to."""

    def look(value: Any) -> Any:
        return {name: id(item) for name, item in value.items()} if isinstance(value, dict) else id(value)

    modules = [
        (path, type(module), {name: look(value) for name, value in vars(module).items()})
        for path, module in model.named_modules()
    ]
    return [*modules, *(tensor._version for tensor in model.state_dict().values())]


@contextlib.contextmanager
def untouched(model: nn.Module, **options: Any) -> Iterator[None]:
    """Assert that the model comes out of the block as it went in: structure, weights and output."""
    arguments = inputs(model, 16, 16)
    before = state(model), output(model, arguments), {name: t.clone() for name, t in model.state_dict().items()}
    yield
    assert state(model) == before[0]
    assert all(torch.equal(tensor, before[2][name]) for name, tensor in model.state_dict().items())
    assert torch.equal(output(model, arguments), before[1])

"""Fixtures of several test modules, which leave what they set as it was."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.models import threads
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

pytest_plugins = ["support.table"]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """PyTorch computes with one thread: test runs share the cores, and threads that wait for one spin."""
    with threads(1):
        yield


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled or counted before or after the test."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def counter() -> Any:
    """A backend that counts its calls, one for each graph, and generates no code."""
    return CompileCounterWithBackend("eager")

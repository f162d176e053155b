"""Which cases `make test` runs and which it leaves to `make test-all`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow(*cases: Any) -> list[Any]:
    """The cases, marked slow; each a value, a tuple of one for every argument, or a `pytest.param`."""
    params = [case if hasattr(case, "marks") else _param(case) for case in cases]
    return [pytest.param(*case.values, id=case.id, marks=[*case.marks, pytest.mark.slow]) for case in params]


def slow_but(fast: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases in their order, marked slow but for those named fast: values, or the ids of params."""
    return [case if getattr(case, "id", case) in fast else slow(case)[0] for case in cases]


def _param(case: Any) -> Any:
    return pytest.param(*case) if isinstance(case, tuple) else pytest.param(case)

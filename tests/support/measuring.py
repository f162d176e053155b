"""Measuring that is stopped in the middle."""

from typing import Any

import pytest

from bench import measure


def interrupt_the_second(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have the second call of `measure.compare` interrupted; the titles of all calls, as they come."""
    measured: list[str] = []
    compare = measure.compare

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        measured.append(kwargs["title"])
        if len(measured) == 2:
            raise KeyboardInterrupt
        return compare(*args, **kwargs)

    monkeypatch.setattr(measure, "compare", interrupted)
    return measured

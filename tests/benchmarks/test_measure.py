"""The bench can tell: slow is shown slower, a graph break is counted, a broken variant is reported and not averaged."""

import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import measure, tables, warm
from bench.apart import side_by_side


def spin(milliseconds: float) -> Callable[[], Tensor]:
    """A call that takes so long, whatever the machine does beside it."""

    def call() -> Tensor:
        end = time.perf_counter() + milliseconds / 1e3
        while time.perf_counter() < end:
            pass
        return torch.ones(3)

    return call


def compare(calls: dict[str, Callable[[], Tensor]], exact: bool = True, rounds: int = 5) -> dict[str, warm.Row]:
    runs = {name: (lambda call=call: call) for name, call in calls.items()}
    return measure.compare(runs, exact=dict.fromkeys(calls, exact), rounds=rounds, device="cpu", title="test")


def test_a_variant_slowed_on_purpose_is_shown_slower() -> None:
    rows = measure.as_json(compare({"fast": spin(1), "slow": spin(20)}))
    ratio = tables.speedup(rows, "slow", "fast")
    assert ratio is not None
    assert ratio > 2


def fail() -> None:
    raise torch.OutOfMemoryError("spoilt")


def die() -> None:
    os._exit(3)


def prepared(milliseconds: float, first: Callable[[], None] | None = None) -> Callable[[], Tensor]:
    """What a process of its own can be given, and does first."""
    if first:
        first()
    return spin(milliseconds)


def late(then: Callable[[], None]) -> Callable[[], Tensor]:
    """The like, whose third call does it: the first that is timed."""
    calls = iter(range(9))

    def call() -> Tensor:
        if next(calls) == 2:
            then()
        return torch.ones(3)

    return call


@pytest.mark.slow  # seconds for each process to begin
def test_variants_in_processes_of_their_own_are_compared_like_others_and_one_that_dies_takes_none_with_it(
    tmp_path: Path,
) -> None:
    makes = {"fast": partial(prepared, 1), "slow": partial(prepared, 20)}
    makes |= {"failing": partial(prepared, 1, fail), "dying": partial(prepared, 1, die)}
    makes |= {"failing late": partial(late, fail), "dying late": partial(late, die)}
    with side_by_side(makes, "cpu", tmp_path) as runs:
        rows = measure.compare(runs, exact=dict.fromkeys(runs, True), rounds=3, device="cpu", title="test")
        processes = [run.process for run in runs.values()]
    assert [len(row.samples_ms) for row in rows.values()] == [3, 3, 0, 0, 0, 0]
    assert [row.relative_error for row in rows.values()] == [0, 0, None, None, 0, 0]
    spoilt, ended = "OOM", "its process ended with 3"
    assert [row.error for row in rows.values()] == [None, None, spoilt, ended, spoilt, ended]
    assert not any(process.is_alive() for process in processes)


def test_variants_take_turns_in_every_round() -> None:
    order: list[str] = []

    def noting(name: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            order.append(name)
            return torch.ones(1)

        return call

    compare({name: noting(name) for name in "abc"}, rounds=3)
    timed = order[-9:]
    assert timed == ["a", "b", "c"] * 3


def test_a_graph_break_planted_on_purpose_is_counted() -> None:
    def whole(x: Tensor) -> Tensor:
        return x.sin().cos()

    def broken(x: Tensor) -> Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        return y.cos()

    x = torch.randn(8)
    compiled = {f.__name__: torch.compile(f, backend="eager") for f in (whole, broken)}
    rows = compare({name: partial(function, x) for name, function in compiled.items()})
    assert rows["whole"].compiles == warm.Compiles(graphs=1, graph_breaks=0, recompiles=0)
    assert rows["broken"].compiles == warm.Compiles(graphs=2, graph_breaks=1, recompiles=0)


def test_a_recompile_is_counted() -> None:
    compiled = torch.compile(lambda x: x.sin(), backend="eager", dynamic=False)
    with warm.count_compiles() as compiles:
        for size in (3, 4, 3, 5):
            compiled(torch.ones(size))
    assert compiles == warm.Compiles(graphs=3, graph_breaks=0, recompiles=2)


def test_a_variant_that_raises_is_reported_and_the_others_go_on() -> None:
    def fails() -> Tensor:
        raise RuntimeError("no such kernel\nsecond line")

    rows = compare({"good": spin(1), "bad": fails, "also good": spin(1)})
    assert rows["bad"].error == "RuntimeError: no such kernel"
    assert rows["bad"].samples_ms == []
    assert len(rows["good"].samples_ms) == len(rows["also good"].samples_ms) == 5


def test_a_variant_that_raises_while_it_is_timed_keeps_no_samples() -> None:
    calls = iter(range(100))

    def fails_later() -> Tensor:
        if next(calls) >= 4:
            raise ValueError("tired")
        return torch.ones(3)

    rows = compare({"good": spin(1), "late": fails_later})
    assert rows["late"].error == "ValueError: tired"
    assert rows["late"].samples_ms == []
    assert len(rows["good"].samples_ms) == 5


@pytest.mark.parametrize(("output", "message"), [(math.nan, "not finite"), (7.0, "wrong output")])
def test_a_wrong_output_is_no_result(output: float, message: str) -> None:
    rows = compare({"reference": spin(1), "wrong": lambda: torch.full((3,), output)})
    assert message in str(rows["wrong"].error)
    assert rows["wrong"].samples_ms == []


def test_a_broken_first_variant_is_no_reference_for_the_others() -> None:
    rows = compare({"broken": lambda: torch.full((3,), math.nan), "good": spin(1), "also good": spin(1)})
    assert rows["broken"].error
    assert [rows[name].error for name in ("good", "also good")] == [None, None]


def test_a_merging_variant_may_differ() -> None:
    runs = {"reference": lambda: spin(1), "merging": lambda: lambda: torch.full((3,), 2.0)}
    exact = {"reference": True, "merging": False}
    rows = measure.compare(runs, exact=exact, rounds=2, device="cpu", title="test")
    assert rows["merging"].error is None
    assert rows["merging"].relative_error == pytest.approx(1)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("can't allocate memory")])
def test_out_of_memory_says_so(error: Exception) -> None:
    assert warm.reason(error) == "OOM"

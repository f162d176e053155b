"""A variant until it is warm: compiled with empty caches, counted, and ready to be timed.

NOTE [Compiled once]
A cell whose rows take minutes to compile may be stopped before it is measured. What was compiled for it until then is
kept in a folder, a row in a folder of its own, with the seconds that it took when nothing was kept. So whoever measures
the cell again comes further, and the seconds told are those of a cold compile. A row that was stopped while it compiled
starts anew.
"""

import os
import re
import shutil
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics
from torch._inductor.utils import clear_caches, fresh_cache

OUT_OF_MEMORY = "OOM"
Call = Callable[[], torch.Tensor]
COLD = "cold"  # of what is kept of a row, the file of the seconds of its first call when nothing was kept yet


@dataclass
class Compiles:
    """What dynamo did while something ran."""

    graphs: int = 0
    graph_breaks: int = 0
    recompiles: int = 0


@dataclass
class Row:
    """One variant in one cell.

    Args:
        samples_ms: Milliseconds of each timed call, one per round, in order.
        first_s: Seconds of the first call: cold compilation, if any, and one run.
        compiles: Counted over the warm-up.
        relative_error: Distance of the output from the first exact variant's, in the 2-norm, or None.
        peak_memory: Bytes on the GPU besides the model, or None.
        error: Why there are no samples, or None.
    """

    samples_ms: list[float] = field(default_factory=list)
    first_s: float | None = None
    compiles: Compiles | None = None
    relative_error: float | None = None
    peak_memory: int | None = None
    error: str | None = None


@contextmanager
def count_compiles() -> Iterator[Compiles]:
    """Dynamo's own counts of what is compiled within."""
    result = Compiles()
    clear_compilation_metrics()
    graphs, breaks = _graphs(), sum(counters["graph_break"].values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo warns of what it breaks a graph at, which is counted here instead
        yield result
    result.graphs = _graphs() - graphs
    result.graph_breaks = sum(counters["graph_break"].values()) - breaks
    # A compile id is "code object / compile of it". Variants share code objects: only what is compiled twice in here
    # is compiled again.
    compiles = [metrics for metrics in get_compilation_metrics() if not getattr(metrics, "is_runtime", False)]
    frames = [str(metrics.compile_id).split("/")[0] for metrics in compiles]
    result.recompiles = len(frames) - len(set(frames))


def _graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


class Timer:
    """Milliseconds of a call: by events on a GPU, whose second-level cache is flushed before, else by the clock."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device) if self.cuda else None

    def __call__(self, run: Callable[[], Any]) -> float:
        """Run once."""
        if self.flush is None:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        self.flush.zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize()
        events[0].record()
        run()
        events[1].record()
        torch.cuda.synchronize()
        return float(events[0].elapsed_time(events[1]))


class Started(ABC):
    """A variant that gets warm, and is timed then."""

    @abstractmethod
    def close(self) -> None:
        """Give back what it has; it is not timed any more."""

    @abstractmethod
    def warmed(self) -> tuple[Row, torch.Tensor | None]:
        """Its row after the warm-up, and its output where there is no error in it."""

    @abstractmethod
    def sample(self) -> float:
        """Milliseconds of a call."""


Makes = Mapping[str, Callable[[], Call]]  # by name, what prepares a variant and returns the call to time


class Here(Started):
    """One in this process; `kept` is its folder, see NOTE [Compiled once]."""

    def __init__(self, make: Callable[[], Call], timer: Timer, kept: Path | None) -> None:
        self.make, self.timer, self.kept = make, timer, kept
        self.call: Call | None = None

    def close(self) -> None:
        """Let go of model and code."""
        self.call = None

    def warmed(self) -> tuple[Row, torch.Tensor | None]:
        """Warm it up."""
        row = Row()
        try:
            self.call, output = _warm_up(self.make, row, self.timer, self.kept)
        except Exception as error:  # whatever a variant does wrong belongs in its cell
            row.error = reason(error)
            return row, None
        return row, output

    def sample(self) -> float:
        """Call it."""
        assert self.call is not None, "it is closed"
        return self.timer(self.call)


def _warm_up(make: Callable[[], Call], row: Row, timer: Timer, kept: Path | None) -> tuple[Call, torch.Tensor]:
    """The call and its output, with every cache empty before the first of two calls, but for what was kept."""
    with fresh_cache() if kept is None else _kept_cache(kept), count_compiles() as row.compiles:
        call, before = make(), 0
        if timer.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()  # by weights, the timer, and rows that wait for their rounds
        row.first_s = timer(call) / 1e3
        output = call()
        if timer.cuda:
            row.peak_memory = torch.cuda.max_memory_allocated() - before
    if kept is not None:
        cold = kept / COLD
        if not cold.exists():
            cold.write_text(repr(row.first_s))
        row.first_s = float(cold.read_text())
    return call, output


def folder_of(name: str) -> str:
    """A row's folder: Inductor calls compilers by a line that spaces cut."""
    return re.sub(r"\W+", "-", name)


@contextmanager
def _kept_cache(folder: Path) -> Iterator[None]:
    """As `fresh_cache`, with the folder's content in the caches if all of a row was compiled into it."""
    if not (folder / COLD).exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    clear_caches()
    where = {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
    try:
        with patch.dict(os.environ, where):
            yield
    finally:
        clear_caches()


class Told(Exception):
    """What `reason` said in another process."""


def reason(error: Exception) -> str:
    """Why a variant failed, on one line."""
    if isinstance(error, Told):
        return str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error):
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"[:300]

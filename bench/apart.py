"""Variants in processes of their own: they compile side by side, and are timed in turn."""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from bench.measure import Call, Here, Makes, Row, Started, Timer, reason

Key = TypeVar("Key")


class Apart(Started):
    """One in a process of its own, which warms up at once beside others, and waits for its turns to be timed.

    Args:
        make: As `compare` has it, but that it can be pickled.
        device: "cpu" or "cuda".
        threads: Of Inductor's compilers.
    """

    def __init__(self, make: Any, device: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, device, threads), daemon=True)
        self.process.start()
        theirs.close()  # ours ends with theirs, then
        self.told: tuple[Row, torch.Tensor | None] | None = None

    def warmed(self) -> tuple[Row, torch.Tensor | None]:
        """Wait until it is, the first time."""
        if self.told is None:
            try:
                row, output = self.connection.recv()
                self.told = row, None if output is None else torch.from_numpy(output)
            except EOFError:
                self.told = Row(error=f"its process ended with {self._ended()}"), None
        return self.told

    def sample(self) -> float:
        """Have it called.

        Raises:
            RuntimeError: What the call raised.
        """
        self.connection.send(None)
        try:
            result = self.connection.recv()
        except EOFError:
            result = f"its process ended with {self._ended()}"
        if isinstance(result, str):
            raise RuntimeError(result)
        return float(result)

    def close(self) -> None:
        """End the process, and with it what it has on the device."""
        self.connection.close()
        self.process.kill()  # there is nothing that it could lose, and Inductor takes seconds to leave by itself
        self.process.join()

    def _ended(self) -> int | None:
        self.process.join()
        return self.process.exitcode


@contextmanager
def side_by_side(device: str, *several: Mapping[Key, Makes]) -> Iterator[tuple[dict[Key, Makes], ...]]:
    """The same with a process for each variant, which begins at once and ends with the context at the latest."""
    count = sum(len(makes) for one in several for makes in one.values())
    # two at least, that code is written while kernels are compiled
    start = partial(Apart, threads=max(2, (os.cpu_count() or 1) // max(1, count)))
    with ExitStack() as stack:
        yield tuple(
            {
                key: {name: stack.enter_context(closing(start(make, device))) for name, make in makes.items()}
                for key, makes in one.items()
            }
            for one in several
        )


def wait(*several: Makes) -> None:
    """Until all that have a process are warm, that nobody compiles beside what is timed."""
    for one in (one for makes in several for one in makes.values()):
        if isinstance(one, Apart):
            one.warmed()


def end(*several: Makes) -> None:
    """End the processes, where there are any."""
    for one in (one for makes in several for one in makes.values()):
        if isinstance(one, Apart):
            one.close()


def _serve(connection: Connection, make: Callable[[], Call], device: str, threads: int) -> None:
    """What a variant's own process does until nobody is at the other end."""
    torch._inductor.config.compile_threads = threads
    one = Here(make, Timer(device), None)
    with torch.no_grad(), contextlib.suppress(EOFError):
        row, output = one.warmed()
        told = output.float().cpu().numpy() if isinstance(output, torch.Tensor) else None
        connection.send((row, told))  # a tensor itself would be shared through a file
        while True:
            connection.recv()
            try:
                result: float | str = one.sample()
            except Exception as error:
                result = reason(error)
            connection.send(result)

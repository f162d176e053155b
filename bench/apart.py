"""Variants in processes of their own: they compile side by side, and are timed in turn."""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.warm import Call, Here, Makes, Row, Started, Timer, Told, folder_of, reason


class Apart(Started):
    """A variant in a process of its own, for dynamo compiles one model at a time in a process.

    It warms up at once and waits to be timed.

    Args:
        make: As `compare` has it, but that it can be pickled.
        device: "cpu" or "cuda".
        threads: Of Inductor's compilers.
        kept: As `Here` has it.
    """

    def __init__(self, make: Callable[[], Call], device: str, threads: int, kept: Path | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, device, threads, kept), daemon=True)
        self.process.start()
        theirs.close()  # or the end of the process would not be seen

    def warmed(self) -> tuple[Row, torch.Tensor | None]:
        """Wait until it is."""
        try:
            row, output = self._told()
        except Told as error:
            return Row(error=reason(error)), None
        return row, None if output is None else torch.from_numpy(output)

    def sample(self) -> float:
        """Have it called.

        Raises:
            Told: What the call raised.
        """
        with contextlib.suppress(OSError):  # of a process that has ended, which is told next
            self.connection.send(None)
        result = self._told()
        if isinstance(result, str):
            raise Told(result)
        return float(result)

    def close(self) -> None:
        """End the process, and with it what it has on the device."""
        self.connection.close()
        self.process.kill()  # there is nothing that it could lose, and Inductor takes seconds to leave by itself
        self.process.join()

    def _told(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise Told(f"its process ended with {self.process.exitcode}") from None


@contextmanager
def side_by_side(makes: Makes, device: str, kept: Path) -> Iterator[dict[str, Apart]]:
    """A process for each variant of a cell, which begins at once and ends with the context at the latest."""
    # two threads at least, so that code is written while kernels are compiled
    threads = max(2, (os.cpu_count() or 1) // max(1, len(makes)))
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(closing(Apart(make, device, threads, kept / folder_of(name))))
            for name, make in makes.items()
        }


def _serve(connection: Connection, make: Callable[[], Call], device: str, threads: int, kept: Path | None) -> None:
    """What a variant's own process does until nobody is at the other end."""
    torch._inductor.config.compile_threads = threads
    one = Here(make, Timer(device), kept)
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

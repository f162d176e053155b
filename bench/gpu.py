"""`python -m bench gpu`: all that waits for a GPU, one step after another; what is done already is not done again.

NOTE [In steps]
A step is a process of its own: the tests, a cell of a suite, the weights, the times of quality. So one that dies takes
no other with it, and one that runs out of time can be ended. What is left to do is read from the JSON, and there is no
other memory of what ran: the same command goes on from wherever it was stopped.
"""

import argparse
import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from bench import documents, latency, weights
from bench.cells import suite

ROOT = Path(__file__).parent.parent
RECORDED = ROOT / "bench" / "results" / "quality.json"  # whose rows are timed


@dataclass(frozen=True)
class Plan:
    """What is measured, and on what.

    Args:
        dtype: Of weights and of what quality's rows are timed on; suites have their own.
        suites: Of `bench.cells`.
        tokens: That the weights are measured on.
        side: Latents along a side, that quality's rows are timed on.
    """

    device: str
    dtype: str
    suites: tuple[str, ...]
    tokens: tuple[int, ...]
    side: int


PLAN = Plan("cuda", "fp16", ("gpu",), weights.TOKENS, 128)
REHEARSAL = Plan("cpu", "fp32", ("smoke",), (64,), 16)


@dataclass(frozen=True)
class Step:
    """One process.

    Args:
        command: What Python is given.
        left: Whether there is something left for it to do.
        then: Called when it has ended by itself.
    """

    name: str
    command: tuple[str, ...]
    left: Callable[[], bool]
    then: Callable[[], None] = lambda: None


def steps(folder: Path, plan: Plan) -> list[Step]:
    """All steps, in their order: what takes hours comes last.

    Args:
        folder: For the JSON of each kind.
        plan: What is measured.
    """
    result = [_tests(folder, plan), _weights(folder, plan), _times(folder, plan)]
    for name in plan.suites:
        path, tasks = folder / f"{name}.json", suite(name, plan.device)
        for i, task in enumerate(tasks, 1):
            given = {"suite": name, "device": plan.device, "part": f"{i}/{len(tasks)}", "json": path}
            left = partial(latency.left, task, path, breakdown=True)
            command = (*_bench("latency", **given), "--breakdown", "--apart")
            result.append(Step(f"{name}: {task.cell}", command, left))
    return result


def _tests(folder: Path, plan: Plan) -> Step:
    path, outcome = folder / "tests.json", folder / "tests.xml"

    def record() -> None:
        if outcome.exists():
            documents.write(path, documents.new("tests", **documents.origin(plan.device), **outcomes(outcome)))
            outcome.unlink()

    command = ("-m", "pytest", "-m", "gpu", "-q", "--junitxml", str(outcome.absolute()))
    return Step("tests", command, lambda: not path.exists() or bool(documents.read(path)["failed"]), record)


def outcomes(path: Path) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, with the names of those that failed, from pytest's XML."""
    counted: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": []}
    for case in ElementTree.parse(path).iter("testcase"):
        found = {child.tag for child in case}
        if found & {"failure", "error"}:
            counted["failed"].append(f"{case.get('classname')}::{case.get('name')}")
        else:
            counted["skipped" if "skipped" in found else "passed"] += 1
    return counted


def _weights(folder: Path, plan: Plan) -> Step:
    path = folder / "weights.json"
    cells = weights.cells(plan.tokens, dtype=plan.dtype, device=plan.device)
    given = {"device": plan.device, "dtype": plan.dtype, "json": path}
    command = (*_bench("weights", **given), "--tokens", *map(str, plan.tokens))
    return Step("weights", command, lambda: bool(weights.left(cells, path)))


def _times(folder: Path, plan: Plan) -> Step:
    """Of the rows of quality that are recorded, whose images need not be made again."""
    path, setting = folder / RECORDED.name, {"latents": plan.side, "device": plan.device, "dtype": plan.dtype}

    def left() -> bool:
        if not path.exists():
            documents.write(path, documents.read(RECORDED))
        timed = documents.read(path).get("timed", {})
        return any(timed.get(name) != value for name, value in setting.items())

    given = {"time": plan.side, "device": plan.device, "dtype": plan.dtype, "json": path}
    return Step("times of quality", _bench("quality", **given), left)


def _bench(command: str, **given: Any) -> tuple[str, ...]:
    return ("-m", "bench", command, *(text for name, value in given.items() for text in (f"--{name}", str(value))))


def run(todo: Sequence[Step], seconds: float | None = None) -> list[str]:
    """Run the steps that have something left to do.

    Args:
        todo: From `steps`.
        seconds: When to end what is running then and begin nothing more; None never does.

    Returns:
        What could not be finished, in words.
    """
    end = math.inf if seconds is None else time.monotonic() + seconds
    unfinished = []
    for step in todo:
        if not step.left():
            continue
        if time.monotonic() >= end:
            unfinished.append(f"{step.name}: not begun")
            continue
        print(f"\n=== {step.name}: python {' '.join(step.command)}", flush=True)
        code = _run(step.command, None if end == math.inf else end - time.monotonic())
        if code is not None:
            step.then()
        if step.left():
            unfinished.append(f"{step.name}: " + ("out of time" if code is None else f"ended with {code}"))
    return unfinished


def _run(command: Sequence[str], seconds: float | None) -> int | None:
    """The exit status of a process that is ended with all that it started, or None where time ran out."""
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:  # also where this process is interrupted
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def told(document: dict[str, Any]) -> str:
    """The outcome of the tests in words."""
    failed = "".join(f"\n- failed: `{name}`" for name in document["failed"])
    return f"`pytest -m gpu`: {document['passed']} passed, {document['skipped']} skipped.{failed}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench gpu`."""
    parser.add_argument("--folder", type=Path, default=Path("out/gpu"), help="where the JSON is and goes")
    parser.add_argument("--minutes", type=float, help="when to stop; the same command goes on")
    parser.add_argument("--rehearse", action="store_true", help="the same steps on the CPU, all as small as can be")


def main(arguments: argparse.Namespace) -> None:
    """Run `python -m bench gpu`."""
    a = arguments
    if not a.rehearse and not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} of {sys.executable} has no GPU: use another Python, or --rehearse")
    a.folder.mkdir(parents=True, exist_ok=True)
    unfinished = run(steps(a.folder.absolute(), REHEARSAL if a.rehearse else PLAN), a.minutes and 60 * a.minutes)
    if unfinished:
        raise SystemExit("\n".join(["left for the same command:", *unfinished]))
    print(f"\nall is in {a.folder}")

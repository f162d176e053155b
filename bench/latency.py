"""`python -m bench latency`: milliseconds of a call of the model, every variant beside its peers."""

import argparse
import hashlib
import itertools
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from bench import documents, flops, measure, models
from bench.apart import end, side_by_side, wait
from bench.cases import Case
from bench.cells import SUITES, Cell, Task, suite
from bench.images import decode, denoise
from bench.measure import Makes
from bench.models import Build
from bench.options import add_merging, merging, note_given, refuse_idle
from bench.parts import of_a_site
from bench.runs import MODES, RUNS, prepare
from bench.tables import table
from bench.variants import predict
from tome_fx.families.skeleton import skeleton

NOTE = "Weights are random, from a seed: latency does not depend on them."
STEPS = 50  # of an end-to-end image: diffusers' default


def run(tasks: Sequence[Task], path: Path, *, breakdown: bool = False, apart: bool = False) -> Any:
    """Measure the cells that the file does not hold yet, write them into it, and return its content.

    Args:
        tasks: What to measure.
        path: The file.
        breakdown: Whether to measure the parts of a site as well.
        apart: Whether all rows of all cells compile at once, in processes of their own, before any is timed.
    """
    document = _document(path)
    todo = [task for task in tasks if left(task, path, breakdown=breakdown)]
    build = models.build if apart else lru_cache(1)(models.build)  # of cells in a row
    runs: dict[Task, Makes] = {task: {} if _measured(document, task) else _runs(task, build) for task in todo}
    sites: dict[Task, Makes] = {task: of_a_site(task.cell, build) if breakdown else {} for task in todo}
    with ExitStack() as stack:
        if apart and todo:
            runs, sites = stack.enter_context(side_by_side(todo[0].cell.device, runs, sites))
        bounds = {task: _bounds(task) for task in todo if runs[task]}
        wait(*runs.values(), *sites.values())
        for task in todo:
            entry = _measured(document, task) or _rows(task, runs[task], bounds[task], document, path)
            if breakdown:
                entry["breakdown"] = _breakdown(task, sites[task], path, entry)
                documents.write(path, document)
            end(runs[task], sites[task])  # the cells after need the memory
            shutil.rmtree(_kept(path, entry).parent, ignore_errors=True)
            print(f"\n{task.cell}\n{table(entry)}\n", flush=True)
    return document


def _rows(task: Task, runs: Makes, bounds: dict[str, float], document: dict[str, Any], path: Path) -> dict[str, Any]:
    """Measure a cell's rows, and return its entry."""
    cell, key = task.cell, task.cell.stored()
    entry = {"cell": key, "complete": False, **documents.origin(cell.device), "bounds": bounds, "rows": {}}
    document["cells"] = [other for other in document["cells"] if other["cell"] != key] + [entry]
    measure.compare(
        runs,
        exact={name: not RUNS[name].merges for name in runs},
        rounds=task.rounds,
        device=cell.device,
        title=str(cell),
        save=partial(_save, path, document, entry),
        kept=_kept(path, entry),
    )
    entry["complete"] = True
    documents.write(path, document)
    return entry


def _breakdown(task: Task, sites: Makes, path: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """The parts of one site of the finest level, each compiled alone, by what is searched: where a site's time goes."""
    cell, rounds = task.cell, max(task.rounds, 10)
    title, kept = f"parts of {cell}", _kept(path, entry)
    return measure.as_json(
        measure.compare(sites, exact=None, rounds=rounds, device=cell.device, title=title, kept=kept)
    )


def _runs(task: Task, build: Build) -> Makes:
    return {name: partial(_call, name, build, task.cell) for name in task.names}


def left(task: Task, path: Path, *, breakdown: bool = False) -> bool:
    """Whether `run` would measure something of the task."""
    entry = _measured(_document(path), task)
    return entry is None or (breakdown and "breakdown" not in entry)


def _document(path: Path) -> dict[str, Any]:
    return documents.read(path) if path.exists() else documents.new("latency", note=NOTE, cells=[])


def _measured(document: dict[str, Any], task: Task) -> dict[str, Any] | None:
    """The entry of a task that all of its rows are measured in."""
    key, names = task.cell.stored(), set(task.names)
    entries: list[dict[str, Any]] = document["cells"]
    return next((e for e in entries if e["cell"] == key and e["complete"] and names <= e["rows"].keys()), None)


def _kept(path: Path, entry: dict[str, Any]) -> Path:
    """Beside the file, where what is compiled for a cell on this machine and commit is kept until it is done."""
    told = repr((entry["cell"], entry["machine"]))
    return path.with_suffix(".kept") / hashlib.sha256(told.encode()).hexdigest()[:16]


def _save(path: Path, document: dict[str, Any], entry: dict[str, Any], rows: dict[str, measure.Row]) -> None:
    entry["rows"] = measure.as_json(rows)
    documents.write(path, document)


def _bounds(task: Task) -> dict[str, float]:
    """By row, the stock UNet's FLOPs over the row's: the speed-up if time went with FLOPs."""
    shapes, side = skeleton(models.build(task.cell.model, "meta")), task.cell.resolution // models.LATENT
    counted = partial(flops.counted, shapes=shapes, side=side)
    stock = counted(Case())
    return {name: stock / counted(RUNS[name].case(task.cell.ratio, task.cell.options)) for name in task.names}


def _call(name: str, build: Build, cell: Cell) -> measure.Call:
    """Prepare a row for a cell: the call to time."""
    unet = build(cell.model, cell.device, models.DTYPES[cell.dtype])
    call = prepare(name, unet, ratio=cell.ratio, options=cell.options, mode=cell.mode)
    if cell.end_to_end:
        return image(call, unet, cell)
    return partial(predict, call, models.inputs(unet, cell.resolution, cell.unet_batch))


def image(call: Callable[..., Any], unet: UNet2DConditionModel, cell: Cell, *, steps: int = STEPS) -> measure.Call:
    """A call that makes the cell's images from prompt embeddings; it returns their pixels."""
    pipe = models.pipeline(unet)
    prompts = models.inputs(unet, cell.resolution, cell.batch)["encoder_hidden_states"]
    inputs: dict[str, Any] = {"prompt_embeds": prompts, "negative_prompt_embeds": torch.zeros_like(prompts)}
    inputs |= {"height": cell.resolution, "width": cell.resolution, "guidance": 7.5 if cell.guidance else 1.0}
    return lambda: decode(pipe, denoise(pipe, call, seeds=range(cell.batch), steps=steps, **inputs))


OF_A_SUITE = ("part", "device", "breakdown", "apart", "rounds", "json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench latency`."""
    note_given(parser)
    rows = "; ".join(f"{name}: {run.about}" for name, run in RUNS.items())
    parser.add_argument("--suite", choices=SUITES, help=f"a fixed set of cells; goes with {', '.join(OF_A_SUITE)}")
    parser.add_argument("--part", default="1/1", help="which part of the cells, 1/3 for the first third")
    parser.add_argument("--model", nargs="+", default=["tiny"], help=f"{', '.join(models.CONFIGS)} or a folder")
    parser.add_argument("--resolution", nargs="+", type=int, default=[512], help="pixels along a side")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="images")
    parser.add_argument("--ratio", nargs="+", type=float, default=[0.5])
    add_merging(parser)
    parser.add_argument("--variant", nargs="+", choices=RUNS, default=list(RUNS), help=rows)
    parser.add_argument("--dtype", choices=models.DTYPES, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--mode", choices=MODES, default="default")
    parser.add_argument("--no-guidance", action="store_true", help="one call per image, not two")
    parser.add_argument("--end-to-end", action="store_true", help=f"seconds per image of {STEPS} steps, VAE included")
    parser.add_argument("--breakdown", action="store_true", help="time match, merge, unmerge and attention as well")
    parser.add_argument(
        "--apart", action="store_true", help="compile all at once, each row in a process of its own, which takes memory"
    )
    parser.add_argument("--rounds", type=int, help="timed calls of each variant")
    parser.add_argument("--json", type=Path, help="where to; a file that is there is continued")


def main(arguments: argparse.Namespace) -> None:
    """Run `python -m bench latency`."""
    a = arguments
    refuse_idle(a, "suite", OF_A_SUITE)
    for option in ("ratio", "options", "mode"):
        if option in a.given and not any(RUNS[name].heeds(option) for name in a.variant):
            raise ValueError(f"{option} must not be given for {', '.join(a.variant)} alone: it would do nothing")
    if a.suite:
        tasks = suite(a.suite, a.device)
    else:
        products = itertools.product(a.model, a.resolution, a.batch, a.ratio)
        given, common = merging(a.options), (a.dtype, a.device, a.mode, not a.no_guidance, a.end_to_end)
        tasks = [Task(Cell(*product, given, *common), tuple(a.variant)) for product in products]
    if a.rounds:
        tasks = [replace(task, rounds=a.rounds) for task in tasks]
    part, parts = map(int, a.part.split("/"))
    path = a.json or Path("out") / f"{a.suite or 'latency'}.json"
    print(NOTE)
    run(tasks[part - 1 :: parts], path, breakdown=a.breakdown, apart=a.apart)
    print(f"written to {path}")

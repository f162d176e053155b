"""`python -m bench latency`: milliseconds of a call of the model, every variant beside its peers."""

import argparse
import hashlib
import itertools
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from bench import documents, flops, measure, models, warm
from bench.apart import side_by_side
from bench.cases import Case
from bench.cells import SUITES, Cell, Task, suite
from bench.images import decode, denoise
from bench.models import Build
from bench.options import add_merging, merging, note_given, refuse_idle
from bench.parts import of_a_site
from bench.runs import MODES, RUNS, prepare
from bench.tables import table
from bench.variants import predict
from bench.warm import Makes
from tome_fx.families.skeleton import skeleton

NOTE = "Weights are random, from a seed: latency does not depend on them."
STEPS = 50  # of an end-to-end image: diffusers' default


def run(tasks: Sequence[Task], path: Path, *, breakdown: bool = False, apart: bool = False) -> Any:
    """Measure the cells that the file does not hold yet, write them into it, and return its content.

    Args:
        tasks: What to measure.
        path: The file.
        breakdown: Whether to measure the parts of a site as well.
        apart: Whether the rows of a cell compile at once, each in a process of its own, before any is timed.
    """
    document = _document(path)
    build = models.build if apart else lru_cache(1)(models.build)  # of cells in a row
    for task in tasks:
        if not left(task, path, breakdown=breakdown):
            continue
        cell, entry = task.cell, _measured(document, task)
        if entry is None:
            entry = {"cell": cell.stored(), "complete": False, "apart": apart, **documents.origin(cell.device)}
            weights = ("meta",) if apart else (cell.device, models.DTYPES[cell.dtype])
            entry |= {"bounds": _bounds(task, build(cell.model, *weights)), "rows": {}}
            document["cells"] = [other for other in document["cells"] if other["cell"] != entry["cell"]] + [entry]
            makes = {name: partial(_call, name, build, cell) for name in task.names}
            exact = {name: not RUNS[name].merges for name in task.names}
            save = partial(_save, path, document, entry)
            compare = partial(measure.compare, exact=exact, rounds=task.rounds, title=str(cell), save=save)
            _measure(compare, makes, cell, _kept(path, entry), apart)
            entry["complete"] = True
            documents.write(path, document)
        if breakdown:
            # The parts of one site of the finest level, each compiled alone, by what is searched: where its time goes
            compare = partial(measure.compare, exact=None, rounds=max(task.rounds, 10), title=f"parts of {cell}")
            parts = _measure(compare, of_a_site(cell, build), cell, _kept(path, entry), apart)
            entry["breakdown"] = measure.as_json(parts)
            documents.write(path, document)
        shutil.rmtree(_kept(path, entry).parent, ignore_errors=True)
        print(f"\n{cell}\n{table(entry)}\n", flush=True)
    return document


def _measure(compare: Callable[..., Any], makes: Makes, cell: Cell, kept: Path, apart: bool) -> Any:
    """What is compared, in this process or each in its own."""
    with side_by_side(makes, cell.device, kept) if apart else nullcontext(makes) as runs:
        return compare(runs, device=cell.device, kept=kept)


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


def _save(path: Path, document: dict[str, Any], entry: dict[str, Any], rows: dict[str, warm.Row]) -> None:
    entry["rows"] = measure.as_json(rows)
    documents.write(path, document)


def _bounds(task: Task, model: nn.Module) -> dict[str, float]:
    """By row, the stock UNet's FLOPs over the row's: the speed-up if time went with FLOPs."""
    shapes, side = skeleton(model), task.cell.resolution // models.LATENT
    counted = partial(flops.counted, shapes=shapes, side=side)
    stock = counted(Case())
    return {name: stock / counted(RUNS[name].case(task.cell.ratio, task.cell.options)) for name in task.names}


def _call(name: str, build: Build, cell: Cell) -> warm.Call:
    """Prepare a row for a cell: the call to time."""
    unet = build(cell.model, cell.device, models.DTYPES[cell.dtype])
    call = prepare(name, unet, ratio=cell.ratio, options=cell.options, mode=cell.mode)
    if cell.end_to_end:
        return image(call, unet, cell)
    return partial(predict, call, models.inputs(unet, cell.resolution, cell.unet_batch))


def image(call: Callable[..., Any], unet: UNet2DConditionModel, cell: Cell, *, steps: int = STEPS) -> warm.Call:
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
        "--apart",
        action="store_true",
        help="compile a table's rows at once, each in a process of its own, with weights of its own",
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
    if a.breakdown and all(task.cell.model in models.TRANSFORMERS for task in tasks):
        raise ValueError(f"breakdown must be of a UNet among others, got {', '.join(a.model)}: it would do nothing")
    part, parts = map(int, a.part.split("/"))
    path = a.json or Path("out") / f"{a.suite or 'latency'}.json"
    print(NOTE)
    run(tasks[part - 1 :: parts], path, breakdown=a.breakdown, apart=a.apart)
    print(f"written to {path}")

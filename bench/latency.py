"""`python -m bench latency`: milliseconds of a call of the model, every variant beside its peers."""

import argparse
import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from bench import documents, flops, measure, models
from bench.cases import DEFAULTS, Case
from bench.cells import SUITES, Cell, Task, suite
from bench.images import decode, denoise
from bench.measure import Apart
from bench.options import add_merging, merging, note_given, refuse_idle
from bench.peers import finest_sites
from bench.runs import MODES, RUNS, prepare
from bench.tables import MERGING, SEARCHES, table
from bench.variants import merged, predict
from tome_fx import ops, plan
from tome_fx.families.skeleton import skeleton
from tome_fx.families.weights import weights

Build = Callable[[str, str, torch.dtype], Any]  # `bench.models.build`
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
    planned: dict[Task, tuple[dict[str, Any], ...]] = {
        task: (
            {} if _measured(document, task) else _runs(task, build),
            _parts(task.cell, build) if breakdown else {},
        )
        for task in todo
    }
    with ExitStack() as stack:
        if apart:
            count = sum(len(each) for both in planned.values() for each in both)
            # two at least, that code is written while kernels are compiled
            start = partial(Apart, threads=max(2, (os.cpu_count() or 1) // max(1, count)))
            planned = {
                task: tuple(
                    {name: stack.enter_context(closing(start(make, task.cell.device))) for name, make in each.items()}
                    for each in both
                )
                for task, both in planned.items()
            }
        bounds = {task: _bounds(task) for task, (runs, _) in planned.items() if runs}
        for one in (one for both in planned.values() for each in both for one in each.values()):
            if isinstance(one, Apart):
                one.warmed()  # nobody compiles beside what is timed
        for task, (runs, parts) in planned.items():
            _measure(task, runs, parts if breakdown else None, bounds.get(task, {}), document, path)
    return document


def _measure(
    task: Task,
    runs: dict[str, Any],
    parts: dict[str, Any] | None,
    bounds: dict[str, float],
    document: dict[str, Any],
    path: Path,
) -> None:
    """What is left of a cell: rows, where there are any, and parts, where they are asked for."""
    cell, key = task.cell, task.cell.stored()
    entry = _measured(document, task) or {"cell": key, "complete": False, **documents.origin(cell.device)}
    kept = _kept(path, entry)
    if runs:
        entry |= {"bounds": bounds, "rows": {}}
        document["cells"] = [other for other in document["cells"] if other["cell"] != key] + [entry]
        measure.compare(
            runs,
            exact={name: not RUNS[name].merges for name in runs},
            rounds=task.rounds,
            device=cell.device,
            title=str(cell),
            save=partial(_save, path, document, entry),
            kept=kept,
        )
        entry["complete"] = True
        documents.write(path, document)
    if parts is not None:
        entry["breakdown"] = measure.as_json(_breakdown(parts, cell, task.rounds, kept))
        documents.write(path, document)
    for one in (*runs.values(), *(parts or {}).values()):
        if isinstance(one, Apart):  # the cells after need its memory
            one.close()
    shutil.rmtree(kept.parent, ignore_errors=True)
    print(f"\n{cell}\n{table(entry)}\n", flush=True)


def _runs(task: Task, build: Build) -> dict[str, Callable[[], measure.Call]]:
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


PARTS = (
    *(f"{part}, {search}" for search in SEARCHES for part in MERGING),
    *(f"attention, {tokens}" for tokens in ("all tokens", "merged", "merged and weighed")),
)


def _parts(cell: Cell, build: Build) -> dict[str, Callable[[], measure.Call]]:
    if cell.model in models.TRANSFORMERS:  # whose blocks are of many kinds
        return {}
    return {name: partial(_part, name, build, cell) for name in PARTS}


def _part(name: str, build: Build, cell: Cell) -> measure.Call:
    """A part of a site of the finest level, compiled alone, to time."""
    unet = build(cell.model, cell.device, models.DTYPES[cell.dtype])
    site = finest_sites(unet)[0]
    side = cell.resolution // models.LATENT // site.downsample
    attention: Any = merged(unet, Case("tome_fx", cell.ratio)).get_submodule(f"{site.path}.attn1")
    tokens = torch.randn(cell.unet_batch, side * side, site.channels, device=unet.device, dtype=unet.dtype)
    part, of = name.split(", ")
    match = partial(
        ops.match,
        height=side,
        width=side,
        tile=None if of == SEARCHES[0] else DEFAULTS["tile"],
        kept=plan.kept(side, side, cell.ratio),
        sx=2,
        sy=2,
        seed=1,
    )

    def small() -> tuple[Any, ...]:
        slots = match(tokens)
        return ops.merge(tokens, slots), slots

    # What a part is given is computed for it alone, so that a failure is its own.
    parts: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]] = {
        "match": (match, lambda: (tokens,)),
        "merge": (ops.merge, lambda: (tokens, match(tokens))),
        "unmerge": (ops.unmerge, small),
        "attention, all tokens": (lambda x: attention(x), lambda: (tokens,)),
        "attention, merged": (lambda x: attention(x), lambda: small()[:1]),
        "attention, merged and weighed": (
            lambda x, slots: attention(x, attention_mask=weights(attention, x, slots)),
            small,
        ),
    }
    run, inputs = parts[name if name in parts else part]
    compiled, given = torch.compile(run, fullgraph=True), inputs()
    return lambda: compiled(*given)


def _breakdown(parts: dict[str, Any], cell: Cell, rounds: int, kept: Path) -> dict[str, measure.Row]:
    """The parts of one site of the finest level, each compiled alone, by what is searched: where a site's time goes."""
    return measure.compare(
        parts, exact=None, rounds=max(rounds, 10), device=cell.device, title=f"parts of {cell}", kept=kept
    )


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

"""`python -m bench quality`: how far merging moves an image of the same seed, and whether it shows its prompt."""

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import documents, measure, shapes, viz, warm
from bench.cases import ROUNDED, STOCK, Case
from bench.flops import saving
from bench.images import Images, denoiser_of, generate
from bench.metrics import compare, judging, perceiving
from bench.models import DTYPES, example
from bench.options import add_merging, merging, note_given, refuse_idle
from bench.pipelines import load, prompts_for, sides
from bench.quality_tables import table
from bench.shapes.scenes import SIDE, draw
from bench.suites import POINTS, SUITES
from bench.variants import VARIANTS, apply, check, merged, predict

NOTE = "The i-th image of every row is from seed i and prompt i."
ROUNDS = 9  # of timed calls


def run(
    pipeline: str,
    cases: Sequence[Case],
    *,
    count: int,
    steps: int,
    guidance: float,
    prompts: Path | None,
    path: Path,
    batch: int = 16,
    keep: int = 0,
    device: str = "cpu",
    dtype: str = "fp32",
    size: Mapping[str, int] | None = None,
) -> tuple[dict[str, Any], dict[Case, Tensor]]:
    """Generate and judge, case by case, writing the JSON after each; returns it and the first `keep` images of each.

    Cases that the file holds already stay in it, so that several calls can fill one table and one that was stopped goes
    on; they are made again where pictures are to be kept.

    Raises:
        ValueError: A case has an option that its variant would pass over, or the file holds what was measured in
            another setting or on another machine.
    """
    for case in cases:
        check(case)
        if case.variant in ROUNDED and dtype != "fp32":
            raise ValueError(f"dtype must be fp32 for {case.variant}, which is told from it; got {dtype}")
    texts, scenes = prompts_for(pipeline, prompts, count)
    pipe = load(pipeline, device, dtype)
    size = {**sides(pipe), **(size or {})}
    setting = {"device": device, "dtype": dtype, "pipeline": pipeline, "count": count, "prompts": texts}
    how: dict[str, Any] = {"steps": steps, "guidance": guidance}
    document = documents.new("quality", note=NOTE, machine=documents.machine(device), **setting, **how, size=size)
    document |= _earlier(path, document)
    known = [] if keep else [Case.read(row["case"]) for row in document["rows"]]
    left = [case for case in cases if case not in known]
    if not left:
        return document, {}
    judged = judging(scenes) if scenes else None
    perceived = perceiving(texts) if not scenes else None
    denoiser = denoiser_of(pipe)
    asked = shapes.inputs(pipe) if pipeline in shapes.PIPELINES else {}
    saved = saving(pipeline, denoiser, steps)
    if judged:  # what the measures say of as many real images: the best that there is
        pixels = draw(scenes, SIDE) / 2 + 0.5
        document["real"] = judged(Images(pixels, pixels))
    stock: Images | None = None
    pictures = {}
    for case in dict.fromkeys([Case(), *left]):
        torch.manual_seed(0)  # tomesd draws from the process's generator
        call = apply(case, denoiser, steps)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # or fp32 on a GPU would not be what it says
            images = generate(pipe, call, texts, **how, batch=batch, title=case.title, **size, **asked)
        stock = stock or images
        row = {"case": case.stored(), "argv": sys.argv[1:], "flops_saved": saved(case), **compare(images, stock)}
        row |= judged(images) if judged else {}
        row |= perceived(images, stock) if perceived else {}
        _add(row, document)
        documents.write(path, document)
        pictures[case] = images.pixels[:keep]
    return document, pictures


def _earlier(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """What the document has of the file that it goes on with."""
    if not path.exists():
        return {"rows": []}
    earlier = documents.read(path)
    other = [name for name, value in document.items() if earlier.get(name) != value]
    if other:
        raise ValueError(f"json: {path} holds results of another {', '.join(other)}; give another file")
    return earlier


def _add(row: dict[str, Any], document: dict[str, Any]) -> None:
    """Put a row into the document, in the place of an earlier one; times are of all rows, so they are left out."""
    rows = [other for other in document["rows"] if other["case"] != row["case"]] + [row]
    rows.sort(key=lambda row: row["case"]["variant"] != STOCK)  # stock first, whenever it was run
    document["rows"] = [{name: value for name, value in row.items() if name != "ms"} for row in rows]
    document.pop("timed", None)


def add_times(path: Path, side: int, rounds: int, device: str = "cpu", dtype: str = "fp32") -> dict[str, Any]:
    """Time an eager call of the denoiser, an image under guidance, for every row of the file; the rows take turns.

    Args:
        path: The file, to which the times are added; stock must be among its rows.
        side: Latents along a side. Images may be made at a size where merging saves little and timed at a larger one.
        rounds: Calls of each.
        device: Which need not be the one that the images were made on.
        dtype: A key of `DTYPES`.
    """
    document = documents.read(path)
    pipe = load(document["pipeline"], device, dtype)
    denoiser = denoiser_of(pipe)
    inputs = example(denoiser, side, side, 2)
    cases = [Case.read(row["case"]) for row in document["rows"]]

    def make(case: Case) -> warm.Call:
        return partial(predict, apply(case, denoiser, document["steps"]), inputs)

    runs = {case.title: partial(make, case) for case in cases}
    timed = measure.compare(runs, exact=None, rounds=rounds, device=device, title="speed")
    document["timed"] = {"latents": side, "device": device, "dtype": dtype, **documents.origin(device)}
    for row, case in zip(document["rows"], cases, strict=True):
        row["ms"] = timed[case.title].samples_ms
    documents.write(path, document)
    return document


OF_TIMES = ("json", "device", "dtype")
OF_A_MAP = ("pipeline", "ratio", "options", "prompts", "steps", "guidance", "device", "dtype")
OF_A_SUITE = (
    "pipeline",
    "prompts",
    "n",
    "steps",
    "guidance",
    "device",
    "dtype",
    "batch",
    "height",
    "width",
    "json",
    "grid",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench quality`."""
    note_given(parser)
    parser.add_argument(
        "--pipeline", default="shapes", help=f"{', '.join(shapes.PIPELINES)}, or the folder of a pipeline"
    )
    parser.add_argument("--variant", nargs="+", choices=list(VARIANTS)[1:], default=["tome_fx", "tomesd"])
    parser.add_argument("--ratio", nargs="+", type=float, default=[0.25, 0.5, 0.75])
    add_merging(parser)
    parser.add_argument("--suite", choices=SUITES, help="a fixed set of rows in the place of variants and ratios")
    parser.add_argument("--prompts", type=Path, help="a text file, one prompt a line, or a TSV with a column Prompt")
    parser.add_argument("--n", type=int, default=96, help="images of each row")
    parser.add_argument("--steps", type=int, default=12, help="denoising steps of an image")
    parser.add_argument("--guidance", type=float, default=shapes.GUIDANCE, help="scale of the classifier-free guidance")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, of the images, the times and the map")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of all but the VAE, which is fp32")
    parser.add_argument("--batch", type=int, default=16, help="images that are made at once")
    parser.add_argument("--height", type=int, help="of an image in pixels, the pipeline's own if not given")
    parser.add_argument("--width", type=int, help="likewise")
    parser.add_argument("--json", type=Path, default=Path("out/quality.json"), help="rows are added to those it holds")
    parser.add_argument("--grid", type=Path, help="a PNG of the first four prompts' images of each row")
    parser.add_argument(
        "--time", type=int, metavar="SIDE", help="only time the rows of --json, at so many latents a side"
    )
    parser.add_argument(
        "--map", type=Path, help="only write this PNG: what tome_fx merges in the first image, at one ratio"
    )


def write_map(a: argparse.Namespace) -> None:
    """What `--map` asks for.

    Raises:
        ValueError: Several ratios are given, of which one would be drawn.
    """
    if "ratio" in a.given and len(a.ratio) > 1:
        raise ValueError(f"ratio must be one for --map, got {', '.join(map(str, a.ratio))}")
    case = Case("tome_fx", a.ratio[0], merging(a.options))
    (text,), _ = prompts_for(a.pipeline, a.prompts, 1)
    pipe = load(a.pipeline, a.device, a.dtype)
    pipe.unet = merged(pipe.unet, case)
    viz.merge_maps(a.map, pipe, text, case.title, steps=a.steps, guidance=a.guidance)
    print(f"written to {a.map}")


def main(arguments: argparse.Namespace) -> None:
    """Run `python -m bench quality`."""
    a = arguments
    refuse_idle(a, "time", OF_TIMES)
    refuse_idle(a, "map", OF_A_MAP)
    refuse_idle(a, "suite", OF_A_SUITE)
    if a.map:
        write_map(a)
        return
    if a.time:
        print(table(add_times(a.json, a.time, ROUNDS, a.device, a.dtype)))
        return
    given = merging(a.options)
    cases = SUITES[a.suite] if a.suite else [Case(*named, given) for named in itertools.product(a.variant, a.ratio)]
    document, pictures = run(
        a.pipeline,
        cases,
        count=a.n,
        steps=a.steps,
        guidance=a.guidance,
        prompts=a.prompts,
        path=a.json,
        batch=a.batch,
        keep=4,
        device=a.device,
        dtype=a.dtype,
        size={name: value for name in ("height", "width") if (value := getattr(a, name))},
    )
    if a.grid:
        names = {case: f"{name}: " for name, case in POINTS.items()}
        columns = {f"{names.get(case, '')}{case.title}": list(images) for case, images in pictures.items()}
        viz.grid(a.grid, columns, document["prompts"][:4])
    print(f"{document['note']}\n\n{table(document)}\n\nwritten to {a.json}")

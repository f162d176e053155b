"""`python -m bench quality`: how far merging moves an image of the same seed, and whether it shows its prompt."""

import argparse
import csv
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import NormalDist, fmean, median, stdev
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from tabulate import tabulate
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

import tome_fx
from bench import measure, shapes, variants, viz
from bench.latency import DTYPES
from bench.shapes import reader as judge
from bench.shapes.reader import Reader
from bench.shapes.scenes import HELD_OUT, SIDE, Scene, draw, numbered
from bench.variants import SCOPES, AsUNet
from tome_fx.capture import share
from tome_fx.inputs import example_inputs

REAL = 1024  # scenes that a Fréchet distance is taken from
STOCK = "stock"
ROUNDS = 9  # of timed calls


# what some variants do not let one choose; ToDo drops three of four keys and values, whatever the ratio
FIXED: dict[str, dict[str, Any]] = {
    STOCK: {"ratio": 0.0, "scope": "attn", "max_downsample": None},
    "tomesd": {"max_downsample": None},
    "todo": {"ratio": 0.75, "scope": "attn", "max_downsample": None},
}


@dataclass(frozen=True)
class Case:
    """What is merged, and how."""

    variant: str = STOCK
    ratio: float = 0.0
    scope: str = "attn"
    max_downsample: int | None = None

    @property
    def title(self) -> str:
        """A few words for a picture, other ones for each case: scope and levels where they are not the default."""
        words = [self.variant, f"ratio {self.ratio:g}"]
        words += [self.scope] if self.scope != "attn" else []
        words += [f"levels {self.max_downsample}"] if self.max_downsample else []
        return ", ".join(words)

    def check(self) -> None:
        """Refuse an option that the variant would pass over.

        Raises:
            ValueError: Named are the option, what is allowed and what came.
        """
        for name, allowed in FIXED.get(self.variant, {}).items():
            if getattr(self, name) != allowed:
                raise ValueError(f"{name} must be {allowed} for {self.variant}, got {getattr(self, name)}")


def _transformed(unet: UNet2DConditionModel, case: Case, **options: Any) -> UNet2DConditionModel:
    return tome_fx.transform(unet, case.ratio, max_downsample=case.max_downsample, **SCOPES[case.scope], **options)


def _each_step(unet: UNet2DConditionModel, case: Case, steps: int) -> Callable[..., Any]:
    """Other destinations in every step, as tomesd draws them; a pipeline calls its UNet once a step."""
    turns = itertools.cycle([_transformed(unet, case, seed=step) for step in range(steps)])
    return lambda **inputs: next(turns)(**inputs)


def _tomesd(unet: UNet2DConditionModel, case: Case, steps: int) -> Callable[..., Any]:
    return variants.sample_first(variants.patched(unet, variants.Setting(case.ratio, case.scope)))


VARIANTS: dict[str, Callable[[UNet2DConditionModel, Case, int], Callable[..., Any]]] = {
    STOCK: lambda unet, case, steps: unet,
    "tome_fx": lambda unet, case, steps: _transformed(unet, case),
    "prop_attn": lambda unet, case, steps: _transformed(unet, case, prop_attn=True),
    "top-left": lambda unet, case, steps: _transformed(unet, case, use_rand=False),
    "each-step": _each_step,
    "one-match": lambda unet, case, steps: variants.one_match(_transformed(unet, case)),
    "tomesd": _tomesd,
    "todo": lambda unet, case, steps: variants.downsampled(unet, variants.Setting(case.ratio)),
}


@dataclass(frozen=True)
class Images:
    """Latents `[B, C, h, w]` and pixels `[B, 3, H, W]` from 0 to 1."""

    latents: Tensor
    pixels: Tensor


@torch.no_grad()
def generate(
    pipe: Any,
    call: Callable[..., Any],
    prompts: Sequence[str],
    steps: int,
    guidance: float,
    *,
    first_seed: int = 0,
    size: Mapping[str, int] | None = None,
) -> Images:
    """An image for each prompt, the i-th from seed `first_seed + i`, of the pipeline's own size or of `size`.

    Raises:
        ValueError: An image is not finite.
    """
    unet = pipe.unet
    pipe.unet = AsUNet(call, unet)
    try:
        latents = pipe(
            list(prompts),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(first_seed + i) for i in range(len(prompts))],
            output_type="latent",
            **(size or {}),
        ).images
    finally:
        pipe.unet = unet
    pixels = pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample
    if not pixels.isfinite().all():
        raise ValueError(f"an image is not finite: try another dtype than {unet.dtype}")
    return Images(latents.float().cpu(), (pixels.float().cpu() / 2 + 0.5).clamp(0, 1))


def compare(images: Images, stock: Images) -> dict[str, list[float | None]]:
    """How far each image is from the stock one: PSNR in dB, SSIM, and the latents' relative distance.

    There is no PSNR, None, where nothing differs.
    """
    peak: list[float | None] = []
    likeness: list[float | None] = []
    for mine, theirs in zip(images.pixels, stock.pixels, strict=True):
        same = torch.equal(mine, theirs)
        peak.append(None if same else float(peak_signal_noise_ratio(mine, theirs, data_range=1.0)))
        likeness.append(float(_ssim(mine, theirs)))
    difference = (images.latents - stock.latents).flatten(1).norm(dim=1) / stock.latents.flatten(1).norm(dim=1)
    return {"psnr": peak, "ssim": likeness, "latent_error": difference.tolist()}


def _ssim(mine: Tensor, theirs: Tensor) -> Any:
    return structural_similarity_index_measure(mine[None], theirs[None], data_range=1.0)


class Features(nn.Module):
    """The reader's features, the way that a Fréchet distance asks for them."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader = reader
        self.num_features = reader.head.in_channels

    def forward(self, images: Tensor) -> Tensor:
        """`[B, num_features]` from images `[B, 3, H, W]` in 0 to 1."""
        return self.reader.features(2 * images - 1)


def _judge(scenes: Sequence[Scene]) -> Callable[[Images], dict[str, Any]]:
    """What says of images whether each shows its scene's caption, and how far all are from real scenes, by Fréchet.

    `right`: the reader finds what the caption tells, in its order. `counted`: and nothing is drawn twice.
    """
    reader = judge.load()
    told = torch.tensor([len(scene.things) for scene in scenes])
    distance = FrechetInceptionDistance(Features(reader), reset_real_features=False)
    for first in range(0, REAL, 128):
        distance.update(draw(numbered(HELD_OUT + len(scenes) + first, 128), SIDE) / 2 + 0.5, real=True)

    def judged(images: Images) -> dict[str, Any]:
        right = reader.right(scenes, 2 * images.pixels - 1)
        counted = right & (judge.counts(2 * images.pixels - 1) == told)
        result: dict[str, Any] = {"right": right.float().tolist(), "counted": counted.float().tolist()}
        if len(scenes) > 1:  # of a single image there is no covariance
            distance.reset()
            distance.update(images.pixels, real=False)
            result["frechet"] = float(distance.compute())
        return result

    return judged


def _perceive(prompts: Sequence[str]) -> Callable[[Images, Images], dict[str, Any]]:
    """LPIPS and CLIP score where torchmetrics and their weights are at hand, else why they are not; each built once."""

    def lpips() -> Callable[[Images, Images], list[float]]:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
        return lambda images, stock: [
            float(metric(mine[None], theirs[None])) for mine, theirs in zip(images.pixels, stock.pixels, strict=True)
        ]

    def clip_score() -> Callable[[Images, Images], list[float]]:
        from torchmetrics.multimodal.clip_score import CLIPScore

        metric: Any = CLIPScore("openai/clip-vit-base-patch16")
        return lambda images, stock: [
            float(metric((255 * mine).byte(), prompt)) for mine, prompt in zip(images.pixels, prompts, strict=True)
        ]

    scores: dict[str, Callable[[Images, Images], list[float]] | str] = {}
    for build in (lpips, clip_score):
        try:
            scores[build.__name__] = build()
        except Exception as error:  # a package, its weights or the network is missing, each in its own way
            scores[build.__name__] = f"not measured: {measure.reason(error)}"

    def perceived(images: Images, stock: Images) -> dict[str, Any]:
        return {name: score if isinstance(score, str) else score(images, stock) for name, score in scores.items()}

    return perceived


def read_prompts(path: Path, count: int) -> list[str]:
    """The first prompts of a text file, one a line, or of the column Prompt of a TSV, such as PartiPrompts'.

    Raises:
        ValueError: There are fewer, or a TSV has no such column.
    """
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if path.suffix == ".tsv":
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
        if rows and "Prompt" not in rows[0]:
            raise ValueError(f"prompts: {path} must have a column Prompt, its columns are {', '.join(rows[0])}")
        lines = [row["Prompt"] for row in rows]
    if len(lines) < count:
        raise ValueError(f"prompts: {path} must have at least n={count} prompts, it has {len(lines)}")
    return lines[:count]


def load(
    pipeline: str, prompts: Path | None, count: int, device: str = "cpu", dtype: str = "fp32"
) -> tuple[Any, list[str], list[Scene]]:
    """The pipeline, so many prompts, and the scenes that they are captions of, if they are.

    Raises:
        ValueError: There are no prompts, or too few, or `count` is not positive.
    """
    if count < 1:
        raise ValueError(f"n must be at least 1, got {count}")
    ours = pipeline == "shapes"
    if not ours and prompts is None:
        raise ValueError("prompts must be a file of prompts, for any pipeline but shapes; got none")
    pipe = _open(pipeline, device, dtype)
    if prompts is not None:
        return pipe, read_prompts(prompts, count), []
    scenes = numbered(HELD_OUT, count)
    return pipe, [scene.caption for scene in scenes], scenes


def _open(pipeline: str, device: str, dtype: str) -> Any:
    pipe = shapes.pipeline() if pipeline == "shapes" else DiffusionPipeline.from_pretrained(pipeline)
    pipe.to(device)
    if dtype != "fp32":
        pipe.to(DTYPES[dtype])
        pipe.vae.float()  # SDXL's overflows in half precision
    pipe.set_progress_bar_config(disable=True)
    return pipe


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

    Cases that the file holds already stay in it, so that several calls can fill one table.

    Raises:
        ValueError: A case has an option that its variant would pass over, or the file holds what was measured in
            another setting or on another machine.
    """
    for case in cases:
        case.check()
    pipe, texts, scenes = load(pipeline, prompts, count, device, dtype)
    judged = _judge(scenes) if scenes else None
    perceived = _perceive(texts) if not scenes else None
    document: dict[str, Any] = {
        "schema": 2,
        "kind": "quality",
        "note": "The i-th image of every row is from seed i and prompt i.",
        "machine": measure.machine(device),
        "device": device,
        "dtype": dtype,
        "pipeline": pipeline,
        "count": count,
        "steps": steps,
        "guidance": guidance,
        "prompts": texts,
    }
    document["rows"] = _earlier_rows(path, document, cases)
    if document["rows"]:
        document["size"] = measure.read(path)["size"]
    if judged:  # what the measures say of as many real images: the best that there is
        pixels = draw(scenes, SIDE) / 2 + 0.5
        document["real"] = judged(Images(pixels, pixels))
    stock: Images | None = None
    pictures = {}
    with tqdm(total=len(cases) * count, file=sys.stderr, leave=False) as bar:
        for case in cases:
            bar.set_postfix_str(case.title)
            torch.manual_seed(0)  # tomesd draws from the process's generator
            call = VARIANTS[case.variant](share(pipe.unet), case, steps)
            parts = []
            for first in range(0, count, batch):
                some = texts[first : first + batch]
                parts.append(generate(pipe, call, some, steps, guidance, first_seed=first, size=size))
                bar.update(len(parts[-1].latents))
            images = Images(torch.cat([p.latents for p in parts]), torch.cat([p.pixels for p in parts]))
            stock = stock or images
            row = {"case": asdict(case), "argv": sys.argv[1:], **compare(images, stock)}
            row |= judged(images) if judged else {}
            row |= perceived(images, stock) if perceived else {}
            document["rows"].append(row)
            document["rows"].sort(key=lambda row: row["case"]["variant"] != STOCK)  # stock first, whenever it was run
            if document.setdefault("size", list(images.pixels.shape[-2:])) != list(images.pixels.shape[-2:]):
                raise ValueError(f"json: {path} holds images of another size; give another file")
            pictures[case] = images.pixels[:keep]
            measure.write(path, document)
    return document, pictures


def _earlier_rows(path: Path, document: dict[str, Any], cases: Sequence[Case]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    earlier = measure.read(path)
    other = [name for name, value in document.items() if earlier.get(name) != value]
    if other:
        raise ValueError(f"json: {path} holds results of another {', '.join(other)}; give another file")
    return [row for row in earlier["rows"] if Case(**row["case"]) not in cases]


def add_times(path: Path, side: int, rounds: int, device: str = "cpu", dtype: str = "fp32") -> dict[str, Any]:
    """Time an eager call of the UNet, an image under guidance, for every row of the file; the rows take turns.

    Args:
        path: The file, to which the times are added; stock must be among its rows.
        side: Latents along a side. Images may be made at a size where merging saves little and timed at a larger one.
        rounds: Calls of each.
        device: Which need not be the one that the images were made on.
        dtype: A key of `DTYPES`.
    """
    document = measure.read(path)
    pipe = _open(document["pipeline"], device, dtype)
    given = example_inputs(pipe.unet, side, side, device=device, dtype=DTYPES[dtype])
    cases = [Case(**row["case"]) for row in document["rows"]]

    def make(case: Case) -> Callable[[], Tensor]:
        call = VARIANTS[case.variant](share(pipe.unet), case, document["steps"])
        return lambda: call(**given).sample

    runs = {str(case): partial(make, case) for case in cases}
    timed = measure.compare(runs, exact=None, rounds=rounds, device=device, title="speed")
    document["timed"] = {"latents": side, "device": device, "dtype": dtype}
    document["timed"] |= {"argv": sys.argv[1:], "machine": measure.machine(device)}
    for row, case in zip(document["rows"], cases, strict=True):
        row["ms"] = timed[str(case)].samples_ms
    measure.write(path, document)
    return document


def speedup(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> float:
    """Of a row over stock among the rows: the median over the rounds."""
    (stock,) = (other["ms"] for other in rows if other["case"]["variant"] == STOCK)
    ratios: list[float] = [slow / own for slow, own in zip(stock, row["ms"], strict=True)]
    return median(ratios)


def speed_range(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> tuple[float, float, float]:
    """The speed-up of a row over stock among the rows, and the least and the greatest of a round."""
    (stock,) = (other["ms"] for other in rows if other["case"]["variant"] == STOCK)
    ratios = [slow / own for slow, own in zip(stock, row["ms"], strict=True)]
    return speedup(row, rows), min(ratios), max(ratios)


def interval(values: Sequence[float], *, yes_or_no: bool = False) -> tuple[float, float, float]:
    """The mean and its 95 % confidence interval: the normal one, or Wilson's for what is 0 or 1."""
    mean, count, z = fmean(values), len(values), NormalDist().inv_cdf(0.975)
    if yes_or_no:
        middle = (mean + z * z / (2 * count)) / (1 + z * z / count)
        half = z / (1 + z * z / count) * (mean * (1 - mean) / count + z * z / (4 * count * count)) ** 0.5
        return mean, middle - half, middle + half
    half = z * stdev(values) / count**0.5 if count > 1 else math.nan
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Column:
    """How a measure is shown.

    Args:
        head: What stands above it.
        form: Of a number.
        of_pair: Whether it compares with stock, for which it says nothing then.
        yes_or_no: Whether it is 0 or 1 for an image.
    """

    head: str
    form: str
    of_pair: bool = True
    yes_or_no: bool = False

    def cell(self, values: list[float] | list[None] | str | None) -> str:
        """The mean and its interval, why there is none, or nothing."""
        if values is None or isinstance(values, str):
            return values or ""
        numbers = [value for value in values if value is not None]
        if len(numbers) < len(values):  # an image like stock's has no PSNR, and the mean has none either
            return ""
        mean, low, high = map(self.form.format, interval(numbers, yes_or_no=self.yes_or_no))
        return f"{mean} ({low} - {high})"


COLUMNS = {
    "psnr": Column("PSNR, dB", "{:.1f}"),
    "ssim": Column("SSIM", "{:.3f}"),
    "latent_error": Column("latent error", "{:.3f}"),
    "right": Column("captions right", "{:.0%}", of_pair=False, yes_or_no=True),
    "counted": Column("count right", "{:.0%}", of_pair=False, yes_or_no=True),
    "lpips": Column("LPIPS", "{:.3f}"),
    "clip_score": Column("CLIP score", "{:.1f}", of_pair=False),
}


def table(document: dict[str, Any]) -> str:
    """Means with their 95 % confidence intervals, and speed-ups with their range; real images first, where judged."""
    rows = document["rows"]
    present = [name for name in COLUMNS if name in rows[0]]
    lines = []
    for row in rows if "real" not in document else [document["real"], *rows]:
        case = Case(**row["case"]) if "case" in row else None
        exact = case is None or case.variant == STOCK
        line = ["real images" if case is None else f"`{case.variant}`"]
        line += ["", "", ""] if case is None or exact else [f"{case.ratio:g}", case.scope, _levels(case)]
        line += [COLUMNS[name].cell(None if exact and COLUMNS[name].of_pair else row[name]) for name in present]
        line.append(f"{row['frechet']:.2f}" if "frechet" in row else "")
        speed = speed_range(row, rows) if "timed" in document and not exact else None
        lines.append([*line, "{:.2f}x ({:.2f} - {:.2f})".format(*speed) if speed else ""])
    heads = ["variant", "ratio", "scope", "levels", *(COLUMNS[name].head for name in present)]
    heads += ["Fréchet distance", "speed-up (range)"]
    return tabulate(lines, heads, tablefmt="github", disable_numparse=True)


def _levels(case: Case) -> str:
    return str(case.max_downsample or "finest")


# what the two rows of a pair have that is not the same: the first minus the second is told
QUESTIONS: tuple[tuple[str, dict[str, str], dict[str, str]], ...] = (
    ("`tome_fx` - `tomesd`", {"variant": "tome_fx"}, {"variant": "tomesd"}),
    ("`top-left` - `tome_fx`", {"variant": "top-left"}, {"variant": "tome_fx"}),
    ("`each-step` - `tome_fx`", {"variant": "each-step"}, {"variant": "tome_fx"}),
    ("`one-match` - `tome_fx`", {"variant": "one-match"}, {"variant": "tome_fx"}),
    ("`prop_attn` - `tome_fx`", {"variant": "prop_attn"}, {"variant": "tome_fx"}),
    ("attn+crossattn - attn", {"variant": "tome_fx", "scope": "attn+crossattn"}, {"scope": "attn"}),
    ("all - attn", {"variant": "tome_fx", "scope": "all"}, {"scope": "attn"}),
)


def paired(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """The mean of the first minus the second, image by image, and its 95 % confidence interval.

    What an image owes to its prompt and seed is in both and falls out, so that it is far narrower than either's own.
    """
    return interval([a - b for a, b in zip(first, second, strict=True)])


def differences(document: dict[str, Any]) -> str:
    """A table of the paired differences in PSNR and latent error that `QUESTIONS` asks for, where both rows are there.

    A difference whose interval holds 0 may be chance.
    """
    rows = {Case(**row["case"]): row for row in document["rows"]}
    lines = []
    for title, mine, theirs in QUESTIONS:
        for case, row in rows.items():
            other = rows.get(replace(case, **theirs))  # type: ignore[arg-type]
            asked = all(getattr(case, name) == value for name, value in mine.items())
            if not asked or other is None or None in row["psnr"] + other["psnr"]:
                continue
            line = [title, f"{case.ratio:g}", "" if "scope" in mine else case.scope, _levels(case)]
            for name, form in (("psnr", "{:+.2f}"), ("latent_error", "{:+.3f}")):
                mean, low, high = map(form.format, paired(row[name], other[name]))
                line.append(f"{mean} ({low} to {high})")
            lines.append(line)
    heads = ["difference", "ratio", "scope", "levels", "PSNR, dB", "latent error"]
    return tabulate(lines, heads, tablefmt="github", disable_numparse=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench quality`."""
    parser.add_argument("--pipeline", default="shapes", help="shapes, or the folder of a pipeline with a UNet")
    parser.add_argument("--variant", nargs="+", choices=list(VARIANTS)[1:], default=["tome_fx", "tomesd"])
    parser.add_argument("--ratio", nargs="+", type=float, default=[0.25, 0.5, 0.75])
    parser.add_argument("--scope", nargs="+", choices=SCOPES, default=["attn"])
    parser.add_argument(
        "--max-downsample", type=int, choices=(1, 2, 4, 8), help="levels to merge at; finest if not given"
    )
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
    parser.add_argument("--map", type=Path, help="only write this PNG: what the first ratio merges in the first image")


def write_map(arguments: argparse.Namespace) -> None:
    """What `--map` asks for."""
    a = arguments
    pipe, texts, _ = load(a.pipeline, a.prompts, 1, a.device, a.dtype)
    case = Case("tome_fx", a.ratio[0], a.scope[0], a.max_downsample)
    pipe.unet = VARIANTS["tome_fx"](pipe.unet, case, a.steps)
    viz.merge_maps(a.map, pipe, texts[0], steps=a.steps, guidance=a.guidance)
    print(f"written to {a.map}")


def main(arguments: argparse.Namespace) -> None:
    """Run `python -m bench quality`."""
    a = arguments
    products = itertools.product(a.variant, a.scope, a.ratio)
    cases = [Case(), *(Case(variant, ratio, scope, a.max_downsample) for variant, scope, ratio in products)]
    if a.map:
        write_map(a)
        return
    if a.time:
        print(table(add_times(a.json, a.time, ROUNDS, a.device, a.dtype)))
        return
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
        viz.grid(a.grid, {case.title: list(images) for case, images in pictures.items()}, document["prompts"][:4])
    print(f"{document['note']}\n\n{table(document)}\n\nwritten to {a.json}")

"""The tables of `python -m bench quality`: means, paired differences and speed-ups, each with its interval or range."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import Any

from bench import markdown
from bench.cases import ROUNDED, STOCK, Case, told
from bench.measure import ratios
from bench.suites import BESIDE, POINTS, QUESTIONS, YARDSTICK


def speed_range(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> tuple[float, float, float] | None:
    """The speed-up of a row over stock among the rows: the median over the rounds, the least and the greatest."""
    (stock,) = (other["ms"] for other in rows if other["case"]["variant"] == STOCK)
    return ratios(stock, row["ms"])


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
    models = list(rows[0]["flops_saved"])
    lines = []
    for row in rows if "real" not in document else [document["real"], *rows]:
        case = Case.read(row["case"]) if "case" in row else None
        exact = case is None or case.variant == STOCK
        line = ["real images" if case is None else f"`{case.variant}`"]
        line += ["", ""] if case is None or exact else _merging(case)
        line.append("" if case is None or exact else " / ".join(f"{row['flops_saved'][name]:.1%}" for name in models))
        line += [COLUMNS[name].cell(None if exact and COLUMNS[name].of_pair else row[name]) for name in present]
        line.append(f"{row['frechet']:.2f}" if "frechet" in row else "")
        speed = speed_range(row, rows) if "timed" in document and not exact else None
        lines.append([*line, "{:.2f}x ({:.2f} - {:.2f})".format(*speed) if speed else ""])
    heads = ["variant", "ratio", "options", f"FLOPs saved: {' / '.join(models)}"]
    heads += [*(COLUMNS[name].head for name in present), "Fréchet distance", "speed-up (range)"]
    return markdown.without_empty(lines, heads)


def points(document: dict[str, Any]) -> str:
    """What we advise, beside the yardstick and what others and 0.1 do: FLOPs saved, and how far an image moves."""
    rows = {Case.read(row["case"]): row for row in document["rows"]}
    lines = []
    for name, case in (POINTS | {f"`{case.variant}`": case for case in (YARDSTICK, *BESIDE)}).items():
        merging = ", ".join(filter(None, _merging(case)))
        saved = ["" if case == YARDSTICK else f"{rows[case]['flops_saved'][model]:.0%}" for model in ("sd15", "sdxl")]
        lines.append([name, merging, *saved, COLUMNS["psnr"].cell(rows[case]["psnr"])])
    heads = ["", "ratio, options", "FLOPs saved, SD 1.5 at 1024 px", "SDXL at 1024 px", COLUMNS["psnr"].head]
    return markdown.table(lines, heads)


def _merging(case: Case) -> list[str]:
    """A case's ratio and its options; of stock in half precision what it is there for."""
    if case.variant in ROUNDED:
        return ["", ROUNDED[case.variant]]
    return [case.ratios_told, told(case.options)]


def paired(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """The mean of the first minus the second, image by image, and its 95 % confidence interval.

    What an image owes to its prompt and seed is in both and falls out, so that it is far narrower than either's own.
    """
    return interval([a - b for a, b in zip(first, second, strict=True)])


def differences(document: dict[str, Any]) -> str:
    """A table of the paired differences in PSNR and latent error that `QUESTIONS` asks for, where both rows are there.

    A difference whose interval holds 0 may be chance.
    """
    rows = {Case.read(row["case"]): row for row in document["rows"]}
    lines = []
    for title, first, second in QUESTIONS:
        if first not in rows or second not in rows or None in rows[first]["psnr"] + rows[second]["psnr"]:
            continue
        line = [title, first.ratios_told, second.ratios_told]
        for name, form in (("psnr", "{:+.2f}"), ("latent_error", "{:+.3f}")):
            mean, low, high = map(form.format, paired(rows[first][name], rows[second][name]))
            line.append(f"{mean} ({low} to {high})")
        lines.append(line)
    heads = ["difference", "ratio", "and of the other", "PSNR, dB", "latent error"]
    return markdown.table(lines, heads)

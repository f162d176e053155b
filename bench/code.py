"""`python -m bench code`: what a compiled site launches on a GPU and what that is estimated to take; needs no GPU.

NOTE [Estimates]
Every time here is estimated: each step of Inductor's schedule takes as long as the slowest of its bytes, its FLOPs and
a launch, at the shares of a card's peaks below, which published measurements reach. Steps follow one another as in a
CUDA graph. A sort of ATen's is many kernels, and counts as such. It is right enough to tell what pays from what does
not, and not to compare things that are close.
"""

import argparse
import ast
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import documents, markdown, models
from bench.cards import CARDS, Card
from bench.cases import STOCK
from bench.cuda_code import Code, Kernel, build, unavailable, worker, write
from bench.sites import FORMS, levels, transformer

NOTE = (
    "Read from the code that Inductor writes for the card, and compiled by ptxas; no GPU ran any of it. "
    "**All times are estimated**, not measured."
)
LAUNCH = 2.5e-6  # seconds of the smallest kernel in a CUDA graph, with the gap before the next
MEMORY, CACHED = 0.8, 1.4  # of the bandwidth; the latter for a step whose bytes fit in half of the second-level cache
PRODUCT = 0.5  # of the peak FLOPs, as are those of attention's kernels
ATTENTION = {"flash": 0.5, "cudnn": 0.5, "efficient": 0.35}
SORT = 12  # launches of ATen's sort of a row of at most 4096; of a longer one, 22
STOCKS = ("mm", "addmm", "convolution")  # products that a stock model has as well


def estimate(code: Code, card: Card, *, tokens: int) -> dict[str, float]:
    """Microseconds, estimated: see NOTE [Estimates].

    Args:
        code: What is run.
        card: On what.
        tokens: Of the grid, for the sorts.

    Returns:
        "model" is what merging shortens, attention and the products that a stock model has as well; "rest" is all else.
    """
    result = {"model": 0.0, "rest": 0.0}
    for node in code.nodes:
        attention = next((share for kernel, share in ATTENTION.items() if f"_{kernel}_attention" in node.call), None)
        launches = (SORT if tokens <= 4096 else 22) if node.call == "sort" else 1
        bandwidth = card.bandwidth * (CACHED if node.bytes < card.cache / 2 else MEMORY)
        flops = card.flops * (attention or PRODUCT)
        kind = "model" if attention or node.call in STOCKS else "rest"
        result[kind] += 1e6 * max(LAUNCH * launches, node.bytes / bandwidth, node.flops / flops)
    return {kind: round(time, 1) for kind, time in result.items()}


def counted(code: Code) -> dict[str, Any]:
    """What is launched, and what stands in the way of launching it at once.

    The numbers of a row: `triton` launches, calls by name in `gemm` and `aten`, and `largest` in bytes; see `Code`.
    """
    return {
        "triton": len(code.triton),
        "gemm": dict(sorted(Counter(code.gemm).items())),
        "aten": dict(sorted(Counter(code.aten).items())),
        "others": list(code.others),
        "devices": list(code.devices),
        "obstacles": list(code.obstacles),
        "largest": code.largest,
    }


def best(kernels: list[Kernel]) -> list[Kernel]:
    """Of each kernel the configuration that spills least, then the one with fewest registers."""
    result: dict[str, Kernel] = {}
    for kernel in sorted(kernels, key=lambda kernel: (kernel.spilled, kernel.registers)):
        result.setdefault(kernel.name, kernel)
    return list(result.values())


def launches(row: Mapping[str, Any]) -> int:
    """All launches of a row, counting a call as one."""
    return int(row["triton"] + sum(row["gemm"].values()) + sum(row["aten"].values()) + len(row["others"]))


def run(
    name: str, resolution: int, batch: int, cards: list[str], forms: Mapping[str, Any], ratio: float, path: Path
) -> dict[str, Any]:
    """Write, read and compile each form of each level for each card; the JSON is written after each."""
    document = documents.new(
        "code",
        note=NOTE,
        **documents.origin("cpu"),
        model=name,
        resolution=resolution,
        batch=batch,
        ratio=ratio,
        cards={card: CARDS[card].name for card in cards},
        forms=dict(forms),
        levels=[],
    )
    found = levels(name, resolution, batch)
    with tqdm(total=len(cards) * len(found) * (len(forms) + 1), file=sys.stderr, leave=False) as bar:
        for card in cards:
            with worker(card) as process:
                for level in found:
                    rows: dict[str, Any] = {}
                    document["levels"].append({"card": card, **asdict(level), "rows": rows})
                    tokens = level.image[-2] * level.image[-1]
                    for form, options in {STOCK: None, **forms}.items():
                        bar.set_postfix_str(f"{card} {tokens} tokens {form}")
                        options = None if options is None else {"ratio": ratio, **options}
                        code = process.submit(write, transformer, name, level, options).result()
                        kernels = best(process.submit(build, code).result())
                        rows[form] = counted(code) | {
                            "registers": max(kernel.registers for kernel in kernels),
                            "spilled": max(kernel.spilled for kernel in kernels),
                            "estimated_us": estimate(code, CARDS[card], tokens=tokens),
                        }
                        documents.write(path, document)
                        bar.update()
    return document


def table(document: dict[str, Any]) -> str:
    """Each form beside stock's, where it changes anything."""
    lines = []
    for level in document["levels"]:
        (_, channels, height, width), rows = level["image"], level["rows"]
        for form, row in rows.items():
            stock = rows[STOCK]
            if row is not stock and row == stock:
                continue
            added = Counter(row["gemm"]) + Counter(row["aten"])
            added.subtract(stock["gemm"] | stock["aten"])
            gained = stock["estimated_us"]["model"] - row["estimated_us"]["model"]
            paid = row["estimated_us"]["rest"] - stock["estimated_us"]["rest"]
            lines.append(
                [
                    level["card"],
                    f"{height} x {width}, {channels}, {level['blocks']}",
                    form,
                    launches(row) if row is stock else f"{launches(row) - launches(stock):+d}",
                    "" if row is stock else ", ".join(f"{n:+d} {call}" for call, n in sorted(added.items()) if n),
                    f"{row['largest'] / 1e6:.0f}",
                    f"{row['registers']}, {row['spilled']}",
                    f"{sum(row['estimated_us'].values()):.0f}",
                    *(["", "", ""] if row is stock else [f"{gained:.0f}", f"{paid:.0f}", f"{gained - paid:+.0f}"]),
                ]
            )
    heads = [
        "card",
        "grid, channels, blocks",
        "form",
        "launches",
        "calls",
        "largest tensor, MB",
        "registers, spilled B",
    ]
    heads += [f"{what}, µs, *estimated*" for what in ("all", "gained", "paid", "net")]
    return markdown.table(lines, heads)


def options(text: str) -> tuple[str, Any]:
    """An option of `transform` as `name=value`, the value as in Python."""
    name, _, value = text.partition("=")
    return name, ast.literal_eval(value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench code`."""
    parser.add_argument("--model", default="sd15", help=f"{', '.join(models.CONFIGS)} or a diffusers folder")
    parser.add_argument("--resolution", type=int, default=512, help="pixels along a side")
    parser.add_argument("--batch", type=int, default=2, help="the UNet's, guidance included")
    parser.add_argument("--card", nargs="+", choices=CARDS, default=["sm_80", "sm_90"])
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--form", nargs="*", choices=FORMS, default=list(FORMS), help="what is merged how")
    parser.add_argument(
        "--options", nargs="+", type=options, default=[], metavar="NAME=VALUE", help="of transform: one more form"
    )
    parser.add_argument("--json", type=Path, default=Path("out/code.json"))


def main(arguments: argparse.Namespace) -> None:
    """Run `python -m bench code`."""
    a = arguments
    if reason := unavailable():
        raise SystemExit(f"no CUDA code can be written here: {reason}")
    forms = {form: FORMS[form] for form in a.form}
    if a.options:
        forms[", ".join(f"{name}={value}" for name, value in a.options)] = dict(a.options)
    print(NOTE, table(run(a.model, a.resolution, a.batch, a.card, forms, a.ratio, a.json)), sep="\n\n")

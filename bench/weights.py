"""`python -m bench weights`: attention with a weight for each key, in each form of `bench.attention`, beside none."""

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench import documents, markdown, measure, warm
from bench.attention import FORMS, HEADS, PLAIN, WIDTHS, kernel, weight_rows
from bench.models import DTYPES

NOTE = (
    "Attention of as many queries as keys, compiled, with a weight for each key that is the same for all queries and "
    "heads. The kernel is the one that torch itself says it takes on the device."
)
TOKENS = (2048, 8192)  # what a ratio of 0.5 leaves of 64 x 64 and of 128 x 128
ROUNDS = 20


@dataclass(frozen=True)
class Cell:
    """What all forms are measured on.

    Args:
        width: Channels of a head.
        tokens: Queries, and keys.
        batch: Images.
    """

    width: int
    tokens: int
    batch: int = 2
    dtype: str = "fp32"
    device: str = "cpu"

    def __str__(self) -> str:
        """Its name in a progress bar."""
        return f"heads of {self.width}, {self.tokens} tokens"


def example(cell: Cell) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Seeded queries, keys, values and weights of a cell."""
    generator = torch.Generator().manual_seed(0)
    shape = (cell.batch, HEADS, cell.tokens, cell.width)
    device, dtype = cell.device, DTYPES[cell.dtype]
    query, key, value = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    sizes = torch.randint(1, 5, (cell.batch, cell.tokens), generator=generator)
    return query, key, value, weight_rows(sizes.log().to(device, dtype))


def run(cells: Sequence[Cell], path: Path, rounds: int = ROUNDS) -> dict[str, Any]:
    """Measure the cells that the file does not hold yet, write them into it, and return its content."""
    document = documents.read(path) if path.exists() else documents.new("weights", note=NOTE, cells=[])
    for cell in left(cells, path):
        inputs = example(cell)
        rows = measure.compare(
            {form: partial(_call, form, inputs) for form in FORMS},
            exact={form: form != PLAIN for form in FORMS},
            rounds=rounds,
            device=cell.device,
            title=str(cell),
        )
        kernels = {form: kernel(form, inputs) for form in FORMS}
        entry = {"cell": asdict(cell), **documents.origin(cell.device)}
        document["cells"].append(entry | {"kernels": kernels, "rows": measure.as_json(rows)})
        documents.write(path, document)
    return document


def left(cells: Sequence[Cell], path: Path) -> list[Cell]:
    """Those that the file does not hold."""
    held = [Cell(**entry["cell"]) for entry in documents.read(path)["cells"]] if path.exists() else []
    return [cell for cell in cells if cell not in held]


def _call(form: str, inputs: tuple[Tensor, ...]) -> warm.Call:
    compiled: Callable[..., Tensor] = torch.compile(FORMS[form], fullgraph=True)
    return lambda: compiled(*inputs)


def table(document: dict[str, Any]) -> str:
    """The forms of a cell below each other; ratios are taken within each round."""
    lines = []
    for entry in document["cells"]:
        cell, rows = Cell(**entry["cell"]), entry["rows"]
        for form, row in rows.items():
            samples = row["samples_ms"]
            over = measure.ratios(samples, rows[PLAIN]["samples_ms"])
            lines.append(
                [
                    cell.width,
                    cell.tokens,
                    form,
                    entry["kernels"][form],
                    f"{median(samples):.3f}" if samples else row["error"],
                    "{:.2f}x ({:.2f} - {:.2f})".format(*over) if over and form != PLAIN else "",
                    f"{row['peak_memory'] / 2**30:.2f}" if row["peak_memory"] else "",
                ]
            )
    heads = ["channels of a head", "tokens", "weights as", "kernel", "ms (median)", f"over {PLAIN} (range)", "GiB"]
    return markdown.table(lines, heads)


def cells(tokens: Sequence[int], widths: Sequence[int] = WIDTHS, **common: Any) -> list[Cell]:
    """All combinations, with what is common to them."""
    return [Cell(width, count, **common) for width, count in itertools.product(widths, tokens)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench weights`."""
    cuda = torch.cuda.is_available()
    parser.add_argument("--width", nargs="+", type=int, default=list(WIDTHS), help="channels of a head")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), help="queries, and as many keys")
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16" if cuda else "fp32")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed calls of each form")
    parser.add_argument("--json", type=Path, default=Path("out/weights.json"), help="a file that is there is continued")


def main(arguments: argparse.Namespace) -> None:
    """Run `python -m bench weights`."""
    a = arguments
    asked = cells(a.tokens, a.width, batch=a.batch, dtype=a.dtype, device=a.device)
    document = run(asked, a.json, a.rounds)
    print(NOTE, table(document), f"written to {a.json}", sep="\n\n")

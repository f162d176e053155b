"""`python -m bench weights`: attention with a weight for each key, in the forms that say so, beside attention without.

What merged tokens weigh is added to the scores of their keys: by a mask, by one more channel, or by a function of the
score. Which kernels take that depends on the form. This is what each costs on the device at hand.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import flex_attention
from torch.overrides import TorchFunctionMode

from bench import documents, measure
from bench.cards import CARDS, attention_kernel
from bench.cuda_code import TORCH
from bench.models import DTYPES
from tome_fx.families.weights import FLASH_WIDTHS, attend_by_channel
from tome_fx.ops.merging import ALIGNED

NOTE = (
    "Attention of as many queries as keys, compiled, with a weight for each key that is the same for all queries and "
    "heads. The kernel is the one that torch itself says it takes on the device."
)
HEADS = 8
WIDTHS = (40, 64, 80, 160)  # of Stable Diffusion 1's heads, and 64 of later models'
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


def plain(query: Tensor, key: Tensor, value: Tensor, weights: Tensor) -> Tensor:
    """No weights."""
    return F.scaled_dot_product_attention(query, key, value)


def by_mask(query: Tensor, key: Tensor, value: Tensor, weights: Tensor) -> Tensor:
    """Weights as a mask, as diffusers' processor takes it: for every head, and expanded to every query by torch."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=weights)


def by_score(query: Tensor, key: Tensor, value: Tensor, weights: Tensor) -> Tensor:
    """Weights as FlexAttention's change of a score."""
    row = weights[:, 0, 0]

    def score(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + row[b, k]

    result = flex_attention(query, key, value, score_mod=score)
    assert isinstance(result, Tensor)
    return result


PLAIN = "no weights"
# All take queries, keys and values [B, H, L, E] and weights [B, H, 1, L].
FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    PLAIN: plain,
    "mask": by_mask,
    "channel": attend_by_channel,
    "FlexAttention": by_score,
}


class Calls(TorchFunctionMode):
    """Notes what each call of scaled_dot_product_attention within is given, and computes none."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[Sequence[Any], dict[str, Any]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.given.append((args, kwargs))
        return args[2]


def given(form: str, inputs: Sequence[Tensor]) -> tuple[Sequence[Any], dict[str, Any]] | None:
    """What scaled_dot_product_attention is given in this form, or None for FlexAttention, which writes its own."""
    if FORMS[form] is by_score:
        return None
    with Calls() as calls:
        FORMS[form](*inputs)
    ((args, options),) = calls.given
    return args, options


def kernel(form: str, inputs: Sequence[Tensor]) -> str:
    """The kernel that torch says it takes on the device of the inputs."""
    asked = given(form, inputs)
    if asked is None:
        return "its own"
    choice = torch._fused_sdp_choice(*asked[0], **asked[1])
    return str(SDPBackend(choice).name.lower().removesuffix("_attention"))


def example(cell: Cell) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Seeded queries, keys, values and weights, whose rows are aligned as those of `tome_fx` are."""
    generator = torch.Generator().manual_seed(0)
    shape = (cell.batch, HEADS, cell.tokens, cell.width)
    device, dtype = cell.device, DTYPES[cell.dtype]
    query, key, value = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    sizes = torch.randint(1, 5, (cell.batch, 1, 1, cell.tokens), generator=generator).log()
    rows = F.pad(sizes.expand(-1, HEADS, -1, -1), (0, ALIGNED - cell.tokens % ALIGNED)).to(device, dtype)
    return query, key, value, rows[..., : cell.tokens]


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


def _call(form: str, inputs: tuple[Tensor, ...]) -> measure.Call:
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
    return tabulate(lines, heads, tablefmt="github", disable_numparse=True)


def cells(tokens: Sequence[int], widths: Sequence[int] = WIDTHS, **common: Any) -> list[Cell]:
    """All combinations, with what is common to them."""
    return [Cell(width, count, **common) for width, count in itertools.product(widths, tokens)]


def chosen() -> str:
    """Which kernel torch takes for attention without weights and with them, by card: from `bench.cards`."""
    forms = [form for form, function in FORMS.items() if function is not by_score]
    lines = []
    for (name, card), width in itertools.product(CARDS.items(), WIDTHS):
        line = [f"{name}, {card.name}", str(width)]
        for form in forms:
            asked = given(form, example(Cell(width, TOKENS[0], dtype="fp16", device="meta")))
            assert asked is not None
            (query, key, value), options = asked
            found = attention_kernel(card, query, key, value, options.get("attn_mask"))
            made_for = next(w for w in FLASH_WIDTHS if w >= query.shape[-1])
            line.append(f"{found}, made for {made_for}" if found == "flash" else found)
        lines.append(line)
    setting = (
        f"As torch {TORCH} decides for half precision without gradients, read from its source: no card was asked. "
        "Flash is made for heads of some widths, and others run as the next of these."
    )
    heads = ["card", "channels of a head", *forms]
    return "\n\n".join([setting, tabulate(lines, heads, tablefmt="github", disable_numparse=True)])


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

"""Where latency is measured: a cell is a table, a suite many cells."""

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from bench.cases import Options, options, told
from bench.runs import RUNS


@dataclass(frozen=True)
class Cell:
    """A table: what all of its rows are measured on.

    Args:
        resolution: Pixels along a side of the image.
        batch: Images. The UNet sees twice as many under classifier-free guidance.
        ratio: Of the rows that heed it.
        options: Of the rows that heed them; those that they have of their own come before.
        guidance: Whether it does.
        end_to_end: Whether a sample is a whole image, through pipeline, scheduler and VAE.
    """

    model: str
    resolution: int
    batch: int = 1
    ratio: float = 0.5
    options: Options = ()
    dtype: str = "fp32"
    device: str = "cpu"
    mode: str = "default"
    guidance: bool = True
    end_to_end: bool = False

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> "Cell":
        """What `stored` gave."""
        return cls(**{**stored, "options": options(**stored["options"])})

    def stored(self) -> dict[str, Any]:
        """Itself for a JSON."""
        return asdict(self) | {"options": dict(self.options)}

    @property
    def unet_batch(self) -> int:
        """Images that the UNet sees in one call."""
        return self.batch * (2 if self.guidance else 1)

    @property
    def merging(self) -> str:
        """Its ratio and options, in words."""
        return ", ".join(filter(None, [f"ratio {self.ratio:g}", told(self.options)]))

    def __str__(self) -> str:
        """Its name in a progress bar."""
        return f"{self.model} {self.resolution}px b{self.batch} {self.dtype} {self.merging}"


@dataclass(frozen=True)
class Task:
    """A cell, the rows of `RUNS` that are measured on it and in how many rounds."""

    cell: Cell
    names: tuple[str, ...] = tuple(RUNS)
    rounds: int = 10


# What attention writes out is beyond a laptop's memory where images are large, and nobody runs it so today
FUSED = tuple(name for name, run in RUNS.items() if run.fused)
# What a second dtype is shown by: stock, ours and peers, eager and compiled, and the floor
FEW = ("sdpa", "tomesd+sdpa", "compile", "tome_fx", "tome_fx+compile", "oracle+compile", "todo+compile")
COMPILED = ("compile", "tome_fx+compile", "tome_fx+blocks+compile")
ALL_OF_A_GPU = ("sdpa", "tomesd+sdpa", "v0.1+compile", *COMPILED, "tome_fx+kv+compile", "oracle+compile")


def suite(name: str, device: str) -> list[Task]:
    """The suites: see `python -m bench latency --help`."""
    half = "fp16" if device != "cpu" else "fp32"
    if name == "smoke":
        return [Task(Cell("tiny", 256, device=device), ("sdpa", "compile", "tome_fx", "tome_fx+compile"), 3)]
    if name == "cpu":
        return [
            Task(Cell(model, side, dtype=dtype, guidance=False), rows, rounds)
            for model, of_sides in (("tiny", (6, 6, 6)), ("sd15", (6, 4, 3)))
            for dtype, rows in (("fp32", FUSED), ("bf16", FEW))
            for side, rounds in zip((512, 768, 1024), of_sides, strict=True)
        ]
    if name == "seed":
        grid = itertools.product((512, 768, 1024), (1, 2, 4, 8, 10))
        return [Task(Cell("sd15", side, batch, dtype=half, device=device)) for side, batch in grid]
    model = partial(Cell, dtype=half, device=device)
    by_blocks = partial(model, mode="regional")  # whole they take minutes to compile
    return [
        Task(model("sd15", 1024), ALL_OF_A_GPU),
        Task(model("sd15", 2048), ("sdpa", *COMPILED)),
        Task(model("sd15", 512), COMPILED),
        Task(by_blocks("sdxl", 2048), COMPILED),
        Task(model("sd15", 512, mode="reduce-overhead"), COMPILED),
        Task(model("sd35-medium", 1024, dtype="bf16"), COMPILED),  # in fp16 its random weights overflow
        Task(by_blocks("sdxl", 1024), ("sdpa", *COMPILED)),
    ]


SUITES = ("seed", "gpu", "cpu", "smoke")

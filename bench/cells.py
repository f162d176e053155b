"""Where latency is measured: a cell is a table, a suite many cells."""

import itertools
from dataclasses import dataclass

from bench.cases import SCOPES
from bench.runs import RUNS


@dataclass(frozen=True)
class Cell:
    """A table: what all of its rows are measured on.

    Args:
        resolution: Pixels along a side of the image.
        batch: Images. The UNet sees twice as many under classifier-free guidance.
        ratio: Of the rows that heed it, as is `scope`; `FIXED` has those that do not.
        guidance: Whether it does.
        end_to_end: Whether a sample is a whole image, through pipeline, scheduler and VAE.
    """

    model: str
    resolution: int
    batch: int = 1
    ratio: float = 0.5
    scope: str = "attn"
    dtype: str = "fp32"
    device: str = "cpu"
    mode: str = "default"
    guidance: bool = True
    end_to_end: bool = False

    @property
    def unet_batch(self) -> int:
        """Images that the UNet sees in one call."""
        return self.batch * (2 if self.guidance else 1)

    def __str__(self) -> str:
        """Its name in a progress bar."""
        return f"{self.model} {self.resolution}px b{self.batch} r{self.ratio} {self.scope}"


@dataclass(frozen=True)
class Suite:
    """A set of cells with the rows of `RUNS` and the rounds they are measured with."""

    cells: tuple[Cell, ...]
    variants: tuple[str, ...] = tuple(RUNS)
    rounds: int = 10


def suite(name: str, device: str) -> Suite:
    """The suites: see `python -m bench latency --help`."""
    half = "fp16" if device != "cpu" else "fp32"
    if name == "smoke":
        return Suite((Cell("tiny", 256, device=device),), ("sdpa", "compile", "tome_fx", "tome_fx+compile"), 3)
    if name == "cpu":
        return Suite((Cell("tiny", 512, guidance=False), Cell("sd15", 512, guidance=False)), rounds=6)
    if name == "seed":
        grid = itertools.product((512, 768, 1024), (1, 2, 4, 8, 10))
        return Suite(tuple(Cell("sd15", side, batch, dtype=half, device=device) for side, batch in grid))
    sizes = [("sd15", side) for side in (512, 768, 1024, 1536, 2048)] + [("sdxl", side) for side in (1024, 1536, 2048)]
    options = [(ratio, "attn") for ratio in (0.25, 0.5, 0.75)] + [(0.5, scope) for scope in SCOPES if scope != "attn"]
    return Suite(
        tuple(
            Cell(model, side, ratio=ratio, scope=scope, dtype=half, device=device)
            for (model, side), (ratio, scope) in itertools.product(sizes, options)
        )
    )


SUITES = ("seed", "headline", "cpu", "smoke")

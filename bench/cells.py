"""What is measured: a cell is a place in a table of latencies, a case a row of one of quality, a suite many cells."""

import itertools
from dataclasses import dataclass
from typing import Any

from bench.variants import SCOPES, VARIANTS

STOCK = "stock"


@dataclass(frozen=True)
class Cell:
    """One place of a table: what all variants are measured on.

    Args:
        resolution: Pixels along a side of the image.
        batch: Images. The UNet sees twice as many under classifier-free guidance.
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


# What some variants do not let one choose; ToDo drops three of four keys and values, whatever the ratio
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


@dataclass(frozen=True)
class Suite:
    """A set of cells with the variants and rounds they are measured with."""

    cells: tuple[Cell, ...]
    variants: tuple[str, ...] = tuple(VARIANTS)
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

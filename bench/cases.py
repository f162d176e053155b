"""What is merged: a case is a variant and its options, and a row of a table of quality."""

from dataclasses import dataclass
from typing import Any

STOCK = "stock"
SCOPES = {
    "attn": {},
    "attn+crossattn": {"merge_crossattn": True},
    "all": {"merge_crossattn": True, "merge_mlp": True},
}
# What some variants do not let one choose; ToDo drops three of four keys and values, whatever the ratio
FIXED: dict[str, dict[str, Any]] = {
    STOCK: {"ratio": 0.0, "scope": "attn", "max_downsample": None},
    "tomesd": {"max_downsample": None},
    "todo": {"ratio": 0.75, "scope": "attn", "max_downsample": None},
}


@dataclass(frozen=True)
class Case:
    """What is merged, and by which of `bench.variants.VARIANTS`."""

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

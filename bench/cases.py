"""What is merged: a case is a variant, a ratio and options, and a row of a table of quality."""

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import tome_fx

STOCK = "stock"
ROUNDED = {  # stock again, in half precision: what is no further from stock than one of these is as good as exact
    "bf16": "a bf16 model is this far from an fp32 one",
    "fp16": "an fp16 model is this far from an fp32 one",
}
# What `tome_fx.transform` can be told besides the model and the ratio, each with its default
DEFAULTS = {name: p.default for name, p in signature(tome_fx.transform).parameters.items() if p.kind is p.KEYWORD_ONLY}
Options = tuple[tuple[str, Any], ...]


def options(**given: Any) -> Options:
    """Options of `tome_fx.transform` by their names, in one order; those that are its defaults are left out."""
    return tuple(sorted((name, value) for name, value in given.items() if (name, value) not in DEFAULTS.items()))


def told(given: Options) -> str:
    """Options in words, as a call has them."""
    return ", ".join(f"{name}={value!r}" for name, value in given)


@dataclass(frozen=True)
class Case:
    """What is merged.

    Args:
        variant: By what: a key of `bench.variants.VARIANTS`.
        ratio: Share of the tokens to remove.
        options: Of `tome_fx.transform`, from `options`.
        schedule: What the ratio changes to, each from a share of the steps on, in their order; before the first it is
            `ratio`. Empty where it stays.
    """

    variant: str = STOCK
    ratio: float = 0.0
    options: Options = ()
    schedule: tuple[tuple[float, float], ...] = ()

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> "Case":
        """What `stored` gave."""
        schedule = tuple((share, ratio) for share, ratio in stored["schedule"])
        return cls(stored["variant"], stored["ratio"], options(**stored["options"]), schedule)

    def stored(self) -> dict[str, Any]:
        """Itself for a JSON."""
        return {
            "variant": self.variant,
            "ratio": self.ratio,
            "options": dict(self.options),
            "schedule": [list(change) for change in self.schedule],
        }

    @property
    def ratios_told(self) -> str:
        """The ratio, and what it changes to, in words."""
        return ", ".join([f"{self.ratio:g}", *(f"{ratio:g} from {share:.0%}" for share, ratio in self.schedule)])

    @property
    def title(self) -> str:
        """A few words for a picture, other ones for each case."""
        return ", ".join(filter(None, [self.variant, f"ratio {self.ratios_told}", told(self.options)]))

    def ratios(self, steps: int) -> list[float]:
        """The ratio of each of so many steps, as a `tome_fx.RatioSchedule` has it."""
        changes = ((0.0, self.ratio), *self.schedule)
        return [next(ratio for share, ratio in reversed(changes) if share <= step / steps) for step in range(steps)]

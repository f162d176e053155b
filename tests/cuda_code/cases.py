"""What is compiled for cards, and how many launches each takes: `launches.json`.

`PYTHONPATH=tests python -m cuda_code.cases` counts and writes them all anew.
"""

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import models
from bench.cases import STOCK
from bench.code import counted
from bench.cuda_code import MODULE, Code, worker, write
from bench.sites import FORMS, Level, levels, transformer
from tome_fx import transform

TRANSFORMERS = ("pixart-shallow", "sd35-shallow", "flux-shallow", "qwen-shallow")
RECORD = Path(__file__).parent / "launches.json"


@dataclass(frozen=True)
class Case:
    """A form of merging in one place.

    Args:
        model: Of `bench.models.build`.
        form: Of `bench.sites.FORMS`, or stock.
        grid: The tokens of the model's finest transformer, rows and columns; None for the whole model at 256 px.
    """

    model: str
    form: str
    grid: tuple[int, int] | None

    def __str__(self) -> str:
        place = "whole" if self.grid is None else "{} x {}".format(*self.grid)
        return f"{self.model}, {place}, {self.form}"

    def order(self) -> tuple[Any, ...]:
        """The arguments of `bench.cuda_code.write`."""
        options = None if self.form == STOCK else {"ratio": 0.5, **FORMS[self.form]}
        if self.grid is None:
            return whole, self.model, options
        level = finest(self.model)
        return transformer, self.model, replace(level, image=(*level.image[:2], *self.grid)), options


@functools.cache
def finest(model: str) -> Level:
    """The model's finest transformer."""
    return levels(model, 512, 2)[0]


def whole(model: str, options: dict[str, Any] | None) -> MODULE:
    """A whole model, small enough for its size not to matter, and its arguments."""
    built = models.build(model, "cuda")
    inputs = models.inputs(built, 256, 2)
    return built if options is None else transform(built, **options), inputs


def cases(card: str) -> list[Case]:
    """What is compiled for the card: less for those that differ from another in little that matters here."""
    weighed_by_channel = (STOCK, "default", "whole grid", "dynamic ratio", "keys and values", "whole block")
    forms = {"sm_80": weighed_by_channel, "sm_89": (STOCK, "default"), "sm_90": (STOCK, *FORMS)}[card]
    result = [Case("sd15", form, (64, 64)) for form in forms]
    if card == "sm_80":
        result += [Case("sdxl", form, (64, 64)) for form in (STOCK, "default")]  # whose heads are of another width
    if card == "sm_90":
        result += [
            Case("sd15", form, (128, 128)) for form in (STOCK, "default")
        ]  # more than a sort of ATen's is quick for
        result += [Case("sd15", form, (52, 76)) for form in (STOCK, "default")]  # which no tile divides
        result += [Case("sdxl", form, (64, 64)) for form in (STOCK, "default", "whole block")]
        result += [Case("tiny", form, None) for form in (STOCK, "default")]
        result += [Case(model, form, None) for model in TRANSFORMERS for form in (STOCK, "default", "whole block")]
    return result


@contextmanager
def cards() -> Iterator[Callable[..., Any]]:
    """Calls a function in a process that passes for having a card: `run(card, function, *args)`."""
    with ExitStack() as stack:
        processes: dict[str, Any] = {}

        def run(card: str, function: Callable[..., Any], *args: Any) -> Any:
            if card not in processes:
                processes[card] = stack.enter_context(worker(card))
            return processes[card].submit(function, *args).result()

        yield run


def differences(recorded: dict[str, Any], code: Code) -> list[str]:
    """What is counted otherwise than it was recorded: more is worse, and less is to be recorded."""
    now = counted(code)
    return [f"{name}: recorded {recorded[name]}, now {now[name]}" for name in now if recorded[name] != now[name]]


def main() -> None:
    """Record all cases of all cards."""
    result: dict[str, dict[str, Any]] = {}
    with cards() as run:
        for card in ("sm_80", "sm_89", "sm_90"):
            result[card] = {}
            for case in cases(card):
                result[card][str(case)] = counted(run(card, write, *case.order()))
                print(card, case, result[card][str(case)], flush=True)
                RECORD.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

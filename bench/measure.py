"""How things are timed: in interleaved rounds, each beside the others."""

import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from bench.warm import Here, Makes, Row, Started, Timer, folder_of, reason

WRONG = 0.05  # relative: far above the rounding of half precision, far below an output that is another


def compare(
    runs: Makes | Mapping[str, Started],
    *,
    exact: Mapping[str, bool] | None,
    rounds: int,
    device: str,
    title: str,
    save: Callable[[dict[str, Row]], None] = lambda rows: None,
    kept: Path | None = None,
) -> dict[str, Row]:
    """Time variants in interleaved rounds, A B C A B C, so that a drift of the machine meets all of them alike.

    Args:
        runs: For each variant, what prepares it and returns the call to time, which returns its output; or itself,
            where it has started.
        exact: Whether a variant must give the output of the first exact one, up to rounding. None where the outputs
            have nothing to do with one another.
        rounds: Timed calls of each variant.
        device: "cpu" or "cuda".
        title: What the progress bar calls this cell.
        save: Called after the warm-up of each variant and after each round, with all rows so far.
        kept: A folder for what is compiled here: see NOTE [Compiled once]. None keeps nothing.

    Returns:
        The rows. A variant that fails has its reason in `error` and no samples, and the others go on.
    """
    rows: dict[str, Row] = {}
    timer = cache(Timer)  # which takes memory of the device, and only of what is timed here
    started = {
        name: run if isinstance(run, Started) else Here(run, timer(device), kept and kept / folder_of(name))
        for name, run in runs.items()
    }
    reference: torch.Tensor | None = None
    torch._dynamo.reset()  # the cells before are done with, and so is their share of the recompile limit
    gc.collect()
    with torch.no_grad(), tqdm(total=len(runs) * (rounds + 2), desc=title, file=sys.stderr, leave=False) as bar:
        for name, one in started.items():
            bar.set_postfix_str(f"warming up {name}")
            rows[name], output = one.warmed()
            if exact is not None and output is not None:
                try:
                    reference = _check(output, rows[name], reference, exact[name])
                except Exception as error:
                    rows[name].error = reason(error)
            if rows[name].error:
                one.close()
            save(rows)
            bar.update()
        for turn in range(rounds + 1):
            for name, one in started.items():
                if rows[name].error:
                    continue
                bar.set_postfix_str(name)
                try:
                    sample = one.sample()
                    if turn:  # the first brings back what the machine put away while the others compiled
                        rows[name].samples_ms.append(sample)
                except Exception as error:
                    rows[name].error, rows[name].samples_ms = reason(error), []
                    one.close()
                bar.update()
            save(rows)
    return rows


def _check(output: torch.Tensor, row: Row, reference: torch.Tensor | None, exact: bool) -> torch.Tensor | None:
    """Compare with the reference, and return it: the first output that is exact."""
    output = output.float().cpu()
    if not output.isfinite().all():
        raise ValueError("output is not finite")
    if reference is None and exact:
        reference = output
    if reference is not None:
        row.relative_error = float((output - reference).norm() / reference.norm())
        if exact and row.relative_error > WRONG:
            raise ValueError(f"wrong output: {row.relative_error:.2g} from the stock UNet's")
    return reference


def ratios(slow: Sequence[float], fast: Sequence[float]) -> tuple[float, float, float] | None:
    """How many times as long as `fast` `slow` takes, within each round: the median, the least and the greatest.

    None where no round has both.
    """
    found = [a / b for a, b in zip(slow, fast, strict=False)]
    return (median(found), min(found), max(found)) if found else None


def as_json(rows: Mapping[str, Row]) -> dict[str, Any]:
    """Rows as they are stored: raw samples, unrounded."""
    return {name: asdict(row) for name, row in rows.items()}

"""Tables of latencies. Every ratio is taken within a round, and the median of those ratios is shown."""

from statistics import median, quantiles
from typing import Any

from bench import markdown
from bench.measure import ratios
from bench.runs import RUNS

SEARCHES = ("whole grid", "tiles")  # what a token's destination is looked for in, and the columns of a breakdown
MERGING = ("match", "merge", "unmerge")


def table(entry: dict[str, Any]) -> str:
    """A cell's table: medians, and ratios taken within each round."""
    rows = entry["rows"]
    unit, scale = ("s/image", 1e-3) if entry["cell"]["end_to_end"] else ("ms", 1.0)
    lines = []
    for name, row in rows.items():
        samples = row["samples_ms"]
        if not samples:
            lines.append([name, row["error"] or "not measured"])
            continue
        spread = quantiles(samples, n=10) if len(samples) > 1 else samples * 9
        over_compile = speedup(rows, "compile", name)
        bound = entry["bounds"][name] if RUNS[name].merges else None
        lines.append(
            [
                name,
                _number(median(samples) * scale),
                f"{_number(spread[0] * scale)} - {_number(spread[-1] * scale)}",
                _times(speedup(rows, "vanilla", name)),
                _times(over_compile),
                _times(bound),
                share_of_bound(over_compile, bound),
                _percent(speedup(rows, name, "oracle+compile"), name),
                f"{row['first_s']:.1f}",
                row["compiles"]["graphs"],
                row["compiles"]["graph_breaks"],
                row["compiles"]["recompiles"],
                f"{row['peak_memory'] / 2**30:.2f}" if row["peak_memory"] else "",
            ]
        )
    heads = ["variant", f"{unit} (median)", "p10 - p90", "vs vanilla", "vs compile", "FLOP bound", "of the bound"]
    heads += ["over the oracle", "first call s", "graphs", "breaks", "recompiles", "GiB"]
    return markdown.without_empty(lines, heads)


def breakdown(rows: dict[str, Any]) -> str:
    """Milliseconds of the parts of a site, by what is searched; ratios and sums are taken within each round."""
    parts = {part: [rows[f"{part}, {search}"]["samples_ms"] for search in SEARCHES] for part in MERGING}
    parts["all three"] = [
        [sum(ms) for ms in zip(*samples, strict=False)] for samples in zip(*parts.values(), strict=True)
    ]
    parts |= {part: [rows[part]["samples_ms"]] for part in rows if part.startswith("attention")}
    lines = []
    for part, times in parts.items():
        over = ratios(*times) if len(times) > 1 else None
        lines.append([part, *(f"{median(ms):.2f}" if ms else "not measured" for ms in times), _times(over and over[0])])
    heads = ["part", *(f"{search}, ms (median)" for search in SEARCHES), " / ".join(SEARCHES)]
    return markdown.table(lines, heads)


def speedup(rows: dict[str, Any], slow: str, fast: str) -> float | None:
    """Median over the rounds of the time of `slow` over that of `fast` in the same round."""
    if slow not in rows or fast not in rows:
        return None
    found = ratios(rows[slow]["samples_ms"], rows[fast]["samples_ms"])
    return found and found[0]


def share_of_bound(over_compile: float | None, bound: float | None) -> str:
    """How much of what merging could save it saves: 100 % is a run time that fell as much as the FLOPs did."""
    if over_compile is None or bound is None or bound <= 1:
        return ""
    return f"{(over_compile - 1) / (bound - 1):.0%}"


def _number(value: float) -> str:
    """In four digits, or whole where it has more."""
    return f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _percent(ratio: float | None, name: str) -> str:
    return "" if ratio is None or not RUNS[name].merges else f"{ratio - 1:+.1%}"

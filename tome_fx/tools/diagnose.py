"""What torch.compile makes of a transformed model, in plain words: graphs, breaks, recompiles, calls left to ATen."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import starmap
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from tome_fx import ops
from tome_fx.api import transformed

# What to do about a recompile, by what the guard that failed says. The first that fits is told.
ADVICE = (
    ("size mismatch|stride mismatch|Eq\\(|shape", "pad to the sizes you compiled for, or compile with dynamic=True"),
    ("dtype mismatch", "give every call the same dtype"),
    ("requires_grad|grad_mode|inference", "run every call under the same torch.no_grad() or torch.inference_mode()"),
    ("is None|NoneType|DICT_CONTAINS|keys\\(\\)|len\\(", "give every call the same inputs in the same way"),
    ("type_id|ID_MATCH|obj_id", "change modules, LoRAs and processors before the first call, or take it once for each"),
    ("training", "call eval() once, before the first call"),
    ("", "TORCH_LOGS=recompiles shows the guard with its source"),
)
EAGER = (
    "see that torch.compile is not disabled; where it is not, dynamo has compiled this code as often as it will, which "
    "fullgraph=True makes an error, and dynamic=True helps against where sizes vary"
)
# The calls that a merge leaves to ATen by design: see NOTE [Determinism] in ops.py.
EXPECTED = {
    "sort": "two for each match: the ranking of the sources, the order of the slots",
    "searchsorted": "one for each match: where each slot begins",
    "_embedding_bag_forward_only": "one for each merge: the mean of each slot",
    "_embedding_bag": "one for each merge: the mean of each slot",
}


@dataclass(frozen=True)
class Finding:
    """Something found: what it is, what to do about it, and how often it was met."""

    what: str
    advice: str
    times: int = 1


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; `print` shows it in words.

    `graphs` were compiled in the first call and `again` in a second one of the same inputs, in which at least `eager`
    of the parts that are to run compiled did not. `fallbacks` counts the calls in the generated code of those ATen
    operations that a merge is made of, by name; None where nothing was compiled, or not by Inductor.
    """

    title: str
    graphs: int
    again: int
    eager: int
    breaks: tuple[Finding, ...]
    recompiles: tuple[Finding, ...]
    fallbacks: dict[str, int] | None

    @property
    def healthy(self) -> bool:
        """All ran compiled, without break, recompile or second compile, and with no fallback but the expected ones."""
        unexpected = (self.fallbacks or {}).keys() - EXPECTED.keys()
        return not (self.eager or self.breaks or self.recompiles or self.again or unexpected)

    def __str__(self) -> str:
        """Every finding with its advice."""
        lines = [f"{self.title}\n\n{self.graphs or 'No'} graph{'s' * (self.graphs != 1)} compiled in the first call."]
        lines.append(f"{self.again or 'None'} compiled in a second call of the same inputs.")
        if self.eager:
            lines.append(f"Parts of the model that ran eagerly: {self.eager}.\n  What to do: {EAGER}.")
        for name, found in (("graph break", self.breaks), ("recompile", self.recompiles)):
            count = sum(finding.times for finding in found)
            lines.append(f"{count or 'No'} {name}{'s' * (count != 1)}{':' if found else '.'}")
            lines += [f"- {f.what}{f' ({f.times} times)' * (f.times > 1)}\n  What to do: {f.advice}." for f in found]
        if self.fallbacks:
            rows = [
                (name, count, EXPECTED.get(name, "not asked for: please report it"))
                for name, count in sorted(self.fallbacks.items())
            ]
            lines += ["Calls that merging leaves to ATen:", tabulate(rows, ("operation", "calls", "why"))]
        elif self.fallbacks is not None:
            lines.append("Merging leaves no call to ATen.")
        lines.append("All is well." if self.healthy else "Something needs mending.")
        return "\n".join(lines)


def diagnose(model: nn.Module, *args: Any, **kwargs: Any) -> Diagnosis:
    """Call a compiled transformed model twice and say what dynamo and Inductor did.

    The model is left as it is, but for what the calls compile: diagnose it first thing in a process to see all.

    Args:
        model: What `transform` returned, compiled whole, by `.compile()` or by `.compile_repeated_blocks()`.
        args, kwargs: Of the model's forward.

    Raises:
        TypeError: `model` is of a kind that cannot be transformed.
        ValueError: `model` is not compiled.
        TransformError: `model` is not transformed.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported
    from torch._dynamo.utils import counters  # here and below: the compiler is slow to import

    inner, merging = transformed(model)
    parts = 1 if model is not inner else sum(module._compiled_call_impl is not None for module in model.modules())
    if not parts:
        raise ValueError("model is not compiled: compile it first, then diagnose what torch.compile returned")
    title = f"{type(inner).__name__}, ratio {merging.plan.ratio}, merging around {', '.join(merging.plan.scopes)}"
    breaks_before = Counter(counters["graph_break"])
    try:
        with _generated_code() as code:
            graphs, recompiles = _call(model, args, kwargs)
    except (Unsupported, FailOnRecompileLimitHit) as error:  # only under fullgraph=True
        return Diagnosis(title, 0, 0, parts, (_break(str(error), 1),), (), None)
    with profile(use_kineto=False) as second:
        again, repeated = _call(model, args, kwargs)
    regions = sum(event.name.startswith("Torch-Compiled Region") for event in second.function_events)
    breaks = starmap(_break, (Counter(counters["graph_break"]) - breaks_before).items())
    guards = starmap(_recompile, Counter(map(_guard, recompiles + repeated)).items())
    fallbacks = _fallbacks(code) if code else None
    return Diagnosis(title, graphs, again, max(0, parts - regions), tuple(breaks), tuple(guards), fallbacks)


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, list[str]]:
    """Call the model: how many graphs were compiled, and the guard that failed for each that was compiled anew."""
    from torch._dynamo.utils import counters, get_compilation_metrics

    graphs = counters["stats"]["unique_graphs"]
    before = get_compilation_metrics()
    model(*args, **kwargs)
    new = [metrics for metrics in get_compilation_metrics() if not any(metrics is old for old in before)]
    reasons = [metrics.recompile_reason for metrics in new if metrics.recompile_reason]
    return counters["stats"]["unique_graphs"] - graphs, reasons


@contextmanager
def _generated_code() -> Iterator[list[str]]:
    """Everything that Inductor writes meanwhile, or takes from its cache."""
    from torch._inductor.graph import GraphLowering

    code: list[str] = []
    hook: Any = GraphLowering
    before, hook.save_output_code = hook.save_output_code, code.append
    try:
        yield code
    finally:
        hook.save_output_code = before


class _Recorder(TorchDispatchMode):
    """The names of the ATen operations that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__.rstrip("_"))
        return func(*args, **(kwargs or {}))


def _fallbacks(code: list[str]) -> dict[str, int]:
    """The calls of ATen in the generated code, in place or not, by the names of operations that a merge is made of."""
    tokens = torch.zeros(1, 4, 1)
    with _Recorder() as recorder:
        for seed in (None, 0):
            slots = ops.match(tokens, 2, 2, kept=3, sx=2, sy=2, seed=seed)
            for some in (tokens, tokens.clone().requires_grad_()):
                ops.unmerge(ops.merge(some, slots), slots)
                ops.log_sizes(some, slots)
    statements = [line.partition("#")[0] for text in code for line in text.splitlines()]
    called = Counter(re.findall(r"\baten\.(\w+)[.\w]*\(", "\n".join(statements)))
    return {name: count for name, count in called.items() if name.rstrip("_") in recorder.names}


def _guard(reason: str) -> str:
    """The guard alone: without the compile that it belongs to and the line of code that follows it."""
    return re.sub(r"^\d+/\d+: ", "", reason.strip().splitlines()[0]).partition("  #")[0].strip()


def _recompile(reason: str, times: int) -> Finding:
    return Finding(reason, next(advice for pattern, advice in ADVICE if re.search(pattern, reason)), times)


def _break(reason: str, times: int) -> Finding:
    """With dynamo's own hint, where it gives one."""
    hint = re.search(r"Hint: (.+)", reason)
    advice = hint[1].rstrip(".") if hint else "compile with fullgraph=True to be shown the line of code"
    return Finding(reason.strip().splitlines()[0].strip(), advice, times)

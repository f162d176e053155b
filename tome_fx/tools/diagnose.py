"""What torch.compile makes of a transformed model, in plain words: graphs, breaks, recompiles, calls left to ATen."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import starmap
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from tome_fx import ops
from tome_fx.api import compiled_parts, transformed

# What to do about a recompile, by what the guard that failed says. The first that fits is told.
SIZES = "size mismatch|stride mismatch|\\.size\\(\\)|\\.stride\\(\\)"
STATE = "GLOBAL_STATE|dispatch key|requires_grad"
MODULES = "\\bself\\b"  # the guard names the module whose forward was compiled
BACKEND = "BACKEND_MATCH|Unable to find"  # the latter is what torch says of the former before it had a name
ADVICE = (
    ("size mismatch|stride mismatch", "pad to the sizes you compiled for, or compile with dynamic=True"),
    (SIZES, "pad to the sizes you compiled for: a square and a batch of one have graphs of their own"),
    ("dtype mismatch", "give every call the same dtype"),
    (
        "grad_mode|requires_grad|dispatch key",
        "run every call on one device and under the same torch.no_grad() or torch.inference_mode()",
    ),
    ("GLOBAL_STATE", "set what the guard names once, before the first call"),
    ("training", "call eval() once, before the first call"),
    (MODULES, "change modules, LoRAs and processors before the first call, or take it once for each"),
    (BACKEND, "compile with one backend and one mode"),
    (
        "None|DICT_CONTAINS|KeyError|keys\\(\\)|len\\(|expected type|type_id|ID_MATCH|obj_id|==",
        "give every call the same inputs in the same way",
    ),
    ("", "TORCH_LOGS=recompiles shows the guard with its source"),
)
PARTS_DIFFER = "none is needed, as parts of different kinds have a graph each"
EAGERLY = (
    "see that torch.compile is not disabled and that the part is called at all; where it is, dynamo has compiled this "
    "code as often as it will, which fullgraph=True makes an error, and dynamic=True helps against where sizes vary"
)
# The calls that a merge leaves to ATen by design: see NOTE [Determinism] in ops/merging.py.
LEFT_TO_ATEN = {
    "sort": "two for each match: the ranking of the sources, the order of the slots",
    "searchsorted": "one for each match: where each slot begins",
    "_embedding_bag_forward_only": "one for each merge: the mean of each slot",
    "_embedding_bag": "one for each merge: the mean of each slot",
}


@dataclass(frozen=True)
class Finding:
    """Something that the compiler did: what it is, what to do about it, and how often it was met.

    `expected` where it is as it should be and takes nothing from the verdict: see `Diagnosis.recompiles`.
    """

    what: str
    advice: str
    times: int = 1
    expected: bool = False


RECOMPILE_LIMIT = Finding(
    "dynamo's recompile limit: it has compiled this code as often as it will",
    "see what varies from call to call; where sizes do, compile with dynamic=True",
)


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; `print` shows it in words.

    Args:
        title: The model and its plan.
        graphs_first_call: How many graphs were compiled in the first call.
        graphs_second_call: How many more in a second call of the same inputs, where none should be. None where dynamo
            ended the first call with an error, as it does under `fullgraph=True`, so that there was no second.
        eager_parts: How many of the compiled parts, at the least, did not run compiled in the second call.
        breaks: Where dynamo broke a graph in two or, under `fullgraph=True`, would have.
        recompiles: The guard that failed for each compile of code that had been compiled before. Expected in the first
            call are those for another kind of part or another size, for other modules, and under another state of
            torch, such as its grad mode: each is a first compile of something new. Not expected are those for inputs
            of another type than in an earlier call, which a pipeline meets in the middle of an image, and any in
            the second call.
        fallbacks: How many calls the generated code has of those ATen operations that a merge is made of, by name.
            None where nothing was compiled, or not by Inductor.
        parts: How many parts of the model are compiled by themselves: 1 for a model compiled whole.
    """

    title: str
    graphs_first_call: int
    graphs_second_call: int | None
    eager_parts: int
    breaks: tuple[Finding, ...]
    recompiles: tuple[Finding, ...]
    fallbacks: dict[str, int] | None
    parts: int = 1

    @property
    def healthy(self) -> bool:
        """All ran compiled and unbroken, nothing compiled again, and nothing but the expected was left to ATen."""
        recompiled = any(not recompile.expected for recompile in self.recompiles)
        left_to_aten = (self.fallbacks or {}).keys() - LEFT_TO_ATEN.keys()
        steady = self.graphs_second_call == 0 and not recompiled
        return steady and not (self.eager_parts or self.breaks or left_to_aten)

    def __str__(self) -> str:
        """Every finding with its advice."""
        count = self.graphs_first_call
        lines = [f"{self.title}\n\n{count or 'No'} graph{'s' * (count != 1)} compiled in the first call."]
        if self.parts > 1:
            lines.append(f"{self.parts} parts of the model are compiled; those of the same kind can share a graph.")
        if self.graphs_second_call is None:
            lines.append("An error ended the first call, so there was no second.")
        else:
            lines.append(f"{self.graphs_second_call or 'None'} compiled in a second call of the same inputs.")
        if self.eager_parts:
            lines.append(f"Parts of the model that ran eagerly: {self.eager_parts}.\n  What to do: {EAGERLY}.")
        lines += _listed("graph break", self.breaks)
        lines += _listed("recompile", [found for found in self.recompiles if not found.expected])
        if expected := [found for found in self.recompiles if found.expected]:
            lines += _listed("recompile", expected, "as is to be expected", "Advice")
        if self.fallbacks:
            rows = [
                (name, count, LEFT_TO_ATEN.get(name, "not asked for: please report it"))
                for name, count in sorted(self.fallbacks.items())
            ]
            lines += ["Calls that merging leaves to ATen:", tabulate(rows, ("operation", "calls", "why"))]
        elif self.fallbacks is not None:
            lines.append("Merging leaves no call to ATen.")
        lines.append("All is well." if self.healthy else "Something needs mending.")
        return "\n".join(lines)


def _listed(name: str, findings: Sequence[Finding], which: str = "", advice: str = "What to do") -> list[str]:
    count = sum(finding.times for finding in findings)
    head = " ".join(filter(None, (str(count or "No"), f"{name}{'s' * (count != 1)}", which)))
    lines = [f"{head}{':' if findings else '.'}"]
    for found in findings:
        times = f" ({found.times} times)" if found.times > 1 else ""
        lines.append(f"- {found.what}{times}\n  {advice}: {found.advice}.")
    return lines


def diagnose(model: nn.Module, *args: Any, **kwargs: Any) -> Diagnosis:
    """Call a compiled transformed model twice and say what dynamo and Inductor did.

    The model is left as it is, but for what the calls compile: diagnose it first thing in a process to see all.

    Args:
        model: What `transform` returned, compiled in any way: by `torch.compile`, by `.compile()`, by
            `.compile_repeated_blocks()`, by `model.forward = torch.compile(model.forward)`, or some modules of it.
        args, kwargs: Of the model's forward.

    Raises:
        TypeError: `model` is of a kind that cannot be transformed.
        ValueError: `model` is not compiled.
        TransformError: `model` is not transformed.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported
    from torch._dynamo.utils import counters  # here and below: the compiler is slow to import

    inner, merging = transformed(model)
    parts = compiled_parts(model)
    if not parts:
        raise ValueError("model is not compiled: compile it first, then diagnose what torch.compile returned")
    whole = parts[0] is model or parts[0] is inner
    title = f"{type(inner).__name__}, ratio {merging.plan.ratio}, merging around {', '.join(merging.plan.scopes)}"
    breaks_before = Counter(counters["graph_break"])
    error: Exception | None = None
    with _generated_code() as code, _compiles() as first:
        try:
            model(*args, **kwargs)
        except (Unsupported, FailOnRecompileLimitHit) as stopped:  # only under fullgraph=True
            error = stopped
    with _compiles() as second, profile(use_kineto=False) as events:
        if error is None:
            model(*args, **kwargs)
    regions = sum(event.name.startswith("Torch-Compiled Region") for event in events.function_events)
    breaks = Counter(counters["graph_break"]) - breaks_before
    recompiles = Counter(_first_recompile(reason, first.ids, whole) for reason in first.reasons)
    recompiles.update(_recompile(reason, expected=False) for reason in second.reasons)
    if isinstance(error, FailOnRecompileLimitHit):
        recompiles[RECOMPILE_LIMIT] += 1
    return Diagnosis(
        title,
        graphs_first_call=first.graphs,
        graphs_second_call=None if error else second.graphs,
        eager_parts=0 if error else max(0, len(parts) - regions),
        breaks=(_break(str(error), 1),) if isinstance(error, Unsupported) else tuple(starmap(_break, breaks.items())),
        recompiles=tuple(replace(found, times=times) for found, times in recompiles.items()),
        fallbacks=_fallbacks(code) if code else None,
        parts=len(parts),
    )


@dataclass
class _Compiles:
    """How many graphs were compiled, the id of each compile, and why older compiles of the same code did not serve."""

    graphs: int = 0
    ids: frozenset[str | None] = frozenset()
    reasons: tuple[str, ...] = ()


@contextmanager
def _compiles() -> Iterator[_Compiles]:
    """What dynamo compiles meanwhile, told when the block is left."""
    from torch._dynamo.utils import counters, get_compilation_metrics

    result = _Compiles()
    graphs, before = counters["stats"]["unique_graphs"], get_compilation_metrics()
    yield result
    new = [metrics for metrics in get_compilation_metrics() if not any(metrics is old for old in before)]
    result.graphs = counters["stats"]["unique_graphs"] - graphs
    result.ids = frozenset(metrics.compile_id for metrics in new)
    result.reasons = tuple(metrics.recompile_reason for metrics in new if metrics.recompile_reason)


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
    # Under any mode of the caller's the names of all are wanted, so the tokens are no inference tensors either.
    with torch.inference_mode(False), torch.enable_grad(), _Recorder() as recorder:
        tokens = torch.zeros(1, 4, 1)
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


def _recompile(reason: str, *, expected: bool) -> Finding:
    guard = _guard(reason)
    return Finding(guard, next(advice for pattern, advice in ADVICE if re.search(pattern, guard)), expected=expected)


def _first_recompile(reason: str, ids: frozenset[str | None], whole: bool) -> Finding:
    """A recompile in the first call, in which dynamo made the compiles `ids`; see `Diagnosis.recompiles`.

    The guard is one of a single older compile. Where that was made for another part in the same call, the two parts
    differ in kind. Parts differ in their inputs too, so only of a model compiled whole does the guard say how this
    call differs from earlier ones.
    """
    if reason.partition(":")[0] in ids:
        return Finding(_guard(reason), PARTS_DIFFER, expected=True)
    something_new = re.search("|".join((SIZES, STATE, MODULES, BACKEND)), _guard(reason))
    return _recompile(reason, expected=not whole or something_new is not None)


def _break(reason: str, times: int) -> Finding:
    """With dynamo's own hint, where it gives one."""
    hint = re.search(r"Hint: (.+)", reason)
    advice = hint[1].rstrip(".") if hint else "compile with fullgraph=True to be shown the line of code"
    return Finding(reason.strip().splitlines()[0].strip(), advice, times)

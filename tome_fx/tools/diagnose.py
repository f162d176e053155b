"""What torch.compile makes of a transformed model, in plain words: graphs, breaks, recompiles, calls left to ATen."""

import ast
import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import starmap
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from tome_fx import ops
from tome_fx.api import compiled_parts, transformed
from tome_fx.families.registry import family_of
from tome_fx.tools.diagnosis import RECOMPILE_LIMIT, Diagnosis, Finding

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
CALL_EAGERLY = "call the model without torch.compile, to see where"
PARTS_DIFFER = "none is needed, as parts of different kinds have a graph each"


def diagnose(model: nn.Module, *args: Any, **kwargs: Any) -> Diagnosis:
    """Call a compiled transformed model twice and say what dynamo and Inductor did.

    The model is left as it is, but for what the calls compile: diagnose it first thing in a process to see all.

    Args:
        model: What `transform` returned, compiled in any way: by `torch.compile`, by `.compile()`, by
            `.compile_repeated_blocks()`, by `model.forward = torch.compile(model.forward)`, or some modules of it.
        *args: Of the model's forward.
        **kwargs: Of the model's forward, by name.

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
    around = ", ".join(family_of(inner).merged_around(merging.plan))
    title = f"{type(inner).__name__}, ratio {merging.plan.ratio}, merging around {around}"
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
    """With dynamo's own hint, where it gives one; of an error that the model raises that error."""
    if raised := re.search(r"raised exception (\w+)\((.+)\)$", reason, re.MULTILINE):
        with contextlib.suppress(ValueError, SyntaxError):  # another repr than that of one text
            return Finding(f"{raised[1]}: {ast.literal_eval(raised[2])}", CALL_EAGERLY, times)
    hint = re.search(r"Hint: (.+)", reason)
    advice = hint[1].rstrip(".") if hint else "compile with fullgraph=True to be shown the line of code"
    return Finding(reason.strip().splitlines()[0].strip(), advice, times)

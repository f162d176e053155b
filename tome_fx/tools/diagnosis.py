"""What `diagnose` can find, and how it is told."""

from collections.abc import Sequence
from dataclasses import dataclass

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
        from tabulate import tabulate  # only tables need it

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

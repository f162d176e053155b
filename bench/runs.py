"""How a variant is run: the rows of the tables of latencies."""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from bench.cases import STOCK, Case, Options, options
from bench.variants import VARIANTS, apply, case_for
from tome_fx.families.unet import share

MODES = ("default", "reduce-overhead", "max-autotune", "regional")


@dataclass(frozen=True)
class Run:
    """A row of the tables of latencies.

    Args:
        about: What it is, in a few words.
        variant: What is merged: a key of `bench.variants.VARIANTS`.
        options: Of its own, whatever the other rows' are.
        fused: Whether attention is computed at once; else it writes its scores out, as everybody's did when tomesd
            was published.
        compiled: Whether it is, in the mode that is measured.
        fullgraph: Whether a graph break is an error then.
    """

    about: str
    variant: str = STOCK
    options: Options = ()
    fused: bool = True
    compiled: bool = False
    fullgraph: bool = True

    @property
    def merges(self) -> bool:
        """Whether its output may differ from the stock UNet's."""
        return self.variant != STOCK

    def heeds(self, option: str) -> bool:
        """Whether it is another run with another `ratio`, with other `options` or in another `mode`."""
        variant = VARIANTS[self.variant]
        return {"ratio": variant.ratio is None, "options": bool(variant.heeds), "mode": self.compiled}[option]

    def case(self, ratio: float, given: Options) -> Case:
        """What it merges, of a ratio and options that it may not heed."""
        return case_for(self.variant, ratio, options(**dict(given) | dict(self.options)))


RUNS = {
    "vanilla": Run("eager, attention written out", fused=False),
    "sdpa": Run("eager, fused attention"),
    "tomesd": Run("tomesd, attention written out", "tomesd", fused=False),
    "tomesd+sdpa": Run("tomesd, fused attention", "tomesd"),
    "compile": Run("torch.compile alone", compiled=True),
    "v0.1+compile": Run("what 0.1 did without being told otherwise", "v0.1", compiled=True),
    "tome_fx": Run("ours, eager", "tome_fx"),
    "tome_fx+compile": Run("ours under torch.compile", "tome_fx", compiled=True),
    "tome_fx+dynamic+compile": Run("one graph for every ratio", "tome_fx", options(dynamic_ratio=True), compiled=True),
    "tome_fx+kv+compile": Run(
        "keys and values alone are merged", "tome_fx", options(merge_queries=False), compiled=True
    ),
    "tome_fx+blocks+compile": Run("whole blocks are merged", "tome_fx", options(merge_block=True), compiled=True),
    "oracle+compile": Run("our graph with free matching and merging", "oracle", compiled=True),
    "todo+compile": Run("keys and values downsampled by 2 x 2, whatever the ratio", "todo", compiled=True),
    "hidiffusion+compile": Run(
        "attention within quarters of the grid, whatever the ratio", "hidiffusion", compiled=True
    ),
    # last, for what it breaks stays broken: see ISOLATED
    "tomesd+compile": Run("tomesd under torch.compile, graph breaks allowed", "tomesd", compiled=True, fullgraph=False),
}

# The graph breaks of one run use up the recompile limit of code objects that all runs share, after which those compiled
# before it run no more. Newer torch can keep them apart.
ISOLATED = {"isolate_recompiles": True} if "isolate_recompiles" in signature(torch.compile).parameters else {}


def compiled(unet: Any, mode: str = "default", *, fullgraph: bool = True) -> nn.Module:
    """Compile the UNet the way that the mode says."""
    if mode == "regional":
        # not isolated, for then no block would share another's code
        unet.compile_repeated_blocks(fullgraph=fullgraph)
        return unet  # type: ignore[no-any-return]
    how = None if mode == "default" else mode
    result: nn.Module = torch.compile(unet, fullgraph=fullgraph, mode=how, **ISOLATED)  # type: ignore[call-overload]
    return result


def prepare(
    name: str, unet: UNet2DConditionModel, *, ratio: float = 0.5, options: Options = (), mode: str = "default"
) -> Callable[..., Any]:
    """What is called for a row, on a copy that shares the weights of `unet`."""
    run = RUNS[name]
    if not run.fused:
        unet = share(unet)
        unet.set_attn_processor(AttnProcessor())
    result = apply(run.case(ratio, options), unet)
    return compiled(result, mode, fullgraph=run.fullgraph) if run.compiled else result

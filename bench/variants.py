"""What is compared. Each variant makes a callable UNet from the stock one; all of them share its weights."""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import tomesd
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, fx, nn

import tome_fx
from tome_fx import ops
from tome_fx.families.unet import find_sites, share
from tome_fx.graph.specialize import Pass, specialize

SCOPES = {
    "attn": {},
    "attn+crossattn": {"merge_crossattn": True},
    "all": {"merge_crossattn": True, "merge_mlp": True},
}
MODES = ("default", "reduce-overhead", "max-autotune", "regional")


@dataclass(frozen=True)
class Setting:
    """How a variant merges and compiles."""

    ratio: float = 0.5
    scope: str = "attn"
    mode: str = "default"


@dataclass(frozen=True)
class Variant:
    """A row of the tables.

    Args:
        about: What it is, in a few words.
        prepare: Makes the UNet that is called, from a copy that shares the stock UNet's weights.
        merges: Whether tokens are merged, so that its output may differ from the stock UNet's.
    """

    about: str
    prepare: Callable[[UNet2DConditionModel, Setting], Callable[..., Any]]
    merges: bool = True


# The graph breaks of one variant use up the recompile limit of code objects that all variants share, after which those
# compiled before it run no more. Newer torch can keep them apart.
ISOLATED = {"isolate_recompiles": True} if "isolate_recompiles" in signature(torch.compile).parameters else {}


def compiled(unet: nn.Module, setting: Setting, fullgraph: bool = True) -> nn.Module:
    """Compile the UNet the way that the mode says."""
    if setting.mode == "regional":
        # not isolated, for then no block would share another's code
        unet.compile_repeated_blocks(fullgraph=fullgraph)  # type: ignore[operator]
        return unet
    mode = None if setting.mode == "default" else setting.mode
    result: nn.Module = torch.compile(unet, fullgraph=fullgraph, mode=mode, **ISOLATED)  # type: ignore[call-overload]
    return result


def unfused(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Attention that writes its scores out, as everybody's did when tomesd was published."""
    unet.set_attn_processor(AttnProcessor())
    return unet


def patched(unet: UNet2DConditionModel, setting: Setting) -> UNet2DConditionModel:
    """tomesd's patch. Its level is chosen as ours is, for its default of 1 leaves SDXL as it was."""
    finest = min(site.downsample for site in find_sites(unet))
    tomesd.apply_patch(unet, setting.ratio, max_downsample=finest, **SCOPES[setting.scope])
    return unet


def sample_first(unet: Callable[..., Any]) -> Callable[..., Any]:
    """tomesd reads the image size from the first positional argument."""
    return lambda sample, **inputs: unet(sample, **inputs)


class AsUNet(nn.Module):
    """Lets a pipeline call a variant, whatever it is, where it expects a UNet; what else it reads is the UNet's own."""

    def __init__(self, call: Callable[..., Any], unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.call = call
        self.unet = unet

    def __getattr__(self, name: str) -> Any:
        """What is not found here is looked for in the UNet: SDXL's pipeline reads its `add_embedding`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "unet":  # not there yet, or there is no end to it
                raise
            return getattr(self.unet, name)

    def forward(self, sample: Tensor, timestep: Tensor, **kwargs: Any) -> Any:
        """What a pipeline gives by position, the variant is given by name."""
        return self.call(sample=sample, timestep=timestep, **kwargs)


def merged(unet: UNet2DConditionModel, setting: Setting, **options: bool) -> UNet2DConditionModel:
    """Our transform."""
    return tome_fx.transform(unet, setting.ratio, **SCOPES[setting.scope], **options)


@dataclass(frozen=True)
class Replace:
    """Our pass, with other functions in the place of the three operations."""

    inner: Pass
    functions: tuple[tuple[Any, Any], ...]

    def __call__(self, graph: fx.Graph) -> int:
        """Run our pass, then put the other functions in."""
        changed = self.inner(graph)
        for node in graph.nodes:
            node.target = dict(self.functions).get(node.target, node.target)
        return changed


@dataclass(frozen=True)
class OneMatch:
    """Our pass, with the match of a transformer's first block for all of its blocks."""

    inner: Pass

    def __call__(self, graph: fx.Graph) -> int:
        """Run our pass, then drop all matches but the first."""
        changed = self.inner(graph)
        first, *others = [node for node in graph.nodes if node.target is ops.match] or [None]
        for node in others:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
        return changed


def with_passes(unet: UNet2DConditionModel, wrap: Callable[[Pass], Pass]) -> UNet2DConditionModel:
    """A transformed UNet rewritten in place with other passes, each made from ours."""
    for module in unet.modules():
        cls: Any = type(module)
        if hasattr(cls, "rewrite"):
            template = cls._template
            example = {p.name: k for p, k in zip(template.parameters, next(iter(cls.graphs))[0], strict=True)}
            module.__class__ = specialize(
                module, wrap(cls.rewrite), example=example, live=template.live, leaves=template.leaves
            )
    return unet


def replaced(unet: UNet2DConditionModel, setting: Setting, **functions: Any) -> UNet2DConditionModel:
    """Our transform with other operations, given by name; the graph is otherwise the same."""
    swaps = tuple((getattr(ops, name), function) for name, function in functions.items())
    return with_passes(merged(unet, setting), lambda inner: Replace(inner, swaps))


def one_match(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A transformed UNet, in place, with one match for the stacked blocks of each of its transformers."""
    return with_passes(unet, OneMatch)


def no_match(tokens: Tensor, height: int, width: int, *, kept: int, **_: Any) -> ops.SlotMap:
    """The oracle's match: nothing is computed; views of the tokens carry N and K."""
    return ops.SlotMap(tokens, tokens, tokens[:, :kept])


def first_tokens(tokens: Tensor, slots: ops.SlotMap | None) -> Tensor:
    """The oracle's merge: keep the first K tokens."""
    return tokens if slots is None else tokens[:, : slots.start.shape[1]]


def repeat_tokens(tokens: Tensor, slots: ops.SlotMap | None) -> Tensor:
    """The oracle's unmerge: repeat the K tokens up to N."""
    if slots is None:
        return tokens
    count, kept = slots.slot.shape[1], tokens.shape[1]
    return tokens.repeat(1, -(-count // kept), 1)[:, :count]


class ToDoProcessor:
    """Attention whose keys and values are every `stride`-th token of the grid along both sides; queries are whole.

    Source: Smith et al., "ToDo: Token Downsampling for Efficient Generation of High-Resolution Images" (2024):
    nearest-neighbour downsampling of keys and values, by 2 at the finest level.
    """

    def __init__(self, inner: Any, stride: int = 2) -> None:
        self.inner = inner
        self.stride = stride

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: None, **kwargs: Any) -> Tensor:
        """Attend to the downsampled tokens; the grid is square, as every resolution measured here is."""
        batch, tokens, channels = hidden_states.shape
        side = int(tokens**0.5)
        grid = hidden_states.view(batch, side, side, channels)
        context = grid[:, :: self.stride, :: self.stride].reshape(batch, -1, channels)
        result: Tensor = self.inner(attn, hidden_states, encoder_hidden_states=context, **kwargs)
        return result


def downsampled(unet: UNet2DConditionModel, setting: Setting) -> UNet2DConditionModel:
    """ToDo at the levels that we merge at."""
    sites = find_sites(unet)
    finest = min(site.downsample for site in sites)
    for site in sites:
        if site.downsample == finest:
            attn = unet.get_submodule(f"{site.path}.attn1")
            attn.set_processor(ToDoProcessor(attn.processor))
    return unet


def oracle(unet: UNet2DConditionModel, setting: Setting) -> UNet2DConditionModel:
    """The floor: the same graph with matching removed, merge a slice and unmerge a repeat."""
    return replaced(unet, setting, match=no_match, merge=first_tokens, unmerge=repeat_tokens)


VARIANTS = {
    "vanilla": Variant("eager, attention written out", lambda u, s: unfused(u), merges=False),
    "sdpa": Variant("eager, fused attention", lambda u, s: u, merges=False),
    "tomesd": Variant("tomesd, attention written out", lambda u, s: sample_first(patched(unfused(u), s))),
    "tomesd+sdpa": Variant("tomesd, fused attention", lambda u, s: sample_first(patched(u, s))),
    "compile": Variant("torch.compile alone", lambda u, s: compiled(u, s), merges=False),
    "tome_fx": Variant("ours, eager", merged),
    "tome_fx+compile": Variant("ours under torch.compile", lambda u, s: compiled(merged(u, s), s)),
    "tome_fx+dynamic+compile": Variant(
        "ours with dynamic_ratio=True: one graph for every ratio",
        lambda u, s: compiled(merged(u, s, dynamic_ratio=True), s),
    ),
    "tome_fx+prop_attn+compile": Variant(
        "ours with prop_attn=True: merged tokens weighed by their number",
        lambda u, s: compiled(merged(u, s, prop_attn=True), s),
    ),
    "oracle+compile": Variant("our graph with free matching and merging", lambda u, s: compiled(oracle(u, s), s)),
    "todo+compile": Variant("keys and values downsampled by 2 x 2", lambda u, s: compiled(downsampled(u, s), s)),
    # last, for what it breaks stays broken: see ISOLATED
    "tomesd+compile": Variant(
        "tomesd under torch.compile, graph breaks allowed",
        lambda u, s: sample_first(compiled(patched(u, s), s, fullgraph=False)),
    ),
}


def prepare(name: str, unet: UNet2DConditionModel, setting: Setting) -> Callable[..., Any]:
    """The callable of a variant, on a copy that shares the weights of `unet`."""
    return VARIANTS[name].prepare(share(unet), setting)

"""The two passes, each for one kind of module, and what they refuse: options that would do nothing, and what expects
all tokens where merged ones are.
"""

from dataclasses import dataclass

from torch import fx, nn

from tome_fx.graph.rewrite import insert_match, insert_merge
from tome_fx.ops import SlotMap
from tome_fx.plan import SCOPES, TransformError

KEEPING_PROCESSORS = ("CrossAttnStoreProcessor",)  # of self-attention guidance, which maps its weights to pixels
# Of perturbed-attention guidance and of text-to-video zero: they attend in parts of the batch, or across it, and would
# give some images the mask of others.
MIXING_PROCESSORS = (
    "PAGIdentitySelfAttnProcessor2_0",
    "PAGCFGIdentitySelfAttnProcessor2_0",
    "CrossFrameAttnProcessor",
    "CrossFrameAttnProcessor2_0",
)


@dataclass(frozen=True)
class MatchPass:
    """The pass for a `Transformer2DModel`: a slot map for each of its blocks. A ratio of None is a dynamic one."""

    ratio: float | None
    sx: int
    sy: int
    seed: int | None
    blocks: tuple[str, ...]

    def __call__(self, graph: fx.Graph) -> int:
        """Change the graph in place; returns how many blocks were matched for."""
        ratio, seed = self.ratio, self.seed
        count = insert_match(graph, self.blocks, image="hidden_states", ratio=ratio, sx=self.sx, sy=self.sy, seed=seed)
        _require(count, self.blocks, graph)
        return count


@dataclass(frozen=True)
class MergePass:
    """The pass for a `BasicTransformerBlock`: each scope's module sees merged tokens, at whatever ratio.

    `prop_attn` makes its self-attention proportional.
    """

    scopes: tuple[str, ...]
    prop_attn: bool = False

    def __call__(self, graph: fx.Graph) -> int:
        """Change the graph in place; returns how many modules were wrapped."""
        proportional = {"attn1"} & set(self.scopes) if self.prop_attn else set()
        for node in graph.nodes:
            if node.target in self.scopes:
                _refuse_masks(node)
            if node.target in proportional and node.kwargs.get("encoder_hidden_states") is not None:
                raise TransformError(
                    "attn1 attends to the prompt in a block of only_cross_attention, whose tokens are not merged: "
                    "prop_attn=True has none to weigh there. Transform with prop_attn=False"
                )
        count = insert_merge(graph, self.scopes, proportional=proportional)
        _require(count, self.scopes, graph)
        return count

    def check(self, block: nn.Module, slots: SlotMap | None) -> None:
        """Refuse what keeps merged tokens for a later call, which merges others, and what would mix up weights."""
        for name in self.scopes if slots is not None else ():
            module = getattr(block, name)
            registry = getattr(module, "_diffusers_hook", None)
            hooks = () if registry is None else registry.hooks.values()
            processor = type(getattr(module, "processor", None)).__name__
            keeping = [type(hook).__name__ for hook in hooks if hook._is_stateful]
            keeping += [processor] * (processor in KEEPING_PROCESSORS)
            if processor in MIXING_PROCESSORS and self.prop_attn:
                raise TransformError(
                    f"{processor} attends in parts of the batch or across it, and would mix up the weights that "
                    "prop_attn=True gives tokens. Leave it out, or transform with prop_attn=False"
                )
            if keeping:
                raise TransformError(
                    f"{keeping[0]} keeps what it sees in {name}, whose tokens are merged ({_scope(name)}=True) and are "
                    f"others in every step. Leave it out there, or transform with {_scope(name)}=False"
                )


def _require(count: int, modules: tuple[str, ...], graph: fx.Graph) -> None:
    """Every module asked for must have been found: a merge that is left out silently is an option that does nothing."""
    if count != len(modules):
        called = sorted(str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr"))
        raise TransformError(f"expected one call each of {', '.join(modules)}, found calls of {', '.join(called)}")


def _scope(module: str) -> str:
    """The option that merges around a module of a block."""
    return next(scope for scope, name in SCOPES.items() if name == module)


def _refuse_masks(node: fx.Node) -> None:
    """A mask over image tokens does not fit merged tokens."""
    for module, mask in (("attn1", "attention_mask"), ("attn2", "ip_adapter_masks")):
        if node.target == module and node.kwargs.get(mask) is not None:
            raise TransformError(
                f"{mask} was given to {module}, whose tokens are merged ({_scope(module)}=True): the mask has an entry "
                f"for every image token and merged tokens are fewer. Leave {mask} out, or transform with "
                f"{_scope(module)}=False"
            )

"""What is known of the blocks of diffusion transformers, as data: the modules in them that may see merged tokens.

Attention of image and text together takes both by arguments of their own and returns both. The image's tokens are
merged before it and unmerged after it, the text's are left alone. What such attention is given for each token, places
and weights, comes through its block from the model, where it is made for merged tokens once for all blocks.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field, replace

from torch import nn

from tome_fx.families.unet import SCOPES
from tome_fx.graph.scopes import Scope
from tome_fx.graph.structure import Count
from tome_fx.plan import Plan


@dataclass(frozen=True)
class Block:
    """A kind of block.

    Args:
        scopes: Its modules that may see merged tokens, in the order in which they run.
        example: The `kind` of what models give it, by name.
        counts: Modules whose results it counts; see `Structure`.
        text: Name of its argument with tokens of text that it puts before the image's itself; None where it does not.
    """

    scopes: tuple[Scope, ...]
    example: dict[str, Hashable] = field(hash=False)
    counts: tuple[tuple[str, Count], ...] = ()
    text: str | None = None

    def scopes_in(self, block: nn.Module, plan: Plan) -> tuple[Scope, ...]:
        """The modules of a block of this kind that the plan merges around."""
        there = [scope for scope in self.scopes if getattr(block, scope.module, None) is not None]
        return tuple(scope for scope in there if getattr(plan, scope.option))


def of_flux(attention: nn.Module) -> int:
    """How many values attention of Flux returns for image and text: an image prompt makes a third of its own."""
    return 3 if type(attention.processor).__name__ == "FluxIPAdapterAttnProcessor" else 2


ATTENTION = Scope("attn", tokens="hidden_states", weights="attention_mask", option="merge_attn")
JOINT = Scope("attn", tokens="hidden_states", result=0, weights="attention_mask", option="merge_attn")
SECOND = Scope("attn2", tokens="hidden_states", weights="attention_mask", option="merge_attn")
IMAGE = replace(JOINT, result=(0, 2))  # and of an image prompt, which comes third
COUNTS: tuple[tuple[str, Count], ...] = (("attn", of_flux),)
ROTARY: dict[str, Hashable] = {"image_rotary_emb": "opaque"}
BOTH: dict[str, Hashable] = {"hidden_states": "3d", "encoder_hidden_states": "3d", "temb": "2d"}

# By the names of diffusers' classes, as in facts.py.
BLOCKS = {
    "BasicTransformerBlock": Block(
        SCOPES, {"hidden_states": "3d", "encoder_hidden_states": "3d", "encoder_attention_mask": "3d", "timestep": "2d"}
    ),
    "JointTransformerBlock": Block((JOINT, SECOND), BOTH),
    "SD3SingleTransformerBlock": Block((ATTENTION,), {"hidden_states": "3d", "temb": "2d"}),
    "FluxTransformerBlock": Block((IMAGE,), {**BOTH, **ROTARY}, counts=COUNTS),
    "FluxSingleTransformerBlock": Block((ATTENTION,), {**BOTH, **ROTARY}, text="encoder_hidden_states"),
    "QwenImageTransformerBlock": Block((JOINT,), {**BOTH, **ROTARY}),
    "ChromaTransformerBlock": Block((IMAGE,), {**BOTH, **ROTARY, "temb": "3d", "attention_mask": "2d"}, counts=COUNTS),
    "ChromaSingleTransformerBlock": Block(
        (ATTENTION,), {"hidden_states": "3d", "temb": "3d", **ROTARY, "attention_mask": "2d"}
    ),
    "Flux2TransformerBlock": Block((JOINT,), {**BOTH, **ROTARY, "temb_mod_img": "2d", "temb_mod_txt": "2d"}),
    "Flux2SingleTransformerBlock": Block((ATTENTION,), {"hidden_states": "3d", "temb_mod": "2d", **ROTARY}),
    "AuraFlowJointTransformerBlock": Block((JOINT,), BOTH),
    "AuraFlowSingleTransformerBlock": Block((ATTENTION,), {"hidden_states": "3d", "temb": "2d"}),
    "CogView4TransformerBlock": Block((replace(JOINT, module="attn1"),), {**BOTH, **ROTARY}),
    "HunyuanDiTBlock": Block(  # whose cross-attention is handed the places of its tokens as well
        (replace(ATTENTION, module="attn1"), replace(ATTENTION, module="attn2")), {**BOTH, **ROTARY, "skip": "3d"}
    ),
    "CogVideoXBlock": Block((replace(JOINT, module="attn1"),), {**BOTH, **ROTARY}),
    "LTXVideoTransformerBlock": Block((replace(ATTENTION, module="attn1"),), {**BOTH, "temb": "3d", **ROTARY}),
    "WanTransformerBlock": Block((replace(ATTENTION, module="attn1"),), {**BOTH, "temb": "3d", "rotary_emb": "opaque"}),
}

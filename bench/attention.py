"""Attention with a weight for each key, in the forms that say so, and the kernels that torch takes for them.

What merged tokens weigh is added to the scores of their keys: by a mask, by one more channel, or by a function of the
score. Which kernels take that depends on the form and on the card.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import flex_attention
from torch.overrides import TorchFunctionMode

from bench import markdown
from bench.cards import CARDS, attention_kernel
from bench.cuda_code import TORCH
from tome_fx.families.weights import FLASH_WIDTHS, attend_by_channel
from tome_fx.ops.merging import ALIGNED

HEADS = 8
WIDTHS = (40, 64, 80, 160)  # of Stable Diffusion 1's heads, and 64 of later models'


def plain(query: Tensor, key: Tensor, value: Tensor, weights: Tensor) -> Tensor:
    """No weights."""
    return F.scaled_dot_product_attention(query, key, value)


def by_mask(query: Tensor, key: Tensor, value: Tensor, weights: Tensor) -> Tensor:
    """Weights as a mask, as diffusers' processor takes it: for every head, and expanded to every query by torch."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=weights)


def by_score(query: Tensor, key: Tensor, value: Tensor, weights: Tensor) -> Tensor:
    """Weights as FlexAttention's change of a score."""
    row = weights[:, 0, 0]

    def score(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + row[b, k]

    result = flex_attention(query, key, value, score_mod=score)
    assert isinstance(result, Tensor)
    return result


PLAIN = "no weights"
# All take queries, keys and values [B, H, L, E] and weights [B, H, 1, L].
FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    PLAIN: plain,
    "mask": by_mask,
    "channel": attend_by_channel,
    "FlexAttention": by_score,
}


class Calls(TorchFunctionMode):
    """Notes what each call of scaled_dot_product_attention within is given, and computes none."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[Sequence[Any], dict[str, Any]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.given.append((args, kwargs))
        return args[2]


def given(form: str, inputs: Sequence[Tensor]) -> tuple[Sequence[Any], dict[str, Any]] | None:
    """What scaled_dot_product_attention is given in this form, or None for FlexAttention, which writes its own."""
    if FORMS[form] is by_score:
        return None
    with Calls() as calls:
        FORMS[form](*inputs)
    ((args, options),) = calls.given
    return args, options


def kernel(form: str, inputs: Sequence[Tensor]) -> str:
    """The kernel that torch says it takes on the device of the inputs."""
    asked = given(form, inputs)
    if asked is None:
        return "its own"
    choice = torch._fused_sdp_choice(*asked[0], **asked[1])
    return str(SDPBackend(choice).name.lower().removesuffix("_attention"))


def weight_rows(weights: Tensor) -> Tensor:
    """Weights `[B, L]` for all heads, `[B, H, 1, L]`, in memory as those of `tome_fx` are."""
    wide = weights[:, None, None].expand(-1, HEADS, -1, -1)
    return F.pad(wide, (0, ALIGNED - weights.shape[1] % ALIGNED))[..., : weights.shape[1]]


def chosen() -> str:
    """Which kernel torch takes for attention without weights and with them, by card: from `bench.cards`."""
    forms = [form for form, function in FORMS.items() if function is not by_score]
    half: dict[str, Any] = {"dtype": torch.float16, "device": "meta"}
    lines = []
    for (name, card), width in itertools.product(CARDS.items(), WIDTHS):
        line = [f"{name}, {card.name}", str(width)]
        for form in forms:
            x, sizes = torch.empty(2, HEADS, 2048, width, **half), torch.ones(2, 2048, **half)
            asked = given(form, (x, x, x, weight_rows(sizes)))
            assert asked is not None
            (query, key, value), options = asked
            found = attention_kernel(card, query, key, value, options.get("attn_mask"))
            made_for = next(w for w in FLASH_WIDTHS if w >= query.shape[-1])
            line.append(f"{found}, made for {made_for}" if found == "flash" else found)
        lines.append(line)
    setting = (
        f"As torch {TORCH} decides for half precision without gradients, read from its source: no card was asked. "
        "Flash is made for heads of some widths, and others run as the next of these."
    )
    heads = ["card", "channels of a head", *forms]
    return "\n\n".join([setting, markdown.table(lines, heads)])

"""Small real diffusion transformers with seeded random weights, and the oracle for merging in them.

A builder returns the same object every time, as those of `support.models` do.
"""

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    ChromaTransformer2DModel,
    CogVideoXTransformer3DModel,
    CogView4Transformer2DModel,
    Flux2Transformer2DModel,
    FluxControlNetModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    LTXVideoTransformer3DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from tome_fx import ops
from tome_fx.families.registry import family_of
from tome_fx.ops.tiling import Tiles
from tome_fx.plan import Plan

SIDE = 16  # latents, so 8 x 8 tokens
TEXT = 5
FRAMES = 3  # of a video
Pictures = tuple[tuple[int, int], ...]  # the heights and widths, in tokens, of those that an image's tokens are of


def _built(make: Callable[[], Any], louder: float = 1.0) -> Any:
    """A model whose weights are random everywhere, those of attention times a number: what is zero has an effect."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`FluxPosEmbed` is deprecated")  # by diffusers' own ControlNet
        torch.manual_seed(0)
        model = make().eval()
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.3)
        for name, parameter in model.named_parameters():
            if "attn." in name:
                parameter.data.mul_(louder)
    return model


@functools.cache
def pixart() -> PixArtTransformer2DModel:
    """PixArt in small."""
    return _built(
        lambda: PixArtTransformer2DModel(
            sample_size=SIDE,
            num_layers=3,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=12,
            in_channels=4,
            out_channels=8,
        )
    )


SD3_CONFIG: dict[str, Any] = {
    "sample_size": SIDE,
    "num_layers": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 10,
    "in_channels": 4,
    "out_channels": 4,
    "pos_embed_max_size": 32,
    "qk_norm": "rms_norm",
}


@functools.cache
def sd3() -> SD3Transformer2DModel:
    """Stable Diffusion 3.5 in small: the first two blocks have a second attention, over the image alone."""
    return _built(lambda: SD3Transformer2DModel(**SD3_CONFIG, dual_attention_layers=(0, 1)))


@functools.cache
def sd3_controlnet() -> SD3ControlNetModel:
    """A ControlNet for `sd3()` of two blocks."""
    return _built(lambda: SD3ControlNetModel(**{**SD3_CONFIG, "num_layers": 2}))


@functools.cache
def sd3_controlnet_without_text() -> SD3ControlNetModel:
    """As those of Stable Diffusion 3.5 large: no text and no embedding of places, so that tokens are put in."""
    config = {**SD3_CONFIG, "num_layers": 2, "joint_attention_dim": None, "qk_norm": None}
    return _built(lambda: SD3ControlNetModel(**config, use_pos_embed=False, pos_embed_type=None))


FLUX_CONFIG: dict[str, Any] = {
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "axes_dims_rope": (4, 6, 6),
}


@functools.cache
def flux() -> FluxTransformer2DModel:
    """Flux in small, with guidance as an input."""
    return _built(lambda: FluxTransformer2DModel(**FLUX_CONFIG, guidance_embeds=True))


@functools.cache
def flux_controlnet() -> FluxControlNetModel:
    """A ControlNet for `flux()` of one block of each kind."""
    config = {**FLUX_CONFIG, "num_layers": 1, "num_single_layers": 1}
    return _built(lambda: FluxControlNetModel(**config, guidance_embeds=True, num_mode=3))


@functools.cache
def qwen() -> QwenImageTransformer2DModel:
    """Qwen-Image in small."""
    return _built(
        lambda: QwenImageTransformer2DModel(
            in_channels=8,
            out_channels=2,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            axes_dims_rope=(4, 6, 6),
        )
    )


@functools.cache
def chroma() -> ChromaTransformer2DModel:
    """Chroma in small."""
    return _built(
        lambda: ChromaTransformer2DModel(
            in_channels=8,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=16,
            approximator_hidden_dim=16,
            approximator_layers=1,
        )
    )


@functools.cache
def flux2() -> Flux2Transformer2DModel:
    """Flux.2 in small."""
    return _built(
        lambda: Flux2Transformer2DModel(
            in_channels=8,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        )
    )


@functools.cache
def auraflow() -> AuraFlowTransformer2DModel:
    """AuraFlow in small."""
    return _built(
        lambda: AuraFlowTransformer2DModel(
            sample_size=SIDE,
            num_mmdit_layers=1,
            num_single_dit_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            caption_projection_dim=16,
        ),
        louder=4.0,  # its attention adds little by these
    )


@functools.cache
def cogview4() -> CogView4Transformer2DModel:
    """CogView 4 in small."""
    return _built(
        lambda: CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=12,
            time_embed_dim=16,
            condition_dim=4,
            sample_size=SIDE,
            rope_axes_dim=(16, 16),
        )
    )


@functools.cache
def hunyuan_dit() -> HunyuanDiT2DModel:
    """Hunyuan-DiT in small: its last block takes what its first gave."""
    return _built(
        lambda: HunyuanDiT2DModel(
            in_channels=4,
            patch_size=2,
            sample_size=SIDE,
            num_layers=4,
            attention_head_dim=8,
            num_attention_heads=2,
            hidden_size=16,
            cross_attention_dim=12,
            cross_attention_dim_t5=16,
            pooled_projection_dim=16,
            text_len=4,
            text_len_t5=4,
        )
    )


@functools.cache
def cogvideox() -> CogVideoXTransformer3DModel:
    """CogVideoX in small."""
    return _built(
        lambda: CogVideoXTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            time_embed_dim=8,
            text_embed_dim=12,
            use_rotary_positional_embeddings=True,
        )
    )


@functools.cache
def ltx(patch: int = 2) -> LTXVideoTransformer3DModel:
    """LTX-Video in small, with tokens as wide as others have here, and not as its own."""
    return _built(
        lambda: LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            patch_size=patch,
            num_layers=2,
            attention_head_dim=12,
            num_attention_heads=2,
            cross_attention_dim=24,
            caption_channels=12,
        )
    )


WAN_CONFIG: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "text_dim": 12,
    "freq_dim": 16,
    "ffn_dim": 48,
    "rope_max_seq_len": 32,
}


@functools.cache
def wan() -> WanTransformer3DModel:
    """Wan in small."""
    return _built(lambda: WanTransformer3DModel(**WAN_CONFIG))


@functools.cache
def wan_of_an_image() -> WanTransformer3DModel:
    """Wan that is told an image, whose processors take 512 tokens of a prompt for granted."""
    return _built(lambda: WanTransformer3DModel(**WAN_CONFIG, image_dim=6, added_kv_proj_dim=24))


MODELS: dict[str, Callable[[], Any]] = {
    "pixart": pixart,
    "sd3": sd3,
    "sd3_controlnet": sd3_controlnet,
    "sd3_controlnet_without_text": sd3_controlnet_without_text,
    "flux": flux,
    "flux_controlnet": flux_controlnet,
    "qwen": qwen,
    "chroma": chroma,
    "flux2": flux2,
    "auraflow": auraflow,
    "cogview4": cogview4,
    "hunyuan_dit": hunyuan_dit,
    "wan": wan,
    "cogvideox": cogvideox,
    "ltx": ltx,
}


def frames_of(model: Any) -> int:
    """Frames of what the model is given here."""
    return FRAMES if "3DModel" in type(model).__name__ else 1


def inputs(
    model: Any, height: int = SIDE, width: int = SIDE, *, batch: int = 2, seed: int = 0, text: int | None = None
) -> dict[str, Any]:
    """Arguments for a forward of the model, in its dtype: the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"text_tokens": TEXT if text is None else text, "frames": frames_of(model)}
        found = family_of(model).example_inputs(model, height, width, batch=batch, **options)  # type: ignore[arg-type]
    return {name: _cast(value, model.dtype) for name, value in found.items()}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {name: _cast(item, dtype) for name, item in value.items()}
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def one_of(arguments: dict[str, Any], image: int) -> dict[str, Any]:
    """The arguments of one image of a batch; coordinates are those of all."""
    result: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, dict):
            result[name] = one_of(value, image)
        elif isinstance(value, (Tensor, list)) and name not in ("img_ids", "txt_ids"):
            result[name] = value[image : image + 1]
        else:
            result[name] = value
    return result


def output(model: Any, arguments: dict[str, Any]) -> Tensor:
    """What the model makes of the arguments, without gradients; of a ControlNet, all residuals in one row."""
    with torch.no_grad():
        return flattened(model(**arguments, return_dict=False))


def flattened(result: Any) -> Tensor:
    """A tensor itself, or all of them in one row."""
    (result,) = result if len(result) == 1 else (result,)
    if isinstance(result, Tensor):
        return result
    return torch.cat([part.flatten() for group in result for part in ([group] if isinstance(group, Tensor) else group)])


def patched(model: Any, ratio: float = 0.5, *, pictures: Pictures = ((SIDE // 2, SIDE // 2),), **options: Any) -> Any:
    """A copy of the model that merges as `transform` of the same options does, without a graph: the oracle.

    Each block, or each part of it, is called for one image after another, with tables that are that image's own, by a
    `__call__` around it. The slot map is `ops.match`'s, of each picture by itself, every frame of a video among them;
    the rest is written out.
    """
    pictures *= frames_of(model)
    result, plan = copy.deepcopy(model), Plan(ratio, **{"use_rand": False, "merge_block": True, **options})
    if not plan.matches:
        return result
    seen: dict[str, Any] = {}
    sites = family_of(model).merged_sites(model, plan)
    for site in sites:
        block = result.get_submodule(site.path)
        if plan.merge_block:
            _wrap(block, plan, seen, pictures, first=site is sites[0])
            continue
        for name in _parts(block, plan):
            _wrap_part(block, name, plan, seen)
        _wrap_match(block, plan, seen, pictures, first=site is sites[0])
    return result


def _wrap(block: Any, plan: Plan, seen: dict[str, Any], pictures: Pictures, *, first: bool) -> None:
    cls = type(block)
    weighed = plan.prop_attn is not False

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = {**dict(zip(_names(cls), args, strict=False)), **kwargs}
        given = kwargs.pop("hidden_states")
        text = given[:, : given.shape[1] - sum(height * width for height, width in pictures)]  # where it is in there
        tokens = given[:, text.shape[1] :]
        if first or not plan.share_match:
            seen["slots"] = _match(tokens, plan, pictures)
        slots, places = seen["slots"]
        merged = ops.merge(tokens, slots)
        if kwargs.get("skip") is not None:
            kwargs["skip"] = ops.merge(kwargs["skip"], slots)
        outputs = []
        for b in range(len(tokens)):
            own = {name: _of_image(name, value, b, places[b], tokens) for name, value in kwargs.items()}
            if weighed:
                sizes = torch.bincount(slots.slot[b], minlength=merged.shape[1]).to(tokens.dtype).log()
                own |= _weights(cls, block, sizes, own)
            outputs.append(cls.__call__(self, torch.cat([text, merged], dim=1)[b : b + 1], **own))
        if isinstance(outputs[0], Tensor):
            of_text, of_image = torch.cat(outputs).split([text.shape[1], merged.shape[1]], dim=1)
            return torch.cat([of_text, ops.changed(tokens, merged, of_image, slots)], dim=1)
        both = []
        for parts in zip(*outputs, strict=True):  # of image and text, in either order
            part = None if parts[0] is None else torch.cat(parts)
            if part is not None and part.shape[1] == merged.shape[1]:
                part = ops.changed(tokens, merged, part, slots)
            both.append(part)
        return tuple(both)

    block.__class__ = type(cls.__name__, (cls,), {"__call__": __call__, "__module__": cls.__module__})


def _parts(block: Any, plan: Plan) -> list[str]:
    """The modules of a block that the plan merges around."""
    if type(block).__name__ == "BasicTransformerBlock":
        parts = {"attn1": plan.merge_attn, "attn2": plan.merge_crossattn, "ff": plan.merge_mlp}
        return [name for name, wanted in parts.items() if wanted]
    if type(block).__name__ in ("JointTransformerBlock", "HunyuanDiTBlock"):
        return [name for name in ("attn", "attn1", "attn2") if getattr(block, name, None) is not None]
    return ["attn1"] if hasattr(block, "attn1") else ["attn"]


def _wrap_match(block: Any, plan: Plan, seen: dict[str, Any], pictures: Pictures, *, first: bool) -> None:
    cls = type(block)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = args[0] if args else kwargs["hidden_states"]
        seen["tokens"] = tokens = tokens[:, tokens.shape[1] - sum(height * width for height, width in pictures) :]
        if first or not plan.share_match:
            seen["slots"] = _match(tokens, plan, pictures)
        return cls.__call__(self, *args, **kwargs)

    block.__class__ = type(cls.__name__, (cls,), {"__call__": __call__, "__module__": cls.__module__})


def _wrap_part(block: Any, name: str, plan: Plan, seen: dict[str, Any]) -> None:
    """Merge the tokens of the image, which come last, around a module of a block, and unmerge what is made of them."""
    module, kind = block.get_submodule(name), type(block)
    cls = type(module)
    weighed = plan.prop_attn is not False and name in ("attn", "attn1")

    def __call__(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        kwargs = {**dict(zip(_names(cls)[1:], args, strict=False)), **kwargs}
        (slots, places), tokens = seen["slots"], seen["tokens"]
        text = hidden_states.shape[1] - tokens.shape[1]
        merged = ops.merge(hidden_states[:, text:], slots)
        outputs = []
        for b in range(len(tokens)):
            given = torch.cat([hidden_states[b : b + 1, :text], merged[b : b + 1]], dim=1)
            own = {key: _of_image(key, value, b, places[b], tokens) for key, value in kwargs.items()}
            if weighed:
                sizes = torch.bincount(slots.slot[b], minlength=merged.shape[1]).to(tokens.dtype).log()
                before = own.get("encoder_hidden_states")
                length = text if before is None else before.shape[1]
                own |= _weights_of_attention(kind, block, sizes, length)
            if not plan.merge_queries:
                outputs.append(cls.__call__(self, hidden_states[b : b + 1], **{**own, "encoder_hidden_states": given}))
                continue
            found = cls.__call__(self, given, **own)
            parts = [found] if isinstance(found, Tensor) else list(found)
            for place in range(0, len(parts), 2):  # of text and image it returns the image, the text, and more of it
                part = parts[place]
                parts[place] = torch.cat([part[:, :text], part[:, text:][:, slots.slot[b]]], dim=1)
            outputs.append(parts[0] if isinstance(found, Tensor) else tuple(parts))
        if isinstance(outputs[0], Tensor):
            return torch.cat(outputs)
        return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))

    module.__class__ = type(cls.__name__, (cls,), {"__call__": __call__, "__module__": cls.__module__})


def _weights_of_attention(kind: type[nn.Module], block: Any, sizes: Tensor, text: int) -> dict[str, Any]:
    """The arguments that weigh merged tokens in attention of a kind of block, after so many tokens of text."""
    if kind.__name__ == "BasicTransformerBlock":
        return {"attention_mask": sizes[None, None].repeat(block.attn1.heads, 1, 1)}
    if kind.__name__.startswith("Flux"):
        return {"attention_mask": torch.cat([sizes.new_zeros(text), sizes])[None, None, None]}
    if kind.__name__.startswith("CogVideoX"):
        return {"attention_mask": torch.cat([sizes.new_zeros(text), sizes])[None, None]}
    return {}


def _names(cls: type[nn.Module]) -> list[str]:
    forward: Any = cls.forward
    return list(forward.__code__.co_varnames[1 : forward.__code__.co_argcount])


def _match(tokens: Tensor, plan: Plan, pictures: Pictures) -> tuple[ops.SlotMap, Tensor]:
    """The slot map of pictures that follow one another, and the destination of each slot or its only token."""
    found, destinations, before, below = [], set(), 0, 0
    for height, width in pictures:
        part = tokens[:, before : before + height * width]
        kept = part.shape[1] - int(part.shape[1] * plan.ratio)
        slots = ops.match(part, height, width, kept=kept, sx=2, sy=2, seed=plan.cell_seed, tile=plan.tile)
        assert slots is not None
        found.append(slots.slot + below)
        grid = Tiles.of(height, width, 2, 2, plan.tile, plan.cell_seed, tokens.device)
        some = grid.token_of_place[:, : grid.destinations].flatten()
        destinations |= {token + before for token in some.tolist() if token >= 0}
        before, below = before + height * width, below + kept
    slot = torch.cat(found, dim=1)
    in_order, order = slot.sort(dim=1, stable=True)
    first = torch.arange(len(slot))[:, None]
    start = torch.searchsorted(in_order, torch.arange(below).expand(len(slot), -1).contiguous()) + first * before
    places = [
        [(set(members) & destinations or set(members)).pop() for members in _members(one, below)]
        for one in slot.tolist()
    ]
    return ops.SlotMap(slot, (order + first * before).int(), start.int()), torch.tensor(places)


def _members(slot: list[int], kept: int) -> list[list[int]]:
    return [[token for token, own in enumerate(slot) if own == k] for k in range(kept)]


def _of_image(name: str, value: Any, image: int, places: Tensor, tokens: Tensor) -> Any:
    """What one image's block call is given for an argument of all images'."""
    if name in ROWS:
        return _rows(value, image, places, tokens.shape[1])
    if isinstance(value, dict):
        return {key: _of_image(key, item, image, places, tokens) for key, item in value.items()}
    if isinstance(value, list):
        return [_of_image(name, item, image, places, tokens) for item in value]
    if isinstance(value, Tensor) and len(value) == len(tokens):
        return value[image : image + 1]
    return value


ROWS = ("image_rotary_emb", "rotary_emb", "temb", "attention_mask")


def _rows(table: Any, image: int, places: Tensor, count: int) -> Any:
    """The rows of an image's merged tokens in a table of all `count` tokens and of text before them, if it has such.

    A table is `[S, ...]` for all images, or `[1, S, ...]`, or `[B, S, ...]`; what has fewer rows is of the text.
    """
    if not isinstance(table, Tensor):
        return None if table is None else tuple([_rows(part, image, places, count) for part in table])
    if table.ndim == 4 and count <= table.shape[2] == table.shape[3]:  # a mask of an attention, `[B, 1, S, S]`
        rows = _rows(table[image, 0], image, places, count)
        return _rows(rows.mT, image, places, count).mT[None, None]
    if table.ndim > 1 and len(table) < count <= table.shape[1]:
        return _rows(table[min(image, len(table) - 1)], image, places, count)[None]
    if len(table) < count:
        return table[image : image + 1] if len(table) == 2 else table
    text = len(table) - count
    return table[torch.cat([torch.arange(text), places + text])]


def _weights(cls: type[nn.Module], block: Any, sizes: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments that weigh merged tokens, where a block takes any."""
    if cls.__name__ == "BasicTransformerBlock":
        return {"attention_mask": sizes[None, None].repeat(block.attn1.heads, 1, 1)}
    if cls.__name__.startswith("Flux"):
        mask = torch.cat([sizes.new_zeros(given["image_rotary_emb"][0].shape[0] - len(sizes)), sizes])
        return {
            "joint_attention_kwargs": {
                **(given.get("joint_attention_kwargs") or {}),
                "attention_mask": mask[None, None, None],
            }
        }
    if cls.__name__.startswith("CogVideoX"):
        mask = torch.cat([sizes.new_zeros(given["encoder_hidden_states"].shape[1]), sizes])
        return {"attention_kwargs": {**(given.get("attention_kwargs") or {}), "attention_mask": mask[None, None]}}
    return {}

"""Merging in diffusion transformers without a graph: the oracle for what `transform` makes of them."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from support.transformers import SIDE, frames_of
from tome_fx import ops
from tome_fx.families.registry import family_of
from tome_fx.ops.tiling import Tiles
from tome_fx.plan import Plan

Pictures = tuple[tuple[int, int], ...]  # the heights and widths, in tokens, of those that an image's tokens are of


def patched(model: Any, ratio: float = 0.5, *, pictures: Pictures = ((SIDE // 2, SIDE // 2),), **options: Any) -> Any:
    """A copy of the model that merges as `transform` of the same options does, without a graph.

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

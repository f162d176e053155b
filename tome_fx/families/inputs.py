"""Random inputs for a UNet or ControlNet, from its config: for `explain`, the benchmarks and the tests."""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from tome_fx.plan import TransformError

# Kandinsky's hint: its channels as latents, and its pixels per latent along a side.
HINT_CHANNELS, HINT_SCALE = 4, 8


def example_inputs(
    model: nn.Module,
    height: int,
    width: int,
    *,
    batch: int = 2,
    frames: int | None = None,
    text_tokens: int = 77,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Random arguments for a forward of the model, such as a pipeline would give it.

    Args:
        model: A UNet or ControlNet.
        height: Latent rows.
        width: Latent columns.
        batch: Images; 2 is one image under classifier-free guidance.
        frames: Of a clip, where the model makes clips.
        text_tokens: Length of the prompt; 77 is what CLIP gives.
        device: Of the tensors; "meta" for shapes alone.
        dtype: Of the tensors.

    Raises:
        TransformError: The model's config asks for an embedding that is not known here.
    """
    config: Any = model.config

    def random(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, device=device, dtype=dtype)

    clip = () if frames is None else (frames,)
    hint = HINT_CHANNELS if config.get("addition_embed_type") == "image_hint" else 0  # which the model appends itself
    prompt = _prompt_width(model)
    inputs: dict[str, Any] = {
        "sample": random(config.in_channels - hint, *clip, height, width),
        "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": None if prompt is None else random(text_tokens, prompt),
    }
    added = {name: random(*shape) for name, shape in _added_shapes(model, height, width).items()}
    if added:
        inputs["added_cond_kwargs"] = added
    classes = config.get("class_embed_type")
    if classes in ("projection", "simple_projection"):
        inputs["class_labels"] = random(config.projection_class_embeddings_input_dim)
    elif classes == "identity":  # labels that are embeddings already
        embedding: Any = model.get_submodule("time_embedding.linear_2")
        inputs["class_labels"] = random(embedding.out_features)
    elif classes is not None or config.get("num_class_embeds") is not None:
        inputs["class_labels"] = torch.zeros(batch, dtype=torch.long, device=device)
    if "conditioning_channels" in config:  # a ControlNet, whose picture is larger than the latents
        scale = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
        inputs["controlnet_cond"] = random(config.conditioning_channels, height * scale, width * scale)
    if config.get("time_cond_proj_dim") is not None:  # LCM's guidance scale, embedded
        inputs["timestep_cond"] = random(config.time_cond_proj_dim)
    return inputs


def _prompt_width(model: nn.Module) -> int | None:
    """The width of a token of the prompt; None for a model that runs without a prompt.

    Raises:
        TransformError: No prompt fits all cross-attention of the model, and it cannot do without one.
    """
    config: Any = model.config
    if isinstance(model, UNet2DConditionModel) and config.encoder_hid_dim_type is not None:
        return config.encoder_hid_dim  # type: ignore[no-any-return]  # the other models project no prompt
    crossing = [module for module in model.modules() if isinstance(module, Attention) and module.is_cross_attention]
    widths = {module.added_kv_proj_dim or module.cross_attention_dim for module in crossing}
    if not widths:
        return config.cross_attention_dim if isinstance(config.cross_attention_dim, int) else None
    if len(widths) == 1:
        return widths.pop()  # type: ignore[no-any-return]
    if all(module.added_kv_proj_dim is None and module.cross_attention_dim == module.query_dim for module in crossing):
        return None  # as in AudioLDM, whose cross-attention looks at the image where there is no prompt
    raise TransformError(
        f"no example inputs for {type(model).__name__}: its cross-attention takes prompts of the widths "
        f"{', '.join(map(str, sorted(widths)))}, which no one prompt has"
    )


def _added_shapes(model: nn.Module, height: int, width: int) -> dict[str, tuple[int, ...]]:
    """What goes into `added_cond_kwargs`: shapes by name, without the batch.

    Raises:
        TransformError: The model's config asks for an embedding that is not known here.
    """
    config: Any = model.config
    # `config.get` would say what the model was made with: loading an IP-Adapter changes the attribute alone.
    addition, projection = config.get("addition_embed_type"), getattr(config, "encoder_hid_dim_type", None)
    shapes: dict[str, tuple[int, ...]] = {}
    if addition == "text_time":
        # SDXL: six numbers (sizes and crop) and the pooled prompt, which is what is left of the embedding's width
        total, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
        times = min(6, total // each)
        shapes = {"text_embeds": (total - times * each,), "time_ids": (times,)}
    elif addition == "text_image":  # Kandinsky 2.1, both as wide as a token of its attention
        shapes = dict.fromkeys(("text_embeds", "image_embeds"), (config.cross_attention_dim,))
    elif addition in ("image", "image_hint"):  # Kandinsky 2.2, and its ControlNet with a picture larger than latents
        shapes = {"image_embeds": (config.encoder_hid_dim,)}
        if addition == "image_hint":
            shapes["hint"] = (3, height * HINT_SCALE, width * HINT_SCALE)
    elif addition not in (None, "text"):  # the latter is made of the prompt
        raise TransformError(f"no example inputs for addition_embed_type={addition!r}")
    if projection in ("text_image_proj", "image_proj"):
        wide = config.cross_attention_dim if projection == "text_image_proj" else config.encoder_hid_dim
        shapes.setdefault("image_embeds", (wide,))
    elif projection not in (None, "text_proj"):
        raise TransformError(f"no example inputs for encoder_hid_dim_type={projection!r}")
    return shapes

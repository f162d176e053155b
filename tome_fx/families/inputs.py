"""Random inputs for a UNet or ControlNet, from its config: for `explain`, the benchmarks and the tests."""

from typing import Any

import torch
from torch import Tensor, nn

from tome_fx.plan import TransformError


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
    context = config.get("encoder_hid_dim") or config.cross_attention_dim
    inputs: dict[str, Any] = {
        "sample": random(config.in_channels, *clip, height, width),
        "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": random(text_tokens, context if isinstance(context, int) else context[0]),
    }
    addition, classes = config.get("addition_embed_type"), config.get("class_embed_type")
    if addition == "text_time":
        # SDXL: six numbers (sizes and crop) and the pooled prompt, which is what is left of the embedding's width
        times = 6
        pooled = config.projection_class_embeddings_input_dim - times * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": random(pooled), "time_ids": random(times)}
    elif addition is not None:
        raise TransformError(f"no example inputs for addition_embed_type={addition!r}")
    if classes in ("projection", "simple_projection"):
        inputs["class_labels"] = random(config.projection_class_embeddings_input_dim)
    elif classes is not None or config.get("num_class_embeds") is not None:
        inputs["class_labels"] = torch.zeros(batch, dtype=torch.long, device=device)
    if "conditioning_channels" in config:  # a ControlNet, whose picture is larger than the latents
        scale = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
        inputs["controlnet_cond"] = random(config.conditioning_channels, height * scale, width * scale)
    return inputs

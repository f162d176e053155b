"""What the examples share: their common arguments, and small pipelines with random weights to run without a download.

A pipeline is written to a folder that is gone when the process ends, and read from there as a real one is. So in a
script of your own, put the folder or id of yours in the place of a call of this module.
"""

import argparse
import atexit
import functools
import json
import shutil
import string
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

TEXT = 16  # channels of text
CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation
NOISE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def parse(parser: argparse.ArgumentParser, half: str = "float16") -> argparse.Namespace:
    """The parser's arguments, and those of every example: `model`, `device`, `dtype` and `steps`.

    Without a `--dtype` a GPU computes in `half`.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--model", metavar="FOLDER_OR_ID", help="the pipeline; without it, a tiny one of random weights"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help=f"default: {half}, on a CPU float32"
    )
    parser.add_argument("--steps", type=int, default=20, help="default: %(default)s")
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else half))
    return args


@functools.cache
def stable_diffusion() -> Path:
    """A pipeline of the kind of Stable Diffusion 1, for images of 64 px."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type="UNetMidBlock2D",
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=TEXT,
    )
    scheduler = PNDMScheduler(**NOISE, steps_offset=1, skip_prk_steps=True)
    pipe = StableDiffusionPipeline(
        _autoencoder(4), CLIPTextModel(_clip()), _clip_tokenizer(), unet, scheduler, None, None, None, False
    )
    return _saved(pipe)


@functools.cache
def controlnet() -> Path:
    """A ControlNet for `stable_diffusion()`."""
    unet = UNet2DConditionModel.from_pretrained(stable_diffusion(), subfolder="unet")
    model = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8))
    for parameter in model.parameters():  # what starts from zero would add nothing
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return _saved(model)


@functools.cache
def lora(rank: int, seed: int) -> Path:
    """A LoRA for the attention of `stable_diffusion()`."""
    unet = UNet2DConditionModel.from_pretrained(stable_diffusion(), subfolder="unet")
    torch.manual_seed(seed)
    unet.add_adapter(LoraConfig(r=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    folder = _folder()
    StableDiffusionPipeline.save_lora_weights(folder, get_peft_model_state_dict(unet))
    return folder


@functools.cache
def sdxl() -> Path:
    """A pipeline of the kind of SDXL, for images of 128 px."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=(2, 4),
        cross_attention_dim=2 * TEXT,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT + 6 * 8,
    )
    texts = CLIPTextModel(_clip()), CLIPTextModelWithProjection(_clip())
    tokenizers = _clip_tokenizer(), _clip_tokenizer()
    scheduler = EulerDiscreteScheduler(**NOISE, steps_offset=1)
    return _saved(
        StableDiffusionXLPipeline(_autoencoder(4), *texts, *tokenizers, unet, scheduler, add_watermarker=False)
    )


@functools.cache
def flux() -> Path:
    """A pipeline of the kind of Flux.1 dev, for images of 256 px."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    words = {"vocab_size": 3 + len(CHARACTERS), "d_model": TEXT, "d_kv": 8, "d_ff": TEXT, "num_heads": 2}
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        _autoencoder(4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        CLIPTextModel(_clip()),
        _clip_tokenizer(),
        T5EncoderModel(T5Config(**words, num_layers=1)),
        _t5_tokenizer(),
        transformer,
    )
    return _saved(pipe)


def _autoencoder(channels: int, **config: Any) -> AutoencoderKL:
    """An autoencoder whose latents are half as wide as a picture."""
    kinds = {"down_block_types": 2 * ("DownEncoderBlock2D",), "up_block_types": 2 * ("UpDecoderBlock2D",)}
    return AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=channels, **kinds, **config)


def _clip() -> CLIPTextConfig:
    widths = {"hidden_size": TEXT, "intermediate_size": TEXT, "projection_dim": TEXT}
    words = {"vocab_size": 2 + 2 * len(CHARACTERS), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return CLIPTextConfig(num_hidden_layers=2, num_attention_heads=2, **widths, **words)


def _clip_tokenizer() -> CLIPTokenizer:
    """A tokenizer that spells, of characters and of those that end a word."""
    folder = _folder()
    words = ["<|startoftext|>", "<|endoftext|>", *CHARACTERS, *(f"{character}</w>" for character in CHARACTERS)]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def _t5_tokenizer() -> T5TokenizerFast:
    """A tokenizer that spells."""
    folder = _folder()
    words = [(word, 0.0) for word in ("<pad>", "</s>", "<unk>", *CHARACTERS)]
    Tokenizer(Unigram(words, unk_id=2)).save(str(folder / "tokenizer.json"))
    return T5TokenizerFast.from_pretrained(folder, extra_ids=0)


@functools.cache
def _folders() -> str:
    """The folder of all folders, which is gone when the process ends."""
    folder = tempfile.mkdtemp(prefix="tome_fx-examples-")
    atexit.register(shutil.rmtree, folder)
    return folder


def _folder() -> Path:
    return Path(tempfile.mkdtemp(dir=_folders()))


def _saved(model: Any) -> Path:
    folder = _folder()
    model.save_pretrained(folder)
    return folder

"""Models of diffusers' folders, built by their configs alone: shapes without values."""

import os
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin
from torch import nn

from tome_fx.plan import TransformError

PARTS = ("unet", "transformer", None)  # subfolders of a pipeline's; None is the model's own folder


class _Config(ConfigMixin):  # type: ignore[misc]
    """What a folder says of the model in it."""

    config_name = "config.json"


def from_folder(folder: str | os.PathLike[str]) -> nn.Module:
    """The model of a folder on the meta device; weights are neither read nor needed.

    Args:
        folder: That of a pipeline, whose `unet` or `transformer` is taken, or that of a model itself. Where there is
            none of this name, the id of a repository that is in the hub's cache; nothing is downloaded.

    Raises:
        ValueError: There is no config of a model of diffusers.
        TransformError: diffusers cannot build the model that the config describes.
    """
    config = _config_in(folder)
    name = config.get("_class_name") if isinstance(config, dict) else None
    cls: Any = getattr(diffusers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(
            f"folder must have the config of a model of diffusers, got {folder!r}, whose config names {name or 'none'}"
        )
    try:
        with torch.device("meta"):
            return cls.from_config(config)  # type: ignore[attr-defined,no-any-return]
    except Exception as error:
        raise TransformError(
            f"diffusers {diffusers.__version__} builds no {name} by the config in {folder}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _config_in(folder: str | os.PathLike[str]) -> Any:
    """The first config that is found, which may hold any JSON."""
    reasons = []
    for part in PARTS:
        try:
            return _Config.load_config(folder, subfolder=part, local_files_only=True)
        except OSError as error:
            reasons.append(str(error))
    why = f": {' '.join(dict.fromkeys(reasons))}" if os.path.exists(folder) else ""
    raise ValueError(
        "folder must be that of a pipeline of diffusers with a unet or a transformer, that of such a model, or the id "
        f"of one in the hub's cache; got {folder!r}{why}"
    )

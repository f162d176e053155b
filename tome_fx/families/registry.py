"""Which family a model is of: the one place where kinds of models are told apart."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from tome_fx.families import transformers, unet
from tome_fx.families.levels import Level
from tome_fx.families.sites import Site
from tome_fx.plan import Plan


class Family(Protocol):
    """What is known of a kind of models: the functions of one of the files beside this one."""

    @property
    def NAMES(self) -> tuple[str, ...]:
        """Names of diffusers' classes."""

    def serves(self, model: object) -> bool:
        """Whether a model is of this kind; a `TransformError` if it cannot have merged tokens."""

    def merged_sites(self, model: nn.Module, plan: Plan) -> list[Site]:
        """The blocks that the plan reaches; an error if it reaches none."""

    def levels(self, model: nn.Module, plan: Plan) -> list[Level]:
        """The levels of a model of several, and which of them the plan reaches."""

    def merged_around(self, plan: Plan) -> tuple[str, ...]:
        """What the plan merges around, in words."""

    def rewritten_classes(self, model: nn.Module, plan: Plan) -> dict[str, type[nn.Module]]:
        """The new class of each module that the plan changes, by its path."""

    def weighing_processors(self, model: nn.Module, plan: Plan) -> Mapping[str, Any]:
        """Attention processors that weigh merged tokens, by the paths of attention that is to have them."""

    def why_unweighed(self, model: nn.Module, site: Site) -> str:
        """Why merged tokens are not weighed in a block where nobody has asked for it; empty where they are."""

    def plain_processor(self, model: nn.Module, attention: Any) -> object:
        """The processor that attention of the model has when nobody has put in another."""

    def example_inputs(
        self, model: nn.Module, height: int, width: int, *, batch: int = 2, device: torch.device | str = "cpu"
    ) -> dict[str, Any]:
        """Random arguments for a forward at a latent size."""


WITHIN = ("module", "model", "unet", "transformer")  # where DataParallel, PEFT and users' own modules have a model
FAMILIES: tuple[Family, ...] = (unet, transformers)


def family_of(model: object) -> Family:
    """The family of a model.

    Raises:
        TypeError: It is of none.
        TransformError: It is a model that cannot have merged tokens.
    """
    for family in FAMILIES:
        if family.serves(model):
            return family
    *names, last = (name for family in FAMILIES for name in family.NAMES)
    found, hint = type(model).__name__, ""
    if found in (*names, last):
        found, hint = f"{type(model).__module__}.{found}", ", a class of the same name from elsewhere"
    for part in ("unet", "transformer"):
        if hasattr(model, part) and not isinstance(model, nn.Module):
            hint = f"; pass pipe.{part}, not the pipeline"
    for part in WITHIN if isinstance(model, nn.Module) else ():
        if any(family.serves(getattr(model, part, None)) for family in FAMILIES):
            hint = f"; pass its {part}"
    raise TypeError(f"model must be a {', '.join(names)} or {last}, got {found}{hint}")

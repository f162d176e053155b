"""A ratio that follows the denoising, driven by a pipeline's own callback."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from tome_fx.api import set_ratio, transformed
from tome_fx.plan import TransformError, is_number, number


class RatioSchedule:
    """Changes the ratio of transformed models while a pipeline makes an image.

    Early steps lay out the image, and what is merged in them moves it most; late ones fill in detail. So merge late:

        schedule = tome_fx.RatioSchedule.late(pipe.unet)
        image = pipe(prompt, callback_on_step_end=schedule).images[0]

    which is ``RatioSchedule({0: 0, 0.5: 0.5}, pipe.unet)``: nothing in the first half of the steps, half in the other.

    A model that is compiled compiles each ratio once, in the first image. Nothing is left running between steps.

    Args:
        ratios: From the share of the steps that are done, 0 to below 1, to the ratio from there on. Holds 0.
        models: What `transform` returned, or what `torch.compile` made of it: a UNet, a ControlNet. Their ratio
            becomes the first one at once.

    Raises:
        TypeError: A share or a ratio is not a number, or a model of a kind that cannot be transformed.
        ValueError: A share or a ratio is out of range, there is none for 0, or there is no model.
        TransformError: A model is not transformed.
    """

    # What diffusers' MultiPipelineCallbacks asks of a callback: the names of the tensors that it reads.
    tensor_inputs: tuple[str, ...] = ()

    def __init__(self, ratios: Mapping[float, float], *models: nn.Module) -> None:
        if not isinstance(ratios, Mapping):
            raise TypeError(f"ratios must map shares of the steps to ratios, got {ratios!r}")
        if not models:
            raise ValueError("models must hold at least one transformed model: RatioSchedule(ratios, pipe.unet)")
        for share in ratios:
            if not is_number(share):
                raise TypeError(f"ratios must map shares of the steps to ratios, got {share!r} for a share")
            if not 0 <= share < 1:
                raise ValueError(f"ratios must start at shares of the steps from 0 to below 1, got {share}")
        if 0 not in ratios:
            raise ValueError(f"ratios must say where to start, with an entry for 0; got {dict(ratios)}")
        self.ratios = dict(sorted(ratios.items()))
        self.models = models
        for model in models:
            plan = transformed(model)[1].plan
            for ratio in self.ratios.values():
                replace(plan, ratio=ratio)  # refuses what this model cannot have, before anything is changed
        self.start()

    @classmethod
    def late(cls, *models: nn.Module, ratio: float = 0.5, start: float = 0.5) -> "RatioSchedule":
        """Merge nothing at first, and from a share of the steps on.

        Args:
            models: As above.
            ratio: From then on. Half saves nearly as much over all as a quarter throughout, and moves an image less; at
                three quarters there was no difference to as much throughout in a UNet.
            start: Share of the steps to leave as they are, above 0 and below 1.

        Raises:
            TypeError: `start` or `ratio` is not a number, or a model is of a kind that cannot be transformed.
            ValueError: `start` or `ratio` is out of range, or there is no model.
            TransformError: A model is not transformed.
        """
        if not 0 < number("start", start) < 1:
            raise ValueError(f"start must be above 0, for that is transform's own ratio, and below 1; got {start}")
        return cls({0: 0, start: ratio}, *models)

    def start(self) -> None:
        """Go back to the first ratio: to be called after an image that was cut short."""
        self._set(self.ratio_at(0, 1))

    def ratio_at(self, step: int, steps: int) -> float:
        """The ratio of the `step`-th of `steps` steps, counted from 0."""
        return next(ratio for share, ratio in reversed(self.ratios.items()) if share <= step / steps)

    def __call__(
        self, pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """What a pipeline calls at the end of each step: sets the ratio of the next one, and of the next image's first.

        Raises:
            TypeError: It was given as `callback`, which is called with other arguments.
            TransformError: The image began at another ratio than the schedule's first, the pipeline does not use one
                of the models, or does not say how many steps it takes.
        """
        if callback_kwargs is None:
            raise TypeError(
                "a RatioSchedule must be given as callback_on_step_end, got a call as of callback: in a pipeline that "
                "has that alone, call tome_fx.set_ratio from a callback of your own"
            )
        steps = getattr(pipe, "num_timesteps", None)
        if not steps:
            raise TransformError(f"{type(pipe).__name__} has no num_timesteps, by which a schedule tells where it is")
        if step == 0:
            self._check_start(pipe, self.ratio_at(0, steps))
        self._set(self.ratio_at((step + 1) % steps, steps))
        return callback_kwargs

    def _check_start(self, pipe: Any, first: float) -> None:
        """Every model must be the pipeline's, and must have begun the image at the first ratio."""
        used = {m for part in vars(pipe).values() if isinstance(part, nn.Module) for m in part.modules()}
        for model in self.models:
            inner, merging = transformed(model)
            if inner not in used:
                raise TransformError(
                    f"the schedule's {type(inner).__name__} is no part of this {type(pipe).__name__}: make the "
                    "schedule for the models that the pipeline has now"
                )
            found, begins = merging.plan.ratio, replace(merging.plan, ratio=first).ratio
            if found != begins:
                raise TransformError(
                    f"the image began at a ratio of {found}, and its schedule begins at {begins}: call "
                    "schedule.start() after an image that was cut short or a change of the ratio"
                )

    def _set(self, ratio: float) -> None:
        for model in self.models:
            set_ratio(model, ratio)

"""A training loop that can be stopped at any time and goes on where it was.

What a step does depends on its number alone, on one kind of device and with as many images. So a run which was stopped
trains what one which was not trains.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm


def fit(
    path: Path,
    module: nn.Module,
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    decay: float = 0.0,
    show: Callable[[int], str] | None = None,
    every: int = 500,
) -> None:
    """Train with AdamW: the rate rises for 100 steps, holds, and falls to zero over the last third.

    Args:
        path: The file that holds all that goes on after an interruption; beside it grows a log of the losses.
        module: Trained in place; in the end its weights are the running average, where one is kept.
        loss: The loss of a step, by its number.
        steps: How many in all.
        rate: The learning rate that is held.
        betas: Of Adam, for the running averages of gradients and of their squares.
        decay: Of the running average of the weights; 0 for none.
        show: What to do every so many steps with the average in place; what it returns is logged.
        every: How many.
    """
    optimizer = torch.optim.AdamW(module.parameters(), rate, betas, weight_decay=0.01)
    schedule = LambdaLR(optimizer, lambda step: min(1, (step + 1) / 100, 3 * (1 - step / steps)))
    average = EMAModel(module.parameters(), decay=decay, foreach=True)
    parts = {"module": module, "optimizer": optimizer, "schedule": schedule, "average": average}
    first = _load(path, parts)
    average.to(next(module.parameters()).device)
    losses: list[Tensor] = []
    with tqdm(total=steps, initial=first, desc=path.stem) as bar, path.with_suffix(".log").open("a") as log:
        for step in range(first, steps):
            module.train()
            torch.manual_seed(step)
            value = loss(step)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.step(module.parameters())
            losses.append(value.detach())  # not read yet: a GPU would wait for it
            bar.update()
            if (step + 1) % every == 0 or step + 1 == steps:
                _save(path, parts, step + 1)
                average.store(module.parameters())
                average.copy_to(module.parameters())
                told = f"{torch.stack(losses).mean():.4f} {show(step + 1) if show else ''}"
                average.restore(module.parameters())
                log.write(f"{step + 1} {told}\n")
                log.flush()
                bar.set_postfix_str(told)
                losses.clear()
    average.copy_to(module.parameters())
    module.eval().requires_grad_(False)


def _load(path: Path, parts: dict[str, Any]) -> int:
    """Bring back what a run that was stopped left, and return the step that comes next."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["step"])


def _save(path: Path, parts: dict[str, Any], step: int) -> None:
    """Write it; an interruption leaves the old file or the new one."""
    state = {"step": step, **{name: part.state_dict() for name, part in parts.items()}}
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)

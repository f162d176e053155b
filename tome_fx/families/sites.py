"""Where tokens are merged in a model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One block over image tokens.

    Args:
        transformer: Path of the module whose forward calls the block: a `Transformer2DModel` of a UNet; empty where it
            is the model itself.
        block: The block's name in there.
        downsample: Latents per token along a side: the level's factor.
        channels: Width of a token.
        frames: Grids of tokens that are matched, each by itself: the frames of a video, as pipelines make by default.
    """

    transformer: str
    block: str
    downsample: int
    channels: int
    frames: int = 1

    @property
    def path(self) -> str:
        """The block's path in the model."""
        return f"{self.transformer}.{self.block}" if self.transformer else self.block

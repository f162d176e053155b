"""What is known of diffusers: the models in `unet`, and for all of them `inputs`, `refusals`, `maps` and `skeleton`.

The only files that import diffusers.
"""

"""What is known of diffusers: a file a kind of model, `unet` and `transformers`, of which `registry` chooses.

The only files that import diffusers. What is peculiar to UNets is in `inputs` and `levels`, what to transformers in
`facts`, `grids`, `rotary` and `transformer_inputs`; the others are about any model.
"""

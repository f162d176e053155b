"""What is known of diffusers' models, a file for each kind; the only files that import diffusers' models."""

"""The pass: a forward traced, rewritten and made a class again; knows torch.fx and nothing of diffusers."""

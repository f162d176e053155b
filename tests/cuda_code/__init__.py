"""The contract of the code that Inductor writes for CUDA, checked without a GPU."""

"""The CUDA kernel: a step of a whole model in three launches."""

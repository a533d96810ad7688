"""The losses that a training loop calls, the options they take, and their presets. May import the engine (distill_kernels) alone."""

"""The losses that a training loop calls, the options they take, and their presets. It imports `call`, `divergences` and `ops`."""

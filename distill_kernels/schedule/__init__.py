"""Tokens go through the kernels a chunk at a time: how many, in how much memory, in which order. Imports `call` and `estimators`."""

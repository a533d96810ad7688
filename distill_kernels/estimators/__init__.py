"""Losses and gradients from a sample of the vocabulary: sampled columns, and quantised sweeps that they correct.

It imports `call`, `divergences` and `products`.
"""

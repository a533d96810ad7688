"""Tokens go through the kernels a chunk at a time: how many, in how much memory, in which order.

It imports `call`, `estimators`, `memory` and `products`.
"""

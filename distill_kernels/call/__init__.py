"""One call of a loss: its options, its tensors' shapes, whether they fit, and the ranks that it is divided over.

It imports `divergences`.
"""

"""One call of a loss: its options, its tensors' shapes, whether they fit, and the ranks it is divided over. Imports divergences alone."""

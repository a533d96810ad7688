"""Causal language models of transformers: their hidden states, heads and labels, and students cut from teachers.

It imports `user_error`.
"""

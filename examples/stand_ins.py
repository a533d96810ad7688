"""A teacher, a student and rows of text for the loops of this folder: random models that read bytes, so that nothing has to be fetched.

For real ones: `teacher, tokenizer = distill_kernels.api.models.loading.load_causal_lm("models/teacher")`, and rows of its tokens.
"""

from pydoc_data.topics import topics

import torch
from transformers import LlamaConfig, LlamaForCausalLM

STEPS, BATCH, LENGTH, LEARNING_RATE = 4, 8, 64, 1e-2


def models():
    """(student, teacher): the same ones at each call."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "num_attention_heads": 4, "max_position_embeddings": LENGTH, "initializer_range": 0.1}
    teacher = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, **sizes))
    student = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, **sizes))
    return student.train(), teacher.eval().requires_grad_(False)


def rows():
    """(STEPS · BATCH, LENGTH) int64: what a data loader would bring, in order."""
    text = "\n".join(topics.values()).encode()[: STEPS * BATCH * LENGTH]
    return torch.tensor(list(text)).view(-1, LENGTH)

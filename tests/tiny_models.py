"""Models of a few thousand parameters with a tokenizer of made-up words, saved as a user would have them."""

import random

WORDS = [f"{first}{second}{third}" for first in "bdfgklmn" for second in "aeiou" for third in "nrstlm"]  # 240
LAYERS, WIDTH = 4, 32


def tokenizer_of(words):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["?", *words])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


def save_llama(folder, *, words=WORDS, vocabulary=300, layers=LAYERS, width=WIDTH, seed=0, initializer_range=0.3, **more):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=initializer_range, **more,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer_of(words).save_pretrained(folder)
    return folder


def sections(count, seed=0):
    """Documents of 40 words each."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=40)) for _ in range(count)]

"""Small trainers of TRL, with a tokenizer of words and random models: what the tests of its losses run."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

WORDS = 250
SPECIAL = ["<pad>", "<eos>", "<unk>", "user", "assistant", ":"]
VOCABULARY = WORDS + len(SPECIAL)
CHAT = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} <eos> {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
COMMON = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def tokenizer():
    words = {word: number for number, word in enumerate([*SPECIAL, *(f"w{number}" for number in range(WORDS))])}
    split = Tokenizer(WordLevel(words, unk_token="<unk>"))
    split.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=split, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left", model_max_length=64
    )
    made.chat_template = CHAT
    return made


def llama(seed, hidden_size, vocabulary=VOCABULARY, **options):
    set_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_attention_heads=4, vocab_size=vocabulary,
            max_position_embeddings=512, initializer_range=0.4, **({"num_hidden_layers": 2} | options),
        )
    )  # fmt: skip


def conversations(number):
    generator = torch.Generator().manual_seed(0)

    def text(words):
        return " ".join(f"w{number}" for number in torch.randint(WORDS, (words,), generator=generator).tolist())

    return [[{"role": "user", "content": text(3 + row % 4)}, {"role": "assistant", "content": text(4 + row % 5)}] for row in range(number)]


def gkd(trainer=GKDTrainer, folder="", *, student=None, teacher=None, beta=0.5, lmbda=0.5, max_steps=3, made_with=None, **options):
    """A GKD trainer, or of a class made of it, on twelve training and three evaluation conversations."""
    rows = [{"messages": conversation} for conversation in conversations(15)]
    arguments = GKDConfig(
        output_dir=str(folder),
        beta=beta,
        lmbda=lmbda,
        max_steps=max_steps,
        max_new_tokens=6,
        gradient_checkpointing=False,
        **(COMMON | options),
    )
    return trainer(
        model=llama(2, 32) if student is None else student,
        teacher_model=llama(1, 48) if teacher is None else teacher,
        args=arguments,
        train_dataset=Dataset.from_list(rows[:12]),
        eval_dataset=Dataset.from_list(rows[12:]),
        processing_class=tokenizer(),
        **(made_with or {}),
    )


def distillation(trainer=DistillationTrainer, folder="", *, student=None, teacher=None, beta=1.0, max_steps=3, **options):
    """A distillation trainer, or of a class made of it, on twelve training and three evaluation prompts."""
    rows = [{"prompt": conversation[:1]} for conversation in conversations(15)]
    arguments = DistillationConfig(output_dir=str(folder), beta=beta, max_steps=max_steps, max_completion_length=6, **(COMMON | options))
    return trainer(
        model=llama(2, 32) if student is None else student,
        teacher_model=llama(1, 48) if teacher is None else teacher,
        args=arguments,
        train_dataset=Dataset.from_list(rows[:12]),
        eval_dataset=Dataset.from_list(rows[12:]),
        processing_class=tokenizer(),
    )


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}

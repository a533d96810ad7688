"""Peak memory of one step's loss and its gradients in TRL's trainers, with their own loss and with it from hidden states.

    python examples/trl_memory.py                            # a table: 16 processes, up to 6 GiB each
    python examples/trl_memory.py --tokens 256 --vocabularies 32000

Each figure is of a process of its own: the kernel's high-water mark of resident memory over compute_loss and backward, above what was
resident before, less the bytes of the gradients. Bodies are of one layer and random, for they are the same in both; widths are 576.
"""

import argparse
import json
import subprocess
import sys
import tempfile

import torch

MIB = 2**20


def status(field: str) -> int:
    """Bytes, of /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def make_trainer(kind: str, fused: bool, vocabulary: int, dtype: torch.dtype, folder: str):
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DistillationConfig, DistillationTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from distill_kernels import TRLDistillationMixin, TRLGKDMixin

    mixin, trainer, config = {
        "GKDTrainer": (TRLGKDMixin, GKDTrainer, GKDConfig),
        "DistillationTrainer": (TRLDistillationMixin, DistillationTrainer, DistillationConfig),
    }[kind]
    if fused:
        trainer = type("Fused", (mixin, trainer), {})
    shape = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=9, num_key_value_heads=3, vocab_size=vocabulary
    )
    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return trainer(
        model=LlamaForCausalLM(shape).to(dtype),
        teacher_model=LlamaForCausalLM(shape).to(dtype),
        args=config(output_dir=folder, beta=0.5, use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False, max_steps=1),
        train_dataset=Dataset.from_list([{"prompt": "<eos>"}]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"),
    )


def make_batch(kind: str, tokens: int, vocabulary: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(vocabulary, (2, tokens // 2), generator=torch.Generator().manual_seed(0))
    ones = torch.ones_like(ids)
    if kind == "GKDTrainer":
        return {"input_ids": ids, "attention_mask": ones, "labels": ids}
    prompt, completion = slice(None, 1), slice(1, None)
    parts = {"prompt": prompt, "completion": completion}
    return {f"{part}_ids": ids[:, where] for part, where in parts.items()} | {
        f"{part}_mask": ones[:, where] for part, where in parts.items()
    }


def measure(kind: str, fused: bool, tokens: int, vocabulary: int, dtype: str) -> float:
    """MiB, of one step in this process."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(kind, fused, vocabulary, getattr(torch, dtype), folder)
    parameters = list(trainer.model.parameters())

    def step(size: int) -> None:
        trainer.compute_loss(trainer.model, make_batch(kind, size, vocabulary)).backward()
        sum(parameter.grad.view(-1)[0] for parameter in parameters)

    step(4)  # code is loaded, and pools of threads are started
    for parameter in parameters:
        parameter.grad = None
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts again from here
    before = status("VmRSS")
    step(tokens)
    return (status("VmHWM") - before - sum(parameter.grad.nbytes for parameter in parameters)) / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[49152, 129280])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a process of its own measures, as JSON
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(**json.loads(arguments.one))))
        return
    print("| trainer | vocabulary | dtype | TRL 1.16, MiB | from hidden states, MiB |\n|---|---|---|---|---|")
    for kind in ("GKDTrainer", "DistillationTrainer"):
        for vocabulary in arguments.vocabularies:
            for dtype in arguments.dtypes:
                peaks = []
                for fused in (False, True):
                    case = {"kind": kind, "fused": fused, "tokens": arguments.tokens, "vocabulary": vocabulary, "dtype": dtype}
                    command = [sys.executable, "-W", "ignore", __file__, "--one", json.dumps(case)]
                    made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                    peaks.append(json.loads(made.stdout.splitlines()[-1]))
                print(f"| `{kind}` | {vocabulary:,} | {dtype} | {peaks[0]:,.0f} | {peaks[1]:,.0f} |", flush=True)


if __name__ == "__main__":
    main()

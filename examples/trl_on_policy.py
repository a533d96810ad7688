"""On-policy distillation by TRL's DistillationTrainer, its loss from hidden states: the student samples, the teacher scores every token.

    python examples/trl_on_policy.py                          # SmolLM2-135M and a student of twelve of its layers, on CPU
    python examples/trl_on_policy.py --teacher FOLDER --steps 200 --beta 0.5

Prints the divergence on the student's own samples for held-out prompts, before and after. The prompts are openings of paragraphs of
Python's own documentation.
"""

import argparse
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer

from distill_kernels import TRLDistillationMixin
from distill_kernels.api.models.initial_models import DEFAULT_LAYERS, cut_student, default_teacher, layers_to_keep, load, savable

HELD_OUT = 32  # prompts


class Trainer(TRLDistillationMixin, DistillationTrainer):
    """Everything of TRL but the loss."""


def prompts(number: int, words: int = 12) -> list[dict[str, str]]:
    paragraphs = (paragraph.split() for text in topics.values() for paragraph in text.split("\n\n"))
    long_enough = [" ".join(paragraph[:words]) for paragraph in paragraphs if len(paragraph) >= 3 * words]
    return [{"prompt": text} for text in long_enough[:: max(1, len(long_enough) // number)][:number]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="folder of a causal language model; SmolLM2-135M by default")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--completion", type=int, default=24, help="tokens that are sampled for each prompt")
    parser.add_argument("--beta", type=float, default=1.0, help="0: forward KL, 1: reverse KL, between: Jensen-Shannon")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    arguments = parser.parse_args()

    teacher, tokenizer = load("--teacher", arguments.teacher or default_teacher())
    student = savable(cut_student(teacher, layers_to_keep(teacher) if arguments.teacher else DEFAULT_LAYERS))
    texts = prompts(arguments.steps * arguments.batch_size + HELD_OUT)
    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            output_dir=folder,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            beta=arguments.beta,
            max_completion_length=arguments.completion,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            logging_steps=10,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
        )
        trainer = Trainer(
            model=student,
            teacher_model=teacher,
            args=config,
            train_dataset=Dataset.from_list(texts[HELD_OUT:]),
            eval_dataset=Dataset.from_list(texts[:HELD_OUT]),
            processing_class=tokenizer,
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    print(f"divergence on the student's own samples, held-out prompts: {before:.3f} nats before, {after:.3f} after {arguments.steps} steps")


if __name__ == "__main__":
    main()

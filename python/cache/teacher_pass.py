"""What a cache keeps of a teacher's run over a few rows. The logits of the whole vocabulary are never held for more than a chunk of tokens.

    logsumexp, entropy    one sweep of the library's own (token_logprobs): log-sum-exp = y_v − log p_v, for the token v that comes next
    top-k                 logits of a chunk, as many tokens as the workspace has room for
"""

from collections.abc import Callable

import torch
from torch import Tensor

from distill_kernels.api.cache import int8_rows
from distill_kernels.api.cache.layout import DTYPES, CachePlan
from distill_kernels.api.losses.logprobs import token_logprobs
from distill_kernels.api.models.backbone import BackboneOutput
from distill_kernels.call.options import Options
from distill_kernels.call.problem import Problem, Tensors
from distill_kernels.products import Products, apply_head

PAD_ID = 0  # any id of the vocabulary: masked, and after all that is kept of its row


def teacher_columns(
    run: Callable[..., BackboneOutput],
    plan: CachePlan,
    rows: list[Tensor],  # (length,) int64 each
    device: torch.device,
    workspace_mib: int | None,
) -> dict[str, Tensor]:
    """What plan.token_columns() says of the tokens of `rows`, packed, on the CPU; from one run of the teacher."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID).to(device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    padding = {} if bool(mask.all()) else {"attention_mask": mask.long()}
    with torch.no_grad():
        output = run(input_ids=ids, **padding)
        hidden = output.hidden[mask]
        columns = _top_k if plan.kind == "top-k" else _hidden
        made = columns(output, hidden, ids[mask], plan, workspace_mib)
        return {name: column.to("cpu") for name, column in made.items()}


def _hidden(output: BackboneOutput, hidden: Tensor, ids: Tensor, plan: CachePlan, workspace_mib: int | None) -> dict[str, Tensor]:
    if plan.dtype == "int8":
        rows, scales = int8_rows.quantise(hidden)
        kept = {"hidden": rows, "hidden_scale": scales}
    else:
        kept = {"hidden": hidden.to(DTYPES[plan.dtype])}
    # Of what will be read, and not of what was rounded: exp(y − logsumexp) then sums to 1 there.
    hidden = restore_hidden(kept["hidden"], kept.get("hidden_scale"), plan.hidden_dim, output.weight.dtype)
    # Any token would do; the next one is mostly likely, and a small log-probability costs no digits in the difference.
    chosen = ids.roll(-1)
    logprobs, entropy = token_logprobs(
        hidden, output.weight, chosen, bias=output.bias, logit_scale=output.logit_scale, softcap=output.softcap,
        temperature=plan.temperature, workspace_mib=workspace_mib,
    )  # fmt: skip
    logits = (hidden.float() * output.weight[chosen].float()).sum(-1)
    apply_head(logits, None if output.bias is None else output.bias[chosen].float(), output.logit_scale, output.softcap)
    return {**kept, "logsumexp": logits / plan.temperature - logprobs, "entropy": entropy}


def restore_hidden(hidden: Tensor, scale: Tensor | None, dim: int, dtype: torch.dtype) -> Tensor:
    """Hidden states (..., dim) as a loss takes them, in the head's dtype, of what a cache holds."""
    return (hidden if scale is None else int8_rows.restore(hidden, scale, dim)).to(dtype)


def _top_k(output: BackboneOutput, hidden: Tensor, ids: Tensor, plan: CachePlan, workspace_mib: int | None) -> dict[str, Tensor]:
    tokens, vocabulary = len(hidden), len(output.weight)
    nothing = hidden.new_empty(0)
    tensors = Tensors(hidden, output.weight, None, None, None, None, None, nothing)
    problem = Problem.of(tensors, Options(workspace_mib=workspace_mib), kd=False, cross_entropy=True)
    workspace_bytes = problem.workspace_mib * 2**20
    # The logits, their exponentials, and what a search for the largest takes.
    chunk = max(1, min(tokens, workspace_bytes // (4 * 4 * vocabulary)))
    products = Products(problem, hidden.device)
    logits = torch.empty(chunk, vocabulary, device=hidden.device)
    made = {name: torch.empty(tokens, *shape, dtype=dtype, device=hidden.device) for name, (dtype, shape) in plan.token_columns().items()}
    for begin in range(0, tokens, chunk):
        part = slice(begin, min(begin + chunk, tokens))
        of_part = logits[: part.stop - begin]
        products.logits(hidden[part], output.weight, out=of_part)
        apply_head(of_part, output.bias, output.logit_scale, output.softcap)
        of_part /= plan.temperature
        logsumexp = of_part.logsumexp(1, keepdim=True)
        top, top_ids = of_part.topk(plan.top_k)
        made["top_ids"][part], made["top_logprobs"][part] = top_ids, top - logsumexp
        # Summed by itself: 1 less the others would lose it to rounding where they are nearly all.
        made["tail_mass"][part] = (of_part.scatter_(1, top_ids, -torch.inf).logsumexp(1) - logsumexp.squeeze(1)).exp()
    return made

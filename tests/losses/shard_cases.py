"""What ranks that share a vocabulary have to get right: a function for each case, run by shard_ranks.py on every rank."""

import contextlib
import re

import torch
import torch.distributed as distributed
from accuracy import (
    DIVERGENCES,
    eager_terms,
    everything,
    make_inputs,
    make_labels,
    make_token_weight,
    with_gradients,
)
from shard_calls import (
    CASES,
    STUDENT_DIM,
    TEACHER_DIM,
    TOKENS,
    VOCABULARY,
    assert_alike,
    case,
    check,
    inputs_of,
    put_together,
    rank,
    rows,
    rows_of,
    sharded,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from distill_kernels import distillation_loss, distillation_loss_and_stats, divergences, plan, token_logprobs
from distill_kernels.backends.torch.rows import STATISTICS, Sums
from distill_kernels.call import shards, worthwhile
from distill_kernels.call.problem import STATS


def divergence_matches_reference(divergence):
    check(inputs_of(), divergence=divergence)
    check(inputs_of("peaked"), divergence=divergence, slack=4, **everything(TOKENS, VOCABULARY))


# Divergences see log-probabilities, not ranks: a few of them, one with a gradient that is not continuous, tell whether those are right.
QUICK = (divergences.resolve("forward_kl"), divergences.alpha_beta(0.2, 0.7), divergences.resolve("total_variation"))
for each in DIVERGENCES:
    case((1, 2, 3, 4), each, exhaustive=(1, 2, 4) if each in QUICK else (1, 2, 3, 4))(divergence_matches_reference)


@case((2, 3), "flat")
@case((2, 3), "equal")
@case((2, 3), "huge")
@case((2, 3), "realistic")
def family_matches_reference(family):
    check(inputs_of(family), slack=4, **everything(TOKENS, VOCABULARY))


@case((2, 3), torch.bfloat16)
@case((2, 3), torch.float16)
@case((2, 3), torch.float64)
def dtype_matches_reference(dtype):
    check(inputs_of("grid", dtype=dtype), slack=4, labels=make_labels(TOKENS, VOCABULARY), ce_weight=0.5)


@case((1, 2, 3, 4), "sum")
@case((1, 2, 3, 4), "none")
def reduction_matches_reference(reduction):
    options = {"labels": make_labels(TOKENS, VOCABULARY), "ce_weight": 0.5, "token_weight": make_token_weight(TOKENS)}
    upstream = torch.linspace(0.2, 2.0, TOKENS) if reduction == "none" else 1.7
    check(inputs_of(), upstream, reduction=reduction, **options)


@case((2, 3, 4))
def several_chunks_match_reference():
    check(inputs_of(tokens=97, vocabulary=6000), workspace_mib=2, divergence=divergences.jensen_shannon(beta=0.3))


@case((2, 3))
def losses_without_a_divergence_match_reference():
    check(inputs_of(), kd_weight=0.0, ce_weight=1.0, z_loss_weight=0.1, labels=make_labels(TOKENS, VOCABULARY))


@case((1, 2, 3))
def masked_everywhere_gives_zero():
    got = with_gradients(sharded(), inputs_of(), 1.7, labels=torch.full((TOKENS,), -100), ce_weight=0.5)
    assert all((value == 0).all() for value in got.values())


@case((1, 2, 3), "torch")
@case((2, 3), "triton", exhaustive=(3,))
def stats_match_eager(backend):
    tokens = TOKENS if backend == "torch" else 13
    inputs, labels = inputs_of(tokens=tokens), make_labels(tokens, VOCABULARY)
    # By turns the models' most probable entries are one; two of two ranks; one, of the last rank; two of one rank.
    elsewhere = rows_of(1).start if distributed.get_world_size() > 1 else 100
    places = torch.tensor([[5, 5], [0, elsewhere], [VOCABULARY - 1, VOCABULARY - 1], [5, 6]])
    for model in range(2):
        hidden, weight = inputs[2 * model], inputs[2 * model + 1]
        hidden[:, :4], weight[:, :4] = 0, 0
        kinds = torch.arange(tokens) % len(places)
        hidden[torch.arange(tokens), kinds] = 30.0
        weight[places[:, model], torch.arange(len(places))] = 1.0
    inputs.teacher_weight[0, 1] = 0.9  # of what rank 0 has both models like the same entry best, but the teacher likes one of rank 1 better
    options = {"student_bias": inputs[4], "teacher_bias": inputs[5], "labels": labels}
    _, stats = sharded(distillation_loss_and_stats)(*inputs[:4], backend=backend, **options)
    _, wanted = eager_terms(*inputs[:4], labels, student_bias=inputs[4], teacher_bias=inputs[5])
    for name in STATS:
        want = torch.where(labels != -100, wanted[name], 0)
        torch.testing.assert_close(getattr(stats, name), want, rtol=2e-5, atol=2e-6)
        assert want.unique().numel() > 1


@case((1, 2, 3))
def log_probabilities_match_eager():
    inputs = inputs_of().to(torch.float64)
    ids = make_labels(TOKENS, VOCABULARY)
    hidden, weight = inputs.student_hidden.requires_grad_(), inputs.student_weight.requires_grad_()
    own = rows(VOCABULARY)
    made = token_logprobs(hidden, weight[own], ids, bias=inputs.student_bias[own], temperature=2.0, process_group=distributed.group.WORLD)
    log_q = ((hidden @ weight.T + inputs.student_bias) / 2.0).log_softmax(-1)
    valid = ids != -100
    want = torch.where(valid, log_q.gather(-1, (ids * valid)[:, None])[:, 0], 0), torch.where(valid, -(log_q.exp() * log_q).sum(-1), 0)
    upstream = torch.linspace(0.2, 2.0, TOKENS, dtype=torch.float64)
    got, wanted = (torch.autograd.grad([*pair], [hidden, weight], [upstream, -upstream]) for pair in (made, want))
    distributed.all_reduce(got[1])
    for left, right in zip((*made, *got), (*want, *wanted), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10)


@case((2, 3))
def the_same_bits_come_out_again():
    inputs = inputs_of(tokens=97, vocabulary=6000)
    first, again = (with_gradients(sharded(), inputs, 1.7, workspace_mib=2, divergence="reverse_kl") for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@case((2, 3))
def frozen_head_gets_no_gradient():
    inputs = inputs_of(bias=False)
    hidden = inputs.student_hidden.requires_grad_()
    own = rows(VOCABULARY)
    weight = inputs.student_weight[own]
    loss = distillation_loss(hidden, weight, inputs.teacher_hidden, inputs.teacher_weight[own], process_group=distributed.group.WORLD)
    loss.backward()
    want = with_gradients(distillation_loss, inputs_of(bias=False), 1.0)
    torch.testing.assert_close(hidden.grad, want["d_student_hidden"], rtol=1e-5, atol=1e-7)


@contextlib.contextmanager
def sampled_whatever_the_size():
    least = worthwhile.LEAST_TOKENS, worthwhile.LEAST_VOCABULARY
    worthwhile.LEAST_TOKENS = worthwhile.LEAST_VOCABULARY = 1
    try:
        yield
    finally:
        worthwhile.LEAST_TOKENS, worthwhile.LEAST_VOCABULARY = least


@case((2, 3), exhaustive=(3,))
def sampled_gradients_are_unbiased():
    inputs, draws = inputs_of("peaked", bias=False), 200
    exact = put_together(with_gradients(distillation_loss, inputs, 1.0))
    weight = exact["d_student_weight"] / distributed.get_world_size()  # every rank had all of it
    own = rows(VOCABULARY)
    hidden, head = inputs.student_hidden.requires_grad_(), inputs.student_weight[own].requires_grad_()
    sums, squares, predicted = [torch.zeros_like(hidden), torch.zeros_like(head)], torch.zeros(2), torch.zeros(2)
    with sampled_whatever_the_size():
        for seed in range(draws):
            loss, stats = distillation_loss_and_stats(
                hidden, head, inputs.teacher_hidden, inputs.teacher_weight[own], column_fraction=0.2, seed=seed,
                process_group=distributed.group.WORLD,
            )  # fmt: skip
            made = torch.autograd.grad(loss, [hidden, head])
            torch.testing.assert_close(loss, exact["loss"], rtol=1e-5, atol=1e-6)
            for total, gradient in zip(sums, made, strict=True):
                total += gradient / draws
            errors = [(made[0] - exact["d_student_hidden"]).square().sum(), (made[1] - weight[own]).square().sum()]
            squares += torch.stack(errors) / draws
            predicted += stats.gradient_error.square() / draws
            assert_alike(stats.gradient_error)
    distributed.all_reduce(weight_errors := squares[1:])
    scale = torch.stack([exact["d_student_hidden"].square().sum(), weight.square().sum()])
    observed = torch.stack([squares[0], weight_errors[0]]) / scale
    assert (observed > 1e-4).all(), "nothing was sampled"
    assert ((observed / predicted).log().abs() < 0.4).all(), f"observed {observed.sqrt()}, predicted {predicted.sqrt()}"
    bias = (sums[0] - exact["d_student_hidden"]).square().sum() / scale[0], (sums[1] - weight[own]).square().sum() / scale[1]
    # The mean of so many draws is off by a root of their number less than each.
    assert bias[0] < 2.5 * observed[0] / draws and bias[1] < 2.5 * observed[1] / draws, f"{bias}, {observed / draws}"


@case((2, 3))
def sampled_gradients_made_in_backward_are_those_made_in_forward():
    inputs = inputs_of("peaked", bias=False)
    options = {"column_fraction": 0.2, "seed": 7}
    with sampled_whatever_the_size():
        want = with_gradients(sharded(), inputs, 1.7, **options)
        got = with_gradients(sharded(), inputs, 1.7 / TOKENS, reduction="none", **options)
    for name in ("d_student_hidden", "d_student_weight"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6)
        assert want[name].abs().max() > 0


@case((2, 3, 4), "mean")
@case((2, 3, 4), "none")
def divided_tokens_give_what_whole_ones_give(reduction):
    ranks = distributed.get_world_size()
    tokens = 6 * ranks
    inputs, labels, weights = inputs_of(tokens=tokens), make_labels(tokens, VOCABULARY), make_token_weight(tokens)
    options = {"reduction": reduction, "ce_weight": 0.4, "temperature": 2.0}
    upstream = torch.linspace(0.2, 2.0, tokens) if reduction == "none" else torch.tensor(1.7)
    want = with_gradients(distillation_loss, inputs, upstream, labels=labels, token_weight=weights, **options)
    part = slice(6 * rank(), 6 * rank() + 6)
    divided = inputs._replace(student_hidden=inputs.student_hidden[part], teacher_hidden=inputs.teacher_hidden[part])
    own = {"labels": labels[part], "token_weight": weights[part], "sequence_parallel": True}
    got = put_together(with_gradients(sharded(), divided, upstream[part] if upstream.dim() else upstream, **own, **options))
    want["d_student_hidden"] = want["d_student_hidden"][part]
    if reduction == "none":
        want["loss"] = want["loss"][part]
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5 * want[name].abs().max().item())


@case((2, 3))
def distributed_tensors_say_how_they_are_divided():
    ranks = distributed.get_world_size()
    mesh, tokens = init_device_mesh("cpu", (ranks,)), 6 * ranks
    inputs, labels = inputs_of(tokens=tokens, bias=False), make_labels(tokens, VOCABULARY)
    want = with_gradients(distillation_loss, inputs, 1.7, labels=labels, ce_weight=0.4)
    student_weight, teacher_weight = (distribute_tensor(w, mesh, [Shard(0)]) for w in (inputs.student_weight, inputs.teacher_weight))
    for placement in (Replicate(), Shard(0)):
        hidden, taught, own_labels = (
            distribute_tensor(tensor, mesh, [placement]) for tensor in (inputs.student_hidden, inputs.teacher_hidden, labels)
        )
        hidden, weight = hidden.requires_grad_(), student_weight.detach().clone().requires_grad_()
        loss = distillation_loss(hidden, weight, taught, teacher_weight, own_labels, ce_weight=0.4)
        (1.7 * loss).backward()
        torch.testing.assert_close(loss, want["loss"], rtol=1e-5, atol=1e-6)
        assert isinstance(weight.grad, DTensor) and weight.grad.placements == (Shard(0),)
        for name, tensor in (("d_student_hidden", hidden), ("d_student_weight", weight)):
            torch.testing.assert_close(tensor.grad.full_tensor(), want[name], rtol=1e-4, atol=1e-7)
    by_features = distribute_tensor(inputs.student_weight, mesh, [Shard(1)])
    refused(r"wanted Shard\(0\), rows of the vocabulary", lambda: distillation_loss(hidden, by_features, taught, teacher_weight))
    halved = distribute_tensor(inputs.student_hidden, mesh, [Shard(0)])
    refused("the tokens of student_hidden are divided", lambda: distillation_loss(
        halved, student_weight, distribute_tensor(inputs.teacher_hidden, mesh, [Replicate()]), teacher_weight))  # fmt: skip


@case((4,))
def two_dimensions_are_data_and_vocabulary():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "vocabulary"))
    inputs, labels = inputs_of(tokens=12, bias=False), make_labels(12, VOCABULARY)
    items = int((labels != -100).sum())
    want = with_gradients(distillation_loss, inputs, 1.0, labels=labels, ce_weight=0.4)
    tokens, own = slice(6 * (rank() // 2), 6 * (rank() // 2) + 6), slice(0, 150) if rank() % 2 == 0 else slice(150, VOCABULARY)
    hidden, weight = inputs.student_hidden[tokens].requires_grad_(), inputs.student_weight[own].requires_grad_()
    loss = distillation_loss(
        hidden, weight, inputs.teacher_hidden[tokens], inputs.teacher_weight[own], labels[tokens], ce_weight=0.4, num_items=items,
        process_group=mesh["vocabulary"],
    )  # fmt: skip
    loss.backward()
    data = mesh["data"].get_group()
    distributed.all_reduce(loss.detach_(), group=data)
    distributed.all_reduce(weight.grad, group=data)
    torch.testing.assert_close(loss, want["loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden.grad, want["d_student_hidden"][tokens], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(weight.grad, want["d_student_weight"][own], rtol=1e-4, atol=1e-7)
    whole = make_inputs("moderate", 12, VOCABULARY, STUDENT_DIM, TEACHER_DIM)
    by_data = [
        distribute_tensor(tensor, mesh, [Shard(0), Replicate()]).to_local()
        for tensor in (whole.student_hidden, whole.teacher_hidden, labels)
    ]
    as_dtensors = [DTensor.from_local(tensor, mesh, [Shard(0), Replicate()], run_check=False) for tensor in by_data]
    heads = [distribute_tensor(weight, mesh, [Replicate(), Shard(0)]) for weight in (whole.student_weight, whole.teacher_weight)]
    hidden = as_dtensors[0].requires_grad_()
    loss = distillation_loss(hidden, heads[0], as_dtensors[1], heads[1], as_dtensors[2], ce_weight=0.4, reduction="sum")
    loss.backward()
    total = loss.detach()
    distributed.all_reduce(total, group=data)
    torch.testing.assert_close(total, want["loss"] * items, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.to_local(), want["d_student_hidden"][tokens] * items, rtol=1e-4, atol=1e-6)
    refused("is a DTensor that is replicated over dimension 0 of its mesh, whose ranks each make a gradient", lambda: distillation_loss(
        hidden, heads[0].detach().requires_grad_(), as_dtensors[1], heads[1]))  # fmt: skip
    refused("device mesh of 2 dimensions", lambda: distillation_loss(*inputs_of(bias=False)[:4], process_group=mesh))


@case((2, 3), False)
@case((2, 3), True)
def bytes_are_those_of_the_docstring(gradient):
    tokens, sent = 48, {"gathered": 0, "added": 0}
    inputs = inputs_of(tokens=tokens)
    gather, add_up = shards.Shards.gather, shards.Shards.add_up

    def counting_gather(self, values):
        sent["gathered"] += values.nbytes
        return gather(self, values)

    def counting_add_up(self, values):
        sent["added"] += values.nbytes
        return add_up(self, values)

    shards.Shards.gather, shards.Shards.add_up = counting_gather, counting_add_up
    try:
        hidden = inputs.student_hidden.requires_grad_(gradient)
        sharded()(hidden, *inputs[1:4], backend="torch", workspace_mib=1)
    finally:
        shards.Shards.gather, shards.Shards.add_up = gather, add_up
    joined = sent["gathered"] - tokens * 4 * (STATISTICS + len(Sums._fields))
    assert 0 < joined < 1024, f"{joined} bytes were gathered beside those of the tokens"
    assert sent["added"] == tokens * STUDENT_DIM * 4 * gradient


def refused(message, call):
    try:
        call()
    except (ValueError, TypeError) as error:
        assert re.search(message, str(error)), str(error)
    else:
        raise AssertionError(f"nothing was refused, wanted: {message}")


@case((2, 3))
def ranks_that_disagree_are_all_told():
    inputs = inputs_of(bias=False)
    odd = rank() == 1
    whole = inputs.student_weight
    calls = {
        "rank 1 called with another temperature than rank 0": {"temperature": 2.0 if odd else 1.0},
        "rank 1 called with another divergence than rank 0": {"divergence": "reverse_kl" if odd else "forward_kl"},
        "rank 1 called with another z_loss_weight than rank 0": {"z_loss_weight": 0.1 if odd else 0.0},
        "rank 1 called with another token_weight, num_items or weight of a term than rank 0": {"num_items": 105 if odd else 100},
        "rank 1 called with another mask than rank 0": {"token_weight": (torch.arange(TOKENS) != 20 + odd).float()},
        "rank 1 called with another backend than rank 0": {"backend": "triton" if odd else "torch"},
        "rank 1 called with another workspace_mib than rank 0": {"workspace_mib": 8 if odd else 9},
        "rank 1 called with another labels or token_weight, or none, than": {"labels": make_labels(TOKENS, VOCABULARY) if odd else None},
    }
    for message, options in calls.items():
        refused(message, lambda options=options: sharded()(*inputs[:4], **options))
    own = inputs._replace(student_hidden=inputs.student_hidden[: TOKENS - odd], teacher_hidden=inputs.teacher_hidden[: TOKENS - odd])
    refused("rank 1 called with another number of tokens than rank 0", lambda: sharded()(*own[:4]))
    other = inputs.student_hidden.flip(0) if odd else inputs.student_hidden
    refused("rank 1 called with another student_hidden than rank 0. Ranks that share", lambda: sharded()(other, *inputs[1:4]))
    labels = make_labels(TOKENS, VOCABULARY, masked=0.0)
    labels[20] += odd
    refused("rank 1 called with another labels than rank 0", lambda: sharded()(*inputs[:4], labels=labels, ce_weight=1.0))
    frozen = whole if odd else whole.clone().requires_grad_()
    refused("rank 1 called with another student_weight.requires_grad than", lambda: sharded()(inputs.student_hidden, frozen, *inputs[2:4]))
    few = (torch.arange(TOKENS) % 3 == 0).float()
    refused("rank 1 called with another student_hidden than rank 0. Ranks that share", lambda: sharded()(
        other, *inputs[1:4], token_weight=few))  # fmt: skip
    refused("rank 1 called with another labels, or none, than rank 0", lambda: sharded()(
        *inputs[:4], labels=labels if odd else None, sequence_parallel=True))  # fmt: skip
    uneven = inputs._replace(student_hidden=inputs.student_hidden[: 5 + odd], teacher_hidden=inputs.teacher_hidden[: 5 + odd])
    refused(r"have \[5, 6.*\] tokens; wanted as many", lambda: sharded()(*uneven[:4], sequence_parallel=True))
    refused("labels must be at least 0 and below the vocabulary size 301", lambda: sharded()(
        *inputs[:4], labels=torch.full((TOKENS,), VOCABULARY), ce_weight=1.0))  # fmt: skip
    check(inputs_of())  # and go on together


@case((2, 3))
def options_of_whole_vocabularies_are_refused():
    inputs = inputs_of(bias=False)
    for options in ({"column_fraction": "auto", "gradient_tolerance": 0.1}, {"sweep": "int8", "column_fraction": 0.1},
                    {"vocab_mismatch": "truncate"}, {"backend": "native"}):  # fmt: skip
        try:
            sharded()(*inputs[:4], **options)
        except NotImplementedError as error:
            assert "shards" in str(error)
        else:
            raise AssertionError(f"{options} was not refused")


class Student(torch.nn.Module):
    """Its forward is the loss, so that whatever wraps it sees all that the loss uses."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.body = torch.nn.Linear(STUDENT_DIM, STUDENT_DIM)
        self.head = torch.nn.Linear(STUDENT_DIM, VOCABULARY, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / STUDENT_DIM**0.5)

    def forward(self, features, teacher_hidden, teacher_weight, labels, num_items):
        hidden = self.body(features).tanh()
        return distillation_loss(
            hidden, self.head.weight, teacher_hidden, teacher_weight, labels, ce_weight=0.3, temperature=2.0, num_items=num_items
        )


STEPS = 20


def steps_of(module, part, ranks):
    """The losses of STEPS, and the module's parameters after them; each rank has a part of every batch."""
    optimizer, losses = torch.optim.AdamW(module.parameters(), lr=1e-2), []
    teacher_weight = inputs_of(bias=False).teacher_weight
    for step in range(STEPS):
        batch = make_inputs("moderate", 12, VOCABULARY, STUDENT_DIM, TEACHER_DIM, seed=step)
        labels = make_labels(12, VOCABULARY, seed=step)
        items = int((labels != -100).sum())
        loss = module(batch.student_hidden[part], batch.teacher_hidden[part], teacher_weight, labels[part], items / ranks)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach() / ranks)
    return torch.stack(losses), {name: getattr(p, "full_tensor", lambda p=p: p)().detach() for name, p in module.named_parameters()}


@case((2,), "DistributedDataParallel")
@case((2,), "fully_shard")
def wrapped_training_is_that_of_one_process(wrapper):
    part = slice(0, 5) if rank() == 0 else slice(5, 12)
    student = Student()
    if wrapper == "fully_shard":
        fully_shard(student)
        hidden = torch.randn(3, STUDENT_DIM)
        refused(  # a data-parallel shard is no shard of a vocabulary
            "called with another student_hidden than rank 0.*inside of the wrapped module's forward",
            lambda: distillation_loss(hidden + rank(), student.head.weight, torch.randn(3, TEACHER_DIM), torch.randn(
                len(student.head.weight.to_local()), TEACHER_DIM)))  # fmt: skip
    else:
        student = torch.nn.parallel.DistributedDataParallel(student)
    losses, parameters = steps_of(student, part, 2)
    distributed.all_reduce(losses)
    want, wanted = steps_of(Student(), slice(0, 12), 1)
    torch.testing.assert_close(losses, want, rtol=1e-4, atol=1e-5)
    untrained = dict(Student().named_parameters())
    for name, parameter in parameters.items():
        name = name.removeprefix("module.")
        torch.testing.assert_close(parameter, wanted[name], rtol=1e-3, atol=1e-4)
        assert (parameter - untrained[name]).abs().max() > 0.05, "nothing was learned"


@case((2, 3), "forward_kl", exhaustive=(2,))
@case((2,), divergences.jensen_shannon(beta=0.3), exhaustive=(2,))
def triton_matches_reference(divergence):
    check(inputs_of(tokens=13), backend="triton", divergence=divergence, slack=4, **everything(13, VOCABULARY))
    inputs = inputs_of(tokens=13)
    value = sharded()(*inputs[:4], backend="triton", divergence=divergence)  # tile-fused, if one pass is enough
    torch.testing.assert_close(value, distillation_loss(*inputs[:4], divergence=divergence), rtol=1e-5, atol=1e-6)


@case((3,))
def triton_chunks_match_reference():
    options = {"labels": make_labels(40, 2000), "ce_weight": 0.5}
    assert plan(40, 667, STUDENT_DIM, TEACHER_DIM, workspace_mib=1).chunks == 1
    check(inputs_of(tokens=40, vocabulary=2000), backend="triton", workspace_mib=1, slack=4, **options)


def names_of(ranks, which):
    """Of the cases of so many ranks the "quick" ones or the "exhaustive" ones."""
    return [name for name, (_, numbers, slow) in CASES.items() if ranks in numbers and (ranks in slow) == (which == "exhaustive")]

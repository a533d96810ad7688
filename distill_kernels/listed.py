"""Losses of a few listed vocabulary entries of each token: what a teacher whose top-k log-probabilities were kept can be compared by.

Let L be the entries that a token lists, q the student's softmax, and q_rest = Σ_{v ∉ L} q_v. Every loss here is a function of the listed
logits z_k and of the log-sum-exp of all the others, and that is all a backend has to make of the vocabulary (`backends`, run_listed):

    listed (n, K)    z_k, of meant logits
    others (n, 3)    a reference r, log Σ_{v ∉ L} exp((z_v − r) / τ) and log Σ_{v ∉ L} exp(z_v − r); −∞ where every entry is listed

The others are summed without the listed ones, not by difference: where L has nearly all the probability, 1 − Σ q_k has no digits left. A
loss answers with its gradient, from which that of every logit follows:

    d_listed (n, K)  ∂/∂z_k
    d_others (n, 2)  of an entry not listed it is  d_others[0] · softmax(z / τ)_v + d_others[1] · softmax(z)_v,  softmaxes of the others

What the teacher leaves out, its tail, is compared by one of `options.TAILS`:

    bucket       as one entry more, of probability 1 − Σ p_k and q_rest: the divergence of two distributions over K + 1 outcomes; not
                 where everything is listed
    renormalise  not at all; both distributions are renormalised to the list, p_k / Σ p and q_k / Σ_L q: how L is shared out
    ignore       not at all, and nothing is renormalised: Σ_k value(log p_k, log q_k), which is no divergence unless L is everything
"""

import warnings
from typing import NamedTuple

import torch

from distill_kernels.call.options import Options
from distill_kernels.call.problem import Problem
from distill_kernels.divergences import LOG_PROBABILITY_FLOOR

LEAST_ROUNDED = 32  # log-probabilities with two decimals are no coincidence
# Σ p of a row that is taken for rounding of its log-probabilities: bfloat16's of an entropy of 10 nats add up to 4 %. Unnormalised
# logits, or another base of logarithms, make more.
MOST_MASS = 1.05


def listed_bytes(problem: Problem) -> int:
    """Of what a token of a chunk takes for its list, sorted and compared: some thirty numbers for each entry at the worst line."""
    return 32 * problem.compute_dtype.itemsize * problem.listed


class Lists(NamedTuple):
    """Entries of every token, and what they are compared with; `of` some tokens likewise."""

    ids: torch.Tensor  # (N, K) int64, negative where there is none, none twice in a row
    flawed: torch.Tensor  # (N,) bool: the row was not what was wanted, and its results are NaN
    log_p: torch.Tensor | None = None  # (N, K) the teacher's, −∞ where it lists none
    shown: torch.Tensor | None = None  # (N, K) bool: entries that the teacher lists, not the label alone
    log_tail: torch.Tensor | None = None  # (N, 1) log-probability of what the teacher does not list; None: not compared
    label_at: torch.Tensor | None = None  # (N,) int64: the label's place in the list, −1: no label

    def of(self, tokens) -> "Lists":
        return Lists(*(None if tensor is None else tensor[tokens] for tensor in self))


def checked(name: str, ids, vocabulary: int, counts) -> Lists:
    """The lists (N, K) of tokens that count, (N,) bool; of the others nothing is looked at.

    Raises ValueError on CPU for a row that is flawed; elsewhere, where looking would wait for the device, its results are NaN.
    """
    ids = torch.where(counts[:, None], ids, -1)
    beyond = (ids < -1) | (ids >= vocabulary)
    in_order = ids.sort(-1).values
    twice = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)
    if ids.device.type == "cpu":
        _refuse(beyond, ids, f"{name} must be at least 0 and below the vocabulary size {vocabulary}, or -1 for none")
        _refuse(twice, in_order, f"{name} must name each entry once in a row, and have -1, not an id, where a row has fewer")
    flawed = beyond.any(-1) | twice.any(-1)
    return Lists(torch.where(flawed[:, None], -1, ids), flawed)


def with_teacher(lists: Lists, log_p, tail_mass, options: Options, dtype) -> Lists:
    """The lists with a teacher's log-probabilities (N, K), and the mass (N,) of its tail if that is known better than by 1 − Σ p.

    With tail="renormalise" p is raised to `options.list_exponent`, which brings it to the loss's temperature. Raises as `checked`.
    """
    tail = options.tail
    shown = lists.ids >= 0
    log_p = torch.where(shown, log_p.to(dtype), -torch.inf)
    # The largest by itself: what it leaves of 1 may be 1e-9, and its logarithm does say so.
    most, at = log_p.max(-1, keepdim=True)
    p_of_others = log_p.exp().scatter(-1, at, 0).sum(-1, keepdim=True)
    mass = most.exp() + p_of_others
    anything = shown.any(-1, keepdim=True)
    too_much = ~(mass <= MOST_MASS)
    nothing = anything & (most == -torch.inf) & (tail == "renormalise")
    left = None if tail_mass is None else torch.where(anything, tail_mass.to(dtype)[:, None], 1.0)
    if log_p.device.type == "cpu":
        wanted = "teacher_logprobs must be logarithms of probabilities, natural ones, at the temperature of the loss"
        _refuse(too_much, mass, f"{wanted}; those of a row must not sum to more than 1")
        _refuse(nothing, most, 'teacher_logprobs of a row must not all be −inf with tail="renormalise"')
        if left is not None:
            _refuse(~((left >= 0) & (left <= 1)), left, "teacher_tail_mass must be a probability")
        _notice_rounding(log_p[shown])
    flawed = lists.flawed | (too_much | nothing).squeeze(-1)
    if left is not None:
        flawed = flawed | ~((left >= 0) & (left <= 1)).squeeze(-1)
    log_tail = None
    if tail == "bucket":
        log_tail = ((-torch.expm1(most) - p_of_others).clamp(min=0) if left is None else left).log()
    elif tail == "renormalise":
        log_p = log_p * options.list_exponent
        log_p = torch.where(shown, log_p - log_p.logsumexp(-1, keepdim=True), -torch.inf)
    return lists._replace(log_p=log_p, shown=shown, log_tail=log_tail, flawed=flawed)


def with_labels(lists: Lists, labels) -> Lists:
    """The lists with a column more, that of labels (N,) which they do not have; negative labels are none."""
    found = (lists.ids == labels[:, None]) & (labels[:, None] >= 0)
    has, width = found.any(-1), lists.ids.shape[1]
    at = torch.where(has, found.to(torch.int8).argmax(-1), torch.where(labels >= 0, width, -1))
    added = {"ids": torch.where(has | (labels < 0), -1, labels), "label_at": at}
    if lists.log_p is not None:
        added |= {"log_p": torch.full_like(labels, -torch.inf, dtype=lists.log_p.dtype), "shown": torch.zeros_like(has)}
    columns = {name: torch.cat([getattr(lists, name), new[:, None]], 1) for name, new in added.items() if name != "label_at"}
    return lists._replace(label_at=at, **columns)


def _refuse(wrong, values, wanted: str):
    """ValueError with the first value that is wrong, and its row."""
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(f"{wanted}, got {values[row, column].item():g} in row {row}")


def _notice_rounding(log_p):
    """Warns where all log-probabilities, of the teacher's entries alone, have been rounded to two decimals, as servers print them."""
    some = log_p[log_p.isfinite() & (log_p != 0)]
    if len(some) >= LEAST_ROUNDED and ((some * 100).round() / 100 - some).abs().max() <= 4 * torch.finfo(some.dtype).eps * some.abs().max():
        warnings.warn(
            "all teacher_logprobs have been rounded to two decimals: each probability is wrong by up to 0.5 %, and a row's tail by "
            "as much of the whole. Ask whoever made them for all digits.",
            stacklevel=2,
        )


class LogProbabilities(NamedTuple):
    """Of a chunk's lists under the student, at one temperature."""

    listed: torch.Tensor  # (n, K), −∞ where there is no entry
    rest: torch.Tensor  # (n, 1) of all others together
    lse: torch.Tensor  # (n, 1) log Σ exp z of all entries, if the temperature is 1


def log_probabilities(ids, listed, others, inverse_temperature: float, log_sum: int) -> LogProbabilities:
    """log_sum: the column of `others` that is of this temperature."""
    reference, log_sum = others[:, :1], others[:, log_sum : log_sum + 1]
    listed = torch.where(ids >= 0, listed, -torch.inf)
    highest = torch.maximum(listed.amax(-1, keepdim=True), torch.where(log_sum == -torch.inf, -torch.inf, reference))
    x = (listed - highest) * inverse_temperature
    rest = (reference - highest) * inverse_temperature + log_sum
    lse = torch.cat([x, rest], -1).logsumexp(-1, keepdim=True)
    return LogProbabilities(x - lse, rest - lse, highest + lse)


def log_probability_gradient(made: LogProbabilities, d_listed, d_rest):
    """(d_listed (n, K), d_others (n, 2)) of Σ d_listed · log q_k + d_rest · log q_rest; a log-probability below the floor is a constant."""
    d_listed = torch.where(made.listed < LOG_PROBABILITY_FLOOR, 0, d_listed)
    d_rest = torch.where(made.rest < LOG_PROBABILITY_FLOOR, 0, d_rest)
    total = d_listed.sum(-1, keepdim=True) + d_rest
    d_rest = d_rest - made.rest.exp() * total
    return d_listed - made.listed.exp() * total, torch.cat([d_rest, torch.zeros_like(d_rest)], 1)


def terms_and_gradient(problem: Problem, lists: Lists, coefficients, listed, others):
    """The loss of a chunk's tokens: its terms (n, 3), and d_listed, d_others of Σ coefficients · terms.

    `lists` are those of the chunk, `coefficients` (n, 3); `problem.divergence` None: there is no teacher.
    """
    kd, ce, z_loss = coefficients.unsqueeze(-1).unbind(1)  # (n, 1) each
    terms = torch.zeros_like(coefficients)
    d_listed, d_others = torch.zeros_like(listed), torch.zeros_like(others[:, :2])
    if problem.divergence is not None:
        made = log_probabilities(lists.ids, listed, others, 1 / problem.options.temperature, 1)
        value, gradient, of_rest = _divergence(problem.divergence, lists, problem.options.tail, problem.vocabulary, made)
        terms[:, :1] = value
        d_listed = kd / problem.options.temperature * gradient
        d_others[:, :1] = kd / problem.options.temperature * of_rest
    if problem.cross_entropy or problem.z_loss:
        made = log_probabilities(lists.ids, listed, others, 1.0, 2)
        terms[:, 2:] = made.lse.square()
        pull = 2 * z_loss * made.lse
        if problem.cross_entropy:
            labelled = lists.label_at[:, None] >= 0
            at = lists.label_at[:, None].clamp(min=0)
            log_q = torch.where(labelled, made.listed.gather(-1, at), 0)
            terms[:, 1:2] = -log_q.clamp(min=LOG_PROBABILITY_FLOOR)
            push = ce * (labelled & ~(log_q < LOG_PROBABILITY_FLOOR))
            pull = pull + push
            d_listed = d_listed.scatter_add(-1, at, -push)
        d_listed = d_listed + pull * made.listed.exp()
        d_others[:, 1:] = pull * made.rest.exp()
    counts = (coefficients != 0).any(-1, keepdim=True)
    flawed = lists.flawed[:, None]
    return tuple(torch.where(counts, made.masked_fill(flawed, torch.nan), 0) for made in (terms, d_listed, d_others))


def _divergence(divergence, lists: Lists, tail: str, vocabulary: int, made: LogProbabilities):
    """(value (n, 1), ∂value/∂x_k (n, K), and of the others together (n, 1)), x = z / τ."""
    shown, log_p, log_q = lists.shown, lists.log_p, made.listed
    q, q_rest = made.listed.exp(), made.rest.exp()
    if tail == "bucket":
        # A label that the teacher does not list is of its tail.
        label = torch.where(shown, -torch.inf, log_q).amax(-1, keepdim=True)
        bucket = torch.logaddexp(label, made.rest)
        share_of_label, share_of_rest = (torch.where(part == -torch.inf, 0, (part - bucket).exp()) for part in (label, made.rest))
        log_p, log_q = torch.cat([log_p, lists.log_tail], 1), torch.cat([log_q, bucket], 1)
        # Of a list of everything 1 − Σ p is rounding, and there is nothing that could have it.
        count = shown.sum(-1, keepdim=True)
        shown = torch.cat([shown, (count > 0) & (count < vocabulary)], 1)
    elif tail == "renormalise":
        log_q = torch.where(shown, log_q, -torch.inf)
        log_q = log_q - log_q.logsumexp(-1, keepdim=True)
        q, q_rest = torch.where(shown, log_q.exp(), 0), torch.zeros_like(q_rest)
    value, slope = divergence(*(torch.where(shown, log, 0).clamp(min=LOG_PROBABILITY_FLOOR) for log in (log_p, log_q)))
    value = torch.where(shown, value, 0).sum(-1, keepdim=True)
    slope = torch.where(shown & ~(log_q < LOG_PROBABILITY_FLOOR), slope, 0)
    total = slope.sum(-1, keepdim=True)
    of_rest = -q_rest * total
    if tail == "bucket":
        slope, of_bucket = slope[:, :-1], slope[:, -1:]
        slope = torch.where(lists.shown, slope, of_bucket * share_of_label)
        of_rest = of_rest + of_bucket * share_of_rest
    return value, slope - q * total, of_rest

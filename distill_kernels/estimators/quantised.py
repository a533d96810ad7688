"""The quantised sweep: logits from 8-bit products over the whole vocabulary, corrected by the few columns that are computed exactly.

Sampled gradients (`columns`) leave 1S + 1T, the products whose sums over the vocabulary make the log-sum-exps and the loss. Made in
8 bits they cost a fraction and keep no logits, and also say which columns matter; alone they would be too coarse. But K columns are
computed exactly for the gradients anyway, column v kept with probability π_v, and they correct every sum:

    Σ_v f(exact_v)  ≈  Σ_v f(swept_v) + Σ_{v kept} (f(exact_v) − f(swept_v)) / π_v

the difference estimator of survey sampling (Cassel, Särndal and Wretman 1976; Särndal, Swensson and Wretman 1992, section 6.3). It is
unbiased whatever the swept values are, if π_v is positive where they differ: the sweep is a control variate, and a coarse or stale one
costs variance, not truth. Corrected are Σ exp(y), Σ exp(x) of the tempered logits, Σ exp(z) of the student's untempered ones, and
Σ value and Σ slope of a divergence that can be renormalised (`divergences.renormalised_by`): forward and reverse KL. The others sum
functions of log-probabilities, which no sweep knows before its end. They are refused (`Options.check_sweep`), and so is label smoothing,
whose sum of all logits has its weight where nothing is kept. The label's own logit is exact.

A token's loss is a smooth function F of those sums. With δ_v the vector of differences at column v and c = ∇F at the corrected sums, its
squared standard error is, for columns kept independently of each other (of which systematic sampling does not do worse here: tested),

    Var F ≈ Σ_{v kept} (1 − π_v)/π_v² · (cᵀδ_v)² = cᵀ M c,    M = Σ_{v kept} (1 − π_v)/π_v² · δ_v δ_vᵀ

so M is summed beside the sums, and c is applied once they are known. F is not linear: the logarithm of an unbiased sum is too small by
half its relative variance, to the next order, so the bias of a log-sum-exp is at most half the square of its standard error: below
2e-4 nats at a standard error of 0.02.

Scores. Column v is kept with a probability that goes with √Σ_n a_n²·(dz̃² + 0.1·(p̃ + q̃)²): its part in the gradient where the models
differ, in the sums where they agree (a_n is what a token's loss is weighted with; cross entropy and z-loss add theirs, the label's column
its own). dz̃, p̃ and q̃ want sums before the sweep is through: taken are those over the `pilot`, the sixteenth of the vocabulary that the
mean hidden state finds likeliest. What comes out above 1 counts as 1.

Quantisation. Hidden states have outliers (the largest of SmolLM2's is 17 times their root mean square), which a scale for a whole row would
spend its 8 bits on. So rows of both operands are first turned by the same orthogonal matrix, random signs and a Hadamard matrix of each
block of 64 entries (as in QuaRot, Ashkboos et al. 2024): products stay as they are, outliers spread, and the error of a logit falls from
0.33 to 0.08 nats. Then one scale for each row: symmetric int8, or float8 e4m3.
"""

import math

import torch

from distill_kernels.call.problem import Problem, Tensors

KINDS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}  # largest magnitude
BLOCK = 64  # entries of a row that are turned together; rows are padded to whole blocks
PILOT_FRACTION = 16  # one in so many
AGREEMENT = 0.1  # weight of (p̃ + q̃)² in a column's score
# Standard deviation of a logit's error, in nats of either softmax, up to which the estimate of the standard error is to be trusted: with
# normal errors of more, single columns that nobody has kept make the difference.
MOST_NOISE = 1.0
# Of the error of rounding to a step of 1 (int8); of float8's three bits of mantissa relative to the number, at the worst.
STEP_ERROR = {"int8": 1 / math.sqrt(12), "fp8": 2.0**-4 / math.sqrt(3)}


def signs(dim: int, device=None) -> torch.Tensor:
    """(dim,) ±1 float32, pseudo-random, the same everywhere: bits of a mixed multiplicative hash."""
    mask = 0xFFFFFFFF
    h = (torch.arange(1, dim + 1, device=device) * 0x9E3779B1) & mask
    h = h ^ (h >> 15)
    # A product of 32-bit numbers by halves: int64 has no room for all of it.
    h = (h * 0xCA77 + (((h * 0x85EB) & 0xFFFF) << 16)) & mask
    return 1.0 - 2.0 * ((h >> 16) & 1).float()


def hadamard(device=None) -> torch.Tensor:
    """(BLOCK, BLOCK) orthogonal, of entries ±1/√BLOCK (Sylvester 1867)."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < BLOCK:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(BLOCK)


def padded_dim(dim: int) -> int:
    return -(-dim // BLOCK) * BLOCK


ROWS_BYTES = 2 * 2**20  # of float32 rows that are turned at a time, a few times over
MEAN_ROWS = 1024  # of hidden states that are summed at a time


def quantise(matrix: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (R, D) turned and quantised: (R, D') of the 8-bit dtype, D' padded, and (R, 3) float32: each row's scale, 128 times the sum
    of its integers (what unsigned operands offset by 128 add to a product; 0 for float8), and its Euclidean norm before."""
    dtype, most = KINDS[kind]
    rows, dim = matrix.shape
    quantised = torch.empty(rows, padded_dim(dim), dtype=dtype, device=matrix.device)
    scales = torch.empty(rows, 3, dtype=torch.float32, device=matrix.device)
    turn, sign = hadamard(matrix.device), signs(dim, matrix.device)
    step = max(1, ROWS_BYTES // (4 * padded_dim(dim)))
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        wide = torch.nn.functional.pad(matrix[part].float() * sign, (0, padded_dim(dim) - dim))
        turned = (wide.view(-1, BLOCK) @ turn).view(wide.shape)
        largest = turned.abs().amax(1, keepdim=True)
        scaled = turned * torch.where(largest > 0, most / largest, 0.0)
        scaled = (scaled.round() if kind == "int8" else scaled).clamp(-most, most)
        quantised[part] = scaled
        scales[part, 0] = largest.squeeze(1) / most
        scales[part, 1] = 128.0 * quantised[part].sum(1, dtype=torch.float32) if kind == "int8" else 0.0
        scales[part, 2] = torch.linalg.vector_norm(wide, dim=1)
    return quantised, scales


def pilot(problem: Problem, tensors: Tensors) -> torch.Tensor:
    """(P,) int64, ascending: the entries likeliest under the mean hidden state of the tokens that count, the teacher's if there is one."""
    hidden, weight, bias = tensors.student_hidden, tensors.student_weight, tensors.student_bias
    scale = problem.options.student_logit_scale
    if problem.teacher_dim:
        hidden, weight, bias = tensors.teacher_hidden, tensors.teacher_weight, tensors.teacher_bias
        scale = problem.options.teacher_logit_scale
    counts = (tensors.coefficients != 0).any(-1, keepdim=True)
    total = torch.zeros(hidden.shape[1], dtype=torch.float32, device=hidden.device)
    for rows, count in zip(hidden.split(MEAN_ROWS), counts.split(MEAN_ROWS), strict=True):
        total += torch.where(count, rows, 0).sum(0, dtype=torch.float32)  # what does not count may be NaN
    mean = total / counts.sum().clamp(min=1)
    logits = torch.mv(weight, mean.to(weight.dtype)).float()
    if bias is not None:
        logits = logits + bias
    return (logits * scale).topk(-(-problem.vocabulary // PILOT_FRACTION), sorted=False).indices.sort().values


class Trust:
    """Whether the estimate of a chunk is good enough, for the chunks of one call."""

    def __init__(self, problem: Problem, tensors: Tensors):
        self.problem = problem
        both = tensors.student_scales, tensors.teacher_scales
        # (3,) of a typical row of each head: the root mean square of its rows' scales and norms.
        self.typical = [None if scales is None else scales.square().mean(0).sqrt() for scales in both]

    def exceeds(self, chunk, student_scales: torch.Tensor, teacher_scales: torch.Tensor | None) -> bool:
        """Whether its standard errors, root mean square over the tokens, are above the tolerance: it is then computed exactly.

        *_scales (n, 3): of the tokens' quantised hidden states. Reads the errors, for which a GPU is waited for, unless any error will
        do or a graph is being captured.
        """
        errors, noisy = chunk.errors, self._noisy(student_scales, "student") | self._noisy(teacher_scales, "teacher")
        errors.add_(torch.where(noisy[:, None], math.inf, 0.0))  # what is not a number stays that
        tolerance = self.problem.options.sweep_tolerance
        if errors.is_cuda and (tolerance is None or torch.cuda.is_current_stream_capturing()):
            return False
        of_terms = torch.stack((chunk.coefficients[:, 0] != 0, (chunk.coefficients[:, 1:] != 0).any(-1)), -1)
        counted = torch.where(of_terms, errors, 0)  # what counts for nothing may err
        most = math.inf if tolerance is None else tolerance**2
        return not bool(counted.square().mean(0).max() <= most)  # a NaN exceeds, too

    def _noisy(self, scales, model) -> torch.Tensor | bool:
        """(n,) tokens whose rounding errors leave no estimate of a standard error to be trusted."""
        typical = self.typical[model == "teacher"]
        return False if typical is None else ~(noise(self.problem, scales, typical, model) <= MOST_NOISE)


def noise(problem: Problem, scales: torch.Tensor, typical: torch.Tensor, model: str) -> torch.Tensor:
    """(n,) standard deviation of a tempered logit's rounding error, for tokens of `scales` (n, 3) and rows of a head like `typical` (3,).

    Errors of single products are independent, uniform, and in float8 relative to the number.
    """
    step = STEP_ERROR[problem.options.sweep]
    if problem.options.sweep == "fp8":
        error = math.sqrt(2) * step * scales[:, 2] * typical[2] / math.sqrt(getattr(problem, f"{model}_dim"))
    else:
        error = step * torch.hypot(scales[:, 0] * typical[2], scales[:, 2] * typical[0])
    # Cross entropy and z-loss are of the untempered logits.
    untempered = model == "student" and (problem.cross_entropy or problem.z_loss)
    scale, temperature = getattr(problem.options, f"{model}_logit_scale"), problem.options.temperature
    return abs(scale) * error / (min(temperature, 1.0) if untempered else temperature)

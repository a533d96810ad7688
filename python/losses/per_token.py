"""What every loss does with its tokens: masks, weights and the normaliser, one row for each token, and the problem that is then solved."""

import torch
from torch import Tensor

from distill_kernels.call import problem as contract


def check(tokens, labels, token_weight, num_items, options):
    """Raises unless labels, weights and normaliser suit tokens of shape (...) and the options ce_weight and reduction."""
    if labels is not None:
        contract.check_tokens("labels", labels, tokens, (torch.int64,), "int64")
    elif options["ce_weight"] != 0:
        raise ValueError("ce_weight is not 0 but labels is None; pass labels (...) int64, already shifted, or ce_weight=0")
    if token_weight is not None:
        contract.check_tokens("token_weight", token_weight, tokens, contract.DTYPES, "a floating-point tensor")
        if token_weight.requires_grad:
            raise ValueError('token_weight gets no gradient; detach it, or use reduction="none" and multiply')
    if num_items is not None:
        if isinstance(num_items, Tensor):
            if num_items.dim() != 0:
                raise ValueError(f"num_items must be an int or a 0-d tensor, got a tensor of shape {tuple(num_items.shape)}")
            if num_items.requires_grad:
                raise ValueError("num_items gets no gradient; detach it")
        else:
            contract.finite_number("num_items", num_items, above=0)
        if options["reduction"] != "mean":
            raise ValueError(f'num_items is the normaliser of reduction="mean", but reduction is {options["reduction"]!r}')


def factors(tokens, labels, token_weight, num_items, options, dtype, device) -> tuple[Tensor, Tensor]:
    """(which tokens are not masked (...) bool, what each token's loss is multiplied by (...)), by ignore_index and reduction."""
    valid = torch.ones(tokens, dtype=torch.bool, device=device) if labels is None else labels != options["ignore_index"]
    factor = valid.to(dtype)
    if token_weight is not None:
        factor = factor * token_weight
    if options["reduction"] == "mean":
        factor = factor / (valid.sum().clamp(min=1) if num_items is None else num_items)
    return valid, factor


def marked(name, labels, valid, vocabulary):
    """Labels with contract.NO_LABEL where they are not valid; checked here under the caller's name, and again below if compiled, or if the
    size of the vocabulary is not known here (None)."""
    labels = torch.where(valid, labels, contract.NO_LABEL)
    if not torch.compiler.is_compiling() and vocabulary is not None:
        contract.check_labels(name, labels, vocabulary)
    return labels


def check_lists(name, ids, tokens):
    """Raises unless ids (..., K) have at least one place for each token (...)."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(ids).__name__}")
    if ids.dtype is not torch.int64:
        raise TypeError(f"{name} must be int64, got {ids.dtype}")
    if ids.shape[:-1] != tokens or ids.dim() == len(tokens) or ids.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one place for each token, shape {(*tokens, 'K')}, got {tuple(ids.shape)}")


def check_logprobs(hidden, weight, bias, temperature, logit_scale, softcap, backend):
    """Raises unless these are arguments that log-probabilities can be made of."""
    contract.finite_number("temperature", temperature, above=0)
    contract.finite_number("logit_scale", logit_scale)
    contract.finite_number("softcap", softcap, above=0, optional=True)
    contract.backend_name(backend)
    contract.check_head("", hidden, weight, bias)


def compute_dtype(student_hidden, teacher_hidden):
    return contract.compute_dtype(student_hidden.dtype, student_hidden.dtype if teacher_hidden is None else teacher_hidden.dtype)


def per_term(factor, kd, ce, z_loss):
    """(N, 3): a token's factor times the weight of each of problem.TERMS."""
    return torch.stack((factor * kd, factor * ce, factor * z_loss), -1)


def flat(student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, labels, coefficients):
    """One row for each token, in autocast's dtype where that is on."""

    def cast(tensor):
        return None if tensor is None else tensor.to(contract.autocast_dtype(tensor))

    def rows(tensor):
        return None if tensor is None else cast(tensor).reshape(-1, tensor.shape[-1])

    return contract.Tensors(
        rows(student_hidden), cast(student_weight), cast(student_bias), rows(teacher_hidden), cast(teacher_weight), cast(teacher_bias),
        None if labels is None else labels.reshape(-1), coefficients.to(compute_dtype(student_hidden, teacher_hidden)),
    )  # fmt: skip


def problem(tensors, **options) -> contract.Problem:
    """The problem of these tensors; gradients are computed for what asks for them now."""
    student, teacher = tensors.student_hidden, tensors.teacher_hidden

    def asks(tensor):
        return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()

    return contract.Problem(
        tokens=student.shape[0],
        vocabulary=tensors.student_weight.shape[0],
        student_dim=student.shape[1],
        teacher_dim=0 if teacher is None else teacher.shape[1],
        student_dtype=student.dtype,
        teacher_dtype=student.dtype if teacher is None else teacher.dtype,
        device=student.device,
        d_hidden=asks(student),
        d_weight=asks(tensors.student_weight),
        d_bias=asks(tensors.student_bias),
        **options,
    )

"""Whatever is wrong with a call is said before any work: the right exception, the argument's name, what was got and what was wanted."""

import re

import pytest
import torch

import distill_kernels
from distill_kernels import backends, distillation_loss, divergences
from distill_kernels.backends import native
from distill_kernels.schedule import chunked

TOKENS, VOCABULARY, STUDENT_DIM, TEACHER_DIM = (2, 3), 11, 8, 6


def good_call():
    g = torch.Generator().manual_seed(0)
    return {
        "student_hidden": torch.randn(*TOKENS, STUDENT_DIM, generator=g, requires_grad=True),
        "student_weight": torch.randn(VOCABULARY, STUDENT_DIM, generator=g, requires_grad=True),
        "teacher_hidden": torch.randn(*TOKENS, TEACHER_DIM, generator=g),
        "teacher_weight": torch.randn(VOCABULARY, TEACHER_DIM, generator=g),
        "labels": torch.randint(VOCABULARY, TOKENS, generator=g),
        "student_bias": torch.randn(VOCABULARY, generator=g),
        "teacher_bias": torch.randn(VOCABULARY, generator=g),
        "token_weight": torch.rand(TOKENS, generator=g),
        "num_items": torch.tensor(6),
        "ce_weight": 0.5,
    }


def put(**changes):
    """What to do to a good call: replace these arguments."""
    return lambda call: call | changes


def of(name, change):
    """What to do to a good call: replace this argument by `change` of it."""
    return lambda call: call | {name: change(call[name])}


def with_label(value, **options):
    def change(call):
        labels = call["labels"].clone()
        labels[0, 1] = value
        return call | {"labels": labels} | options

    return change


def drop(*names, **changes):
    return lambda call: {k: v for k, v in call.items() if k not in names} | changes


def double(call):
    return {name: value.double() if torch.is_tensor(value) and value.dtype == torch.float32 else value for name, value in call.items()}


SWEEP = {"sweep": "int8", "column_fraction": 0.08}
NOT_A_NUMBER = {"a_string": ("2", "str"), "a_bool": (True, "bool"), "a_tensor": (torch.tensor(2.0), "Tensor"), "none": (None, "NoneType")}
NUMBERS = ("temperature", "kd_weight", "ce_weight", "z_loss_weight", "label_smoothing", "student_logit_scale", "teacher_logit_scale")

BAD_OPTIONS = [
    *[
        (f"{name}_{kind}", put(**{name: value}), TypeError, rf"^{name} must be a number, got {got}$")
        for name in NUMBERS
        for kind, (value, got) in NOT_A_NUMBER.items()
    ],
    *[
        (f"{name}_{value}", put(**{name: float(value)}), ValueError, rf"^{name} must be a finite number.*, got {value}$")
        for name in NUMBERS
        for value in ("nan", "inf", "-inf")
    ],
    ("temperature_zero", put(temperature=0), ValueError, r"^temperature must be a finite number above 0, got 0$"),
    ("temperature_negative", put(temperature=-1.5), ValueError, r"^temperature must be .* above 0, got -1\.5$"),
    ("temperature_complex", put(temperature=1j), TypeError, r"^temperature must be a number, got complex$"),
    *[
        (f"{name}_negative", put(**{name: -0.1}), ValueError, rf"^{name} must be a finite number at least 0.*, got -0\.1$")
        for name in ("kd_weight", "ce_weight", "z_loss_weight", "label_smoothing")
    ],
    ("all_weights_zero", put(kd_weight=0, ce_weight=0), ValueError, r"^kd_weight, ce_weight and z_loss_weight are all 0"),
    ("label_smoothing_above_1", put(label_smoothing=1.5), ValueError, r"^label_smoothing must be .* at least 0 and at most 1, got 1\.5$"),
    *[
        (f"{name}_{kind}", put(**{name: value}), exception, rf"^{name} must be {wanted}.*, got {got}$")
        for name in ("student_softcap", "teacher_softcap")
        for kind, value, exception, wanted, got in (
            ("zero", 0.0, ValueError, "a finite number above 0", r"0\.0"),
            ("negative", -30.0, ValueError, "a finite number above 0", r"-30\.0"),
            ("nan", float("nan"), ValueError, "a finite number above 0", "nan"),
            ("a_string", "30", TypeError, "a number or None", "str"),
            ("a_bool", False, TypeError, "a number or None", "bool"),
        )
    ],
    ("temperature_squared_number", put(temperature_squared=1), TypeError, r"^temperature_squared must be True or False, got 1$"),
    ("temperature_squared_none", put(temperature_squared=None), TypeError, r"^temperature_squared must be True or False, got None$"),
    ("reduction_unknown", put(reduction="batchmean"), ValueError, r"^reduction must be one of 'mean', 'sum', 'none', got 'batchmean'$"),
    ("reduction_none_object", put(reduction=None), ValueError, r"^reduction must be one of 'mean', 'sum', 'none', got None$"),
    ("vocab_mismatch_unknown", put(vocab_mismatch="pad"), ValueError, r"^vocab_mismatch must be one of 'error', 'truncate', got 'pad'$"),
    ("ignore_index_float", put(ignore_index=-100.0), TypeError, r"^ignore_index must be an int, got -100\.0$"),
    ("ignore_index_none", put(ignore_index=None), TypeError, r"^ignore_index must be an int, got None$"),
    ("seed_float", put(seed=0.5), TypeError, r"^seed must be an int.*, got 0\.5$"),
    ("seed_bool", put(seed=True), TypeError, r"^seed must be an int.*, got True$"),
    ("workspace_mib_zero", put(workspace_mib=0), ValueError, r"^workspace_mib must be at least 1, got 0$"),
    ("workspace_mib_negative", put(workspace_mib=-64), ValueError, r"^workspace_mib must be at least 1, got -64$"),
    ("workspace_mib_float", put(workspace_mib=64.5), TypeError, r"^workspace_mib must be an int, got 64\.5$"),
    ("workspace_mib_string", put(workspace_mib="64"), TypeError, r"^workspace_mib must be an int, got '64'$"),
    ("divergence_unknown", put(divergence="kl"), ValueError, r"^unknown divergence 'kl'; there are .*forward_kl.*reverse_kl"),
    ("divergence_number", put(divergence=0.5), TypeError, r"^divergence must be a name or one of .*divergences, got float$"),
    ("divergence_none", put(divergence=None), TypeError, r"^divergence must be a name or one of .*divergences, got NoneType$"),
    ("divergence_function", put(divergence=torch.exp), TypeError, r"^divergence must be a name or .*, got builtin_function_or_method$"),
    (
        "divergence_without_parameters", put(divergence="jensen_shannon"), ValueError,
        r"^jensen_shannon has parameters: pass divergence=distill_kernels\.divergences\.jensen_shannon\(beta=\.\.\.\)$",
    ),
    (
        "divergence_family_without_parameters", put(divergence=divergences.alpha_beta), ValueError,
        r"^alpha_beta has parameters: pass divergence=.*alpha_beta\(alpha=\.\.\., beta=\.\.\.\)$",
    ),
    ("backend_none", put(backend=None), TypeError, r"^backend must be a name, got NoneType$"),
    # Part of the contract, not served yet: checked first all the same.
    ("column_fraction_string", put(column_fraction="0.08"), TypeError, r"^column_fraction must be a number.*, got str$"),
    ("column_fraction_bool", put(column_fraction=True), TypeError, r"^column_fraction must be a number.*, got bool$"),
    *[
        (f"column_fraction_{value}", put(column_fraction=value), ValueError,
         rf"^column_fraction must be a finite number above 0 and at most 1, got {re.escape(repr(value))}$")
        for value in (0, -0.1, 1.5, float("nan"))
    ],
    ("sweep_unknown", put(sweep="int4"), ValueError, r"^sweep must be one of None, 'int8', 'fp8', got 'int4'$"),
    ("seed_negative", put(seed=-1), ValueError, r"^seed must be at least 0, got -1$"),
    ("seed_too_large", put(seed=2**63), ValueError, r"^seed must be below 2\*\*63, got \d+$"),
    ("auto_without_tolerance", put(column_fraction="auto"), TypeError, r"^gradient_tolerance must be a number, got NoneType$"),
    ("auto_with_zero_tolerance", put(column_fraction="auto", gradient_tolerance=0), ValueError, r"^gradient_tolerance must be .* above 0"),
    ("tolerance_without_auto", put(column_fraction=0.1, gradient_tolerance=0.1), ValueError,
     r'^gradient_tolerance is for column_fraction="auto"'),
    ("sweep_without_columns", put(sweep="int8"), ValueError, r"^sweep='int8' is corrected by .* column_fraction=0.08 .* got None$"),
    ("sweep_auto", put(sweep="fp8", column_fraction="auto", gradient_tolerance=0.1), ValueError, r"^sweep='fp8' is .* got 'auto'$"),
    ("sweep_divergence", put(**SWEEP, divergence="total_variation"), NotImplementedError, r"^sweep='int8': total_variation is summed"),
    ("sweep_smoothing", put(**SWEEP, ce_weight=0.7, label_smoothing=0.1), NotImplementedError, r"^sweep='int8': label_smoothing sums"),
    ("sweep_tolerance_zero", put(sweep_tolerance=0.0), ValueError, r"^sweep_tolerance must be a finite number above 0, got 0.0$"),
    ("sweep_tolerance_text", put(sweep_tolerance="1%"), TypeError, r"^sweep_tolerance must be a number or None, got str$"),
    ("process_group", put(process_group="world"), TypeError, r"^process_group must be a torch.distributed.ProcessGroup or .*, got str$"),
    ("sequence_parallel_flag", put(sequence_parallel=1), TypeError, r"^sequence_parallel must be True or False, got 1$"),
    ("bad_sweep_beside_valid_fraction", put(column_fraction=0.08, sweep="int4"), ValueError, r"^sweep must be one of"),
    ("bad_fraction_beside_valid_sweep", put(column_fraction=2.0, sweep="int8"), ValueError, r"^column_fraction must be"),
]  # fmt: skip

MODELS = (("student", STUDENT_DIM), ("teacher", TEACHER_DIM))
MATRICES = [f"{model}_{part}" for model, _ in MODELS for part in ("hidden", "weight", "bias")]
TENSORS = ("student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight", "teacher_bias", "labels", "token_weight",
           "num_items")  # fmt: skip

def zero3_parameter(call):
    """As DeepSpeed leaves it between forwards."""
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_shape = call["student_weight"].shape
    return call | {"student_weight": weight}


BAD_TENSORS = [
    ("zero3_parameter", zero3_parameter, ValueError, r"^student_weight is a parameter .* DeepSpeed's ZeRO-3 has left \(0,\) here; "),
    ("sequence_parallel", put(sequence_parallel=True), ValueError, r"^the tokens are divided over ranks but the heads are not: that is d"),
    ("sweep_float64", lambda call: double(call) | SWEEP, NotImplementedError, r"^sweep='int8': float64 inputs want float64.*; pass None"),
    *[
        (f"{name}_a_list", put(**{name: [[1.0]]}), TypeError, rf"^{name} must be a torch\.Tensor, got list$")
        for name in (*MATRICES, "labels", "token_weight")
    ],
    *[
        (f"{name}_{dtype}", of(name, lambda t, dtype=dtype: t.detach().to(dtype)), TypeError,
         rf"^{name} must be float32, bfloat16, float16 or float64, got {dtype}$")
        for name in MATRICES
        for dtype in (torch.int64, torch.complex64)
    ],
    *[
        (f"{name}_missing", put(**{name: None}), TypeError, rf"^{name} must be a torch\.Tensor, got NoneType$")
        for name in ("student_hidden", "student_weight")
    ],
    ("student_hidden_0d", of("student_hidden", lambda t: t.sum()), ValueError,
     r"^student_hidden must have at least 1 dimension, got shape \(\)$"),
    *[
        case
        for model, dim in MODELS
        for case in (
            (f"{model}_weight_1d", of(f"{model}_weight", torch.ravel), ValueError,
             rf"^{model}_weight must have 2 dimensions, got shape \({11 * dim},\)$"),
            (f"{model}_weight_3d", of(f"{model}_weight", lambda t: t[None]), ValueError,
             rf"^{model}_weight must have 2 dimensions, got shape \(1, 11, {dim}\)$"),
            (f"{model}_bias_2d", of(f"{model}_bias", lambda t: t[None]), ValueError,
             rf"^{model}_bias must have 1 dimensions?, got shape \(1, 11\)$"),
            (f"{model}_bias_short", of(f"{model}_bias", lambda t: t[:-1]), ValueError,
             rf"^{model}_bias has 10 entries but {model}_weight has 11 rows$"),
            (f"{model}_weight_transposed", of(f"{model}_weight", lambda t: t.T), ValueError,
             rf"^{model}_hidden has {dim} features \(shape \(2, 3, {dim}\)\) but {model}_weight has 11 columns .* wanted"),
            (f"{model}_features_differ", of(f"{model}_hidden", lambda t: t[..., :-1]), ValueError,
             rf"^{model}_hidden has {dim - 1} features .* but {model}_weight has {dim} columns"),
            (f"{model}_weight_empty", of(f"{model}_weight", lambda t: t[:0]), ValueError,
             rf"^{model}_weight is empty: shape \(0, {dim}\)"),
            (f"{model}_dtypes_differ", of(f"{model}_weight", lambda t: t.detach().bfloat16()), TypeError,
             rf"^{model}_hidden is torch\.float32 but {model}_weight is torch\.bfloat16; .*autocast"),
        )
    ],
    ("teacher_tokens_differ", of("teacher_hidden", lambda t: t[:1]), ValueError,
     r"^student_hidden has tokens of shape \(2, 3\) but teacher_hidden \(1, 3\)"),
    ("teacher_tokens_flattened", of("teacher_hidden", lambda t: t.flatten(0, 1)), ValueError,
     r"^student_hidden has tokens of shape \(2, 3\) but teacher_hidden \(6,\)"),
    ("teacher_hidden_missing", put(teacher_hidden=None), TypeError, r"teacher_hidden and teacher_weight must be tensors, or both None"),
    ("teacher_weight_missing", put(teacher_weight=None), TypeError, r"teacher_hidden and teacher_weight must be tensors, or both None"),
    ("teacher_missing", put(teacher_hidden=None, teacher_weight=None, teacher_bias=None), TypeError, r"or both None with kd_weight=0"),
    ("half_a_teacher_unused", put(teacher_hidden=None, kd_weight=0), TypeError, r"or both None with kd_weight=0"),
    *[
        (f"{name}_requires_grad", of(name, lambda t: t.clone().requires_grad_()), ValueError,
         rf"^{name} requires grad, but the teacher gets no gradient here: .*torch\.no_grad\(\).* or pass {name}\.detach\(\)$")
        for name in ("teacher_hidden", "teacher_weight", "teacher_bias")
    ],
    ("vocabularies_differ", of("teacher_weight", lambda t: torch.cat([t, t])), ValueError, r"^teacher_bias has 11 entries"),
    ("vocabularies_differ_without_bias", drop("teacher_bias", teacher_weight=torch.randn(14, TEACHER_DIM)), ValueError,
     r'^student_weight has 11 rows but teacher_weight has 14; .* first 11 entries .*vocab_mismatch="truncate"'),
    # Labels
    ("labels_missing", put(labels=None), ValueError, r"^ce_weight is not 0 but labels is None; pass labels \(\.\.\.\) int64"),
    ("labels_int32", of("labels", lambda t: t.int()), TypeError, r"^labels must be int64, got torch\.int32$"),
    ("labels_float", of("labels", lambda t: t.float()), TypeError, r"^labels must be int64, got torch\.float32$"),
    ("labels_flattened", of("labels", torch.ravel), ValueError, r"^labels must have one entry for each token, shape \(2, 3\), got \(6,\)$"),
    ("labels_one_hot", of("labels", lambda t: torch.nn.functional.one_hot(t, 11)), ValueError,
     r"^labels .*shape \(2, 3\), got \(2, 3, 11\)$"),
    ("label_too_large", with_label(11), ValueError, r"^labels must be at least 0 and below .* size 11, or ignore_index, got 11$"),
    ("label_negative", with_label(-3), ValueError, r"^labels must be at least 0 and below .* size \d+, or ignore_index, got -3$"),
    ("label_minus_one", with_label(-1), ValueError, r"^labels must be at least 0 and below .* size \d+, or ignore_index, got -1$"),
    ("label_of_another_ignore_index", with_label(-100, ignore_index=-1), ValueError, r"^labels must be at least 0 .*, got -100$"),
    ("label_beyond_the_students", with_label(11, teacher_weight=torch.randn(7, TEACHER_DIM), teacher_bias=None, vocab_mismatch="truncate"),
     ValueError, r"^labels must be at least 0 and below the vocabulary size 11, or ignore_index, got 11$"),
    ("label_too_large_as_mask_only", with_label(11, ce_weight=0), ValueError, r"^labels must be at least 0 and below .* size 11"),
    # Weights of tokens, normaliser
    ("token_weight_int", of("token_weight", lambda t: t.long()), TypeError,
     r"^token_weight must be a floating-point tensor, got torch\.int64$"),
    ("token_weight_bool", of("token_weight", lambda t: t > 0), TypeError,
     r"^token_weight must be a floating-point tensor, got torch\.bool$"),
    ("token_weight_shape", of("token_weight", lambda t: t[0]), ValueError,
     r"^token_weight must have one entry for each token, shape \(2, 3\), got \(3,\)$"),
    ("token_weight_requires_grad", of("token_weight", lambda t: t.requires_grad_()), ValueError,
     r"^token_weight gets no gradient; detach it"),
    ("num_items_zero", put(num_items=0), ValueError, r"^num_items must be a finite number above 0, got 0$"),
    ("num_items_negative", put(num_items=-4), ValueError, r"^num_items must be a finite number above 0, got -4$"),
    ("num_items_string", put(num_items="4"), TypeError, r"^num_items must be a number.*, got str$"),
    ("num_items_bool", put(num_items=True), TypeError, r"^num_items must be a number.*, got bool$"),
    ("num_items_1d", put(num_items=torch.tensor([6])), ValueError,
     r"^num_items must be an int or a 0-d tensor, got a tensor of shape \(1,\)$"),
    ("num_items_with_sum", put(reduction="sum"), ValueError, r'^num_items is the normaliser of reduction="mean", but reduction is .sum.$'),
    ("num_items_with_none", put(reduction="none"), ValueError, r'^num_items is the normaliser of reduction="mean", but .* .none.$'),
    # Devices
    *[
        (f"{name}_on_another_device", of(name, lambda t: t.to("meta")), ValueError,
         rf"^all tensors must be on one device, got .*\b{name} on meta\b")
        for name in TENSORS
    ],
]  # fmt: skip

# Found by the choice of a backend, or by its planner, so a backend may be looked up but must not have begun.
BAD_BACKENDS = [
    ("backend_unknown", put(backend="tpu"), ValueError, r"^backend must be 'auto' or one of 'native', 'triton', 'torch', 'cuda', got 'tpu"),
    ("backend_empty", put(backend=""), ValueError, r"^backend must be 'auto' or one of .*, got ''$"),
    ("native_float64", lambda call: {k: v.detach().double() if k in MATRICES else v for k, v in call.items()} | {"backend": "native"},
     NotImplementedError, r"^backend 'native' cannot run this: .*float64"),
    *[
        (f"workspace_too_small_for_{name}",
         lambda call, name=name: {
             "student_hidden": torch.zeros(4, 1), "student_weight": torch.zeros(3_000_000, 1), "teacher_hidden": torch.zeros(4, 1),
             "teacher_weight": torch.zeros(3_000_000, 1), "workspace_mib": 1, "backend": name},
         ValueError,
         r"^workspace_mib=1 cannot hold the (logits|sums) of \d+ tokens? at vocabulary size 3000000; it needs at least \d+$")
        for name in ("torch", "native")
    ],
]  # fmt: skip


def table(cases):
    return pytest.mark.parametrize(("mutate", "exception", "pattern"), [pytest.param(*case[1:], id=case[0]) for case in cases])


@pytest.fixture
def no_work(monkeypatch):
    """Fails the test that enters a backend."""

    def entered(*args, **kwargs):
        raise AssertionError("a backend was chosen before the input was checked")

    monkeypatch.setattr(backends, "choose", entered)


@pytest.fixture
def no_run(monkeypatch):
    def entered(*args, **kwargs):
        raise AssertionError("a backend began its work before the input was checked")

    monkeypatch.setattr(chunked, "run", entered)


def assert_refused(function, exception, pattern):
    with pytest.raises(exception) as caught:
        function()
    message = str(caught.value)
    assert type(caught.value) is exception
    assert re.search(pattern, message), f"{message!r} does not match {pattern!r}"
    # A sentence, not a dump of objects: one line, beginning with a word, nothing of Python's own representations.
    assert re.match(r"[A-Za-z_]", message) and "\n" not in message and len(message) < 450, message
    assert not re.search(r"object at 0x|<class|<built-in|<function|torch\.Size|tensor\(|\bNone None\b|  ", message), message


def test_the_good_call_is_good():
    for reduction, num_items in (("mean", torch.tensor(6)), ("sum", None), ("none", None)):
        assert distillation_loss(**good_call() | {"reduction": reduction, "num_items": num_items}).isfinite().all()


@table(BAD_OPTIONS + BAD_TENSORS)
def test_bad_argument_is_refused_before_any_work(mutate, exception, pattern, no_work):
    assert_refused(lambda: distillation_loss(**mutate(good_call())), exception, pattern)


@table([case for case in BAD_OPTIONS + BAD_TENSORS if "nan" in case[0] or "device" in case[0]])
def test_bad_argument_is_refused_by_the_variant_with_stats(mutate, exception, pattern, no_work):
    assert_refused(lambda: distill_kernels.distillation_loss_and_stats(**mutate(good_call())), exception, pattern)


@table(BAD_BACKENDS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_what_no_backend_can_run_is_refused_before_any_product(mutate, exception, pattern, reduction, no_run):
    call = mutate({k: v for k, v in good_call().items() if k != "num_items"})
    assert_refused(lambda: distillation_loss(**call, reduction=reduction), exception, pattern)


@table(BAD_OPTIONS)
def test_module_refuses_a_bad_option_when_it_is_made(mutate, exception, pattern, no_work):
    base = {"ce_weight": 0.5}
    options = {k: v for k, v in mutate(base).items() if k not in base or v is not base[k]}
    assert_refused(lambda: distill_kernels.DistillationLoss(**options), exception, pattern)


def test_module_names_options_it_does_not_have(no_work):
    make = distill_kernels.DistillationLoss
    assert_refused(lambda: make(temprature=2.0), TypeError, r"^the loss has no option temprature; its options are .*temperature")
    for name in ("student_bias", "teacher_bias", "token_weight", "num_items", "tail"):
        assert_refused(lambda name=name: make(**{name: None}), TypeError, rf"^the loss has no option {name}; its options are ")
    call = good_call()
    del call["ce_weight"]
    module = make(ce_weight=0.5)
    assert_refused(lambda: module(**call, temperature=2.0), TypeError, "got an unexpected keyword argument 'temperature'")


def test_unknown_argument_is_refused_by_name(no_work):
    assert_refused(lambda: distillation_loss(**good_call(), temprature=2.0), TypeError, "unexpected keyword argument 'temprature'")
    with_stats = distill_kernels.distillation_loss_and_stats
    words = "^the loss has no option temprature; its options are .*temperature"
    assert_refused(lambda: with_stats(**good_call(), temprature=2.0), TypeError, words)


@pytest.mark.parametrize(
    ("make", "exception", "pattern"),
    [
        (lambda: divergences.jensen_shannon(), TypeError, r"^divergences\.jensen_shannon\(beta=\.\.\.\): missing .*'beta'"),
        (lambda: divergences.jensen_shannon(gamma=0.1), TypeError, r"^divergences\.jensen_shannon\(beta=\.\.\.\): .*'beta'|'gamma'"),
        (lambda: divergences.jensen_shannon(beta=float("nan")), ValueError, r"jensen_shannon: beta must be a finite number, got nan$"),
        (lambda: divergences.jensen_shannon(beta="0.1"), ValueError, r"jensen_shannon: beta must be a finite number, got '0\.1'$"),
        (lambda: divergences.jensen_shannon(beta=0), ValueError, r"beta must lie strictly .*, got 0; that limit is 'forward_kl'$"),
        (lambda: divergences.jensen_shannon(beta=1.0), ValueError, r"between 0 and 1, got 1; that limit is 'reverse_kl'$"),
        (lambda: divergences.skew_forward_kl(alpha=2), ValueError, r"alpha must lie strictly between 0 and 1, got 2$"),
        (lambda: divergences.skew_reverse_kl(alpha=0), ValueError, r"alpha must lie .* got 0; that limit is 'reverse_kl'$"),
        (lambda: divergences.symmetric_kl(weight=1.5), ValueError, r"^symmetric_kl: weight must lie in \[0, 1\], got 1\.5$"),
        (lambda: divergences.alpha_beta(alpha=0.005, beta=1), ValueError, r"^alpha_beta: \|alpha\| must be at least 0\.01 .*, got 0\.005$"),
        (lambda: divergences.alpha_beta(alpha=1, beta=-1), ValueError, r"\|alpha\+beta\| must be at least 0\.01"),
        (lambda: divergences.forward_kl(0.5), TypeError, r"^divergences\.forward_kl\(\): too many positional arguments$"),
    ],
)
def test_bad_parameter_of_a_divergence_is_refused(make, exception, pattern):
    assert_refused(make, exception, pattern)


# token_logprobs speaks of the names its caller used


def good_logprobs_call():
    return {"hidden": torch.randn(2, 3, 8), "weight": torch.randn(11, 8), "token_ids": torch.randint(11, (2, 3)), "bias": torch.randn(11)}


BAD_LOGPROBS = [
    ("hidden_a_list", put(hidden=[1.0]), TypeError, r"^hidden must be a torch\.Tensor, got list$"),
    ("hidden_int", of("hidden", torch.Tensor.long), TypeError, r"^hidden must be float32, .*, got torch\.int64$"),
    ("weight_1d", of("weight", torch.ravel), ValueError, r"^weight must have 2 dimensions, got shape \(88,\)$"),
    ("features_differ", of("hidden", lambda t: t[..., :5]), ValueError, r"^hidden has 5 features .* but weight has 8 columns"),
    ("dtypes_differ", of("weight", torch.Tensor.half), TypeError, r"^hidden is torch\.float32 but weight is torch\.float16"),
    ("weight_empty", of("weight", lambda t: t[:0]), ValueError, r"^weight is empty"),
    ("bias_short", of("bias", lambda t: t[:3]), ValueError, r"^bias has 3 entries but weight has 11 rows$"),
    ("token_ids_missing", put(token_ids=None), TypeError, r"^token_ids must be a torch\.Tensor, got NoneType$"),
    ("token_ids_int32", of("token_ids", torch.Tensor.int), TypeError, r"^token_ids must be int64, got torch\.int32$"),
    ("token_ids_shape", of("token_ids", torch.ravel), ValueError, r"^token_ids must have one entry for each token, shape .*, got \(6,\)$"),
    ("token_ids_too_large", of("token_ids", lambda t: t + 11), ValueError, r"^token_ids must be at least 0 and below .* size 11"),
    ("token_ids_negative", of("token_ids", lambda t: t - 50), ValueError, r"^token_ids must be at least 0"),
    ("hidden_on_meta", of("hidden", lambda t: t.to("meta")), ValueError, r"^all tensors must be on one device, got hidden on meta"),
    ("token_ids_on_meta", of("token_ids", lambda t: t.to("meta")), ValueError, r"token_ids on meta"),
    ("temperature_nan", put(temperature=float("nan")), ValueError, r"^temperature must be a finite number above 0, got nan$"),
    ("logit_scale_string", put(logit_scale="1"), TypeError, r"^logit_scale must be a number, got str$"),
    ("softcap_zero", put(softcap=0), ValueError, r"^softcap must be a finite number above 0, got 0$"),
    ("ignore_index_none", put(ignore_index=None), TypeError, r"^ignore_index must be an int, got None$"),
    ("workspace_mib_zero", put(workspace_mib=0), ValueError, r"^workspace_mib must be at least 1, got 0$"),
    ("workspace_mib_string", put(workspace_mib="64"), TypeError, r"^workspace_mib must be an int, got '64'$"),
    ("backend_none", put(backend=None), TypeError, r"^backend must be a name, got NoneType$"),
]


@table(BAD_LOGPROBS)
def test_token_logprobs_refuses_by_its_own_names(mutate, exception, pattern, no_work):
    assert_refused(lambda: distill_kernels.token_logprobs(**mutate(good_logprobs_call())), exception, pattern)


# plan


BAD_PLANS = [
    ("sweep_divergence", put(divergence="total_variation", **SWEEP), NotImplementedError, r"^sweep='int8': total_variation is summed"),
    ("sweep_without_columns", put(sweep="int8"), ValueError, r"^sweep='int8' is corrected by"),
    *[
        (f"{name}_{value}", put(**{name: value}), ValueError, rf"^{name} must be an int of at least {least}, got {re.escape(repr(value))}$")
        for name, least in (("tokens", 0), ("vocabulary", 1), ("student_dim", 1), ("teacher_dim", 0))
        for value in (-1, 1.5, True, "8", None)
    ],
    ("vocabulary_0", put(vocabulary=0), ValueError, r"^vocabulary must be an int of at least 1, got 0$"),
    ("dtype_int", put(dtype=torch.int8), ValueError, r"^dtype must be one of torch\.float32, torch\.bfloat16, .*, got torch\.int8$"),
    ("dtype_string", put(dtype="float32"), ValueError, r"^dtype must be one of torch\.float32, .*, got 'float32'$"),
    ("reduction", put(reduction="avg"), ValueError, r"^reduction must be one of .*, got 'avg'$"),
    ("divergence", put(divergence="kl"), ValueError, r"^unknown divergence 'kl'"),
    ("workspace_mib_0", put(workspace_mib=0), ValueError, r"^workspace_mib must be .*at least 1, got 0$"),
    ("workspace_mib_float", put(workspace_mib=64.5), TypeError, r"^workspace_mib must be an int, got 64\.5$"),
    ("workspace_mib_string", put(workspace_mib="64"), TypeError, r"^workspace_mib must be .*, got .*(str|'64')"),
    ("workspace_too_small", put(vocabulary=10**6, workspace_mib=4), ValueError, r"^workspace_mib=4 cannot hold .* needs at least \d+$"),
    ("backend_unknown", put(backend="mps"), ValueError, r"^backend must be 'auto' or one of .*, got 'mps'$"),
    ("backend_for_device", put(backend="native", device="meta"), NotImplementedError, r"^backend 'native' cannot run this: it runs on CPU"),
    ("backend_for_dtype", put(backend="native", dtype=torch.float64), NotImplementedError, r"^backend 'native' cannot run this: .*float64"),
]


@table(BAD_PLANS)
def test_plan_refuses_bad_values(mutate, exception, pattern):
    good = {"tokens": 16, "vocabulary": 100, "student_dim": 8, "teacher_dim": 8}
    assert_refused(lambda: distill_kernels.plan(**mutate(good)), exception, pattern)


# What cannot run says why


@pytest.fixture
def without_extension(monkeypatch):
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "MISSING", "No module named 'distill_kernels._native'", raising=False)


def test_missing_extension_is_refused_where_it_was_asked_for(without_extension, no_run):
    pattern = r"^backend 'native' cannot run this: the compiled extension is missing \(No module named .*\); install a C\+\+17 compiler"
    assert_refused(lambda: distillation_loss(**good_call(), backend="native"), NotImplementedError, pattern)
    assert_refused(lambda: distill_kernels.plan(16, 100, 8, 8, backend="native"), NotImplementedError, pattern)


def test_missing_extension_leaves_auto_to_torch(without_extension):
    call = good_call()
    assert torch.equal(distillation_loss(**call), distillation_loss(**call, backend="torch"))
    assert distill_kernels.plan(16, 100, 8, 8) == distill_kernels.plan(16, 100, 8, 8, backend="torch")


def test_missing_extension_is_reported_by_doctor(without_extension, capsys):
    reasons = distill_kernels.doctor()
    printed = capsys.readouterr().out
    assert reasons["torch"] is None and "extension is missing" in reasons["native"]
    assert re.search(r"native +cpu +cannot run: the compiled extension is missing \(No module named", printed)
    assert re.search(r'backend="auto" on cpu takes torch', printed)
    assert "native kernels use" not in printed


@pytest.fixture
def own_divergence():
    @divergences.register
    def half_square(log_p, log_q):
        gap = log_q - log_p
        return 0.5 * gap * gap, gap

    yield half_square
    del divergences.FAMILIES["half_square"]


def test_own_divergence_is_refused_by_native_in_words_and_runs_elsewhere(own_divergence, no_run, monkeypatch):
    call = good_call() | {"divergence": "half_square"}
    pattern = r"^backend 'native' cannot run this: it has the built-in divergences .*forward_kl.* and half_square is not one of them$"
    assert_refused(lambda: distillation_loss(**call, backend="native"), NotImplementedError, pattern)
    monkeypatch.undo()  # lets backends work again
    assert torch.equal(distillation_loss(**call), distillation_loss(**call, backend="torch"))


def test_registering_a_bad_divergence_is_refused():
    def forward_kl(log_p, log_q):
        return log_p, log_q

    def wrong(p, q):
        return p, q

    assert_refused(lambda: divergences.register(forward_kl), ValueError, r"^forward_kl is the name of a built-in divergence; give yours")
    assert_refused(lambda: divergences.register(wrong), ValueError, r"first two arguments of divergence wrong must be log_p and log_q, got")

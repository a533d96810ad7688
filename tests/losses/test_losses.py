import pytest
import torch
from accuracy import (
    BACKENDS,
    DIVERGENCES,
    EPS32,
    FAMILIES,
    NATIVE,
    assert_as_good_as_eager,
    assert_close64,
    check_loss,
    eager_log_probabilities,
    eager_logits,
    eager_stats,
    eager_with_gradients,
    everything,
    make_inputs,
    make_labels,
    make_token_weight,
    with_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_kernels import distillation_loss, distillation_loss_and_stats, divergences, reference, token_logprobs
from distill_kernels.schedule import chunked

TOKENS, VOCABULARY = 21, 300
pytestmark = pytest.mark.covering(2)
# For hundreds of calls of random sizes, and for one token or two features: eager's error is a few draws of luck there, and calls
# that are right exceed the rule by up to two.
SLACK = 4
BOTH = pytest.mark.parametrize("backend", BACKENDS)
# Options are tried with the default and with one divergence whose value and slope share nothing with it.
TWO = pytest.mark.parametrize("divergence", ["forward_kl", divergences.jensen_shannon(0.3)], ids=str)
ALL = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])


def per_token(tokens, seed=0):
    """An upstream gradient (tokens,) for reduction="none"."""
    return torch.randn(tokens, generator=torch.Generator().manual_seed(seed))


@BOTH
@DTYPES
@ALL
def test_divergence_matches_reference(divergence, dtype, backend):
    check_loss(make_inputs("moderate", dtype=dtype), divergence=divergence, backend=backend)


@BOTH
@DTYPES
@ALL
def test_divergence_with_every_option_matches_reference(divergence, dtype, backend):
    inputs = make_inputs("realistic", dtype=dtype, bias=True)
    check_loss(inputs, divergence=divergence, backend=backend, **everything(TOKENS, VOCABULARY))


@ALL
def test_divergence_in_float64_is_exact(divergence):
    inputs = make_inputs("realistic", dtype=torch.float64, bias=True)
    check_loss(inputs, divergence=divergence, backend="torch", **everything(TOKENS, VOCABULARY))
    check_loss(inputs, divergence=divergence, backend="auto", reduction="none", upstream=per_token(TOKENS))


@BOTH
@TWO
@DTYPES
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "equal"])
def test_input_family_matches_reference(family, dtype, divergence, backend):
    check_loss(make_inputs(family, dtype=dtype), divergence=divergence, reduction="none", upstream=per_token(TOKENS), backend=backend)


@BOTH
@ALL
@pytest.mark.parametrize("family", ["flat", "peaked", "huge"])
def test_input_family_of_every_divergence_matches_reference(family, divergence, backend):
    check_loss(make_inputs(family), divergence=divergence, backend=backend, labels=make_labels(TOKENS, VOCABULARY), ce_weight=0.5)


@BOTH
@DTYPES
@ALL
def test_equal_teacher_gives_rounding_error_only(divergence, dtype, backend):
    # The truth is 0 here, so the rule has no scale. It is taken from the same student under a teacher whose vocabulary is turned by
    # one: the terms that cancel when the two agree are of that size.
    inputs = make_inputs("equal", dtype=dtype, bias=True)
    turned = inputs._replace(teacher_weight=inputs.teacher_weight.roll(1, 0), teacher_bias=inputs.teacher_bias.roll(1))
    options = {"divergence": divergence, "temperature": 2.0, "reduction": "none"}
    got = with_gradients(distillation_loss, inputs, per_token(TOKENS), backend=backend, **options)
    scale = with_gradients(reference.distillation_loss, turned.to(torch.float64), per_token(TOKENS), **options)
    for name, value in got.items():
        error, allowed = value.abs().max().item(), 16 * EPS32 * scale[name].abs().max().item()
        assert error <= allowed, f"{name}: {error:.3g}, allowed {allowed:.3g}"


@BOTH
@TWO
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_temperature_scales_value_and_gradient(temperature, squared, divergence, backend):
    options = {"divergence": divergence, "temperature": temperature, "temperature_squared": squared, "backend": backend}
    check_loss(make_inputs("moderate"), **options)
    check_loss(make_inputs("moderate"), labels=make_labels(TOKENS, VOCABULARY), ce_weight=0.3, z_loss_weight=0.01, **options)


@BOTH
@TWO
@pytest.mark.parametrize(
    "weights",
    [
        (1.0, 0.0, 0.0),
        (0.3, 0.0, 0.0),
        (0.0, 1.0, 0.0),
        (0.0, 0.0, 1.0),
        (0.0, 0.6, 0.2),
        (0.5, 0.5, 0.0),
        (0.5, 0.0, 0.5),
        (0.2, 0.7, 0.1),
    ],
    ids=str,
)
def test_term_weights_match_reference(weights, divergence, backend):
    options = dict(zip(("kd_weight", "ce_weight", "z_loss_weight"), weights, strict=True))
    labels = make_labels(TOKENS, VOCABULARY)
    check_loss(make_inputs("moderate", bias=True), labels=labels, divergence=divergence, temperature=2.0, backend=backend, **options)


@BOTH
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kd_weight", [0.0, 0.5])
def test_label_smoothing_matches_reference(kd_weight, smoothing, temperature, backend):
    check_loss(
        make_inputs("moderate"),
        labels=make_labels(TOKENS, VOCABULARY),
        kd_weight=kd_weight,
        ce_weight=0.8,
        label_smoothing=smoothing,
        temperature=temperature,
        backend=backend,
    )


@BOTH
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_matches_torch(smoothing, backend):
    # Not through the reference: torch's own function pins down what smoothing means.
    inputs = make_inputs("moderate")
    labels = make_labels(TOKENS, VOCABULARY)
    options = {"labels": labels, "kd_weight": 0.0, "ce_weight": 1.0, "label_smoothing": smoothing}
    got = with_gradients(distillation_loss, inputs, 1.7, backend=backend, **options)

    def cross_entropy(hidden, weight, *_, labels):
        return torch.nn.functional.cross_entropy(hidden @ weight.T, labels, label_smoothing=smoothing)

    truth = with_gradients(cross_entropy, inputs.to(torch.float64), 1.7, labels=labels)
    eager = eager_with_gradients(cross_entropy, inputs, 1.7, labels=labels)
    for name in truth:
        assert_as_good_as_eager(name, got[name], eager[name], truth[name], gradient=name != "loss")


@BOTH
@TWO
@pytest.mark.parametrize("which", ["student_bias", "teacher_bias", "both"])
def test_bias_matches_reference(which, divergence, backend):
    inputs = make_inputs("moderate", bias=True)
    if which != "both":
        inputs = inputs._replace(**{"teacher_bias" if which == "student_bias" else "student_bias": None})
    check_loss(inputs, divergence=divergence, temperature=2.0, backend=backend)


@BOTH
@TWO
@pytest.mark.parametrize("scales", [(0.125, 1.0), (1.0, 2.5), (0.5, -0.7), (-1.5, 0.3), (0.0, 1.0)], ids=str)
def test_logit_scale_matches_reference(scales, divergence, backend):
    inputs = make_inputs("moderate", bias=True)
    scales = {"student_logit_scale": scales[0], "teacher_logit_scale": scales[1]}
    check_loss(inputs, divergence=divergence, labels=make_labels(TOKENS, VOCABULARY), ce_weight=0.5, backend=backend, **scales)


@BOTH
@TWO
@pytest.mark.parametrize("caps", [(30.0, None), (None, 5.0), (3.0, 4.0)], ids=str)
def test_softcap_matches_reference(caps, divergence, backend):
    caps = {"student_softcap": caps[0], "teacher_softcap": caps[1]}
    for temperature in (1.0, 2.0):
        check_loss(make_inputs("moderate", bias=True), divergence=divergence, temperature=temperature, backend=backend, **caps)


@BOTH
@ALL
def test_saturated_softcap_matches_reference(divergence, backend):
    # Nearly every logit lies in the flat part of tanh, where 1 − tanh² is a difference of neighbouring numbers.
    inputs = make_inputs("huge", bias=True)
    check_loss(inputs, divergence=divergence, student_softcap=15.0, teacher_softcap=20.0, temperature=2.0, backend=backend)


@BOTH
@TWO
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_token_weight_matches_reference(reduction, divergence, backend):
    inputs = make_inputs("moderate")
    options = {"divergence": divergence, "token_weight": make_token_weight(TOKENS), "reduction": reduction, "backend": backend}
    upstream = per_token(TOKENS) if reduction == "none" else 1.7
    check_loss(inputs, upstream=upstream, **options)
    check_loss(inputs, upstream=upstream, labels=make_labels(TOKENS, VOCABULARY), ce_weight=0.4, **options)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_token_weight_of_another_dtype_matches_reference(dtype, backend):
    check_loss(make_inputs("moderate"), token_weight=make_token_weight(TOKENS).to(dtype), backend=backend)


@BOTH
@TWO
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 7, VOCABULARY + 5])
def test_ignore_index_matches_reference(ignore_index, divergence, backend):
    labels = make_labels(TOKENS, VOCABULARY, ignore_index=ignore_index)
    got = check_loss(
        make_inputs("moderate"),
        labels=labels,
        ce_weight=0.5,
        ignore_index=ignore_index,
        divergence=divergence,
        temperature=2.0,
        backend=backend,
    )
    assert (got["d_student_hidden"][labels == ignore_index] == 0).all()


@BOTH
def test_labels_without_cross_entropy_only_mask(backend):
    inputs, labels = make_inputs("moderate"), make_labels(TOKENS, VOCABULARY)
    masked = check_loss(inputs, labels=labels, backend=backend)
    kept = labels != -100
    alone = inputs._replace(student_hidden=inputs.student_hidden[kept], teacher_hidden=inputs.teacher_hidden[kept])
    alone = with_gradients(distillation_loss, alone, 1.7, backend=backend)
    torch.testing.assert_close(masked["loss"], alone["loss"])
    torch.testing.assert_close(masked["d_student_weight"], alone["d_student_weight"])


@BOTH
def test_label_minus_one_is_not_taken_for_masked(backend):
    # −1 pads the labels of many trainers; with another ignore_index it is out of range like any other negative label.
    labels = make_labels(TOKENS, VOCABULARY)
    labels[0] = -1
    with pytest.raises(ValueError, match="labels must be at least 0"):
        distillation_loss(*make_inputs("moderate")[:4], labels, ce_weight=1.0, backend=backend)


@BOTH
@TWO
@pytest.mark.parametrize("num_items", [5, 40, torch.tensor(9), torch.tensor(9.5)], ids=str)
def test_num_items_replaces_the_normaliser(num_items, divergence, backend):
    labels = make_labels(TOKENS, VOCABULARY)
    check_loss(make_inputs("moderate"), labels=labels, num_items=num_items, divergence=divergence, ce_weight=0.5, backend=backend)


@BOTH
@TWO
@DTYPES
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reduction_matches_reference(reduction, dtype, divergence, backend):
    upstream = per_token(TOKENS) if reduction == "none" else 1.7
    options = {"divergence": divergence, "reduction": reduction, "temperature": 2.0, "backend": backend}
    check_loss(make_inputs("moderate", dtype=dtype), upstream=upstream, **options)
    labels = make_labels(TOKENS, VOCABULARY)
    check_loss(
        make_inputs("moderate", dtype=dtype, bias=True), upstream=upstream, labels=labels, ce_weight=0.5, z_loss_weight=0.1, **options
    )


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_batch_dimensions_match_reference(reduction, backend):
    inputs = make_inputs("moderate", tokens=12)
    batched = inputs._replace(
        student_hidden=inputs.student_hidden.view(3, 2, 2, -1), teacher_hidden=inputs.teacher_hidden.view(3, 2, 2, -1)
    )
    labels = make_labels(12, VOCABULARY).view(3, 2, 2)
    weight = make_token_weight(12).view(3, 2, 2)
    upstream = per_token(12).view(3, 2, 2) if reduction == "none" else 1.7
    check_loss(batched, upstream=upstream, labels=labels, token_weight=weight, ce_weight=0.5, reduction=reduction, backend=backend)
    single = inputs._replace(student_hidden=inputs.student_hidden[0], teacher_hidden=inputs.teacher_hidden[0])
    check_loss(single, reduction=reduction, backend=backend)


@BOTH
def test_strided_inputs_match_reference(backend):
    inputs = make_inputs("moderate", tokens=12)
    strided = inputs._replace(
        student_hidden=inputs.student_hidden.T.contiguous().T,
        student_weight=inputs.student_weight.T.contiguous().T,
        teacher_hidden=inputs.teacher_hidden.repeat(1, 2)[:, : inputs.teacher_hidden.shape[1]],
        teacher_weight=inputs.teacher_weight.repeat_interleave(2, 0)[::2],
    )
    check_loss(strided, backend=backend)


@BOTH
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("vocabularies", [(300, 320), (320, 300), (2, 300)], ids=str)
@TWO
def test_vocab_truncate_matches_reference(divergence, vocabularies, bias, backend):
    """The divergence is of what both have; cross entropy and z-loss are of all of the student's, whose own entries get their gradient."""
    inputs = make_inputs("moderate", vocabulary=vocabularies[0], teacher_vocabulary=vocabularies[1], bias=bias)
    options = {"labels": make_labels(TOKENS, vocabularies[0]), "vocab_mismatch": "truncate", "divergence": divergence, "backend": backend}
    assert vocabularies[0] <= vocabularies[1] or (options["labels"] >= vocabularies[1]).any()
    check_loss(inputs, ce_weight=0.5, label_smoothing=0.1, z_loss_weight=0.01, **options)
    check_loss(inputs, ce_weight=0.5, reduction="none", upstream=per_token(TOKENS), **options)
    alone = check_loss(inputs, **options)
    assert (alone["d_student_weight"][min(vocabularies) :] == 0).all()


@BOTH
@pytest.mark.parametrize("weights", [{}, {"ce_weight": 0.5}, {"kd_weight": 0.0, "ce_weight": 0.5}], ids=str)
def test_stats_of_a_student_with_entries_of_its_own_match_reference(weights, backend):
    inputs = make_inputs("moderate", vocabulary=320, teacher_vocabulary=300)
    check_stats(inputs, labels=make_labels(TOKENS, 320), vocab_mismatch="truncate", backend=backend, **weights)


@BOTH
def test_stats_without_labels_of_a_student_with_entries_of_its_own_match_reference(backend):
    check_stats(make_inputs("moderate", vocabulary=320, teacher_vocabulary=300), vocab_mismatch="truncate", backend=backend)


@BOTH
@pytest.mark.parametrize("student_dtype, teacher_dtype", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_models_of_different_dtypes_match_reference(student_dtype, teacher_dtype, backend):
    inputs = make_inputs("moderate", dtype=student_dtype)
    inputs = inputs._replace(teacher_hidden=inputs.teacher_hidden.to(teacher_dtype), teacher_weight=inputs.teacher_weight.to(teacher_dtype))
    check_loss(inputs, divergence="reverse_kl", backend=backend)


def test_float64_teacher_of_a_float32_student_is_exact():
    # All is computed in float64 then, the normaliser too: 1/21 is no float32.
    inputs = make_inputs("moderate", dtype=torch.float64)
    student = {name: getattr(inputs, name).float() for name in ("student_hidden", "student_weight")}
    inputs = inputs._replace(**student)
    got = with_gradients(distillation_loss, inputs, 1.7, backend="torch")
    truth = with_gradients(reference.distillation_loss, inputs.to(torch.float64), 1.7)
    assert_close64("loss", got["loss"], truth["loss"])


# Around the sizes at which the kernels cut: 4, 8 and 16 tokens to a register, 64, 96, 256 and 2048 entries of the vocabulary, 64 and
# 512 features.
SHAPES = [
    (1, 1, 1, 1), (2, 1, 5, 3), (1, 2, 1, 3), (5, 2, 4, 1), (1, 300, 24, 40), (3, 7, 1, 1), (16, 64, 16, 16), (15, 63, 7, 9),
    (17, 65, 33, 5), (31, 128, 8, 8), (33, 129, 9, 17), (97, 95, 65, 63), (65, 257, 513, 20), (5, 2047, 8, 8), (4, 2048, 8, 8),
    (6, 2049, 8, 8), (2, 4097, 5, 6),
]  # fmt: skip


@BOTH
@TWO
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_shape_matches_reference(shape, divergence, backend):
    tokens, vocabulary, student_dim, teacher_dim = shape
    inputs = make_inputs("grid", tokens, vocabulary, student_dim, teacher_dim, bias=True)
    options = everything(tokens, vocabulary)
    if vocabulary == 1:
        options["ce_weight"] = 0.0  # its gradient cancels to nothing, and what is left of it is no multiple of the truth
    check_loss(inputs, divergence=divergence, backend=backend, slack=SLACK, **options)
    check_loss(inputs, divergence=divergence, backend=backend, slack=SLACK, reduction="none", upstream=per_token(tokens))


@pytest.fixture
def one_thread():
    """The native kernels' scratch grows with the threads: with many of them it leaves no room for logits in a small workspace."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_chunks_match_reference(dtype, masked, reduction, backend, monkeypatch, one_thread):
    calls, run = [], chunked.run

    def counted_run(problem, tensors, plan, kernel):
        def counted(chunk):
            calls.append(chunk.student_hidden.shape[0])
            return kernel(chunk)

        return run(problem, tensors, plan, counted)

    monkeypatch.setattr(chunked, "run", counted_run)
    tokens, vocabulary = 97, 6000
    options = {"labels": make_labels(tokens, vocabulary), "ce_weight": 0.5, "token_weight": make_token_weight(tokens)} if masked else {}
    inputs = make_inputs("grid", tokens, vocabulary, 24, 16, dtype=dtype, bias=True)
    check_loss(
        inputs,
        upstream=per_token(tokens) if reduction == "none" else 1.7,
        divergence=divergences.jensen_shannon(0.3),
        # What the native kernels need besides logits: 16-bit heads are converted a block at a time.
        workspace_mib=3 if backend == "native" and dtype is not torch.float32 else 1,
        reduction=reduction,
        backend=backend,
        **options,
    )
    assert len(calls) >= 3, "the workspace was to force several chunks"
    forward_and_backward = 2 if reduction == "none" else 1
    wanted = int(((options["labels"] != -100) & (options["token_weight"] != 0)).sum()) if masked else tokens
    assert sum(calls) == forward_and_backward * wanted, "masked tokens are not to reach the kernel"


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_tokens_masked_gives_zero_attached(reduction, backend):
    inputs = make_inputs("moderate", bias=True)
    labels = torch.full((TOKENS,), -100)
    upstream = per_token(TOKENS) if reduction == "none" else 1.7
    got = with_gradients(distillation_loss, inputs, upstream, labels=labels, ce_weight=0.5, reduction=reduction, backend=backend)
    assert all((value == 0).all() for value in got.values())


@BOTH
@pytest.mark.parametrize("which", ["both", "student", "teacher"])
@ALL
def test_minus_infinity_in_bias_matches_reference(divergence, which, backend):
    inputs = make_inputs("moderate", bias=True)
    where = slice(5, 90)  # whole blocks of 64 and parts of one
    for name in ("student_bias", "teacher_bias"):
        if which in ("both", name.removesuffix("_bias")):
            getattr(inputs, name)[where] = float("-inf")
    got = check_loss(inputs, divergence=divergence, temperature=2.0, backend=backend)
    assert all(value.isfinite().all() for value in got.values())


@BOTH
def test_minus_infinity_with_every_option_is_finite(backend):
    inputs = make_inputs("moderate", bias=True)
    for bias in (inputs.student_bias, inputs.teacher_bias):
        bias[5:90] = float("-inf")
    options = everything(TOKENS, VOCABULARY)
    check_loss(inputs, backend=backend, **options)
    check_loss(inputs, backend=backend, **{**options, "student_softcap": None, "teacher_softcap": None})


@BOTH
@ALL
@pytest.mark.parametrize("cap", [None, 10.0])
@pytest.mark.parametrize("where", ["student_hidden", "teacher_hidden"])
def test_nan_in_hidden_reaches_loss_and_gradient(where, cap, divergence, backend):
    inputs = make_inputs("moderate")
    getattr(inputs, where)[4, 2] = float("nan")
    options = {"divergence": divergence, "backend": backend, "student_softcap": cap, "teacher_softcap": cap}
    got = with_gradients(distillation_loss, inputs, 1.7, **options)
    assert got["loss"].isnan(), "loss"
    assert got["d_student_weight"].isnan().any(), "d_student_weight"
    row_is_nan = got["d_student_hidden"].isnan().any(-1)
    assert row_is_nan[4] and row_is_nan.sum() == 1, "d_student_hidden: that token, and no other"
    # Masked, it does nothing at all.
    labels = torch.zeros(TOKENS, dtype=torch.long)
    labels[4] = -100
    masked = with_gradients(distillation_loss, inputs, 1.7, labels=labels, **options)
    assert all(value.isfinite().all() for value in masked.values())


STATS = ("divergence", "cross_entropy", "student_entropy", "teacher_entropy", "top1_agreement", "tail_mass")


def stats_of(inputs, **options):
    loss, stats = distillation_loss_and_stats(*inputs[:4], student_bias=inputs.student_bias, teacher_bias=inputs.teacher_bias, **options)
    return loss, stats


def check_stats(inputs, *, backend, **options):
    """Every field of the stats against the reference, 0 where a token is masked; returns them."""
    loss, stats = stats_of(inputs, backend=backend, **options)
    plain = {"kd_weight", "ce_weight", "z_loss_weight", "token_weight", "num_items", "temperature_squared", "reduction", "workspace_mib"}
    terms = {name: value for name, value in options.items() if name not in plain}
    eager = eager_stats(inputs, **terms)
    wide = inputs.to(torch.float64)
    _, truth = reference.distillation_terms(*wide[:4], student_bias=wide.student_bias, teacher_bias=wide.teacher_bias, **terms)
    valid = torch.ones(inputs.student_hidden.shape[:-1], dtype=torch.bool)
    if options.get("labels") is not None:
        valid &= options["labels"] != options.get("ignore_index", -100)
    if options.get("token_weight") is not None:
        valid &= options["token_weight"] != 0
    assert (stats.valid == valid).all()
    means = stats.mean()
    assert sorted(means) == sorted(STATS)
    for name in STATS:
        got = getattr(stats, name)
        assert not got.requires_grad
        assert (got[~valid] == 0).all(), name
        assert_as_good_as_eager(name, got[valid], [stat[valid] for stat in eager[name]], truth[name][valid])
        torch.testing.assert_close(means[name], got[valid].mean(), msg=name)
    return loss, stats


@BOTH
@ALL
def test_stats_match_reference(divergence, backend):
    inputs = make_inputs("realistic", bias=True)
    check_stats(inputs, divergence=divergence, backend=backend)
    check_stats(inputs, divergence=divergence, backend=backend, **everything(TOKENS, VOCABULARY))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["flat", "moderate", "peaked", "equal"])
def test_stats_of_input_family_match_reference(family, dtype, backend):
    _, stats = check_stats(make_inputs(family, dtype=dtype), temperature=2.0, labels=make_labels(TOKENS, VOCABULARY), backend=backend)
    if family == "equal":
        assert (stats.top1_agreement[stats.valid] == 1).all()


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_stats_leave_the_loss_as_it_is(reduction, backend):
    inputs = make_inputs("moderate", bias=True)
    options = {**everything(TOKENS, VOCABULARY), "reduction": reduction, "num_items": None, "backend": backend}
    upstream = per_token(TOKENS) if reduction == "none" else 1.7
    plain = with_gradients(distillation_loss, inputs, upstream, **options)
    beside = with_gradients(lambda *args, **kwargs: distillation_loss_and_stats(*args, **kwargs)[0], inputs, upstream, **options)
    for name in plain:
        assert torch.equal(plain[name], beside[name]), name


@BOTH
def test_stats_of_several_chunks_match_reference(backend, one_thread):
    tokens, vocabulary = 97, 6000
    inputs = make_inputs("moderate", tokens, vocabulary, 24, 16)
    check_stats(inputs, labels=make_labels(tokens, vocabulary), workspace_mib=3, backend=backend)


@BOTH
def test_stats_without_divergence_term_still_describe_the_teacher(backend):
    # kd_weight=0 for a while is a common warm-up; what is logged must not silently turn to 0.
    check_stats(make_inputs("moderate"), labels=make_labels(TOKENS, VOCABULARY), kd_weight=0.0, ce_weight=1.0, backend=backend)


def logprobs(function):
    """`function` (token_logprobs or the like) in the form of a loss: (2, N), log-probabilities and entropies."""

    def stacked(hidden, weight, teacher_hidden, teacher_weight, *, student_bias=None, teacher_bias=None, **options):
        return torch.stack(function(hidden, weight, bias=student_bias, **options))

    return stacked


def eager_token_logprobs(hidden, weight, *, token_ids, bias=None, logit_scale=1.0, softcap=None, temperature=1.0, ignore_index=-100):
    log_q = eager_log_probabilities(eager_logits(hidden, weight, bias, logit_scale, softcap) / temperature)
    valid = token_ids != ignore_index
    at_id = log_q.gather(-1, (token_ids * valid).unsqueeze(-1)).squeeze(-1)
    return at_id * valid, -(log_q.exp() * log_q).sum(-1) * valid


def check_token_logprobs(inputs, *, backend, workspace_mib=64, **options):
    upstream = torch.randn(2, *inputs.student_hidden.shape[:-1], generator=torch.Generator().manual_seed(0))
    got = with_gradients(logprobs(token_logprobs), inputs, upstream, backend=backend, workspace_mib=workspace_mib, **options)
    truth = with_gradients(logprobs(reference.token_logprobs), inputs.to(torch.float64), upstream, **options)
    if inputs.student_hidden.dtype is torch.float64:
        for name in truth:
            assert_close64(name, got[name], truth[name])
        return
    eager = eager_with_gradients(logprobs(eager_token_logprobs), inputs, upstream, **options)
    for name in truth:
        assert_as_good_as_eager(name, got[name], eager[name], truth[name], gradient=name != "loss")


@BOTH
@DTYPES
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.0},
        {"temperature": 0.5, "logit_scale": 0.7},
        {"softcap": 5.0},
        {"softcap": 20.0, "logit_scale": 1.3, "temperature": 1.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
def test_token_logprobs_match_reference(bias, options, dtype, backend):
    ids = make_labels(TOKENS, VOCABULARY, masked=0.0)
    check_token_logprobs(make_inputs("moderate", dtype=dtype, bias=bias), token_ids=ids, backend=backend, **options)


@BOTH
@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_token_logprobs_of_masked_ids_get_no_gradient(ignore_index, backend):
    # The upstream gradient of a masked position is whatever the caller's formula gives there, rarely 0.
    ids = make_labels(TOKENS, VOCABULARY, ignore_index=ignore_index)
    check_token_logprobs(make_inputs("moderate", bias=True), token_ids=ids, ignore_index=ignore_index, backend=backend)


@BOTH
def test_token_logprobs_of_several_chunks_match_reference(backend, one_thread):
    inputs = make_inputs("moderate", 97, 12000, 16, 16, bias=True)
    check_token_logprobs(inputs, token_ids=make_labels(97, 12000, masked=0.0), workspace_mib=3, temperature=2.0, backend=backend)


def test_token_logprobs_in_float64_are_exact():
    inputs = make_inputs("moderate", dtype=torch.float64, bias=True)
    options = {"temperature": 1.5, "softcap": 20.0, "logit_scale": 1.3}
    check_token_logprobs(inputs, token_ids=make_labels(TOKENS, VOCABULARY, masked=0.0), backend="auto", **options)


@BOTH
def test_token_logprobs_in_batches_match_reference(backend):
    inputs = make_inputs("moderate", tokens=12)
    inputs = inputs._replace(student_hidden=inputs.student_hidden.view(3, 4, -1), teacher_hidden=inputs.teacher_hidden.view(3, 4, -1))
    check_token_logprobs(inputs, token_ids=make_labels(12, VOCABULARY, masked=0.0).view(3, 4), backend=backend)


@st.composite
def calls(draw):
    """(inputs, options) of a random call; nothing about it is special."""
    tokens, vocabulary = draw(st.integers(1, 40)), draw(st.integers(2, 200))
    seed = draw(st.integers(0, 2**20))
    inputs = make_inputs(
        "grid",
        tokens,
        vocabulary,
        draw(st.integers(1, 40)),
        draw(st.integers(1, 40)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        bias=draw(st.booleans()),
        seed=seed,
    )
    options = {
        "divergence": draw(st.sampled_from(DIVERGENCES)),
        "temperature": draw(st.sampled_from([0.7, 1.0, 2.0, 3.3])),
        "temperature_squared": draw(st.booleans()),
        "kd_weight": draw(st.sampled_from([1.0, 0.35])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "student_logit_scale": draw(st.sampled_from([1.0, 0.6])),
        "student_softcap": draw(st.sampled_from([None, 25.0])),
        "teacher_softcap": draw(st.sampled_from([None, 30.0])),
    }
    if draw(st.booleans()):
        options["labels"] = make_labels(tokens, vocabulary, seed=seed)
        options["ce_weight"] = draw(st.sampled_from([0.0, 0.5]))
        options["label_smoothing"] = draw(st.sampled_from([0.0, 0.2]))
    if draw(st.booleans()):
        options["z_loss_weight"] = 0.05
    if draw(st.booleans()):
        options["token_weight"] = make_token_weight(tokens, seed=seed)
    return inputs, options


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, derandomize=True, max_examples=120)
@given(call=calls())
def test_random_call_matches_reference(backend, call):
    inputs, options = call
    tokens = inputs.student_hidden.shape[0]
    check_loss(inputs, upstream=per_token(tokens) if options["reduction"] == "none" else 1.7, backend=backend, slack=SLACK, **options)


@pytest.mark.parametrize("backend", [NATIVE])
@settings(deadline=None, derandomize=True, max_examples=40)
@given(call=calls(), exponent=st.integers(-3, 3))
def test_random_call_gradient_is_linear_in_upstream(backend, call, exponent):
    # Powers of two scale without rounding, so nothing between loss and gradient may depend on the size of either.
    inputs, options = call
    inputs = inputs.to(torch.float32)
    once = with_gradients(distillation_loss, inputs, 1.0, backend=backend, **options)
    scaled = with_gradients(distillation_loss, inputs, 2.0**exponent, backend=backend, **options)
    for name in once:
        assert torch.equal(once[name] * (1.0 if name == "loss" else 2.0**exponent), scaled[name]), name

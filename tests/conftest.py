"""Before any test imports triton: without a GPU its kernels run on CPU tensors, in the interpreter. And fixtures of several files."""

import collections
import contextlib
import itertools
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser):
    parser.addoption("--instruction-set", help="hold the native kernels to this instruction set, as on a processor that has no wider one")


def pytest_configure(config):
    if (name := config.getoption("--instruction-set")) is not None:
        from distill_kernels.backends import native

        if name not in native.instruction_sets():
            raise pytest.UsageError(f"--instruction-set {name}: there are {', '.join(native.instruction_sets())}")
        native.INSTRUCTION_SET = name


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """Of a test marked `covering(k)` only as many of its parameters' combinations stay in `make test` as it takes to have every k of their
    values together once; the others are exhaustive."""
    functions = {}
    for item in items:
        if item.get_closest_marker("covering") and hasattr(item, "callspec"):
            functions.setdefault((item.path, item.originalname), []).append(item)
    for members in functions.values():
        (together,) = members[0].get_closest_marker("covering").args
        for item in uncovered(members, together):
            item.add_marker(pytest.mark.exhaustive)


def uncovered(items, together):
    """The items beyond a cover, which takes what has most that is new, and of those what has values that were used least."""
    values = {item: sorted((name, id(value)) for name, value in item.callspec.params.items()) for item in items}
    left = {
        item: set(itertools.combinations(values[item], min(together, len(values[item]))))
        for item in items
        if item.get_closest_marker("exhaustive") is None
    }
    wanted, used = set().union(*left.values()), collections.Counter()
    while wanted:
        best = max(left, key=lambda item: (len(left[item] & wanted), -sum(used[value] for value in values[item])))
        wanted -= left.pop(best)
        used.update(values[best])
    return list(left)


@pytest.fixture
def guarded():
    """Triton's kernels run in shuffled order, with bounds and races checked, and allocations full of NaN; not on a GPU."""
    import triton_guard

    with contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            triton_guard.install()
            stack.enter_context(triton_guard.check(order="shuffle", races=True))
            stack.enter_context(triton_guard.poisoned_allocations())
        yield


@pytest.fixture
def kernels(request, monkeypatch):
    """Those that the cuda backend calls; in emulation threads, blocks and late copies come in an order of the test's own."""
    import cuda_emulated

    from distill_kernels.backends.cuda import extension, launch

    if cuda_emulated.ON_GPU:
        yield extension.kernels
        return
    emulated = cuda_emulated.module()
    emulated.schedule(sum(request.node.name.encode()))
    monkeypatch.setattr(extension, "kernels", emulated)
    forget = launch.limits.cache_clear  # a test may put limits of its own in the place of what has it
    forget()
    yield emulated
    forget()


@pytest.fixture
def sampling_pays():
    """Columns are sampled for any number of tokens and any vocabulary: a few hundred columns are enough for a test."""
    from distill_kernels.call import worthwhile

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worthwhile, "LEAST_TOKENS", 1)
        patch.setattr(worthwhile, "LEAST_VOCABULARY", 1)
        yield


@pytest.fixture
def draws(monkeypatch):
    """(columns, weights, uniform, scores, tokens) of every chunk."""
    from distill_kernels.backends import native
    from distill_kernels.estimators import sampling

    recorded = []

    def recording(draw):
        def record(scores, kept, uniform):
            drawn, weights = draw(scores, kept, uniform)
            recorded.append([drawn.cpu(), weights.cpu(), int(uniform), scores.clone().cpu()])
            return drawn, weights

        return record

    def count(self, chunk, *args, gradients=sampling.Sampler.gradients):
        gradients(self, chunk, *args)
        recorded[-1].append(chunk.terms.shape[0])

    monkeypatch.setattr(sampling, "draw", recording(sampling.draw))
    monkeypatch.setattr(native.Kernels, "draw", staticmethod(recording(native.Kernels.draw)))
    monkeypatch.setattr(sampling.Sampler, "gradients", count)
    return recorded

"""Chunks on four threads and on one, bit for bit, for a build with ThreadSanitizer:

    python tests/backends/native/race_driver.py PATH_OF_THE_EXTENSION

Without torch, whose OpenMP runtime is not instrumented and whose barriers the sanitizer therefore takes for races: the extension then
starts threads of its own. `make sanitize` builds and runs it; pytest does not collect it.
"""

import ctypes
import importlib.util
import itertools
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

# Tokens, vocabulary, dims of student and teacher: one task and several, whole vectors and ragged ones, panels of tokens that are one
# task's and that are shared out.
SHAPES = ((1, 97, 8, 8), (19, 1, 1, 3), (33, 2600, 65, 30), (130, 3500, 24, 70), (80, 9300, 6, 16), (150, 700, 70, 12))
# Whether logits are kept, whether gradients are made of them, and whether stats are asked for, which takes the sweep of the sums.
SCHEDULES = ((True, True, True), (True, True, False), (True, False, True), (False, False, True), (False, False, False))
DIVERGENCES = ("forward_kl", "total_variation")  # summed in the first sweep, and in one of its own


def load(path):
    spec = importlib.util.spec_from_file_location("distill_kernels._native", path)
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    assert "torch" not in sys.modules and not hasattr(ctypes.CDLL(None), "GOMP_parallel"), "an OpenMP runtime is in this process"
    return extension


def aligned(*shape):
    """NaNs (whatever is read before it is written shows), on a cache line."""
    count = int(np.prod(shape))
    room = np.full(count + 16, np.nan, np.float32)
    begin = -room.ctypes.data % 64 // 4
    return room[begin : begin + count].reshape(shape)


def chunk(extension, isa, shape, bfloat16, keeps, gradients, stats, divergence, threads):
    """Everything that run_chunk writes for one random chunk: with gradients of all columns, with those of a few, with logits from a
    quantised sweep that those correct, and with entries that tokens list."""
    tokens, vocabulary, *dims = shape
    stride = -(-tokens // extension.token_alignment) * extension.token_alignment
    generator = np.random.default_rng(0)
    held = []  # what the addresses point to

    def address(array):
        held.append(array)
        return array.ctypes.data

    def matrix(rows, dim):
        values = generator.standard_normal((rows, dim), dtype=np.float32)
        stored = (values.view(np.uint32) >> 16).astype(np.uint16) if bfloat16 else values
        return address(stored), int(bfloat16), dim

    def model(dim):
        return {
            "hidden": matrix(tokens, dim),
            "weight": matrix(vocabulary, dim),
            "bias": address(generator.standard_normal(vocabulary, dtype=np.float32)),
            "dim": dim,
            "scale": 0.8,
            "softcap": 15.0,
            "logits": address(aligned(vocabulary, stride)) if keeps else 0,
        }

    written = {"terms": aligned(tokens, 3)}
    if stats:
        written["stats"] = aligned(tokens, 6)
    if gradients:
        written |= {"d_hidden": aligned(tokens, dims[0]), "d_weight": aligned(vocabulary, dims[0]), "d_bias": aligned(vocabulary)}
    kept = max(1, vocabulary // 3) if gradients else 0
    columns, weights = np.arange(kept) * 2, aligned(kept)
    weights[:] = 1.5
    arguments = {
        "tokens": tokens,
        "stride": stride,
        "vocabulary": vocabulary,
        "student": model(dims[0]),
        "teacher": model(dims[1]),
        "labels": address(generator.integers(0, vocabulary, tokens)),
        "coefficients": address(generator.random((tokens, 3), dtype=np.float32)),
        **{name: address(written[name]) if name in written else 0 for name in ("terms", "stats", "d_hidden", "d_weight", "d_bias")},
        "first": True,
        "scores": 0,
        "kept": (0, 0, 0, 0, 0),
        "divergence": extension.divergences.index(divergence),
        "parameters": (),
        "temperature": 2.0,
        "label_smoothing": 0.1,
        "log_probability_floor": -1.0e4,
        "tail_log_probability": -9.2,
        "untempered": True,
    }

    def run(arguments, *stages):
        scratch = aligned(extension.chunk_scratch_floats(arguments, threads, isa))
        for stage in stages:
            extension.run_chunk(arguments, scratch.ctypes.data, threads, isa, stage)

    run(arguments, extension.Stage.whole)
    width = min(5, vocabulary // 2)
    if width and not stats:
        ids = generator.permuted(np.tile(np.arange(vocabulary), (tokens, 1)), axis=1)[:, :width].ravel()
        places = np.argsort(ids, kind="stable")
        made = {name: aligned(tokens, columns) for name, columns in (("logits", width), ("others", 3))}
        given = [generator.standard_normal((tokens, columns), dtype=np.float32) for columns in (width, 2)]
        made |= {name: written[name].copy() for name in ("d_hidden", "d_weight", "d_bias") if gradients}
        written |= {f"listed_{name}": array for name, array in made.items()}
        listed = ids.size, address(ids[places]), address(places), width, address(made["logits"]), address(made["others"])
        fixed = {"listed": (*listed, *map(address, given)), "labels": 0, "divergence": -1, "label_smoothing": 0.0}
        fixed["teacher"] = arguments["teacher"] | {"weight": (0, 0, 0), "logits": 0}
        fixed |= {name: address(array) for name, array in made.items() if name.startswith("d_")}
        run(arguments | fixed, extension.Stage.listed, *([extension.Stage.listed_gradients] if gradients else []))
    if not gradients:
        return written
    sampled = {name: array.copy() for name, array in written.items()}
    written |= {f"sampled_{name}": array for name, array in sampled.items()}
    sampled["d_weight"][:] = 0.0
    sampled["scores"] = written["scores"] = aligned(vocabulary)
    written["squares"] = aligned(2, kept)
    lists = address(columns), address(weights), address(aligned(kept, stride)), address(written["squares"])
    addresses = {name: address(array) for name, array in sampled.items()}
    arguments |= addresses | {"kept": (kept, *lists)}
    run(arguments, *(getattr(extension.Stage, name) for name in ("scores", "gather", "multiply")))
    # The last by itself, as in a backward: without logits and teacher.
    written["late_d_hidden"], written["late_d_weight"] = aligned(tokens, dims[0]), np.zeros((vocabulary, dims[0]), np.float32)
    alone = {"student": arguments["student"] | {"logits": 0}, "teacher": arguments["teacher"] | {"weight": (0, 0, 0), "logits": 0}}
    late = {name: address(written[f"late_{name}"]) for name in ("d_hidden", "d_weight")}
    run(arguments | alone | late | {"d_bias": 0}, extension.Stage.multiply)
    if divergence != "forward_kl":
        return written

    def quantised(name, logits):
        data, element, dim = arguments[name]["weight"]
        turned = -(-dim // 64) * 64
        rows, scales = np.full((vocabulary, turned), -128, np.int8), aligned(vocabulary, 3)
        written.update({f"{name}_rows": rows, f"{name}_scales": scales})
        extension.quantise_rows(data, element, dim, vocabulary, dim, address(rows), address(scales), threads, isa)
        return arguments[name] | {"logits": address(logits), "quantised": (rows.ctypes.data, turned, scales.ctypes.data)}

    pilot, dz = np.arange(0, vocabulary, 5), aligned(kept, stride)
    for exact in (False, True):  # its own sums, or those of the fallback
        made = {name: array.copy() for name, array in sampled.items() if name != "d_bias"} | {"errors": aligned(tokens, 2)}
        made["d_weight"][:] = 0.0
        written |= {f"{'exact' if exact else 'swept'}_{name}": array for name, array in made.items()}
        models = {"student": quantised("student", dz), "teacher": quantised("teacher", aligned(kept, stride))}
        fixed = {"label_smoothing": 0.0, "d_bias": 0, "pilot": (len(pilot), address(pilot)), "kept": (kept, *lists[:2], dz.ctypes.data, 0)}
        stages = ("sweep", "correct", *(["exact"] if exact else []), "gather", "multiply")
        addresses = {name: address(array) for name, array in made.items()}
        run(arguments | models | fixed | addresses, *(getattr(extension.Stage, name) for name in stages))
    return written


def check(extension, *case):
    one, four = (chunk(extension, *case, threads) for threads in (1, 4))
    for name in one:
        # A sum that such weights as these correct may have no logarithm; then there is no standard error, nor anything after it.
        assert np.isfinite(one[name]).all() or name.startswith("swept"), f"{name} of {case} is not finite"
        assert one[name].tobytes() == four[name].tobytes(), f"{name} of {case} is not the same on 1 and on 4 threads"


def main(path):
    extension = load(path)
    product = itertools.product(extension.instruction_sets(), SHAPES, (False, True), SCHEDULES, DIVERGENCES)
    cases = [(isa, shape, bfloat16, *schedule, divergence) for isa, shape, bfloat16, schedule, divergence in product]
    with ThreadPoolExecutor(2) as pool:  # calls beside each other share nothing, either
        list(pool.map(lambda case: check(extension, *case), cases))
    print(f"{len(cases)} chunks: the same bits on 1 thread and on 4")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""How many tiles of the logits' gradient could be skipped, on SmolLM2: what a backward that recomputes tiles would save.

    python -m benchmarks.students.negligible_tiles            # writes results/negligible_tiles.csv

A tile may be skipped exactly if no entry of it changes a float32 sum, about 2⁻²⁴ of the largest; CCE skips below 2⁻¹² of it, which is
an approximation. Shares are given for the vocabulary as it is and sorted by mean |dz|, the best order there is.
"""

import torch

from benchmarks import cases, record

TILES = ((128, 128), (64, 64), (16, 128))  # tokens, entries
BOUNDS = (-12, -16, -20, -24)  # powers of two


def main():
    student_hidden, student_weight, teacher_hidden, teacher_weight = (t.detach() for t in cases.SMOLLM2.tensors())
    q, p = (student_hidden @ student_weight.T).softmax(-1), (teacher_hidden @ teacher_weight.T).softmax(-1)
    size = (q - p).abs()
    rows = []
    for order, entries in (("as it is", size), ("sorted", size[:, size.mean(0).argsort()])):
        for tokens, columns in TILES:
            largest = entries.reshape(size.shape[0] // tokens, tokens, size.shape[1] // columns, columns).amax((1, 3))
            for bound in BOUNDS:
                share = (largest < 2.0**bound).float().mean().item()
                rows.append({"vocabulary": order, "tokens": tokens, "entries": columns, "log2_bound": bound, "skipped": share})
                print(f"{order:9} {tokens:4} x {columns:4}, below 2^{bound}: {100 * share:.1f} %")
    print(f"written: {record.write('negligible_tiles', rows, ('vocabulary', 'tokens', 'entries', 'log2_bound'))}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()

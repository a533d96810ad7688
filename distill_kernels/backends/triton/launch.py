"""Launches: the kernels' arguments from a problem, their grids, and how many programs share a token's vocabulary."""

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from distill_kernels.backends.triton import kept_columns, listed_columns, listed_entries, quantised_sweep, rows, sweep
from distill_kernels.backends.triton.elementwise import device_function
from distill_kernels.backends.triton.tiles import MERGED, PLACES, STATISTICS, TOTALS
from distill_kernels.call.problem import Problem, Tensors
from distill_kernels.call.shards import Shards
from distill_kernels.estimators.quantised import PILOT_FRACTION
from distill_kernels.schedule import chunk_products, chunked

READ = ("rows", "head", "row_scales", "head_scales")  # of a `correction.Model` by the sweep
INTERPRETED_MULTIPROCESSORS = 7  # odd, and enough that a small problem has several blocks and several ragged splits of each


def architecture(device: torch.device) -> str:
    """A key of the configurations."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def partial_bytes(problem: Problem, keeps_logits: bool) -> tuple[int, int]:
    """Bytes of partial sums, at most: (for each token, and beside them)."""
    held = 1 + 2 * len(problem.shard_sizes)  # one's own, and every rank's, as they come and in the order of splits
    if keeps_logits:  # splits_of rounds up to a power of two, so by less than two
        programs = rows.configuration(architecture(problem.device)).programs
        return 2 * held * rows.partial_bytes(1, 1), 2 * held * rows.partial_bytes(programs, 1)
    tile = sweep.configuration(architecture(problem.device), _widest(problem), problem.tokens).rows
    return held * rows.partial_bytes(1, 1) + 4 * MERGED, held * rows.partial_bytes(tile * (multiprocessors(problem.device) + 1), 1)


def exchanged(problem: Problem, keeps_logits: bool) -> int:
    """Numbers of each token that a rank tells every other: of a split each, which a chunk of many tokens has one or two of."""
    if not problem.group:
        return 0
    tokens = min(problem.tokens, chunk_products.SAMPLED_TOKENS)
    splits = rows.splits_of(tokens, problem.vocabulary, rows.configuration(architecture(problem.device))) if keeps_logits else 1
    return splits * (STATISTICS + TOTALS)


def swept_bytes(problem: Problem) -> tuple[int, int]:
    """Bytes of what the quantised sweep's kernels leave: (for each token, and beside them)."""
    pilot = -(-problem.vocabulary // PILOT_FRACTION)
    of_rows = rows.configuration(architecture(problem.device))
    tile = quantised_sweep.configuration(architecture(problem.device), problem.options.sweep, problem.tokens, False)
    # Logits of the pilot, and the sweep's of the columns kept, of two models; squared scores by blocks of tokens, and their sum.
    models = 2 if problem.teacher_dim else 1
    token_bytes = 4 * models * max(pilot, problem.kept_columns) + -(-4 * problem.vocabulary // tile.rows)
    fields = max(STATISTICS + TOTALS, kept_columns.CORRECTED + kept_columns.MOMENTS)
    most_splits = fields * 4 * 2 * of_rows.programs  # splits_of rounds up to a power of two, so by less than two
    sums = 4 * quantised_sweep.SUMS * tile.rows * (multiprocessors(problem.device) + 1)
    return token_bytes + 2 * 4 * fields, 2 * 4 * problem.vocabulary + most_splits + sums


class Launcher:
    """The kernels of one call: what is the same for every chunk is prepared once."""

    def __init__(self, problem: Problem, tensors: Tensors):
        self.problem, self.tensors = problem, tensors
        self.device = tensors.student_hidden.device
        self.architecture = architecture(self.device)
        self.shards = Shards.of(problem)
        # Ranks that share a vocabulary divide each the same number of splits, some of a smaller shard's being empty.
        self.divided = problem.largest_shard.vocabulary
        divergence = problem.divergence
        first, second = (*(divergence.parameters if divergence is not None else ()), 0.0, 0.0)[:2]
        untempered = problem.cross_entropy or problem.z_loss
        one_pass = divergence is not None and divergence.one_pass
        self.common = {
            "vocabulary": problem.vocabulary,
            "whole": problem.whole_vocabulary,
            "student_bias": tensors.student_bias,
            "teacher_bias": tensors.teacher_bias,
            "inverse_temperature": 1.0 / problem.options.temperature,
            "label_smoothing": problem.options.label_smoothing,
            "student_scale": problem.options.student_logit_scale,
            "teacher_scale": problem.options.teacher_logit_scale,
            "student_softcap": problem.options.student_softcap,
            "teacher_softcap": problem.options.teacher_softcap,
            "first": first,
            "second": second,
            "TEACHER": problem.teacher_dim > 0,
            "UNTEMPERED": untempered,
            "SEPARATE": untempered and problem.options.temperature != 1.0,
            "SMOOTHING": problem.cross_entropy and problem.options.label_smoothing > 0,
            "TOP": problem.stats,
            "STATS": problem.stats,
            "ALWAYS": problem.stats or (divergence is not None and not one_pass),
            "DIVERGENCE": None if divergence is None else device_function(divergence.body),
            "RENORMALISE": device_function(divergence.body.renormalise) if one_pass else None,
            "PARAMETERS": len(divergence.parameters) if divergence is not None else 0,
        }
        # What may have to wait for the log-sum-exps.
        self.wants_totals = divergence is not None or self.common["SMOOTHING"] or problem.stats

    def rows(self, chunk: chunked.Chunk, student_logits, teacher_logits, dz, dz_scale):
        """A generator: terms, stats and dz (n, V) of a chunk from its logits, bare products (n, V) float32."""
        configuration = rows.configuration(self.architecture)
        tokens = student_logits.shape[0]
        splits = rows.splits_of(tokens, self.divided, configuration)
        slice_entries = _multiple(-(-self.divided // splits), configuration.block)
        values = self.common | self._of(chunk) | {
            "student_logits": student_logits, "teacher_logits": teacher_logits, "dz": dz, "dz_scale": dz_scale, "tokens": tokens,
            "splits": splits, "slice_entries": slice_entries, "ROWS": configuration.rows, "BLOCK": configuration.block,
        }  # fmt: skip
        blocks = -(-tokens // configuration.rows)
        grid = (blocks, splits)
        values |= {"partial": self._new(STATISTICS, tokens, splits)}
        _launch(rows.statistics_kernel, grid, values | self._early(), num_warps=configuration.warps)
        values |= yield from self._everyone(values["partial"], "partial")
        values |= {"totals": self._new(TOTALS, tokens, values["splits"])}
        if self.wants_totals:
            _launch(rows.totals_kernel, grid, values, num_warps=configuration.warps)
            values |= yield from self._everyone(values["totals"][..., :splits], "totals")
        _launch(rows.gradient_kernel, grid if dz is not None else (blocks, 1), values, num_warps=configuration.warps)

    def sweep(self, chunk: chunked.Chunk):
        """A generator: terms of a chunk straight from hidden states and heads."""
        tokens = chunk.student_hidden.shape[0]
        matrices = {
            "student_hidden": chunk.student_hidden, "student_weight": self.tensors.student_weight,
            "teacher_hidden": chunk.teacher_hidden, "teacher_weight": self.tensors.teacher_weight,
        }  # fmt: skip
        matrices = {name: None if matrix is None else _by_rows(matrix) for name, matrix in matrices.items()}
        aligned = all(matrix is None or _aligned(matrix) for matrix in matrices.values())
        target = self.architecture if aligned or self.architecture == "interpreter" else "unaligned"
        configuration = sweep.configuration(target, _widest(self.problem), tokens)
        blocks = -(-tokens // configuration.rows)
        splits = sweep.splits_of(blocks, self.divided, multiprocessors(self.device), configuration)
        slice_entries = _multiple(-(-self.divided // splits), configuration.entries)
        strides = {f"{name}_stride": 0 if matrix is None else matrix.stride(0) for name, matrix in matrices.items()}
        if configuration.descriptors:
            for name, matrix in matrices.items():
                if matrix is not None:
                    height = configuration.rows if name.endswith("hidden") else configuration.entries
                    matrices[name] = TensorDescriptor.from_tensor(matrix, [height, configuration.depth])
        values = self.common | self._of(chunk) | matrices | strides | {
            "partial": self._new(STATISTICS, tokens, splits), "merged": None, "totals": None, "tokens": tokens, "splits": splits,
            "blocks": blocks, "slice_entries": slice_entries, "student_dim": self.problem.student_dim,
            "teacher_dim": self.problem.teacher_dim, "ROWS": configuration.rows, "ENTRIES": configuration.entries,
            "DEPTH": configuration.depth, "DESCRIPTORS": configuration.descriptors, "PRECISION": _precision(),
        }  # fmt: skip
        options = {"num_warps": configuration.warps, "num_stages": configuration.stages}
        _launch(sweep.sweep_kernel, (blocks * splits,), values | self._early(), **options)
        values |= yield from self._everyone(values["partial"], "partial")
        finish = rows.configuration(self.architecture)
        by_token = {"ROWS": finish.rows, "BLOCK": finish.block}
        grid = (-(-tokens // finish.rows), 1)
        if self.wants_totals:
            values |= {"merged": self._new(MERGED, tokens), "totals": self._new(TOTALS, tokens, splits)}
            _launch(rows.merge_kernel, grid, values | by_token, num_warps=1)
            _launch(sweep.sweep_kernel, (blocks * splits,), values | {"splits": splits}, **options)
            values |= yield from self._everyone(values["totals"], "totals")
        nothing = {"student_logits": None, "teacher_logits": None, "dz": None, "dz_scale": None}
        _launch(rows.gradient_kernel, grid, values | by_token | nothing, num_warps=1)

    def references(self, x, y):
        """(REFERENCES, n) of the sweep from logits (n, P) of the pilot; y None: there is no teacher."""
        tokens, pilot = x.shape
        configuration = rows.configuration(self.architecture)
        splits = rows.splits_of(tokens, pilot, configuration)
        partial = self._new(STATISTICS, tokens, splits)
        made = self.tensors.coefficients.new_empty(quantised_sweep.REFERENCES, tokens)
        meant = {"student_bias": None, "teacher_bias": None, "student_scale": 1.0, "teacher_scale": 1.0} | {
            "student_softcap": None, "teacher_softcap": None, "SMOOTHING": False, "TOP": False,
        }  # fmt: skip
        values = self.common | meant | {
            "student_logits": x, "teacher_logits": y, "labels": None, "partial": partial, "references": made, "tokens": tokens,
            "vocabulary": pilot, "splits": splits, "slice_entries": _multiple(-(-pilot // splits), configuration.block),
            "ROWS": configuration.rows, "BLOCK": configuration.block, "SPLITS": triton.next_power_of_2(splits),
        }  # fmt: skip
        blocks = -(-tokens // configuration.rows)
        _launch(rows.statistics_kernel, (blocks, splits), values | self._early(), num_warps=configuration.warps)
        _launch(listed_columns.references_kernel, (blocks,), values, num_warps=1)
        return made

    def quantised_sweep(self, chunk: chunked.Chunk, student, teacher, references):
        """Σ of every token by splits, (SUMS, n, splits), and squared scores of every column by blocks of tokens, (blocks, V)."""
        tokens, vocabulary = chunk.student_hidden.shape[0], self.problem.vocabulary
        configuration = quantised_sweep.configuration(self.architecture, self.problem.options.sweep, tokens, self._bare())
        blocks = -(-tokens // configuration.rows)
        splits = sweep.splits_of(blocks, vocabulary, multiprocessors(self.device), configuration)
        new = self.tensors.coefficients.new_empty
        sums, squares = new(quantised_sweep.SUMS, tokens, splits), new(blocks, vocabulary)
        models = {"student": student, "teacher": teacher}
        matrices = {f"{name}_{part}": None if model is None else getattr(model, part) for name, model in models.items() for part in READ}
        matrices |= {f"{name}_dim": 0 if model is None else model.rows.shape[1] for name, model in models.items()}
        if configuration.descriptors:
            for name, height in (("rows", configuration.rows), ("head", configuration.entries)):
                for prefix, model in models.items():
                    if model is not None:
                        block = [height, configuration.depth]
                        matrices[f"{prefix}_{name}"] = TensorDescriptor.from_tensor(getattr(model, name), block)
        values = self.common | self._of(chunk) | matrices | {
            "references": references, "sums": sums, "squares": squares, "tokens": tokens, "splits": splits, "blocks": blocks,
            "slice_entries": _multiple(-(-vocabulary // splits), configuration.entries), "ROWS": configuration.rows,
            "ENTRIES": configuration.entries, "DEPTH": configuration.depth, "DESCRIPTORS": configuration.descriptors,
            "PARTS": configuration.parts, "INTEGERS": self.problem.options.sweep == "int8",
        }  # fmt: skip
        options = {"num_warps": configuration.warps, "num_stages": configuration.stages}
        _launch(quantised_sweep.quantised_sweep_kernel, (blocks * splits,), values, **options)
        return sums, squares

    def swept_logits(self, model, columns):
        """(n, m) float32: the sweep's logits of a model's entries (m,)."""
        tokens, count = len(model.rows), len(columns)
        configuration = listed_columns.configuration(self.architecture)
        blocks = -(-tokens // configuration.rows)
        logits = self.tensors.coefficients.new_empty(tokens, count)
        values = {part: getattr(model, part) for part in READ} | {
            "bias": model.bias, "columns": columns, "logits": logits, "tokens": tokens, "count": count, "blocks": blocks,
            "dim": model.rows.shape[1], "scale": model.scale, "softcap": model.softcap, "ROWS": configuration.rows,
            "ENTRIES": configuration.entries, "DEPTH": configuration.depth, "INTEGERS": self.problem.options.sweep == "int8",
        }  # fmt: skip
        options = {"num_warps": configuration.warps, "num_stages": configuration.stages}
        _launch(listed_columns.logits_kernel, (blocks * -(-count // configuration.entries),), values, **options)
        return logits

    def differences(self, x, y, swept_x, swept_y, weights, references):
        """(CORRECTED + MOMENTS, n, splits) from logits (n, K) of the columns kept."""
        tokens, count = x.shape
        configuration = rows.configuration(self.architecture)
        splits = rows.splits_of(tokens, count, configuration)
        made = self.tensors.coefficients.new_empty(kept_columns.CORRECTED + kept_columns.MOMENTS, tokens, splits)
        values = self.common | {
            "x": x, "y": y, "swept_x": swept_x, "swept_y": swept_y, "weights": weights, "references": references, "differences": made,
            "tokens": tokens, "count": count, "splits": splits, "slice_entries": _multiple(-(-count // splits), configuration.block),
            "ROWS": configuration.rows, "BLOCK": configuration.block,
        }  # fmt: skip
        _launch(kept_columns.difference_kernel, (-(-tokens // configuration.rows), splits), values, num_warps=configuration.warps)
        return made

    def kept_gradient(self, chunk, x, y, columns, weights, factors, dz):
        """dz (n, K) of the columns kept, each times its weight."""
        tokens, count = x.shape
        configuration = rows.configuration(self.architecture)
        values = self.common | self._of(chunk) | {
            "x": x, "y": y, "columns": columns, "weights": weights, "factors": factors, "dz": dz, "tokens": tokens, "count": count,
            "ROWS": configuration.rows, "BLOCK": configuration.block,
        }  # fmt: skip
        grid = (-(-tokens // configuration.rows), -(-count // configuration.block))
        _launch(kept_columns.kept_gradient_kernel, grid, values, num_warps=configuration.warps)

    def listed(self, logits, ids):
        """(listed (n, K), others (n, 3)) of a chunk's logits, bare products (n, V) float32, which lose what is listed."""
        tokens = len(ids)
        listed = logits.new_empty(ids.shape)
        by_list, by_vocabulary = self._listed(logits, ids)
        _launch(listed_entries.take_kernel, by_list.pop("grid"), by_list | {"listed": listed}, num_warps=1)
        configuration = rows.configuration(self.architecture)
        partial = logits.new_empty(listed_entries.OTHERS, tokens, by_vocabulary["splits"])
        grid = by_vocabulary.pop("grid")
        _launch(listed_entries.others_kernel, grid, by_vocabulary | {"partial": partial}, num_warps=configuration.warps)
        maxima, *sums = partial
        highest = maxima.amax(-1, keepdim=True)
        below = maxima - highest
        factors = (below / self.problem.options.temperature).exp(), below.exp()
        log_sums = [(part * factor).sum(-1, keepdim=True).log() for part, factor in zip(sums, factors, strict=True)]
        return listed, torch.cat([torch.where(log_sums[0] == -torch.inf, 0.0, highest), *log_sums], 1)

    def listed_gradient(self, logits, ids, listed, others, d_listed, d_others, dz, dz_scale):
        """dz (n, V) of logits that lack what is listed; they may be the same."""
        by_list, by_vocabulary = self._listed(logits, ids)
        written = {"dz": dz, "dz_scale": dz_scale}
        of_others = by_vocabulary | written | {"others": others, "d_others": d_others.contiguous()}
        warps = rows.configuration(self.architecture).warps
        _launch(listed_entries.others_gradient_kernel, of_others.pop("grid"), of_others, num_warps=warps)
        of_listed = by_list | written | {"listed": listed, "d_listed": d_listed.contiguous()}
        _launch(listed_entries.put_kernel, of_listed.pop("grid"), of_listed, num_warps=1)

    def _listed(self, logits, ids):
        """Arguments and grids of the kernels that go by lists and of those that go by the vocabulary."""
        tokens, width = ids.shape
        configuration = rows.configuration(self.architecture)
        blocks = -(-tokens // configuration.rows)
        shared = self.common | {
            "logits": logits, "bias": self.tensors.student_bias, "ids": ids, "tokens": tokens, "width": width, "ROWS": configuration.rows,
            "scale": self.problem.options.student_logit_scale, "softcap": self.problem.options.student_softcap,
        }  # fmt: skip
        block = listed_entries.block_of(width, configuration.block)
        splits = rows.splits_of(tokens, self.problem.vocabulary, configuration)
        slice_entries = _multiple(-(-self.problem.vocabulary // splits), configuration.block)
        by_list = {"BLOCK": block, "grid": (blocks, -(-width // block))}
        by_vocabulary = {"BLOCK": configuration.block, "splits": splits, "slice_entries": slice_entries, "grid": (blocks, splits)}
        return shared | by_list, shared | by_vocabulary

    def _new(self, *shape):
        return self.tensors.coefficients.new_empty(*shape)

    def _everyone(self, partial, name):
        """A generator that returns the kernels' arguments: sums of one's own splits (fields, n, splits) joined by those of other ranks."""
        if self.shards is not None:
            if name == "partial":
                partial[list(PLACES)] += self.shards.begin
            partial = (yield from self.shards.gather(partial)).permute(1, 2, 0, 3).flatten(2).contiguous()
        splits = partial.shape[2]
        return {name: partial, "splits": splits, "SPLITS": triton.next_power_of_2(splits)}

    def _bare(self):
        """Whether there is nothing but the divergence."""
        wanted = ("student_bias", "teacher_bias", "student_softcap", "teacher_softcap")
        return not (self.common["STATS"] or self.common["UNTEMPERED"]) and all(self.common[name] is None for name in wanted)

    def _of(self, chunk):
        labels = chunk.labels if self.problem.cross_entropy else None
        if labels is not None and self.shards is not None:
            labels = torch.where(labels < 0, labels, labels - self.shards.begin)
        return {"labels": labels, "coefficients": chunk.coefficients, "terms": chunk.terms, "stats": chunk.stats}

    def _early(self):
        """The statistics' divergence: only one whose sums can be renormalised."""
        return {"DIVERGENCE": self.common["DIVERGENCE"] if self.common["RENORMALISE"] is not None else None}


def _launch(kernel, grid, values, **options):
    kernel[grid](**{name: values[name] for name in kernel.arg_names}, **options)


def _multiple(number, of):
    return -(-number // of) * of


def _by_rows(matrix):
    """The matrix with the elements of a row side by side; a copy only if they are not."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _aligned(matrix) -> bool:
    """Whether every row starts at a multiple of 16 bytes: what TMA wants, and a load of 16 bytes."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0 and matrix.stride(1) == 1


def _widest(problem):
    """The dtype whose tiles take the most room."""
    return max(problem.student_dtype, problem.teacher_dtype, key=lambda dtype: dtype.itemsize)


def _precision():
    """How float32 products are made, by torch's own switch."""
    switch = torch.backends.cuda.matmul
    tf32 = switch.fp32_precision == "tf32" if hasattr(switch, "fp32_precision") else switch.allow_tf32
    return "tf32" if tf32 else "ieee"

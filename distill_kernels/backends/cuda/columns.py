"""The kernels of sampled columns, csrc/cuda/columns.cu, in the place of torch's operations."""

from distill_kernels.backends.cuda import extension
from distill_kernels.backends.cuda.launch import ELEMENTS, address, place
from distill_kernels.estimators.sampling import Library

THREADS = 256


class Columns(Library):
    """`narrow`: the kept columns of dz are products' and nothing else's: gathered in their dtype, with their scale. Otherwise they are
    float32, for a backward that multiplies each token's."""

    def __init__(self, *arguments, narrow: bool, **named):
        super().__init__(*arguments, **named)
        self.narrow = narrow
        self.launched = {"threads": THREADS, **place(self.weight.device)}

    def gather(self, columns, weights, out):
        tokens, vocabulary = self.dz.shape
        extension.kernels.gather_columns(
            dz=address(self.dz),
            dz_element=ELEMENTS[self.dz.dtype],
            tokens=tokens,
            vocabulary=vocabulary,
            columns=address(columns),
            weights=address(weights),
            divisor=0 if self.narrow else address(self.scale),
            kept=len(columns),
            out=address(out),
            out_element=ELEMENTS[self.dtype if self.narrow else out.dtype],
            **self.launched,
        )

    def narrowed(self, dz, tokens, kept):
        if not self.narrow:
            return super().narrowed(dz, tokens, kept)
        return dz.view(-1).view(self.dtype)[: tokens * kept].view(tokens, kept)

    def rows(self, columns):
        if self.weight.stride(1) != 1:
            return super().rows(columns)
        rows = self.weight.new_empty(len(columns), self.weight.shape[1])
        element = self.weight.element_size()
        extension.kernels.gather_rows(
            matrix=address(self.weight),
            stride=self.weight.stride(0) * element,
            places=address(columns),
            count=len(columns),
            bytes=rows.shape[1] * element,
            out=address(rows),
            **self.launched,
        )
        return rows

    def add_rows(self, d_weight, columns, rows):
        extension.kernels.scatter_rows(
            matrix=address(d_weight), places=address(columns), count=len(columns), dim=rows.shape[1], rows=address(rows), **self.launched
        )

"""Knowledge-distillation losses of large-vocabulary language models, computed from hidden states by fused kernels.

    import distill_kernels

    loss = distill_kernels.distillation_loss(student_hidden, student_weight, teacher_hidden, teacher_weight, labels)
    loss.backward()

The public names live in `distill_kernels.api`, the folder python/ of the source tree.
"""

try:
    from distill_kernels.api import *  # noqa: F403
    from distill_kernels.api import __all__ as _public
    from distill_kernels.api import __getattr__  # noqa: F401, names that need a package of their own
except ModuleNotFoundError as error:
    if error.name != "distill_kernels.api":
        raise
    raise ImportError(
        "distill_kernels is not installed: its public API is mapped in from the folder python/ on installation. "
        "Run `pip install -e .` in the source tree, or `pip install .`, and import it again."
    ) from None

from distill_kernels import divergences

__version__ = "0.1.0"
__all__ = ["__version__", "divergences", *_public]

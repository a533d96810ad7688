"""Before any test imports triton: without a GPU its kernels run on CPU tensors, in the interpreter."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

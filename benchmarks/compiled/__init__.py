"""What the GPU kernels become when they are compiled, without a GPU: machine code, bytes and flops, the time that they model to."""

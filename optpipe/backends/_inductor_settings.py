"""torch's settings that decide what an inductor package computes and how: threads and TF32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def threads_of_torch(threads: int) -> Iterator[None]:
    """torch's number of threads set to ``threads``, and given back after."""
    import torch

    before = torch.get_num_threads()
    if before == threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def true_fp32() -> Iterator[None]:
    """TF32 off in matrix products and convolutions on CUDA, and cuDNN free to try its algorithms out."""
    from torch.backends import cuda, cudnn

    before = cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = False, False, True
    try:
        yield
    finally:
        cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before

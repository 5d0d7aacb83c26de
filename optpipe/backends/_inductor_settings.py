"""The process's settings that decide what an inductor package computes and how fast."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_PAGE, _LARGEST_MMAP_THRESHOLD = 4096, 32 << 20
_allocator = threading.Lock()


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


def in_blocks_of_their_own(function: Callable[[], T]) -> T:
    """What ``function`` returns; large memory that it allocates starts at the same place in a page each time.

    A package keeps its weights in one block from malloc, which promises 16 bytes of alignment where the
    kernels read 64 at a time. Blocks from the heap start at any multiple of 16: of two sessions of one
    network one was then several percent slower than the other, for as long as they lived.
    Blocks of their own all start 16 bytes into a page: as in a process that opens a single package. The
    function runs in a thread of its own, whose heap has no large free block to give out instead.

    After it the C library's thresholds stand where it would move them by itself once blocks of 32 MiB had
    been freed. Without glibc the function is only called.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return function()
    with _allocator, ThreadPoolExecutor(1) as thread:
        mallopt(_M_MMAP_THRESHOLD, _PAGE)
        try:
            return thread.submit(function).result()
        finally:
            mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
            mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)

"""Multiprocessors that matrix products leave to what runs beside them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def spare_multiprocessors(count: int) -> Iterator[None]:
    """While entered, cuBLASLt plans torch's products for so many multiprocessors less than the device has.

    For the whole process, so only where one thread multiplies. Without torch's switch for it (it is experimental), and
    without a GPU, products are planned as ever.
    """
    set_spared = getattr(torch._C, "_set_sm_carveout_experimental", None)
    if set_spared is None or not count or not torch.cuda.is_available():
        yield
        return
    library = torch.backends.cuda.preferred_blas_library()
    with warnings.catch_warnings():
        # That it is experimental, said once by torch.
        warnings.simplefilter("ignore")
        # cuBLAS itself knows no such wish.
        torch.backends.cuda.preferred_blas_library("cublaslt")
        set_spared(count)
    try:
        yield
    finally:
        set_spared(None)
        torch.backends.cuda.preferred_blas_library(library)

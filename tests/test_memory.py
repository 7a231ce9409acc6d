"""Freed memory: kept by the process inside the `with`, given back after it."""

import platform

import numpy as np
import psutil
import pytest

from fptq.memory import keeping_freed_memory

MEGABYTE = 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks to glibc's malloc")
def test_freed_memory_is_kept_and_then_given_back() -> None:
    process = psutil.Process()

    def resident_after_freeing() -> float:
        array = np.ones(256 * MEGABYTE, np.uint8)
        del array
        return process.memory_info().rss / MEGABYTE

    before = resident_after_freeing()
    with keeping_freed_memory():
        kept = resident_after_freeing()
    after = process.memory_info().rss / MEGABYTE
    assert kept > before + 200
    assert after < before + 100
    assert resident_after_freeing() < before + 100  # as it was

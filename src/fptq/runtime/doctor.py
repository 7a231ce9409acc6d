"""What this installation can run here, and why."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

import numpy as np

import fptq
from fptq.errors import KernelError
from fptq.runtime import kernels, reference
from fptq.runtime.kernels import Kernels

PACKAGES = {
    "torch": "quantizing, evaluating, transformers",
    "transformers": "quantizing, evaluating, transformers",
    "datasets": "calibration and evaluation text from the Hub",
    "compressed-tensors": "loading checkpoints in stock transformers",
}


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        system: versions of fptq and Python, and the platform.
        cpu: its name, and how many of them this process may use.
        kernel: the target that will run.
        reason: why that one.
        check: "" if the kernel gives the reference's numbers, else what is wrong.
        targets: every target of this installation and what this CPU lacks for it ("" if nothing).
        packages: version of each optional package, or None.
    """

    system: str
    cpu: str
    kernel: str
    reason: str
    check: str
    targets: dict[str, str]
    packages: dict[str, str | None]


def diagnose() -> Diagnosis:
    """Return what this installation can run here.

    Raises:
        KernelError: FPTQ_KERNEL asks for a kernel that can't run here.
    """
    chosen = Kernels()
    return Diagnosis(
        system=f"fptq {fptq.__version__}, Python {platform.python_version()}, {platform.platform()}",
        cpu=f"{kernels.cpu_name()}; {chosen.threads} for this process",
        kernel=chosen.target,
        reason=chosen.reason,
        check=check(chosen),
        targets=kernels.targets(),
        packages={name: _version(name) for name in PACKAGES},
    )


def check(chosen: Kernels) -> str:
    """Return "" if a small product equals the reference's in every integer, else what doesn't."""
    rng = np.random.default_rng(0)
    for bits, m in ((4, 1), (4, 70), (8, 1), (8, 70)):
        top = 2 ** (bits - 1)
        codes = rng.integers(-top, top, (70, 256)).astype(np.int8)
        activations = rng.integers(-128, 128, (m, 256)).astype(np.int8)
        ones, scales = np.ones(m, np.float32), np.ones((70, 1), np.float32)
        got = chosen.matmul(chosen.pack(codes, scales, bits=bits), activations, ones)
        if not np.array_equal(got, reference.matmul(codes, scales, activations, ones, None)):
            return f"{chosen.target} computes wrong products of {m} rows with int{bits} weights"
    return ""


def require_sound(diagnosis: Diagnosis) -> None:
    """Raise KernelError if the kernel computes something else than the reference."""
    if diagnosis.check:
        raise KernelError(f"{diagnosis.check}; please report this, and use FPTQ_KERNEL=reference meanwhile")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

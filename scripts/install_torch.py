"""Install a CPU build of torch into this Python's environment, unless it has a torch already.

On Linux, PyPI's torch brings gigabytes of CUDA libraries. The CPU builds carry "+cpu" in their version: first the
configured package index is asked for one, then PyTorch's own. Elsewhere PyPI's builds are what is wanted.
"""

import importlib.util
import platform
import subprocess
import sys

VERSION = "2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def install(*arguments: str) -> bool:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=False).returncode == 0


def main() -> int:
    if importlib.util.find_spec("torch"):
        return 0
    if platform.system() != "Linux":
        return 0 if install(f"torch=={VERSION}") else 1
    print(f"Installing torch {VERSION}, CPU build (an error of pip here only means that another place is tried)")
    if install(f"torch=={VERSION}+cpu") or install(f"torch=={VERSION}+cpu", "--index-url", CPU_INDEX):
        return 0
    print(
        f"No CPU build of torch {VERSION} could be had. Install one into {sys.prefix} and run make again.",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""The kernels in builds that Python can't load: with sanitizers, and for Arm and Windows under emulators."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CROSS = ROOT / "build" / "cross"  # made by scripts/cross_tools.sh


def build(folder: Path, *options: str) -> Path:
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    configure = ["cmake", "-S", ROOT, "-B", folder, "-DFPTQ_PYTHON=OFF", "-DFPTQ_TESTS=ON", *options]
    for command in (configure, ["cmake", "--build", folder]):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    return next(folder.glob("kernel_tests*"))


def run(*command: object) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers(tmp_path: Path, sanitizers: str) -> None:
    if platform.system() != "Linux":
        pytest.skip("sanitizers of gcc and clang on Linux")
    assert "scalar: right" in run(build(tmp_path, f"-DFPTQ_SANITIZE={sanitizers}"))


def test_targets_share_no_functions(tmp_path: Path) -> None:
    """A function in several files, compiled for different instructions, is one function for the linker.

    Without optimization nothing is inlined, so every such function shows.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64" or shutil.which("nm") is None:
        pytest.skip("looks at x86-64 object files with nm")
    build(tmp_path, "-DCMAKE_BUILD_TYPE=Debug")
    files = [tmp_path / "CMakeFiles/fptq_kernels.dir/native" / f"{name}.cc.o" for name in ("avx2", "avx512vnni")]
    for file in files:
        weak = [line for line in run("nm", "-C", file).splitlines() if " W " in line]
        assert weak == []


@pytest.fixture(scope="module")
def arm_tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (CROSS / "c++").exists():
        pytest.skip("needs the tools of scripts/cross_tools.sh")
    return build(
        tmp_path_factory.mktemp("arm"),
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={CROSS / 'c++'}",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )


def test_arm(arm_tests: Path) -> None:
    assert "neon: right" in run(CROSS / "qemu", "-cpu", "max", arm_tests, "neon")


def test_arm_without_dotprod(arm_tests: Path) -> None:
    """An older CPU gets the portable kernels, not a crash."""
    output = run(CROSS / "qemu", "-cpu", "cortex-a53", arm_tests)
    assert "neon: this CPU has no dotprod" in output
    assert "scalar: right" in output


def test_what_didnt_run_is_a_failure(arm_tests: Path) -> None:
    result = subprocess.run([CROSS / "qemu", "-cpu", "cortex-a53", arm_tests, "neon"], capture_output=True, text=True)
    assert result.returncode == 1
    assert "neon didn't run" in result.stdout


def test_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("x86_64-w64-mingw32-g++-posix", "x86_64-w64-mingw32-g++")  # Debian's second one may be without threads
    compiler = next(filter(shutil.which, names), None)
    if compiler is None:
        pytest.skip("needs MinGW-w64 (Debian: g++-mingw-w64-x86-64-posix)")
    program = build(
        tmp_path / "windows",
        "-DCMAKE_SYSTEM_NAME=Windows",
        "-DCMAKE_SYSTEM_PROCESSOR=AMD64",
        f"-DCMAKE_CXX_COMPILER={compiler}",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )
    if shutil.which("wine") is None:
        pytest.skip("compiled; needs Wine to run")
    monkeypatch.setenv("WINEPREFIX", str(tmp_path / "wine"))
    monkeypatch.setenv("WINEDEBUG", "-all")
    assert "scalar: right" in run("wine", program)

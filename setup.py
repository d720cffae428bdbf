"""Builds fera_ext: the torch-free core with CMake, then thin torch bindings against it.

Environment:
    FERA_CUDA             auto (default: CUDA kernels where nvcc is found), 1 (fail without), 0 (CPU only)
    FERA_CORE             a folder with a core built elsewhere (lib/libfera.so, include/fera/fera.h); skips CMake
    TORCH_CUDA_ARCH_LIST  targets, e.g. "9.0a" or "8.0 8.6+PTX"; default 8.0 8.6 8.9 9.0a, PTX of 9.0 and the newest
    MAX_JOBS              parallel compile jobs
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()


def fail(sentence: str) -> None:
    """Ends the build with one sentence instead of a traceback."""
    print(f"\nfera_ext: {sentence}\n", file=sys.stderr, flush=True)
    # pip reports a build that exits this way as failed and shows the sentence above.
    os._exit(1)


if sys.version_info < (3, 10):  # noqa: UP036 (a build without isolation can meet any Python)
    fail(f"Python must be 3.10 or newer, got {sys.version.split()[0]}")
try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    fail(
        "torch must be installed before the build, because the extension fits exactly one torch; "
        "install torch (>= 2.6), setuptools, wheel, cmake and ninja, then run: "
        "pip install --no-build-isolation ."
    )
if tuple(int(p) for p in torch.__version__.split("+")[0].split(".")[:2]) < (2, 6):
    fail(f"torch must be 2.6 or newer, got {torch.__version__}")

FERA_CUDA = os.environ.get("FERA_CUDA", "auto") or "auto"
if FERA_CUDA not in ("auto", "1", "0"):
    fail(f"FERA_CUDA must be auto, 1 or 0, got {FERA_CUDA}")


def find_cuda_home() -> Path | None:
    """The toolkit's own folder (the one that holds bin/nvcc and include), or None."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    for candidate in filter(None, candidates):
        home = Path(candidate)
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return home
    return None


def find_cuda_include() -> Path | None:
    """Where cuda_runtime_api.h is: the toolkit, or the headers that CUDA torch brings as Python packages."""
    if CUDA_HOME:
        return CUDA_HOME / "include"
    site = Path(torch.__file__).parents[1]
    return next((p.parent for p in sorted(site.glob("nvidia/*/include/cuda_runtime_api.h"))), None)


CUDA_HOME = find_cuda_home() if FERA_CUDA != "0" else None
CUDA_INCLUDE = find_cuda_include() if FERA_CUDA != "0" else None
if FERA_CUDA == "1" and CUDA_HOME is None and "FERA_CORE" not in os.environ:
    fail("FERA_CUDA=1 needs the CUDA toolkit (>= 12.4), and none was found; install it and set CUDA_HOME")
if FERA_CUDA == "1" and torch.version.cuda is None:
    fail(f"FERA_CUDA=1 needs a CUDA build of torch, got the CPU build {torch.__version__}")


def run(command: list[str], env: dict[str, str]) -> None:
    print("+", " ".join(command), flush=True)
    if subprocess.run(command, env=env, cwd=ROOT).returncode != 0:
        fail(f"`{' '.join(command[:3])} ...` failed; the compiler's message stands above")


def build_core(build: Path) -> Path:
    """Configures, builds and installs the core; returns the folder with lib/ and include/."""
    prebuilt = os.environ.get("FERA_CORE")
    if prebuilt:
        if not (Path(prebuilt) / "lib" / "libfera.so").exists():
            fail(f"FERA_CORE must be a folder with lib/libfera.so, got {prebuilt}")
        return Path(prebuilt)
    cmake = shutil.which("cmake")
    if cmake is None:
        fail("cmake (>= 3.24) must be on the PATH; pip install cmake ninja")
    env = dict(os.environ, FERA_CUDA=FERA_CUDA if CUDA_HOME else "0")
    if CUDA_HOME:
        env["CUDA_HOME"] = str(CUDA_HOME)
    install = build / "install"
    configure = [cmake, "-S", str(ROOT), "-B", str(build), f"-DCMAKE_INSTALL_PREFIX={install}"]
    configure += [
        "-DCMAKE_INSTALL_LIBDIR=lib",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DFERA_CUDA={env['FERA_CUDA']}",
    ]
    if os.environ.get("FERA_CORE_TESTS", "0") != "1":
        configure.append("-DBUILD_TESTING=OFF")
    else:
        configure.append("-DBUILD_TESTING=ON")
    if shutil.which("ninja") and not (build / "Makefile").exists():
        configure += ["-G", "Ninja"]
    run(configure, env)
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    run([cmake, "--build", str(build), "--target", "install", "-j", jobs], env)
    return install


class BuildExtension(cpp_extension.BuildExtension):
    """Builds the core first, puts it beside the package, then compiles the bindings."""

    def run(self) -> None:
        core = build_core(ROOT / "build" / "core")
        package = ROOT / "fera_ext" if self.inplace or self.editable_mode else Path(self.build_lib) / "fera_ext"
        for folder, pattern in (("lib", "libfera.so*"), ("include", "**/*.h")):
            for source in (core / folder).glob(pattern):
                target = package / folder / source.relative_to(core / folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                # A running process may have the old library mapped: replace the file, never write into it.
                target.unlink(missing_ok=True)
                shutil.copy2(source, target)
        core_cuda = core_has_cuda(core)
        with_cuda = core_cuda and torch.version.cuda is not None and CUDA_INCLUDE is not None
        if FERA_CUDA == "1" and not with_cuda:
            fail("FERA_CUDA=1 needs a core with CUDA and cuda_runtime_api.h, and one of them is missing")
        extension = self.extensions[0]
        extension.library_dirs.append(str(core / "lib"))
        if with_cuda:
            extension.define_macros.append(("FERA_TORCH_CUDA", "1"))
            extension.include_dirs.append(str(CUDA_INCLUDE))
            extension.libraries += ["c10_cuda", "torch_cuda"]
        super().run()
        write_build_info(package, core_cuda, with_cuda)


def core_has_cuda(core: Path) -> bool:
    import ctypes

    return bool(ctypes.CDLL(str(core / "lib" / "libfera.so")).fera_has_cuda())


def write_build_info(package: Path, core_cuda: bool, with_cuda: bool) -> None:
    nvcc = ""
    if core_cuda and CUDA_HOME:
        lines = subprocess.run([str(CUDA_HOME / "bin" / "nvcc"), "--version"], capture_output=True, text=True)
        nvcc = next((w.strip(",") for w in lines.stdout.split() if w.startswith("V1")), "").lstrip("V")
    compiler = subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True)
    info = {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "core_cuda": core_cuda,
        "operators_cuda": with_cuda,
        "nvcc": nvcc,
        "compiler": compiler.stdout.split("\n")[0],
        "python": sys.version.split()[0],
    }
    text = '"""How this copy was built; written by setup.py."""\n\n'
    text += "INFO = {\n" + "".join(f"    {k!r}: {v!r},\n" for k, v in info.items()) + "}\n"
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build_info.py").write_text(text)


if CUDA_HOME:
    # BuildExtension looks for the toolkit itself; let it find the same one.
    cpp_extension.CUDA_HOME = str(CUDA_HOME)

setup(
    ext_modules=[
        cpp_extension.CppExtension(
            "fera_ext._C",
            sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "torch").glob("*.cpp")),
            include_dirs=[str(ROOT / "csrc" / "include")],
            libraries=["fera"],
            # at::parallel_for is a header template that runs serially unless OpenMP is on here. It is not linked:
            # its symbols come from the runtime that libtorch_cpu brings, so that there is one pool of threads.
            extra_compile_args=["-O2", "-Wall", "-Wno-unused-function", "-fvisibility=hidden", "-fopenmp"],
            extra_link_args=["-Wl,-rpath,$ORIGIN/lib"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)

"""`make gpu-check`: builds on a GPU machine, then CTest, pytest, compute-sanitizer and a short benchmark.

Needs a GPU, a CUDA torch, nvcc, cmake and ninja; no network. FERA_CORE names a core built elsewhere (then CTest is
skipped unless it carries test programs in bin/). Test programs and memcheck run as the dispatcher chooses and with
FERA_BAND_VARIANT=grid. FERA_CHECK_SKIP is a comma-separated list of steps to leave out.
Ends with one table; exit status 1 when a step failed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
LOGS = Path(os.environ.get("OUT", ROOT / "build" / "gpu_check"))
VARIABLE = "FERA_BAND_VARIANT"
SKIP = set(filter(None, os.environ.get("FERA_CHECK_SKIP", "").split(",")))


def shell(name: str, command: list[str], env: dict[str, str] | None = None) -> tuple[bool, str]:
    """Runs one command with its output in a log; (success, output)."""
    print("+", " ".join(command), flush=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with open(LOGS / f"{name}.log", "w") as log:
        code = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, **(env or {})},
            stdout=log,
            stderr=subprocess.STDOUT,
        ).returncode
    return code == 0, (LOGS / f"{name}.log").read_text(errors="replace")


def last(pattern: str, text: str) -> str:
    """The last line of ``text`` that matches."""
    lines = [line for line in text.splitlines() if re.search(pattern, line)]
    return lines[-1].strip(" =") if lines else text.strip().splitlines()[-1][:100] if text.strip() else "no output"


def programs() -> list[Path]:
    folder = Path(os.environ["FERA_CORE"]) / "bin" if "FERA_CORE" in os.environ else ROOT / "build" / "core"
    return sorted(p for p in folder.glob("test_*") if p.is_file() and os.access(p, os.X_OK))


def band_programs() -> list[Path]:
    """Those that run the band kernels, which have two variants."""
    return [p for p in programs() if not p.name.startswith("test_expert")]


def build() -> tuple[bool, str]:
    import torch

    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        major, minor = torch.cuda.get_device_capability()
        os.environ["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}" + ("a" if major == 9 else "")
    env = {"FERA_CUDA": "1", "FERA_CORE_TESTS": "1", "MAX_JOBS": str(os.cpu_count())}
    ok, text = shell("build", [sys.executable, "setup.py", "build_ext", "--inplace"], env)
    return ok, "built" if ok else last("error|must be", text)


def info() -> tuple[bool, str]:
    ok, text = shell("info", [sys.executable, "-m", "fera_ext", "info", "--explain"])
    return ok, f"{text.count(' yes ')} operators work" if ok else last("no ", text)


def ctest() -> tuple[bool, str]:
    """Every program as the dispatcher chooses, and those on band kernels again with the grid variant alone."""
    if not programs():
        return True, "skipped: the core brings no test programs"

    def check(program: Path, variant: str) -> bool:
        env = {"FERA_TEST_DEVICE": "cuda", VARIABLE: variant}
        return shell("-".join(filter(None, (program.name, variant))), [str(program)], env)[0]

    notes, passed = [], True
    for variant, found in (("", programs()), ("grid", band_programs())):
        results = side_by_side([partial(check, p, variant) for p in found])
        notes.append(f"{sum(results)} of {len(results)} " + ("with grid" if variant else "programs"))
        passed = passed and all(results)
    return passed, ", ".join(notes)


def pytest() -> tuple[bool, str]:
    arguments = os.environ.get("FERA_CHECK_PYTEST", "-q -m gpu")
    import shlex

    ok, text = shell("pytest", [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *shlex.split(arguments)])
    return ok, last("passed|failed|error", text)


def side_by_side(runs: list[Callable[[], T]]) -> list[T]:
    """The programs keep a processor busy and leave the GPU idle for most of their time."""
    with ThreadPoolExecutor(max(1, min(len(runs), (os.cpu_count() or 2) // 2))) as pool:
        return list(pool.map(lambda run: run(), runs))


def sanitizer(tool: str, *variants: str) -> tuple[bool, str]:
    """Every program under a tool of compute-sanitizer; with ``variants``, those on band kernels again with each."""
    if not programs():
        return True, "skipped: the core brings no test programs"

    def check(program: Path, variant: str) -> str:
        # Unpoisoned also makes the programs leave out their larger sizes.
        env = {"FERA_TEST_DEVICE": "cuda", "FERA_TEST_UNPOISONED": "1", VARIABLE: variant}
        name = "-".join(filter(None, (program.name, variant)))
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", str(program)]
        ok, text = shell(f"{tool}-{name}", command, env)
        return "" if ok else f"{name}: {last('ERROR SUMMARY|RACECHECK SUMMARY', text)}"

    runs = [partial(check, p, v) for v in ("", *variants) for p in (band_programs() if v else programs())]
    errors = list(filter(None, side_by_side(runs)))
    notes = [f"{len(programs())} programs", *(f"{len(band_programs())} with {v}" for v in variants)]
    return not errors, f"{', '.join(notes)}, 0 errors" if not errors else "; ".join(errors)


def benchmark() -> tuple[bool, str]:
    ok, text = shell("benchmark", [sys.executable, "benchmarks/quick.py"])
    print(text)
    return ok, last("", text)


STEPS = {
    "build": build,
    "info": info,
    "ctest": ctest,
    "pytest": pytest,
    "memcheck": lambda: sanitizer("memcheck", "grid"),
    "racecheck": lambda: sanitizer("racecheck"),
    "initcheck": lambda: sanitizer("initcheck"),
    "benchmark": benchmark,
}


def main() -> int:
    try:
        import torch
    except ImportError:
        print("gpu-check: torch must be installed (a CUDA build), got none")
        return 2
    if not torch.cuda.is_available():
        print(f"gpu-check: torch must see a GPU, got torch {torch.__version__} without one")
        return 2
    LOGS.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, step in STEPS.items():
        if name in SKIP:
            continue
        start = time.monotonic()
        try:
            ok, note = step()
        except Exception as error:
            ok, note = False, f"{type(error).__name__}: {error}"
        rows.append((name, ok, time.monotonic() - start, note))
        print(f"  {name}: {'pass' if ok else 'FAIL'} {note}", flush=True)
        if name == "build" and not ok:
            break
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name, ok, seconds, note in rows:
        print(f"{name:<10} {'pass' if ok else 'FAIL'} {seconds:7.1f} s  {note}")
    return 0 if all(ok for _, ok, _, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

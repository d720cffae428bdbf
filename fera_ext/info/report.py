"""Collects and prints what `fera-ext info` says."""

from __future__ import annotations

import platform
from typing import Any


def _advice(build: dict[str, Any], runtime: dict[str, Any]) -> list[str]:
    advice = []
    if not runtime["torch_cuda"]:
        advice.append(
            "torch is a CPU build: operators run on the CPU; for a GPU, install a CUDA build of torch and rebuild"
        )
    elif not build["operators_cuda"]:
        advice.append(
            "torch has CUDA but this copy was built without: install the CUDA toolkit (nvcc), then rebuild "
            "with FERA_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps ."
        )
    elif not runtime["gpus"]:
        advice.append("built for CUDA, but no GPU is visible: check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES")
    for gpu in runtime["gpus"]:
        if not gpu["covered"]:
            advice.append(
                f"no kernels for {gpu['name']} (sm_{gpu['capability']}): rebuild with "
                f"TORCH_CUDA_ARCH_LIST={gpu['capability'] // 10}.{gpu['capability'] % 10}"
            )
    return advice


def _covered(capability: int, targets: str) -> bool:
    """Whether machine code or PTX in ``targets`` ("80-real,90a-real,121-virtual") runs on ``capability``."""
    for target in filter(None, targets.split(",")):
        number, _, kind = target.partition("-")
        if not number[:1].isdigit():  # native, all, all-major: whatever the build machine made of it
            return True
        plain = int(number.rstrip("af"))
        if number[-1] in "af":
            if plain == capability:
                return True
        elif (kind in ("virtual", "") and plain <= capability) or (
            plain // 10 == capability // 10 and plain <= capability
        ):
            return True
    return False


def collect(explain: bool = False) -> dict[str, Any]:
    """Everything `fera-ext info` knows, JSON-ready; ``ok`` is False when something does not work."""
    import torch

    import fera_ext

    report: dict[str, Any] = {
        "version": fera_ext.__version__,
        "runtime": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "threads": torch.get_num_threads(),
            "gpus": [],
        },
        "build": None,
        "operators": [],
        "advice": [],
        "error": None,
        "ok": False,
    }
    try:
        from fera_ext._build_info import INFO
        from fera_ext._extension import C
    except ImportError as error:
        report["error"] = str(error)
        report["advice"] = [str(error)]
        return report
    report["build"] = {
        **INFO,
        "core_version": C.core_version,
        "targets": C.core_cuda_targets,
        "parallel": C.parallel,
        "cpu_isa": C.core_cpu_isa,
    }
    devices = [torch.device("cpu")]
    if INFO["operators_cuda"] and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            capability = 10 * major + minor
            covered = _covered(capability, C.core_cuda_targets)
            report["runtime"]["gpus"].append(
                {"name": torch.cuda.get_device_name(index), "capability": capability, "covered": covered}
            )
            devices.append(torch.device("cuda", index))
    from fera_ext.info.probes import check

    for device in devices:
        report["operators"] += check(device)
    if explain:
        from fera_ext.info.variants import explain as explain_variants

        report["explain"] = explain_variants(devices)
    report["advice"] = _advice(report["build"], report["runtime"])
    failed = sorted({r["operator"] for r in report["operators"] if not r["ok"]})
    if failed:
        report["advice"].append(f"operators disagree with their twins: {', '.join(failed)}; please report this table")
    report["ok"] = not failed
    return report


def render(report: dict[str, Any]) -> None:
    """Prints the report as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    runtime, build = report["runtime"], report["build"]
    table = Table(title=f"fera_ext {report['version']}", show_header=False, title_justify="left")
    table.add_row("python", runtime["python"])
    cuda = f"CUDA {runtime['torch_cuda']}" if runtime["torch_cuda"] else "CPU build"
    table.add_row("torch", f"{runtime['torch']} ({cuda})")
    if build:
        table.add_row("built against", f"torch {build['torch']}, {build['compiler']}")
        kernels = (
            f"nvcc {build['nvcc']} for {build['targets']}"
            if build["core_cuda"]
            else "none (no nvcc at build time, or FERA_CUDA=0)"
        )
        table.add_row("CUDA kernels", kernels)
        table.add_row("torch operators", "CPU and CUDA" if build["operators_cuda"] else "CPU only")
    isa = f", {build['cpu_isa']} kernels" if build else ""
    table.add_row("CPU", f"{runtime['threads']} threads{isa}")
    for index, gpu in enumerate(runtime["gpus"]):
        kernels = "has kernels" if gpu["covered"] else "no kernels for it"
        table.add_row(f"GPU {index}", f"{gpu['name']}, sm_{gpu['capability']}, {kernels}")
    if not runtime["gpus"]:
        table.add_row("GPU", "none in use")
    console.print(table)
    if build and not build["parallel"]:
        report["advice"].append("the bindings were compiled without OpenMP, CPU kernels run on one thread: rebuild")
    if report["operators"]:
        operators = Table(title="operators, forward and backward against plain PyTorch", title_justify="left")
        for column in ("operator", "device", "works", "relative error"):
            operators.add_column(column)
        for row in report["operators"]:
            shown = "[green]yes[/]" if row["ok"] else f"[red]no[/] {row['message']}"
            error = "" if row["error"] is None else f"{row['error']:.1e}"
            operators.add_row(row["operator"], row["device"], shown, error)
        console.print(operators)
    if "explain" in report:
        from fera_ext.info.variants import render as render_variants

        render_variants(report["explain"], console)
    for sentence in report["advice"]:
        console.print(f"[yellow]![/] {sentence}")

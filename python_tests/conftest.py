"""Devices: every operator test runs on the CPU and, where there is one, on a CUDA GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def _why_no_gpu() -> str | None:
    from fera_ext._build_info import INFO

    if not INFO["operators_cuda"]:
        return "needs a build with CUDA operators"
    return None if torch.cuda.is_available() else "needs a CUDA GPU"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _why_no_gpu()
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device an operator test runs on."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers in every test, and float32 convolutions in float32: cuDNN's default is TF32."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random unconditional pipeline."""
    import helpers_train as parts

    return parts.ddpm(tmp_path_factory.mktemp("ddpm"))


@pytest.fixture(scope="session")
def sd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random Stable Diffusion pipeline."""
    import helpers_train as parts

    return parts.sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five images."""
    import helpers_train as parts

    return parts.write_images(tmp_path_factory.mktemp("images"), 5)

"""Two processes (gloo): the gradients are the joined batch's in one process."""

from __future__ import annotations

import faulthandler
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_models import Case, one_sample, plain, randomise, sd15
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fera_ext.adapter import FeraAdapter, attach
from fera_ext.bands import Bands
from fera_ext.config import FeraConfig

CONFIG = FeraConfig(target_modules=["to_q", "to_out.0"], bands=Bands.rings(3))


def _setup(name: str) -> tuple[Case, FeraAdapter, Tensor]:
    case = {"sd15": sd15, "plain": plain, "checkpointed": sd15}[name](4)
    case.model.train()
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    if name == "checkpointed":
        case.model.enable_gradient_checkpointing()
    # In float64 nothing is left of rounding, so a wrong row or factor cannot hide.
    case.model.double()
    case.inputs = {k: v.double() if v.is_floating_point() else v for k, v in case.inputs.items()}
    target = torch.randn(case.latent.shape, generator=torch.Generator().manual_seed(3)).double()
    return case, adapter, target


def _step(model: Any, adapter: FeraAdapter, inputs: dict[str, Tensor], target: Tensor) -> None:
    def run() -> Tensor:
        out = model(**inputs)
        return out if isinstance(out, Tensor) else out.sample

    with torch.no_grad(), adapter.disabled():
        base = run()
    out = run()
    ((out - target).square().mean() + adapter.fecl_loss(base, out, target)).backward()


def _worker(rank: int, store: str, out: str, name: str) -> None:
    """One process of the two; ends it."""
    faulthandler.dump_traceback_later(150, exit=True)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    case, adapter, target = _setup(name)
    model = DistributedDataParallel(case.model)
    rows = [2 * rank, 2 * rank + 1]

    def part(value: Tensor) -> Tensor:
        return torch.cat([one_sample(value, b) for b in rows])

    inputs = {k: part(v) for k, v in case.inputs.items()}
    for _ in range(2):
        model.zero_grad()
        _step(model, adapter, inputs, part(target))
    if rank == 1:
        with pytest.raises(TypeError, match=r"attach: model must be the denoiser itself .* got Distributed"):
            attach(model)
    grads = {n: p.grad for n, p in adapter.named_parameters()}
    Path(f"{out}.{rank}").write_bytes(pickle.dumps(grads))
    torch.distributed.barrier()
    # gloo's destructor now and then waits for ever for a peer that has gone.
    os._exit(0)


@pytest.mark.timeout(240)
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("name", ["plain", "sd15", "checkpointed"])
def test_two_processes(tmp_path: Path, name: str) -> None:
    code = "import sys, test_ddp; test_ddp._worker(int(sys.argv[1]), *sys.argv[2:])"
    arguments = [str(tmp_path / "store"), str(tmp_path / "grads"), name]
    folder = str(Path(__file__).parent)
    path = os.pathsep.join(p for p in (folder, os.environ.get("PYTHONPATH")) if p)
    logs = [tmp_path / f"stderr.{rank}" for rank in range(2)]
    workers = []
    for rank, log in enumerate(logs):
        with log.open("w") as stream:
            workers.append(
                subprocess.Popen(
                    [sys.executable, "-c", code, str(rank), *arguments],
                    env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                    stderr=stream,
                )
            )
    try:
        # A worker that fails leaves the other waiting for it.
        deadline = time.monotonic() + 200
        while any(w.poll() is None for w in workers) and not any(w.poll() for w in workers):
            assert time.monotonic() < deadline, "the workers do not end"
            time.sleep(0.05)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [w.returncode for w in workers] == [0, 0], "\n".join(log.read_text() for log in logs)
    case, adapter, target = _setup(name)
    _step(case.model, adapter, case.inputs, target)
    both = [pickle.loads((tmp_path / f"grads.{rank}").read_bytes()) for rank in range(2)]
    for key, parameter in adapter.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(both[0][key], both[1][key])
        error = (both[0][key] - parameter.grad).norm()
        assert error <= 1e-10 * parameter.grad.norm(), (key, float(error))

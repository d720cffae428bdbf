"""Fifty training steps with the operators and with their plain PyTorch twins: the same losses, to the dtype's noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers_train as parts
import pytest
from helpers_train import losses, train

from fera_ext import ops, reference

OPERATORS = (
    "frequency_energy",
    "router_softmax",
    "latent_gate",
    "expert_linear",
    "expert_update",
    "expert_linear_group",
    "fecl_loss",
)
OPTIONS: dict[str, Any] = {"max_train_steps": 50, "learning_rate": 1e-3, "fecl_warmup_steps": 5}


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts the twins in the operators' places from its call on; gives the names of those that ran."""
    ran: set[str] = set()

    def replace() -> set[str]:
        for name in OPERATORS:

            def twin(*arguments: Any, _name: str = name, **named: Any) -> Any:
                ran.add(_name)
                return getattr(reference, _name)(*arguments, **named)

            monkeypatch.setattr(ops, name, twin)
        return ran

    return replace


@pytest.mark.parametrize("kind", ["ddpm", "sd"])
def test_losses_are_the_twins(
    kind: str, images: Path, tmp_path: Path, twins: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    model = getattr(parts, kind)(tmp_path / "model")
    more = {"resolution": 32, "instance_prompt": None if kind == "ddpm" else "a cat", **OPTIONS}
    _, own = train(model, images, tmp_path / "a", **more)
    _, again = train(model, images, tmp_path / "b", **more)
    assert own == again  # to the bit
    ran = twins()
    _, plain = train(model, images, tmp_path / "c", **more)
    assert {"latent_gate", "expert_linear", "expert_linear_group", "fecl_loss"} <= ran
    assert len(own) == 50
    assert losses(own) == pytest.approx(losses(plain), rel=1e-4)  # float32, after up to 50 updates of Adam
    assert own[-1]["fecl"] == pytest.approx(plain[-1]["fecl"], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "captured", "compiled"])
def test_losses_are_the_twins_on_a_gpu(mode: str, images: Path, tmp_path: Path, twins: Any) -> None:
    model = parts.sd(tmp_path / "model")
    more = {"resolution": 32, "instance_prompt": "a cat", "mixed_precision": "bf16", **OPTIONS}
    fast = {"eager": {}, "captured": {"cuda_graph": True}, "compiled": {"compile": True}}[mode]
    _, own = train(model, images, tmp_path / "a", **more, **fast)
    ran = twins()
    _, plain = train(model, images, tmp_path / "b", **more)
    assert "expert_linear" in ran
    assert losses(own) == pytest.approx(losses(plain), rel=2e-2)  # bfloat16: 8 bits, in another order

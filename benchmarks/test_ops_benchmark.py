"""The operators under pytest-benchmark, to compare two commits on one machine.

Not part of the test run: `python -m pytest benchmarks --benchmark-autosave`, then `--benchmark-compare` on the other
commit. Wall time of an eager forward and backward, synchronised; `fera-ext bench` measures GPU time beside rivals.
"""

from __future__ import annotations

import pytest
import torch

from fera_ext.bench import OPERATORS, cases, runner

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("bands", ["dog", "author"])
@pytest.mark.parametrize("shape", ["4x4x64x64", "4x16x128x128"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("device", DEVICES)
def test_operator(benchmark, device: str, operator: str, shape: str, bands: str) -> None:
    try:
        options = cases.Options.parse(operator, shapes=shape, bands=bands, device=device, peers="none")
    except ValueError as error:
        pytest.skip(str(error))
    session = runner.Session(options)
    with session.context():
        for contender, case in runner.ours(options, session):
            session.warm_up(contender)
            if case.pass_name in ("step", "backward"):

                def call(run=contender.run) -> None:
                    run()
                    if device == "cuda":
                        torch.cuda.synchronize()

                benchmark(call)
                return

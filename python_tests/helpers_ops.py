"""What operator tests share: the comparison with float64, and a CUDA graph that follows its inputs."""

from __future__ import annotations

import tolerances
import torch
from samples import Sample

from fera_ext import ops, reference

LINEARS = ("expert_linear", "expert_update", "expert_linear_group")


def limit(sample: Sample, dtype: torch.dtype) -> float:
    """The bound of the operator's errors in ``dtype``."""
    return tolerances.linear_limit(dtype) if sample.op in LINEARS else tolerances.energy_limit(dtype)


def assert_matches_float64(sample: Sample, dtype: torch.dtype, device: torch.device) -> None:
    """Output and gradients against the float64 twin on the same (rounded) inputs, and against plain torch."""
    given = sample.cast(dtype, device)
    exact = given.cast(torch.float64, device)
    out, grads = given.gradients(ops)
    upstream = given.upstream(out)
    plain_out, plain_grads = given.gradients(reference, upstream)
    ref_out, ref_grads = exact.gradients(reference, upstream)
    assert out.dtype == plain_out.dtype
    for name, got, plain, ref in zip(
        ("output", *sample.leaves), [out, *grads], [plain_out, *plain_grads], [ref_out, *ref_grads]
    ):
        error = tolerances.error(got, ref)
        # An output or gradient stored in a 16-bit dtype carries that dtype's rounding, and more than usual where it
        # is so small that float16 has only subnormal numbers for it: then the exact answer, stored, is as far off.
        stored = tolerances.SLACK * tolerances.error(ref.to(got.dtype), ref) if got.dtype in tolerances.LOW else 0
        bound = max(limit(sample, dtype), tolerances.LOW.get(got.dtype, 0), stored)
        allowed = max(bound, tolerances.SLACK * tolerances.error(plain, ref)) if dtype == torch.float32 else bound
        assert error <= allowed, (name, error, tolerances.error(plain, ref))
        if got.dtype in tolerances.LOW:
            assert error <= tolerances.SLACK * tolerances.error(plain, ref) + 1e-5, (
                name,
                "worse than plain torch",
            )


class Captured:
    """Forward and backward of a sample on the GPU, captured into one CUDA graph."""

    def __init__(self, given: Sample) -> None:
        self.given = given
        self.leaves = [given.arguments[n] for n in given.leaves]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.upstream = given.upstream(given.run(ops))
            torch.autograd.grad(given.run(ops), self.leaves, self.upstream)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = given.run(ops)
            self.grads = torch.autograd.grad(self.out, self.leaves, self.upstream)

    def replay(self) -> list[torch.Tensor]:
        """The output and the gradients for what the leaves hold now."""
        self.graph.replay()
        return [self.out.detach().clone(), *(g.clone() for g in self.grads)]

    def eager(self) -> list[torch.Tensor]:
        """The same without the graph."""
        out = self.given.run(ops)
        return [out.detach(), *torch.autograd.grad(out, self.leaves, self.upstream)]

"""A step as CUDA graphs: recorded once for each kind of input, then replayed with one launch.

What a graph does is fixed when it is recorded: kernels, addresses, and every number that Python passed to a kernel.
So all that changes from step to step must be a tensor that the function reads: :class:`CapturedStep` takes numbers
too, and makes such tensors of them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from fera_ext.training.errors import TrainError, UsageError, first_line

Inputs = Mapping[str, Tensor]
"""What a step reads, by name."""

Key = tuple[Hashable, ...]


class Recording(Protocol):
    """A function recorded once."""

    def replay(self) -> Tensor:
        """Run it again; the tensor that the recorded call returned, with its new values."""
        ...


class Recorder(Protocol):
    """Where and how steps are recorded; :class:`CudaGraphs`, or a stand-in for tests without a GPU."""

    def region(self) -> Any:
        """A context in which all work of the steps is queued."""
        ...

    def record(self, function: Callable[[], Tensor]) -> Recording:
        """Record one call of ``function`` without executing its kernels."""
        ...


class CudaGraphs:
    """Records CUDA graphs that share one memory pool, on one stream of their own.

    One stream for warm-up, recording and replay, because autograd's accumulation nodes belong to the stream they
    were first used on, and a recording must not wait for another stream. One pool, because the graphs never run at
    the same time and nothing that a graph leaves in it is read after another graph has run.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def region(self) -> Iterator[None]:
        """The stream, after what is queued on the caller's and before what will be."""
        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self.stream):
                yield
        except BaseException:
            # What went wrong says more than a stream that cannot be waited for because of it.
            with suppress(RuntimeError):
                caller.wait_stream(self.stream)
            raise
        caller.wait_stream(self.stream)

    def record(self, function: Callable[[], Tensor]) -> Recording:
        return _CudaGraph(self, function)


class _CudaGraph:
    def __init__(self, graphs: CudaGraphs, function: Callable[[], Tensor]) -> None:
        self.graph = torch.cuda.CUDAGraph()
        # An older graph that is freed meanwhile would be part of it.
        gc.collect()
        # Other threads (a tracker's, a loader's) may call CUDA meanwhile.
        with torch.cuda.graph(self.graph, graphs.pool, graphs.stream, capture_error_mode="thread_local"):
            self.output = function()

    def replay(self) -> Tensor:
        self.graph.replay()
        return self.output


class _Signature:
    """What belongs to one kind of input: its static tensors, how often it ran, its recording."""

    def __init__(self, static: dict[str, Tensor]) -> None:
        self.static = static
        self.calls = 0
        self.recording: Recording | None = None


class CapturedStep:
    """Runs ``function(inputs, **variant)`` as one CUDA graph for each kind of input.

    The first ``warmup`` calls of a kind run eagerly: they are real calls, whose effects count. The next one records
    the graph, and it and all later ones replay it. A kind is the names, shapes and dtypes of the inputs and the
    values of the variant, so each bucket of image sizes has a graph, and each variant of the step.

    The function must do the same work at every call of a kind:

    * what changes comes in through ``inputs``; a Python number in the function stays what it was when recorded;
    * no waiting for the device (``item()``, ``float(tensor)``) and no copies from or to the host;
    * Python code runs in eager calls and while recording, not in replays. What it leaves behind (``optimizer.grad``,
      attributes) must be the same after every call;
    * gradients are None when it begins, or tensors that live for ever. :class:`fera_ext.training.flat.FlatParameters`
      sees to that: ``collect()`` ends each call with the one, and gathers into the other;
    * an optimizer has ``capturable=True`` and its learning rate in a tensor.

    Random numbers: call ``torch.manual_seed`` before the call, never inside. A graph reads the generator's seed when
    it is replayed, so the same seed gives the same numbers as an eager call does.

    Args:
        function: takes the static tensors by name, and the variant as keyword arguments; returns one tensor.
        device: where it runs.
        warmup: eager calls of each kind before it is recorded. At least one: lazily made state (optimizers',
            libraries' workspaces, compiled code) must not be made in a graph. cuDNN's and the allocator's choices
            settle in three.
        recorder: what records; CUDA graphs if not given.

    Raises:
        UsageError: a device without CUDA graphs.
        ValueError: no warm-up.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        device: torch.device,
        *,
        warmup: int = 3,
        recorder: Recorder | None = None,
    ) -> None:
        if recorder is None and device.type != "cuda":
            raise UsageError(f"cuda_graph must be used with a GPU, got {device.type}")
        if warmup < 1:
            raise ValueError(f"CapturedStep: warmup must be at least 1, got {warmup}")
        self.function = function
        self.device = device
        self.warmup = warmup
        self.recorder: Recorder = recorder or CudaGraphs(device)
        self._signatures: dict[Key, _Signature] = {}

    @property
    def graphs(self) -> int:
        """How many graphs have been recorded."""
        return sum(s.recording is not None for s in self._signatures.values())

    def __call__(self, inputs: Mapping[str, Tensor | float], **variant: Hashable) -> Tensor:
        """One step.

        Args:
            inputs: tensors on the device, or numbers, which the function sees as float32 tensors of shape ().
            variant: what the function is told besides; hashable.

        Returns:
            The function's result, as a tensor that later calls leave alone, without a graph of autograd.

        Raises:
            TrainError: the step cannot be recorded. Its Python state is then unknown: end the run.
        """
        with self.recorder.region():
            signature = self._given(inputs, variant)
            signature.calls += 1
            if signature.calls <= self.warmup:
                return self.function(signature.static, **variant).detach()
            if signature.recording is None:
                signature.recording = self._record(signature.static, variant)
            return signature.recording.replay().detach().clone()

    def eager(self, inputs: Mapping[str, Tensor | float], **variant: Hashable) -> Tensor:
        """The same without a graph, for a kind of call that comes once and is not worth one."""
        with self.recorder.region():
            return self.function(self._given(inputs, variant).static, **variant).detach()

    def _given(self, inputs: Mapping[str, Tensor | float], variant: Mapping[str, Hashable]) -> _Signature:
        """The signature of a call, its static tensors filled."""
        key = self._key(inputs, variant)
        signature = self._signatures.get(key)
        if signature is None:
            static = {name: self._static(value) for name, value in inputs.items()}
            signature = self._signatures[key] = _Signature(static)
        for name, value in inputs.items():
            target = signature.static[name]
            if isinstance(value, Tensor):
                target.copy_(value, non_blocking=True)
            else:
                target.fill_(value)
        return signature

    def _key(self, inputs: Mapping[str, Tensor | float], variant: Mapping[str, Hashable]) -> Key:
        kinds = [
            (name, value.shape, value.dtype) if isinstance(value, Tensor) else (name, "number")
            for name, value in inputs.items()
        ]
        return (*sorted(kinds, key=lambda kind: kind[0]), *sorted(variant.items()))

    def _static(self, value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            # Of the same strides: libraries choose kernels, and so the last bits, by them.
            return torch.empty_like(value, device=self.device)
        return torch.empty((), dtype=torch.float32, device=self.device)

    def _record(self, static: Inputs, variant: Mapping[str, Hashable]) -> Recording:
        raised: list[Exception] = []

        def function() -> Tensor:
            try:
                return self.function(static, **variant)
            except Exception as error:
                raised.append(error)
                raise

        try:
            return self.recorder.record(function)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # the model's, the driver's, torch's
            # Leaving a recording that failed raises once more, about the recording.
            cause = raised[0] if raised else error
            if isinstance(cause, torch.cuda.OutOfMemoryError):
                raise cause from None
            raise TrainError(
                f"cuda_graph: the step could not be recorded: {type(cause).__name__}: {first_line(cause)} "
                "(a run without cuda_graph may do)"
            ) from cause

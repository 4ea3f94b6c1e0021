"""The checkpointer: a layer keeps its input alone, on the device or in pinned host memory, and runs again in backward.

    forward:   y = layer(x) without a graph;  x → host on a stream of its own, beside the layer's computation
    backward:  x ← host, asked for one layer ahead;  y' = layer(x) with a graph;  (∂x, ∂θ) = autograd(y', ∂y)

`recompute` keeps x on the device, `offload` sends it to the host; all else is the same code, so the gradients are the
same bits. The last layer's input stays on the device, since its backward comes at once, as do tensors below
`min_bytes`. Nothing is shared between graphs but streams and host memory, so several may be in flight; what the model
keeps beyond its layers (final norm, head) goes to the host too as soon as another graph is in flight (`tail`).
On a CPU, `offload` holds a reference: the same Function without streams.
Left out: layers that return more than hidden states, gradients of anything but the first argument and the layer's own
parameters (refused), double backward.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from grpo.model.host_arena import HostArena, Lease

Mode = Literal["recompute", "offload"]
MIN_BYTES = 2 * 2**20  # a copy of less costs more than it frees


class Checkpointer:
    """Activation checkpointing of one model's decoder layers, installed on these instances and taken off again.

    Args:
        mode: where layer inputs wait.
        context: entered around every recomputation (the caller's own switch of the model's state).
        min_bytes: smaller tensors stay on the device.
        keep_attention: long documents' attention outputs wait with the layer inputs instead of being computed again.
    """

    def __init__(
        self,
        mode: Mode,
        *,
        context: Callable[[], AbstractContextManager[None]] = nullcontext,
        min_bytes: int = MIN_BYTES,
        keep_attention: bool = False,
    ) -> None:
        self.mode, self.context, self.min_bytes, self.keep_attention = mode, context, min_bytes, keep_attention
        self.current: _Call | None = None  # the layer that runs now
        self.refreshed: list[tuple[Tensor, Tensor]] = []  # (copy, original): copied anew when a forward pass begins
        self.host: HostMemory | None = None
        self._layers: list[nn.Module] = []
        self._parameters: list[list[nn.Parameter]] = []
        self._random: list[bool] = []
        self._last_call: weakref.ref[_Call] | None = None

    @property
    def recomputing(self) -> bool:
        """Whether a layer is being recomputed: it may then leave out what only its value needs."""
        return self.current is not None and self.current.recomputing

    def install(self, layers: Sequence[nn.Module]) -> None:
        """Take over transformers' checkpointing hook of `layers`, in the order in which they run."""
        self._layers = list(layers)
        self._parameters = [list(layer.parameters()) for layer in layers]
        self._random = [_has_dropout(layer) for layer in layers]
        for index, layer in enumerate(self._layers):
            layer.gradient_checkpointing = True  # type: ignore[assignment]
            layer._gradient_checkpointing_func = partial(self._run_layer, index)  # type: ignore[assignment]

    def remove(self) -> None:
        """Leave the layers as they were found."""
        for layer in self._layers:
            del layer.gradient_checkpointing, layer._gradient_checkpointing_func
        self._layers, self.refreshed = [], []

    @contextmanager
    def tail(self) -> Iterator[None]:
        """Around a forward pass: while another graph is in flight, send what autograd keeps of it to the host."""
        host = self.host
        if host is None or host.arena.leased == 0:
            yield
            return
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield

    def _run_layer(self, index: int, run: Callable[..., Any], hidden: Tensor, *others: Any) -> Any:
        if any(isinstance(value, Tensor) and value.requires_grad for value in others):
            raise ValueError("activation checkpointing: an argument beside the hidden states requires grad")
        parameters = [p for p in self._parameters[index] if p.requires_grad]
        if not torch.is_grad_enabled() or not (parameters or hidden.requires_grad):
            return run(hidden, *others)  # nothing below learns: no graph, nothing to keep
        call = _Call(self, lambda x: run(x, *others), index)
        output = _Checkpoint.apply(self, call, hidden, *parameters)
        return output if call.rest is None else (output, *call.rest)

    def draws(self, index: int) -> bool:
        """Whether this layer draws random numbers now."""
        return self._random[index] and self._layers[index].training

    def keeper(self, call: _Call, hidden: Tensor) -> _Kept | None:
        """`hidden` on its way to the host, or None where it stays on the device."""
        previous = self._last_call() if self._last_call is not None else None
        self._last_call = weakref.ref(call)
        first = previous is None or previous.index >= call.index
        if previous is not None and not first:
            call.previous = weakref.ref(previous)
        if first and self.refreshed:
            copies, originals = zip(*self.refreshed, strict=True)
            torch._foreach_copy_(copies, originals)
        if not self.leaves(call, hidden):
            return None
        if self.host is None or self.host.device != hidden.device:
            self.host = HostMemory(hidden.device)
        if first:
            self.host.arena.reserve(len(self._layers) - 1, hidden.nbytes)
        return self.host.send(hidden)

    def leaves(self, call: _Call, tensor: Tensor) -> bool:
        """Whether `tensor`, kept by `call`, waits in host memory."""
        last = call.index == len(self._layers) - 1
        return self.mode == "offload" and not last and tensor.nbytes >= self.min_bytes and tensor.is_cuda

    def _pack(self, tensor: Tensor) -> Any:
        small = tensor.nbytes < self.min_bytes or not tensor.is_floating_point() or isinstance(tensor, nn.Parameter)
        if self.host is None or small or tensor.device != self.host.device or not tensor.is_contiguous():
            return tensor
        if tensor.is_leaf and tensor.requires_grad:
            return tensor
        return self.host.send(tensor.detach())


def _unpack(packed: Any) -> Tensor:
    return packed.fetch(last=False) if isinstance(packed, _Kept) else packed


class _Call:
    """One layer in one forward pass: how to run it again, and the call before it in the same pass."""

    def __init__(self, owner: Checkpointer, run: Callable[[Tensor], Any], index: int) -> None:
        self.owner, self.run, self.index = owner, run, index
        self.previous: weakref.ref[_Call] | None = None
        self.kept: _Kept | None = None
        self.rest: tuple[Any, ...] | None = None
        self.recomputing = False
        self._results: list[tuple[Any, ...]] = []  # of attention, in the order of its calls
        self.randomness = _Randomness(owner.draws(index))

    def hidden_states(self, hidden: Tensor) -> Tensor:
        """Run the layer. What it returns beside hidden states (None, in older architectures) is in `rest`.

        Raises:
            ValueError: it returns other tensors, whose gradients would be lost.
        """
        outer, self.owner.current = self.owner.current, self
        try:
            output = self.run(hidden)
        finally:
            self.owner.current = outer
        if isinstance(output, tuple):
            output, *rest = output
            self.rest = tuple(rest)
        if not isinstance(output, Tensor) or any(isinstance(value, Tensor) for value in self.rest or ()):
            raise ValueError("activation checkpointing: a layer returns more than hidden states (want none)")
        return output

    def prefetch_previous(self) -> None:
        """Start the copy that the next backward will wait for."""
        previous = self.previous() if self.previous is not None else None
        if previous is None:
            return
        for kept in (previous.kept, *itertools.chain(*previous._results)):
            if isinstance(kept, _Kept):
                kept.start()

    def keep(self, *tensors: Tensor | None) -> None:
        """See `Keeper` in attention.py."""
        host = self.owner.host
        self._results.append(
            tuple(
                host.send(tensor) if host and tensor is not None and self.owner.leaves(self, tensor) else tensor
                for tensor in tensors
            )
        )

    def take(self) -> tuple[Any, ...]:
        """See `Keeper` in attention.py."""
        if not self._results:
            raise RuntimeError("activation checkpointing: second backward; the first one took the attention outputs")
        return tuple(x.fetch() if isinstance(x, _Kept) else x for x in self._results.pop(0))


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, owner: Checkpointer, call: _Call, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.call, ctx.num_parameters = call, len(parameters)
        ctx.hidden_requires_grad = hidden.requires_grad
        call.randomness.remember(hidden.device)
        ctx.autocast = _autocast(hidden.device.type)
        call.kept = owner.keeper(call, hidden)
        ctx.save_for_backward(*([hidden] if call.kept is None else []), *parameters)
        output = call.hidden_states(hidden)
        # A layer that hands its input through unchanged must not return the same tensor.
        return output.view_as(output) if output is hidden else output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        call: _Call = ctx.call
        saved = list(ctx.saved_tensors)
        hidden = saved.pop(0) if call.kept is None else call.kept.fetch()
        call.prefetch_previous()
        hidden = hidden.detach().requires_grad_(ctx.hidden_requires_grad)
        call.recomputing = True
        with torch.enable_grad(), ctx.autocast(), call.randomness.again(), call.owner.context():
            output = get_gradient_edge(call.hidden_states(hidden))  # the graph alone: nobody reads the value again
        inputs = [*([hidden] if ctx.hidden_requires_grad else []), *saved]
        found = list(torch.autograd.grad([output], inputs, [gradients[0]], allow_unused=True))
        hidden_gradient = found.pop(0) if ctx.hidden_requires_grad else None
        return None, None, hidden_gradient, *found


def _autocast(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return partial(torch.autocast, device_type, dtype=dtype, enabled=enabled)


def _has_dropout(layer: nn.Module) -> bool:
    # Attention dropout is a number on the module, not a Dropout.
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0) or bool(getattr(module, "attention_dropout", 0.0))
        for module in layer.modules()
    )


class _Randomness:
    """The generators' state before a layer with active dropout; nothing for one without."""

    def __init__(self, active: bool) -> None:
        self._active = active
        self._states: list[Tensor] = []
        self._devices: list[torch.device] = []

    def remember(self, device: torch.device) -> None:
        """Before the layer runs."""
        if self._active:
            self._devices = [device] if device.type == "cuda" else []
            self._states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self._devices)]

    @contextmanager
    def again(self) -> Iterator[None]:
        """The same random numbers inside; outside, the generators as they were."""
        if not self._active:
            yield
            return
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._states[0])
            for device, state in zip(self._devices, self._states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


# --- streams ---------------------------------------------------------------------------------------------------------


class HostMemory:
    """Pinned host memory of one CUDA device and a copy stream for each direction."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.arena = HostArena(pinned=True)
        self.to_host = torch.cuda.Stream(device)
        self.from_host = torch.cuda.Stream(device)
        # Sources must outlive their copies. A queue of two is clearer than record_stream, which delays reuse
        # by an amount nobody can foresee.
        self.last_read: torch.cuda.Event | None = None
        self._sources: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def send(self, source: Tensor) -> _Kept:
        """Start the copy of `source` to the host, behind the kernels that make it."""
        compute = torch.cuda.current_stream(self.device)
        kept = _Kept(self, self.arena.lease(source.nbytes), source)
        # Behind the producer, and behind reads of host memory that this lease may now overwrite.
        kept.made.record(compute)
        self.to_host.wait_event(kept.made)
        if self.last_read is not None:
            self.to_host.wait_event(self.last_read)
        with torch.cuda.stream(self.to_host):
            kept.view.copy_(source, non_blocking=True)
            kept.copied.record(self.to_host)
        # Without its graph: a graph holds this queue, and one that fails before its backward would never go.
        self._sources.append((source.detach(), kept.copied))
        while len(self._sources) > 2:
            compute.wait_event(self._sources.popleft()[1])
        return kept

    def drain(self) -> None:
        """Let go of the sources that are still held: the computation waits for their copies."""
        compute = torch.cuda.current_stream(self.device)
        while self._sources:
            compute.wait_event(self._sources.popleft()[1])


class _Kept:
    """A tensor in host memory and its way back."""

    def __init__(self, memory: HostMemory, lease: Lease, source: Tensor) -> None:
        self._memory, self._lease = memory, lease
        self.view = lease.view(source)
        self.made, self.copied, self._wanted = torch.cuda.Event(), torch.cuda.Event(), torch.cuda.Event()
        self._arrived = torch.cuda.Event()
        self._shape, self._dtype = source.shape, source.dtype
        self._device_copy: Tensor | None = None

    def start(self) -> None:
        """Start the copy to the device, once; it runs beside whatever is computed meanwhile."""
        if self._device_copy is not None:
            return
        memory = self._memory
        self._device_copy = torch.empty(self._shape, dtype=self._dtype, device=memory.device)
        # The new tensor may lie where earlier kernels still work; its host bytes may still be on their way.
        self._wanted.record(torch.cuda.current_stream(memory.device))
        memory.from_host.wait_event(self._wanted)
        memory.from_host.wait_event(self.copied)
        with torch.cuda.stream(memory.from_host):
            self._device_copy.copy_(self.view, non_blocking=True)
            self._arrived.record(memory.from_host)
        memory.last_read = self._arrived

    def fetch(self, *, last: bool = True) -> Tensor:
        """The tensor on the device, exact; the computation waits for the copy. `last`: its host memory is given back.

        Raises:
            RuntimeError: it was given back before (a second backward through one graph).
        """
        if not self._lease.held:
            raise RuntimeError("activation checkpointing: second backward; the first one gave the layer inputs back")
        self._memory.drain()
        self.start()
        tensor, self._device_copy = self._device_copy, None
        assert tensor is not None
        torch.cuda.current_stream(self._memory.device).wait_event(self._arrived)
        if last:
            self._lease.release()  # whoever gets it next writes behind this read: see `send`
        return tensor

"""CUDA graphs on a CPU: what is captured is recorded, undone, and done again at every replay.

As on a GPU, a replay takes no other tensors and no other Python numbers than the capture had.
Numbers that the host reads raise an error; what else would wait for a GPU, the emulated one sees
(`emulated_decoding.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "nonzero", "equal")


class Graph(TorchDispatchMode):
    """In the place of `torch.cuda.CUDAGraph`."""

    replays = 0
    modes: ClassVar[list[str]] = []  # that `set_sync_debug_mode` was called with

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.written = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in WAITS:
            raise RuntimeError(f"{function}: operation not permitted when stream is capturing")
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info and argument.alias_info.is_write:
                self.written.append((value, value.clone()))
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        Graph.replays += 1
        for function, args, kwargs, result in self.calls:
            results = tree_leaves(result), tree_leaves(function(*args, **kwargs))
            for old, new in zip(*results, strict=True):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)  # it is neither a view nor what the function wrote to


@contextlib.contextmanager
def capture(graph: Graph, capture_error_mode: str = "global") -> Iterator[None]:
    """In the place of `torch.cuda.graph`."""
    with graph:
        yield
    for tensor, before in reversed(graph.written):
        tensor.copy_(before)

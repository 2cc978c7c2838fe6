"""A pytest plugin (-p kernels_on_gpu): the kernels' tests on the GPU instead of the emulator."""

from functools import cache

import emulator

from gpumlp.backends.probe import find_gpu


@cache
def found():
    """The GPU; what it allocates reads as NaN until somebody writes it, as the emulator's memory does."""
    runtime, reason = find_gpu()
    assert runtime is not None, reason
    allocate = runtime.allocate

    def poisoned(nbytes):
        memory = allocate(nbytes)
        if nbytes:
            runtime._cuda.memsetAsync(memory.pointer, 0xFF, nbytes, runtime._stream.ptr)
        return memory

    runtime.allocate = poisoned
    return runtime


def gpu(*_args, **_options):
    """In the place of EmulatedRuntime; the order in which threads run is the GPU's own."""
    return found()


emulator.EmulatedRuntime = gpu

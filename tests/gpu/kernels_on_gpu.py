"""A pytest plugin (-p kernels_on_gpu): the kernels' tests on the GPU instead of the emulator."""

import emulator

from gpumlp.backends.probe import find_gpu


def gpu(*_args, **_options):
    """In the place of EmulatedRuntime; the order in which threads run is the GPU's own."""
    runtime, reason = find_gpu()
    assert runtime is not None, reason
    return runtime


emulator.EmulatedRuntime = gpu

"""Compile the network of a run with torch.compile, and say what that takes."""

import time

import torch
from torch import nn

from engine.errors import get_compile_error

# graphs beyond which torch would run the network uncompiled; its own limit is 8. A run needs one for each kind of pass
# (training, saliency, evaluation), and again for each image size and each memory format of the images
MAX_GRAPHS = 64


class CompileClock:
    """Measures the seconds that torch spends on compiling."""

    def __init__(self):
        from torch._dynamo.callback import callback_handler  # takes seconds to import

        self.seconds, self.begun = 0.0, 0.0
        callback_handler.register_start_callback(self.start)
        callback_handler.register_end_callback(self.stop)

    def start(self, *args) -> None:
        self.begun = time.perf_counter()

    def stop(self, *args) -> None:
        self.seconds += time.perf_counter() - self.begun

    def take(self) -> float:
        """Return the seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def compile_network(network: nn.Module, **options) -> tuple[CompileClock | None, str]:
    """Compile the calls of a network, if this machine can.

    Returns the clock, and a note for the log. Without a working compiler the clock is None and the network stays as it
    is. Parameters keep their names, and copies of the network are not compiled. options: of torch.compile.

    The first dimension of the images is compiled as a variable: the last batch of an epoch and those of an evaluation
    need no graph of their own. The other dimensions are constants, which makes faster code.
    """
    if obstacle := find_obstacle(next(network.parameters()).device, **options):
        return None, (
            f"--compile has no effect: nothing can be compiled here ({obstacle}); install a C++ compiler and "
            "the header files of Python, or leave it out"
        )
    import torch._dynamo

    torch._dynamo.config.cache_size_limit = MAX_GRAPHS  # also called recompile_limit since torch 2.7
    network.compile(**options)
    call = network._compiled_call_impl

    def call_with_any_batch_size(images: torch.Tensor) -> torch.Tensor:
        torch._dynamo.maybe_mark_dynamic(images, 0)
        torch._dynamo.mark_static(images, [1, 2, 3])
        return call(images)

    network._compiled_call_impl = call_with_any_batch_size  # as model.compile() sets it; copies and pickles drop it
    return CompileClock(), (
        "--compile: the first steps wait for the compiler, for minutes on a CPU; the line of the epoch shows how long"
    )


def find_obstacle(device: torch.device, **options) -> str | None:
    """Compile and run a small function. Returns the first line of the error; None if there is none."""
    try:
        torch.compile(lambda values: values.sin() + 1, **options)(torch.zeros(8, device=device))
    except Exception as error:  # of many types: no C++ compiler, no header files of Python, no folder to write to
        return get_compile_error(error)
    return None

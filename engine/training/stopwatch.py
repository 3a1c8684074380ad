"""Time the parts of a training step: data, saliency, mixing, network."""

import time
from collections.abc import Callable

import torch


class Stopwatch:
    """Accumulates seconds per part of a step. On CUDA it records events and reads them in seconds() only, so that
    timing does not synchronise host and device.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.host: dict[str, float] = {}
        self.marks: list[tuple] = []
        self.last = None

    def now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self.last = self.now()

    def lap(self, name: str) -> None:
        """Add the time since the last start() or lap() to the part `name`."""
        now = self.now()
        if self.device.type == "cuda":
            self.marks.append((name, self.last, now))
        else:
            self.host[name] = self.host.get(name, 0.0) + now - self.last
        self.last = now

    def seconds(self) -> dict[str, float]:
        """Return the total seconds per part. Waits for the device."""
        if self.marks:
            torch.cuda.synchronize(self.device)
            for name, begin, end in self.marks:
                self.host[name] = self.host.get(name, 0.0) + begin.elapsed_time(end) / 1000
            self.marks.clear()
        return self.host


class TimedSource:
    """A wrapper with the interface that mixers use of a saliency.base.Source. Its passes count as `saliency` instead of
    `mixing`.
    """

    def __init__(self, source, watch: Stopwatch):
        self.source, self.watch = source, watch
        self.called = False  # since take_clean_pass() was called

    clean_weight = property(lambda self: self.source.clean_weight)
    per_image = property(lambda self: self.source.per_image)
    logits = property(lambda self: self.source.logits)
    has_gradient = property(lambda self: self.source.has_gradient)

    def points(self, saliency: torch.Tensor):
        return self.source.points(saliency)

    def reduce(self, gradient: torch.Tensor) -> torch.Tensor:
        return self.source.reduce(gradient)

    def gradient(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.time_call(self.source.gradient, images, targets)

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.time_call(self.source, images, targets)

    def time_call(self, function: Callable, *args) -> torch.Tensor:
        self.watch.lap("mixing")
        self.called = True
        result = function(*args)
        self.watch.lap("saliency")
        return result


def flatten_sources(source) -> list:
    """Return the distinct sources of a mixer as a list. source: None, one source, or a list of them, which a choice
    among several methods has.
    """
    sources = source if isinstance(source, list) else [source]
    return list({id(one): one for one in sources if one is not None}.values())


def time_source(source, watch: Stopwatch):
    """Wrap a source, or each source of a list, in a TimedSource. None stays None."""
    if isinstance(source, list):
        return [time_source(one, watch) for one in source]
    return source and TimedSource(source, watch)


def take_clean_pass(source) -> bool:
    """Return whether a source, as time_source() returns it, has trained on the unmixed images since the last call."""
    sources = flatten_sources(source)
    trained = any(one.called and one.clean_weight for one in sources)
    for one in sources:
        one.called = False
    return trained

"""Stands in for CUDA graphs on a CPU: a captured graph keeps the function and its static arguments, and a replay calls
the function with them.
"""

import torch
from torch import nn

from engine.runtime import graphs


def list_memory(function) -> list[torch.Tensor]:
    """Return what a captured function may write besides its results: buffers and gradients of the networks it was
    given, and the tensors of its source.
    """
    owned = [*getattr(function, "args", ())]
    if source := getattr(function, "__self__", None):
        owned += [value for name, value in vars(source).items() if name != "logits"]
    networks = [one for one in owned if isinstance(one, nn.Module)]
    memory = [tensor for network in networks for tensor in network.buffers()]
    memory += [parameter.grad for network in networks for parameter in network.parameters()]
    return memory + [one for one in owned if isinstance(one, torch.Tensor)]


def as_tuple(result) -> tuple:
    return result if isinstance(result, tuple) else () if result is None else (result,)


class FakeGraph:
    def __init__(self, function, arguments: tuple):
        self.function, self.arguments = function, graphs.copy_arguments(arguments)
        self.memory, self.grad_enabled = list_memory(function), torch.is_grad_enabled()
        saved, generator = [tensor.clone() for tensor in self.memory], torch.get_rng_state()
        self.result = function(*self.arguments)
        with torch.no_grad():  # a capture executes nothing, and its results have no values yet
            for tensor, value in zip(self.memory, saved, strict=True):
                tensor.copy_(value)
            for tensor in as_tuple(self.result):
                tensor.fill_(-1)
        torch.set_rng_state(generator)

    def pool(self):
        return None


class FakeGraphs:
    """Replaces captures and replays in engine.runtime.graphs and counts them."""

    def __init__(self, monkeypatch):
        self.captures, self.replays = 0, 0
        monkeypatch.setattr(graphs, "can_capture", lambda device: True)
        monkeypatch.setattr(graphs, "call_on_capture_stream", lambda function, arguments, device: function(*arguments))
        monkeypatch.setattr(graphs, "capture", self.capture)
        monkeypatch.setattr(graphs, "replay", self.replay)

    def capture(self, function, arguments, device, pool):
        graph = FakeGraph(function, arguments)
        self.captures += 1
        return graph, graph.arguments, graph.result

    def replay(self, graph: FakeGraph):
        self.replays += 1
        now = list_memory(graph.function)
        assert all(one is other for one, other in zip(now, graph.memory, strict=True)), "memory that a graph uses moved"
        with torch.set_grad_enabled(graph.grad_enabled):
            result = graph.function(*graph.arguments)
        with torch.no_grad():
            for own, value in zip(as_tuple(graph.result), as_tuple(result), strict=True):
                own.copy_(value)

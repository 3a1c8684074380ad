"""--compile: how many graphs a run compiles, the seconds it reports, and machines that cannot compile."""

import re
from functools import partial

import pytest
import torch
from torch import nn

from engine.data.image_set import ImageSet
from engine.data.loader import DeviceLoader
from engine.launch import explain_error
from engine.training.compilation import compile_network
from engine.training.console import format_remark
from engine.training.evaluate import evaluate_held_out
from engine.training.loop import StepConfig, train_one_epoch
from engine.training.loss import LOSSES
from engine.training.state import TrainingState
from mixing import build_mixer
from saliency import build_source

CPU = torch.device("cpu")
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


class Counting:
    """A compiler that only counts graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def forget_graphs():
    yield
    torch._dynamo.reset()


def build_network() -> nn.Module:
    layers = nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(64, 4))


def compile_with(network: nn.Module, compiler: Counting) -> None:
    """Compile the network; `compiler` counts its graphs only."""
    clock, _ = compile_network(network, backend=compiler)
    assert clock
    compiler.graphs = 0


def make_loader(count: int) -> DeviceLoader:
    pixels = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8)
    return DeviceLoader(ImageSet(pixels, torch.arange(count) % 4, list("abcd"), "here"), 10, device=CPU, **HALF)


@pytest.mark.parametrize(
    "method, graphs, settings",
    [("none", 2, {}), ("rmix", 3, {}), ("puzzlemix", 3, {"clean_lam": 1.0, "block_num": (2,)}), ("cutmix", 2, {})],
)
def test_last_batches_share_the_graphs_of_training_saliency_and_evaluation(method, graphs, settings):
    network, compiler = build_network(), Counting()
    compile_with(network, compiler)
    mixer = build_mixer(method, **{**HALF, **settings})
    share = {"model": network, "num_images": 23, "device": CPU, **HALF, "training_loss": LOSSES["ce"]}
    source = mixer.build_source(lambda one: build_source(one.default_source, **share | one.gradient_options))
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    state, counts = TrainingState(network, optimizer, mixer=mixer, source=source), []
    for epoch in range(3):
        train_one_epoch(state, make_loader(23), StepConfig(LOSSES["ce"], 4), epoch=epoch)
        evaluate_held_out(state, {"test": make_loader(14)}, False)
        counts.append(compiler.graphs)
    assert counts == [graphs] * 3


def test_every_image_size_is_compiled_however_many_there_are():
    network, compiler = build_network(), Counting()
    plain = build_network()
    plain.load_state_dict(network.state_dict())
    compile_with(network, compiler)
    for size in range(12, 22):
        for count in (2, 3):
            images = torch.rand(count, 3, size, size)
            torch.testing.assert_close(network(images), plain(images))
    assert compiler.graphs == 10, "torch's own limit is 8"


def test_a_network_stays_uncompiled_where_nothing_can_be_compiled():
    def fail(graph, inputs):
        raise FileNotFoundError("No working C++ compiler\nsearched here and there")

    network = build_network()
    clock, note = compile_network(network, backend=fail)
    assert clock is None and network._compiled_call_impl is None
    assert note.startswith("--compile has no effect: nothing can be compiled here (No working C++ compiler); install a")


def test_the_log_shows_the_seconds_of_compiling(shapes_run, monkeypatch, capsys):
    monkeypatch.setattr("engine.training.state.compile_network", partial(compile_network, backend="eager"))
    run = shapes_run("--compile", epochs=1)
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("epoch 1/1  lr") and re.search(r"compiling took \d+\.\d s$", line) for line in printed)
    assert any(line.startswith("note: --compile: the first steps wait for the compiler") for line in printed)
    assert "conv1.weight" in torch.load(run / "last.pt", weights_only=True)["model"]


def test_seconds_of_compiling_count_once():
    network = build_network()
    clock, _ = compile_network(network, backend="eager")
    state = TrainingState(network, torch.optim.SGD(network.parameters(), 0.01), compile_clock=clock)
    clock.seconds = 61.25
    assert [format_remark(state, make_loader(4)) for _ in range(2)] == ["  compiling took 61.2 s", ""]


def test_a_failing_compiler_ends_the_run_in_one_line():
    network = build_network()

    def fail(graph, inputs):
        raise RuntimeError("\nC++ compile error\nCommand: g++ ...\nx.cpp:1: fatal error: Python.h: No such file")

    network.compile(backend=fail)
    with pytest.raises(RuntimeError) as caught:
        network(torch.rand(2, 3, 8, 8))
    assert explain_error(caught.value) == (
        "torch.compile failed: x.cpp:1: fatal error: Python.h: No such file\nrun or resume without it: --compile false"
    )

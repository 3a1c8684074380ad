import contextlib
import gc
import weakref

import pytest
import torch
from fake_graphs import FakeGraphs

from engine.data.loader import Batch
from engine.runtime import graphs
from engine.runtime.graphs import EAGER_CALLS, MAX_GRAPHS, GraphCapture
from saliency import SOURCES, build_source, source_class

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def fake(monkeypatch) -> FakeGraphs:
    return FakeGraphs(monkeypatch)


def double(values, offset=None):
    return 2 * values if offset is None else 2 * values + offset


def test_nothing_is_wrapped_without_cuda():
    assert GraphCapture(CPU).wrap(double, "double") is double


def test_kernels_torch_captures_nothing(fake):
    assert GraphCapture(CPU, "torch").wrap(double, "double") is double


def test_a_graph_replaces_calls_after_some_eager_ones_and_reads_its_new_arguments(fake):
    run = GraphCapture(CPU).wrap(double, "double")
    given = [torch.full((2, 3), float(number)) for number in range(EAGER_CALLS + 3)]
    results = [run(values) for values in given]
    assert (fake.captures, fake.replays) == (1, 3)
    for values, result in zip(given, results, strict=True):  # later calls leave the results of earlier ones alone
        assert torch.equal(result, 2 * values)


@pytest.mark.parametrize(
    "other",
    [
        (torch.ones(3, 2),),
        (torch.ones(2, 3, dtype=torch.float64),),
        (torch.ones(3, 2).T,),
        (torch.ones(2, 3), torch.ones(3)),
        (torch.ones(2, 3), 1.0),
    ],
)
def test_arguments_of_another_kind_are_not_put_into_a_graph(fake, other):
    run = GraphCapture(CPU).wrap(double, "double")
    for _ in range(EAGER_CALLS + 1):
        run(torch.ones(2, 3))
    assert torch.equal(run(*other), double(*other)) and fake.replays == 1


def test_autocast_is_part_of_the_kind(fake):
    run = GraphCapture(CPU).wrap(lambda values: values @ values, "product")
    for _ in range(EAGER_CALLS + 1):
        run(torch.ones(2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert run(torch.ones(2, 2)).dtype is torch.bfloat16
    assert fake.replays == 1


def test_a_kind_that_never_comes_several_times_in_a_row_stays_eager(fake):
    run = GraphCapture(CPU).wrap(double, "double")
    for _ in range(4):  # epochs with a smaller last batch
        for size in [8] * 5 + [3]:
            assert len(run(torch.ones(size))) == size
    assert fake.captures == 1 and fake.replays == 2 + 3 * 5


def test_the_number_of_graphs_is_limited(fake):
    run = GraphCapture(CPU).wrap(double, "double")
    for size in range(1, MAX_GRAPHS + 3):
        for _ in range(EAGER_CALLS + 1):
            assert torch.equal(run(torch.ones(size)), 2 * torch.ones(size))
    assert fake.captures == MAX_GRAPHS


def test_large_tensors_stay_eager(fake):
    run = GraphCapture(CPU).wrap(double, "double", max_size=8)
    for _ in range(EAGER_CALLS + 1):
        run(torch.ones(9))
    assert fake.captures == 0


def test_after_a_failed_capture_everything_is_eager_with_one_note(fake, monkeypatch):
    capture = GraphCapture(CPU)
    run, other = capture.wrap(double, "double"), capture.wrap(double, "other")
    for _ in range(EAGER_CALLS + 1):
        other(torch.ones(2))

    def fail(*arguments):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        finally:  # as the end of a broken capture does
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(graphs, "capture", fail)
    for _ in range(EAGER_CALLS + 3):
        assert torch.equal(run(torch.ones(2)), 2 * torch.ones(2))
        assert torch.equal(other(torch.ones(2)), 2 * torch.ones(2))
    (note,) = capture.take_notes()
    assert "double cannot be captured" in note and "(operation not permitted when stream is capturing)" in note
    assert not capture.take_notes() and fake.replays == 1 + EAGER_CALLS


def test_a_graph_outlives_its_function_while_others_may_be_replayed(fake, monkeypatch):
    """Torch frees workspaces that all graphs use with the first one that is deleted, as at the end of a phase."""
    capture = GraphCapture(CPU)
    run, other = capture.wrap(double, "double"), capture.wrap(double, "other")
    for _ in range(EAGER_CALLS + 1):
        run(torch.ones(2)), other(torch.ones(2))
    graph, others_graph = (weakref.ref(*[one.graph for one in each.recordings.values()]) for each in (run, other))
    del run
    gc.collect()
    assert graph() is not None
    capture.disable("other", RuntimeError("out of memory"))  # its graph would keep the memory of its results
    gc.collect()
    assert graph() is others_graph() is None


@pytest.mark.parametrize("torch_ends_it", [False, True])
def test_a_failed_capture_gives_its_memory_back(monkeypatch, torch_ends_it):
    calls = []

    class Graph(contextlib.AbstractContextManager):
        def __init__(self, graph, **options):
            self.options = options

        def __exit__(self, *error):
            raise RuntimeError("operation failed due to a previous error during capture")

    def end(*pool):
        calls.append(("end", *pool))
        if torch_ends_it:
            raise RuntimeError("not currently recording to mempool_id")

    class Generator:
        def clone_state(self):
            return "copy"

        def graphsafe_set_state(self, state):
            calls.append(("renew", state))

    monkeypatch.setattr(graphs, "get_capture_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "default_generators", (None, Generator()))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *pool: calls.append(("release", *pool)), raising=False)
    with pytest.raises(RuntimeError, match="previous error"):
        graphs.capture(double, (torch.ones(2),), torch.device("cuda", 1), None)
    ended = [("renew", "copy"), ("end", 1, (0, 7))]
    assert calls == (ended if torch_ends_it else [*ended, ("release", 1, (0, 7))])


@pytest.mark.parametrize("name", ["fine_grained", "spectral_residual", "float_bytes"])
def test_static_sources_are_captured(fake, name):
    options = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    source, plain = build_source(name, **options), build_source(name, **options)
    GraphCapture(CPU).wrap_source(source)
    for _ in range(EAGER_CALLS + 2):
        images = torch.randn(2, 3, 20, 16)
        assert torch.equal(source(images, None), plain(images, None))
    assert (fake.captures, fake.replays) == (1, 2)


def compare_banks(device: torch.device) -> None:
    """Let a captured bank and a plain one learn from the same batches."""
    bank, plain = (build_source("bank", num_images=6, bank_size=4, device=device) for _ in range(2))
    capture = GraphCapture(device)
    capture.wrap_source(bank)
    for _ in range(EAGER_CALLS + 2):
        images, coverage, gradient = torch.rand(4, 3, 8, 8), torch.rand(4, 1, 8, 8), torch.randn(4, 3, 8, 8)
        index, shift, flip = torch.randperm(6)[:4], torch.randint(-2, 3, (2, 4)), torch.rand(4) < 0.5
        batch = Batch(images, index, index, *(one.to(device) for one in (index, shift, flip)), None)
        maps = []
        for one in (bank, plain):
            one.start_batch(batch)
            maps.append(one(images.to(device)))
            one.after_backward(gradient.to(device), coverage.to(device))
        assert torch.equal(*maps) and torch.equal(bank.maps, plain.maps) and torch.equal(bank.updated, plain.updated)
    bank.sync(lambda tensor: tensor.cpu())  # a graph reads the merged maps, too
    bank.start_batch(batch)
    assert torch.equal(bank(images.to(device)), plain(images.to(device)))
    assert len(bank.look_up.recordings) == len(bank.update.recordings) == 1 and not capture.take_notes()


def test_the_bank_is_captured(fake):
    compare_banks(CPU)


@pytest.mark.gpu
def test_the_bank_is_captured_on_cuda():
    compare_banks(CUDA)


def test_sources_have_the_methods_that_they_declare_as_capturable():
    for name in SOURCES:
        assert all(callable(getattr(source_class(name), method)) for method in source_class(name).capturable)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fine_grained", "spectral_residual", "float_bytes"])
def test_a_replay_equals_eager_on_cuda(name):
    options = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    source, plain = build_source(name, **options), build_source(name, **options)
    capture = GraphCapture(CUDA)
    capture.wrap_source(source)
    for number in range(60):
        images = torch.randn(20, 3, 32, 32, device=CUDA)
        assert torch.equal(source(images, None), plain(images, None))
        if number == 10:
            before = torch.cuda.memory_allocated()
    assert len(source.compute_maps.recordings) == 1 and not capture.take_notes()
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.gpu
def test_random_numbers_of_the_device_go_on_through_replays():
    def draw(values):
        return torch.nn.functional.dropout(values, 0.5)

    values, run = torch.ones(1000, device=CUDA), GraphCapture(CUDA).wrap(draw, "draw")
    torch.manual_seed(3)
    eager = [draw(values) for _ in range(EAGER_CALLS + 4)] + [torch.rand(5, device=CUDA)]
    torch.manual_seed(3)
    replayed = [run(values) for _ in range(EAGER_CALLS + 4)] + [torch.rand(5, device=CUDA)]
    assert all(torch.equal(one, other) for one, other in zip(eager, replayed, strict=True)) and len(run.recordings) == 1


@pytest.mark.gpu
def test_a_function_that_waits_goes_on_eagerly_on_cuda():
    capture = GraphCapture(CUDA)
    run = capture.wrap(lambda values: values * values.sum().item(), "product")
    for _ in range(EAGER_CALLS + 3):
        assert run(torch.ones(3, device=CUDA)).eq(3).all()
        torch.rand(3, device=CUDA)  # the generator still works
    torch.cuda.empty_cache()  # raises if the allocator takes the capture for unfinished
    assert len(capture.take_notes()) == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()

"""The fake CUDA device finds what a GPU would mind, and counts launches."""

import pytest
import torch
from fake_cuda import fake_cuda, find_obstacle
from fake_operations import CUDA, find_device_mix_up

if obstacle := find_obstacle():
    pytest.skip(obstacle, allow_module_level=True)


def find_kinds(call) -> list[str]:
    """Return the kinds of findings of a function of four numbers on the device and four on the host."""
    with fake_cuda() as fake:
        numbers = torch.zeros(4, device=CUDA)
        try:
            call(numbers, torch.arange(4.0))
        except RuntimeError as error:
            return [find_device_mix_up(error).kind]
    return [finding.kind for finding in fake.findings]


def assign(numbers, index, value):
    numbers[index] = value


@pytest.mark.parametrize(
    "call",
    [
        lambda x, host: float(x.sum()),
        lambda x, host: bool(x.any()),
        lambda x, host: x.cpu(),
        lambda x, host: x.nonzero(),
        lambda x, host: x[x > 0],
        lambda x, host: x[[0, 1]],
        lambda x, host: x[host.long()],
        lambda x, host: host.to(CUDA),
        lambda x, host: x.copy_(host),
        lambda x, host: torch.tensor([1.0, 2.0], device=CUDA),
        lambda x, host: x.new_tensor([1.0, 2.0]),
        lambda x, host: assign(x, 0, 1.0),
        lambda x, host: assign(x, torch.zeros(2, dtype=torch.long, device=CUDA), 1.0),
        lambda x, host: torch.cuda.synchronize(),
    ],
)
def test_waits_are_found(call):
    assert find_kinds(call) == ["wait"]


@pytest.mark.parametrize(
    "call, kind",
    [
        (lambda x, host: x.to("cpu", non_blocking=True), "stale copy"),
        (lambda x, host: x.cumsum(0), "refused"),
        (lambda x, host: x + host, "device mix-up"),
    ],
)
def test_other_faults_are_found(call, kind):
    assert find_kinds(call) == [kind]


@pytest.mark.parametrize(
    "call",
    [
        lambda x, host: host.to(CUDA, non_blocking=True),
        lambda x, host: x.index_fill_(0, torch.zeros(2, dtype=torch.long, device=CUDA), 1.0),
        lambda x, host: assign(x, slice(0, 2), 1.0),
        lambda x, host: x.masked_fill_(x > 0, 1.0),
        lambda x, host: x * 2.0 + host[0],
        lambda x, host: int(host.sum()) and host.nonzero(),
    ],
)
def test_what_a_gpu_does_not_mind_is_not_found(call):
    assert not find_kinds(call)


def test_operations_on_the_device_are_launches_and_views_are_not():
    with fake_cuda() as fake:
        numbers, host = torch.zeros(4, device=CUDA), torch.zeros(4)
        before = fake.launches
        numbers.view(2, 2).T[0].unsqueeze(1)
        host.add(1).sum()
        assert fake.launches == before
        numbers.add(1).sum()
        assert fake.launches == before + 2
    assert not torch.cuda.is_available()

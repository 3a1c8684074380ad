import copy
import pickle

import pytest
import torch
from support import same_state
from torch.nn import functional as F

from mixing import RecursiveMix, compose_mixer
from mixing.show.__main__ import collect_mixtures


def draw_batch(count: int = 6, classes: int = 6, size: tuple[int, int] = (16, 20)) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 3, *size), torch.eye(classes)[torch.arange(count) % classes]


def find_pasted(soft: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the row of the history in each image, from its label, where row k of the history has class k + 6 of 12."""
    return (soft - targets)[:, 6:].argmax(1)


def test_the_last_batch_is_shrunk_into_a_box_and_labels_follow_its_area():
    """As the released code has it, with torch's resizing."""
    torch.manual_seed(1)
    mixer, seen = RecursiveMix(), 0
    for _ in range(12):
        mixer.start_epoch(0, 1, 2)
        history, later = draw_batch(classes=12)[0], draw_batch(classes=12)
        assert mixer(history, torch.eye(12)[6:])[0] is history
        mixed, soft = mixer(*later)
        inside = mixer.weight[0, 0] == 0
        if not inside.any():
            assert torch.equal(mixed, later[0]) and torch.equal(soft, later[1])
            continue
        seen += 1
        rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
        y, x = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
        chosen = find_pasted(soft, later[1])
        assert sorted(chosen.tolist()) == [*range(6)], "each image of the history serves once"
        expected = later[0].clone()
        expected[..., y, x] = F.interpolate(history[chosen], size=expected[0, 0, y, x].shape)
        assert torch.equal(mixed, expected)
        lam = 1 - inside.float().mean()
        torch.testing.assert_close(soft, lam * later[1] + (1 - lam) * torch.eye(12)[6 + chosen])
        assert mixer.partner is None, "the other images are not in this batch"
    assert seen > 8


def test_the_history_is_what_the_network_saw():
    """Constant images of one batch after another, a class for each batch: the label of an image is what it shows."""
    torch.manual_seed(0)
    mixer = RecursiveMix(history_area=1.0, in_batch=True)
    for number in range(5):
        images, targets = torch.zeros(8, 5, 24, 24), torch.zeros(8, 5)
        images[:, number], targets[:, number] = 1, 1
        mixed, soft = mixer(images, targets)
        if number < 2:
            torch.testing.assert_close(mixed.mean((2, 3)), soft)
        mixed.zero_(), soft.zero_()  # what the caller does with them
    assert (mixer.history[1] > 0).sum(1).max() >= 4, "classes of four batches"
    torch.testing.assert_close(mixer.history[1].sum(1), torch.ones(8))
    torch.testing.assert_close(mixer.history[0].sum(1), torch.ones(8, 24, 24))


@pytest.mark.parametrize("count", [1, 4, 9])
def test_a_batch_of_another_size_takes_what_the_history_has(count):
    torch.manual_seed(4)
    mixer = RecursiveMix(in_batch=True)
    for _ in range(6):
        mixer.start_epoch(0, 1, 2)
        mixer(draw_batch()[0], torch.eye(12)[6:])
        images, targets = draw_batch(count, classes=12)
        _, soft = mixer(images, targets)
        mixed = mixer.weight.flatten(1).min(1).values == 0
        chosen = find_pasted(soft, targets)[mixed].tolist()
        assert max(map(chosen.count, chosen), default=0) <= -(-count // 6), "as often as any other"
        assert [len(one) for one in mixer.history] == [count, count]


def test_a_history_of_other_images_or_classes_is_dropped():
    mixer = RecursiveMix()
    mixer(*draw_batch())
    for other in (draw_batch(size=(8, 8)), draw_batch(classes=7, size=(8, 8))):
        assert mixer(*other)[0] is other[0]
        assert mixer.weight.eq(1).all() and mixer.partner.tolist() == [*range(6)]
        assert torch.equal(mixer.history[0], other[0])


def test_an_epoch_begins_without_a_history():
    mixer, images = RecursiveMix(), draw_batch()
    mixer(*images)
    mixer.start_epoch(1, 2, 3)
    assert mixer(*images)[0] is images[0]


@pytest.mark.parametrize("options", [{}, {"mix_fraction": 0.5}, {"cutout": True}])
@pytest.mark.parametrize("names", [["recursivemix"], ["recursivemix", "mixup"]])
def test_the_state_continues_within_an_epoch(names, options):
    torch.manual_seed(5)
    batches = [draw_batch() for _ in range(6)]
    whole, part = (compose_mixer(names, mix_prob=0.8, **options) for _ in range(2))
    for batch in batches[:3]:
        whole(*batch)
    state = copy.deepcopy(whole.state_dict())
    copies = [part, copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))]
    part.load_state_dict(state)
    results = []
    for mixer in (whole, *copies):
        torch.manual_seed(6)
        results.append([mixer(*batch) for batch in batches[3:]])
    assert any(not torch.equal(mixed, batch[0]) for (mixed, _), batch in zip(results[0], batches[3:], strict=True))
    assert all(same_state(results[0], other) for other in results[1:])


def test_gradients_flow_through_this_batch_alone():
    torch.manual_seed(2)
    mixer, first, images = RecursiveMix(), draw_batch(), draw_batch()
    first[0].requires_grad_(), images[0].requires_grad_()
    mixer(*first)
    mixed, _ = mixer(*images)
    mixed.sum().backward()
    assert first[0].grad is None and not any(one.requires_grad for one in mixer.history)
    assert torch.equal(images[0].grad, mixer.weight.expand_as(images[0]))


def test_pictures_show_the_history_as_the_share_of_no_image():
    images = torch.randn(3, 3, 24, 24)
    mixed, shares, soft, _ = collect_mixtures(RecursiveMix(), images, None, 6, 0)
    shown = shares.sum(1)
    assert soft.max() < 0.99 and {*shown.unique().tolist()} == {0.0, 1.0}
    visible = torch.einsum("ijhw,jchw->ichw", shares, images)
    assert torch.equal(visible, mixed * shown.unsqueeze(1))


def test_wrong_options_are_refused():
    for options in ({"history_area": 0.0}, {"history_area": 1.5}, {"resize_mode": "cubic"}, {"mix_prob": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            RecursiveMix(**options)

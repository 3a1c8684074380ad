"""Batches for a detector: which images, what happens to them and to their boxes."""

import pytest
import torch

from detection.dataset import DetectionSet
from detection.loader import AUGMENTATIONS, DetectionLoader, DetectionViews
from engine.data.loader import Shard
from engine.errors import UserError

CPU = torch.device("cpu")


def part(count: int = 11) -> DetectionSet:
    """Images that hold their own number, every third higher than wide; a box for each class up to the number."""
    sizes = [(24, 16) if number % 3 == 0 else (16, 24) for number in range(count)]
    images = [torch.full((3, *size), number, dtype=torch.uint8) for number, size in enumerate(sizes)]
    targets = [
        {
            "boxes": torch.tensor([[1.0, 2, 9, 14], [3, 1, 16, 8]])[: number % 3],
            "labels": torch.tensor([1, 2])[: number % 3],
            "difficult": torch.tensor([False, True])[: number % 3],
        }
        for number in range(count)
    ]
    return DetectionSet(["a", "b"], [f"image {number}" for number in range(count)], images, targets, sizes, "a test")


def feed(batch_size: int = 4, **options) -> DetectionLoader:
    return DetectionLoader(part(), batch_size, device=CPU, **{"shuffle": True, "augment": "flip", "seed": 5, **options})


def seen(batches: DetectionLoader, epoch: int = 0, start: int = 0) -> list[list[int]]:
    return [batch.index.tolist() for batch in batches.epoch(epoch, start)]


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own():
    first, second = (seen(feed(), epoch) for epoch in (0, 1))
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(11)) and first != second
    assert seen(feed()) == first and seen(feed(seed=6)) != first
    assert len(first) == len(feed()) == 3


def test_batches_are_of_one_orientation_until_images_run_out():
    batches = seen(feed(batch_size=3))
    kinds = [len({number % 3 == 0 for number in batch}) for batch in batches]
    assert kinds == sorted(kinds) and kinds[:3] == [1, 1, 1]


def test_a_started_epoch_goes_on_with_the_same_samples():
    whole, rest = list(feed().epoch(2)), list(feed().epoch(2, start=1))
    for one, other in zip(whole[1:], rest, strict=True):
        assert torch.equal(one.index, other.index)
        for image, same in zip(one.images, other.images, strict=True):
            assert torch.equal(image, same)
        for target, same in zip(one.targets, other.targets, strict=True):
            assert torch.equal(target["boxes"], same["boxes"])


def test_a_flip_moves_the_boxes_along():
    views = DetectionViews(part(), "flip")
    for epoch in range(20):
        (image,), (target,), _ = views.read([2], seed=1, epoch=epoch)
        if not torch.equal(target["boxes"], part().targets[2]["boxes"]):
            break
    assert target["boxes"].tolist() == [[15, 2, 23, 14], [8, 1, 21, 8]]  # x' = 24 - x
    assert target["labels"].tolist() == [1, 2] and type(image) is type(target["boxes"]) is torch.Tensor


@pytest.mark.parametrize("augment", sorted(AUGMENTATIONS))
def test_augmentation_depends_on_seed_epoch_and_image_alone(augment):
    views = DetectionViews(part(), augment)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    together, targets, _ = views.read([1, 2, 4], seed=3, epoch=1)
    assert torch.equal(torch.get_rng_state(), before), "numbers of the training were used up"
    (alone,), (target,), _ = views.read([2], seed=3, epoch=1)
    assert torch.equal(alone, together[1]) and torch.equal(target["boxes"], targets[1]["boxes"])
    others = [views.read([2], seed=3, epoch=epoch)[1][0]["boxes"].tolist() for epoch in range(8)]
    assert (others.count(others[0]) == 8) == (augment == "none")


def test_crops_keep_labels_with_their_boxes():
    views = DetectionViews(part(), "ssd")
    counts = set()
    for epoch in range(30):
        (image,), (target,), _ = views.read([2], epoch=epoch)
        boxes = target["boxes"]
        assert len(boxes) == len(target["labels"]) == len(target["difficult"])
        assert torch.equal(target["difficult"], target["labels"] == 2), "a label went to another box"
        assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes[:, 2] <= image.shape[2]).all()
        counts.add(len(boxes))
    assert {1, 2} <= counts
    assert views.read([3])[1][0]["boxes"].shape == (0, 4)


def test_workers_change_nothing():
    def content(workers: int) -> list:
        batches = DetectionLoader(part(), 4, device=CPU, shuffle=True, augment="ssd", seed=5)
        batches.reader.workers = workers  # images in memory are read without them otherwise
        found = [(batch.index, torch.cat([image.flatten() for image in batch.images])) for batch in batches.epoch(1)]
        batches.close()
        return found

    for (index, pixels), (same, again) in zip(content(0), content(2), strict=True):
        assert torch.equal(index, same) and torch.equal(pixels, again)


def test_processes_and_micro_batches_share_a_batch():
    whole = [sorted(batch) for batch in seen(feed(batch_size=4, augment="none"))]
    for world_size, micro_batches in ((2, 1), (1, 2)):
        shards = [Shard(rank, world_size, micro_batches) for rank in range(world_size)]
        parts = [seen(feed(batch_size=4, augment="none", shard=shard)) for shard in shards]
        flat = [sorted(sum(step, [])) for step in zip(*parts, strict=True)]
        if micro_batches > 1:
            flat = [sorted(sum(parts[0][i : i + 2], [])) for i in range(0, len(parts[0]), 2)]
        assert flat[:2] == whole[:2]
        assert len(flat[2]) == 4 and set(whole[2]) < set(flat[2]), "three images are left, and an earlier one again"


def test_an_epoch_has_as_many_steps_for_any_number_of_processes():
    for count in (1, 2, 4):
        parts = [feed(batch_size=4, shard=Shard(rank, count)) for rank in range(count)]
        assert {len(one) for one in parts} == {3} and {len(seen(one)) for one in parts} == {3}
        assert set(sum(sum((seen(one) for one in parts), []), [])) == set(range(11))


def test_an_evaluation_reads_every_image_once_over_all_ranks():
    parts = [DetectionLoader(part(), 2, device=CPU, shard=Shard(rank, 2)) for rank in (0, 1)]
    assert sorted(sum((index for one in parts for index in seen(one)), [])) == list(range(11))
    assert all(len(index) == 1 for index in seen(parts[0]))


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    broken = DetectionSet(["a"], ["a"], [tmp_path / "a.jpg"], part(1).targets, [(24, 16)], "a test")
    with pytest.raises(UserError, match=r"a.jpg: not an image\nreplace the file or its annotation"):
        list(DetectionLoader(broken, 1, device=CPU).epoch())

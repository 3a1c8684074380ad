"""Batches of a detector: their composition, and the augmentation of images and boxes."""

import pytest
import torch

from detection.dataset import DetectionSet
from detection.loader import AUGMENTATIONS, DetectionLoader, DetectionViews
from engine.data.loader import Shard
from engine.errors import UserError

CPU = torch.device("cpu")


def make_image_set(count: int = 11) -> DetectionSet:
    """Make images filled with their own number, every third of them in portrait; image n has n % 3 boxes."""
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


def make_loader(batch_size: int = 4, **options) -> DetectionLoader:
    return DetectionLoader(
        make_image_set(), batch_size, device=CPU, **{"shuffle": True, "augment": "flip", "seed": 5, **options}
    )


def list_indices(loader: DetectionLoader, epoch: int = 0, start: int = 0) -> list[list[int]]:
    return [batch.index.tolist() for batch in loader.epoch(epoch, start)]


def test_every_epoch_has_each_image_once_in_a_new_order():
    first, second = (list_indices(make_loader(), epoch) for epoch in (0, 1))
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(11)) and first != second
    assert list_indices(make_loader()) == first and list_indices(make_loader(seed=6)) != first
    assert len(first) == len(make_loader()) == 3


def test_batches_have_one_orientation_until_images_run_out():
    batches = list_indices(make_loader(batch_size=3))
    kinds = [len({number % 3 == 0 for number in batch}) for batch in batches]
    assert kinds == sorted(kinds) and kinds[:3] == [1, 1, 1]


def test_resumed_epoch_continues_with_the_same_samples():
    whole, rest = list(make_loader().epoch(2)), list(make_loader().epoch(2, start=1))
    for one, other in zip(whole[1:], rest, strict=True):
        assert torch.equal(one.index, other.index)
        for image, same in zip(one.images, other.images, strict=True):
            assert torch.equal(image, same)
        for target, same in zip(one.targets, other.targets, strict=True):
            assert torch.equal(target["boxes"], same["boxes"])


def test_flip_also_flips_the_boxes():
    views = DetectionViews(make_image_set(), "flip")
    for epoch in range(20):
        (image,), (target,), _ = views.read([2], seed=1, epoch=epoch)
        if not torch.equal(target["boxes"], make_image_set().targets[2]["boxes"]):
            break
    assert target["boxes"].tolist() == [[15, 2, 23, 14], [8, 1, 21, 8]]  # x' = 24 - x
    assert target["labels"].tolist() == [1, 2] and type(image) is type(target["boxes"]) is torch.Tensor


@pytest.mark.parametrize("augment", sorted(AUGMENTATIONS))
def test_augmentation_depends_only_on_seed_epoch_and_image(augment):
    views = DetectionViews(make_image_set(), augment)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    together, targets, _ = views.read([1, 2, 4], seed=3, epoch=1)
    assert torch.equal(torch.get_rng_state(), before), "the global generator of the training was used"
    (alone,), (target,), _ = views.read([2], seed=3, epoch=1)
    assert torch.equal(alone, together[1]) and torch.equal(target["boxes"], targets[1]["boxes"])
    others = [views.read([2], seed=3, epoch=epoch)[1][0]["boxes"].tolist() for epoch in range(8)]
    assert (others.count(others[0]) == 8) == (augment == "none")


def test_crops_keep_labels_and_boxes_together():
    views = DetectionViews(make_image_set(), "ssd")
    counts = set()
    for epoch in range(30):
        (image,), (target,), _ = views.read([2], epoch=epoch)
        boxes = target["boxes"]
        assert len(boxes) == len(target["labels"]) == len(target["difficult"])
        assert torch.equal(target["difficult"], target["labels"] == 2), "a label moved to another box"
        assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes[:, 2] <= image.shape[2]).all()
        counts.add(len(boxes))
    assert {1, 2} <= counts
    assert views.read([3])[1][0]["boxes"].shape == (0, 4)


def test_number_of_workers_does_not_change_the_batches():
    def content(workers: int) -> list:
        batches = DetectionLoader(make_image_set(), 4, device=CPU, shuffle=True, augment="ssd", seed=5)
        batches.reader.workers = workers  # otherwise images in memory are read without workers
        found = [(batch.index, torch.cat([image.flatten() for image in batch.images])) for batch in batches.epoch(1)]
        batches.close()
        return found

    for (index, pixels), (same, again) in zip(content(0), content(2), strict=True):
        assert torch.equal(index, same) and torch.equal(pixels, again)


def test_processes_and_micro_batches_split_the_same_batch():
    whole = [sorted(batch) for batch in list_indices(make_loader(batch_size=4, augment="none"))]
    for world_size, micro_batches in ((2, 1), (1, 2)):
        shards = [Shard(rank, world_size, micro_batches) for rank in range(world_size)]
        read = [list_indices(make_loader(batch_size=4, augment="none", shard=shard)) for shard in shards]
        flat = [sorted(sum(step, [])) for step in zip(*read, strict=True)]
        if micro_batches > 1:
            flat = [sorted(sum(read[0][i : i + 2], [])) for i in range(0, len(read[0]), 2)]
        assert flat[:2] == whole[:2]
        assert len(flat[2]) == 4 and set(whole[2]) < set(flat[2]), (
            "three images are left; the first one of the epoch fills up the batch"
        )


def test_number_of_steps_does_not_depend_on_the_number_of_processes():
    for count in (1, 2, 4):
        loaders = [make_loader(batch_size=4, shard=Shard(rank, count)) for rank in range(count)]
        assert {len(loader) for loader in loaders} == {3} and {len(list_indices(loader)) for loader in loaders} == {3}
        assert set(sum(sum((list_indices(loader) for loader in loaders), []), [])) == set(range(11))


def test_evaluation_reads_each_image_once_over_all_processes():
    loaders = [DetectionLoader(make_image_set(), 2, device=CPU, shard=Shard(rank, 2)) for rank in (0, 1)]
    assert sorted(sum((index for loader in loaders for index in list_indices(loader)), [])) == list(range(11))
    assert all(len(index) == 1 for index in list_indices(loaders[0]))


def test_invalid_image_error_names_the_file(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    broken = DetectionSet(["a"], ["a"], [tmp_path / "a.jpg"], make_image_set(1).targets, [(24, 16)], "a test")
    with pytest.raises(UserError, match=r"a.jpg: not an image\nreplace the file or its annotation"):
        list(DetectionLoader(broken, 1, device=CPU).epoch())

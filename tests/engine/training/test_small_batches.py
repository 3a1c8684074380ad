"""Batches that are too small for batch norm are found before the first step."""

import pytest
import torch
from support import shapes_command
from torch import nn

import train
from detection.loader import DetectionLoader
from engine.data.image_set import ImageSet
from engine.data.loader import DeviceLoader, Shard
from engine.errors import UserError
from engine.launch import explain_error
from engine.training.small_batches import check_small_batches

CPU = torch.device("cpu")
DROP = "--drop_last leaves it out"


def build_loader(images: int, batch_size: int = 12, *, drop_last: bool = False, parts: tuple = (1, 1)) -> DeviceLoader:
    image_set = ImageSet(torch.zeros(images, 8, 8, 3, dtype=torch.uint8), torch.zeros(images).long(), ["a"], "a test")
    common = {"device": CPU, "mean": (0.5,) * 3, "std": (0.5,) * 3, "shard": Shard(0, *parts)}
    return DeviceLoader(image_set, batch_size, shuffle=True, drop_last=drop_last, **common)


def build_network(stride: int = 1) -> nn.Module:
    """Return a network whose batch norm sees feature maps of 8 / stride pixels a side for images of 8 pixels."""
    return nn.Sequential(nn.Conv2d(3, 4, stride, stride), nn.BatchNorm2d(4), nn.Dropout(0.5))


@pytest.mark.parametrize("parts", [(1, 1), (2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("images", [5, 11, 12, 13, 17, 18, 24, 35, 37])
def test_the_counted_images_are_those_of_the_micro_batches(images, parts):
    for drop_last in (False, True):
        loader = build_loader(images, drop_last=drop_last, parts=parts)
        if sizes := [len(batch.index) for batch in loader.epoch()]:
            assert loader.count_part_images() == (sizes[0], sizes[-1])


def test_a_last_batch_of_one_or_two_images_is_noted():
    (note,) = check_small_batches(build_network(), [(build_loader(37), 8)])
    assert note.startswith("the last batch of an epoch has 1 image (37 training images, --batch_size 12)")
    assert note.endswith(DROP)
    assert "has 2 images (38" in check_small_batches(build_network(), [(build_loader(38), 8)])[0]
    (note,) = check_small_batches(build_network(), [(build_loader(16, parts=(2, 2)), 8)] * 2)
    assert "has 1 image in each process in each part of --accumulate (16" in note
    for loader in (build_loader(39), build_loader(36), build_loader(37, drop_last=True), build_loader(38, 2)):
        assert not check_small_batches(build_network(), [(loader, 8)])
    assert not check_small_batches(nn.Conv2d(3, 4, 1), [(build_loader(37), 8)]), "there is no batch norm"


def test_a_batch_that_torch_would_refuse_is_an_error_with_the_remedy():
    network = build_network(stride=8).train()
    before = torch.get_rng_state()
    with pytest.raises(UserError, match=f"1x1 pixel needs 2\n{DROP}"):
        check_small_batches(network, [(build_loader(37), 8)])
    with pytest.raises(UserError, match="every batch of an epoch has 1 image .*\nuse a larger --batch_size"):
        check_small_batches(network, [(build_loader(37, 1), 8)])
    assert "it is left out" in check_small_batches(network, [(build_loader(37), 8)], skips_single=True)[0]
    assert "unreliable" in check_small_batches(network, [(build_loader(38), 8)])[0], "two images can be trained on"
    assert network.training and torch.equal(before, torch.get_rng_state())
    assert network[1].num_batches_tracked == 0 and not network[1]._forward_pre_hooks
    with pytest.raises(ValueError) as refused:
        network(torch.zeros(1, 3, 8, 8))
    assert "--batch_size" in explain_error(refused.value)


def test_the_remedy_works_in_a_run(tmp_path, capsys):
    command = shapes_command(tmp_path, "--limit", "21", "--model", "imagenet_resnet18", epochs=1)
    with pytest.raises(UserError, match="--drop_last"):
        train.main(command)
    assert not list(tmp_path.iterdir()), "the error comes before the run folder"
    train.main([*command, "--drop_last"])
    assert "1x1" not in capsys.readouterr().out


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_detection_loader_fills_up_its_last_batch(world_size):
    class Images(list):
        images, targets, sizes = [], [], [(8, 8)] * 20

    loader = DetectionLoader(Images(range(20)), 6, device=CPU, shuffle=True, shard=Shard(0, world_size))
    batches = [part for batch in loader.order(0).split(6) for part in loader.shard.split(batch, even=True)]
    assert loader.count_part_images() == (len(batches[0]), len(batches[-1]))

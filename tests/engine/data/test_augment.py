"""Tests of augmentation: reflected borders, erasing, and the policies of torchvision, equal to torchvision's own."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from engine.data.augment import Augmentation, AutoAugment, build_augmentation, crop_and_flip
from engine.data.auto_augment import build_policy
from engine.data.erasing import RATIO, SCALE, RandomErasing, place_rectangles
from engine.data.folders import FileList
from engine.data.image_files import ImageFiles
from engine.data.image_set import ImageSet
from engine.data.loader import DeviceLoader, Shard
from engine.data.sample_rng import hash_samples, uniform
from engine.data.views import CenterCrop, RandomCrop, SquashedView

CPU = torch.device("cpu")
PIXELS = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}  # batches hold pixels in 0..255
MEAN = (0.4, 0.5, 0.6)
RAND = AutoAugment("rand", 2, 9.0, 0.5, 0.5)
EVERYTHING = {
    "padded": Augmentation(4, crop_padding_mode="reflect", auto=RAND, erasing=0.5),
    "resized": Augmentation(
        view=RandomCrop(20, 0.3, interpolation="bicubic"), auto=AutoAugment("trivial"), erasing=0.5
    ),
    "policy alone": Augmentation(crop_and_flip=False, auto=RAND),
    "crop alone": Augmentation(view=RandomCrop(20, 0.3)),
}


def make_pixels(count: int = 12, side: int = 20) -> torch.Tensor:
    """Return smooth images uint8 (count, side, side, 3)."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(count, 3, 5, 5, generator=generator)
    return (255 * F.interpolate(small, (side, side), mode="bilinear")).permute(0, 2, 3, 1).to(torch.uint8).contiguous()


def make_set(**changes) -> ImageSet:
    return ImageSet(make_pixels(), torch.arange(12) % 3, ["a", "b", "c"], "here", **changes)


def make_loader(image_set: ImageSet, augmentation: Augmentation, batch_size: int = 5, **changes) -> DeviceLoader:
    options = {"device": CPU, "shuffle": True, "seed": 3, **PIXELS, **changes}
    return DeviceLoader(image_set, batch_size, augmentation=augmentation, **options)


def same_batches(some, others) -> bool:
    some, others = list(some), list(others)
    return len(some) == len(others) and all(
        torch.equal(a.images, b.images) and torch.equal(a.index, b.index) for a, b in zip(some, others, strict=True)
    )


def to_pillow(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.numpy())


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


# ---- Options ----


def test_each_option_reaches_the_augmentation():
    options = {"trad_augment": True, "crop_padding": 3, "crop_padding_mode": "reflect", "min_scale": None}
    options |= {"auto_augment": "rand", "rand_augment_ops": 1, "rand_augment_magnitude": 4.0, "rand_augment_std": 0.5}
    options |= {"rand_augment_prob": 0.25, "random_erasing": 0.1, "interpolation": "bicubic"}
    later = {"auto": AutoAugment("rand", 1, 4.0, 0.5, 0.25, "bicubic"), "erasing": 0.1}
    colors = {"color_jitter": 0.4, "lighting": 0.2}
    padded = Augmentation(3, crop_padding_mode="reflect", **colors, **later)
    assert build_augmentation(28, **options, **colors) == padded
    view = RandomCrop(28, 0.3, interpolation="bicubic")
    resized = Augmentation(view=view, **colors, **later)
    assert build_augmentation(28, **options | {"min_scale": 0.3}, **colors) == resized
    alone = build_augmentation(28, **options | {"trad_augment": False}, **colors)
    assert alone == Augmentation(crop_and_flip=False, **later)


# ---- Crops ----


@pytest.mark.parametrize("side", [9, 3])
def test_reflected_crops_equal_those_of_an_image_padded_by_torch(side):
    pixels, reach = make_pixels(6, side), side - 1  # torch pads by less than a side
    top, left = torch.randint(-reach, reach + 1, (2, 6))
    out = crop_and_flip(pixels, torch.arange(6), top, left, torch.arange(6) > 2, "reflect")
    padded = F.pad(pixels.permute(0, 3, 1, 2).float(), (reach,) * 4, mode="reflect").permute(0, 2, 3, 1)
    for k in range(6):
        rows, columns = reach + int(top[k]), reach + int(left[k])
        expected = padded[k, rows : rows + side, columns : columns + side]
        assert torch.equal(out[k].float(), expected.flip(1) if k > 2 else expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resized_crops_of_tensors_are_torchvision_s(interpolation):
    image_set = make_set()
    for batch in make_loader(image_set, Augmentation(view=RandomCrop(28, 0.2, interpolation=interpolation))).epoch(1):
        for k, (y1, y2, x1, x2) in enumerate((batch.box * 20).round().int().tolist()):
            image = image_set.pixels[batch.index[k]].permute(2, 0, 1)
            expected = tv.resized_crop(image, y1, x1, y2 - y1, x2 - x1, [28, 28], tv.InterpolationMode(interpolation))
            expected = expected.flip(2) if batch.flip[k] else expected
            assert (batch.images[k] - expected).abs().max() < 1e-3
        assert (0.15 <= (batch.box[:, 1] - batch.box[:, 0]) * (batch.box[:, 3] - batch.box[:, 2])).all()


def test_small_images_are_enlarged_after_cropping():
    big = make_set(resize=SquashedView(40, interpolation="bicubic"))
    plain, enlarged = (next(make_loader(s, Augmentation(4)).epoch(2)) for s in (make_set(), big))
    expected = tv.resize(plain.images.to(torch.uint8), [40, 40], tv.InterpolationMode.BICUBIC)
    assert (enlarged.images - expected).abs().max() < 1e-3
    assert big.pixels.shape[1] == 20 and torch.equal(plain.shift, enlarged.shift)


# ---- Policies ----


@pytest.mark.parametrize(
    "policy",
    [
        AutoAugment("rand", 2, 9.0),
        AutoAugment("rand", 3, 4.3, interpolation="bicubic"),
        AutoAugment("trivial"),
        AutoAugment("trivial", interpolation="bicubic"),
    ],
)
def test_policies_are_torchvision_s_on_the_same_draws(policy):
    drawing = {"interpolation": v2.InterpolationMode(policy.interpolation), "fill": [102, 128, 153]}
    theirs = v2.TrivialAugmentWide(**drawing)
    if policy.policy == "rand":
        theirs = v2.RandAugment(policy.ops, round(10 * policy.magnitude), 101, **drawing)
    ours, image = build_policy(policy, MEAN), to_pillow(make_pixels(1, 32)[0])
    changed = 0
    for seed in range(40):
        torch.manual_seed(seed)
        one = to_tensor(ours(image))
        torch.manual_seed(seed)
        assert torch.equal(one, to_tensor(theirs(image)))
        changed += not torch.equal(one, to_tensor(image))
    assert changed > 25


def test_magnitudes_have_the_mean_and_standard_deviation_of_the_options():
    policy, image, seen = build_policy(AutoAugment("rand", 2, 6.0, 1.5, 0.5), MEAN), to_pillow(make_pixels(1)[0]), []
    policy.operation = lambda image: seen.append(policy.operation.magnitude) or image
    torch.manual_seed(0)
    for _ in range(3000):
        policy(image)
    seen = torch.tensor(seen) / 10
    assert abs(len(seen) / 6000 - 0.5) < 0.02 and abs(seen.mean() - 6) < 0.1 and abs(seen.std() - 1.5) < 0.1
    assert seen.min() >= 0 and seen.max() <= 10


def test_a_policy_runs_after_crop_and_flip():
    plain = next(make_loader(make_set(), Augmentation(4)).epoch(1))
    changed = next(make_loader(make_set(), Augmentation(4, auto=RAND)).epoch(1))
    policy = build_policy(RAND, PIXELS["mean"])
    assert torch.equal(plain.shift, changed.shift) and torch.equal(plain.flip, changed.flip)
    for k, key in enumerate(hash_samples(3, 1, plain.index.tolist()).tolist()):
        torch.manual_seed(key)
        expected = policy(to_pillow(plain.images[k].permute(1, 2, 0).round().to(torch.uint8).contiguous()))
        assert (changed.images[k].permute(1, 2, 0) - to_tensor(expected)).abs().max() < 1e-3
    assert not torch.equal(plain.images, changed.images)


# ---- Erasing ----


def make_erasing(probability: float, size: int) -> RandomErasing:
    return RandomErasing(probability, size=size, seed=0, device=CPU)


def test_erased_images_equal_torchvision_s_erase():
    images, erase = torch.randn(9, 3, 12, 10), make_erasing(0.6, 12)
    out, index = erase(images.clone(), torch.arange(9), epoch=3), torch.arange(9)
    draws = uniform(index, (24,), seed=0, purpose="erased in epoch 3")
    for k, (y1, y2, x1, x2) in enumerate(place_rectangles(draws[:, :-1], 0.6, 12, 10).T.tolist()):
        noise = out[k, :, y1:y2, x1:x2]
        assert torch.equal(out[k], tv.erase(images[k], y1, x1, y2 - y1, x2 - x1, noise))
        assert not (noise == images[k, :, y1:y2, x1:x2]).any()


def test_rectangles_are_distributed_as_in_torchvision():
    height, width, count = 24, 40, 3000
    draws = uniform(torch.arange(count), (23,), seed=1, purpose="test")
    assert (SCALE, RATIO) == (v2.RandomErasing().scale, v2.RandomErasing().ratio)
    y1, y2, x1, x2 = place_rectangles(draws, 1.0, height, width)
    blank, theirs = [torch.empty(3, height, width)], v2.RandomErasing(value="random")
    params = [theirs.make_params(blank) for _ in range(count)]
    for ours, name in ((y2 - y1, "h"), (x2 - x1, "w"), (y1, "i"), (x1, "j")):
        one, other = np.sort(ours.numpy()), np.sort([float(each[name]) for each in params])
        grid = np.union1d(one, other)
        apart = np.abs(np.searchsorted(one, grid, "right") - np.searchsorted(other, grid, "right")).max() / count
        assert apart < 0.05, "Kolmogorov-Smirnov bound at level 1e-3 for 3000 samples each"


def test_the_share_of_erased_images_and_the_noise_are_as_asked_for():
    images = torch.full((2000, 3, 16, 16), 9.0).contiguous(memory_format=torch.channels_last)
    erase = make_erasing(0.25, 16)
    out = erase(images.clone(memory_format=torch.preserve_format), torch.arange(2000), epoch=4)
    erased = (out != 9).flatten(1).any(1)
    noise = out[out != 9]
    assert abs(erased.float().mean() - 0.25) < 0.04 and out.is_contiguous(memory_format=torch.channels_last)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    area = (out != 9).any(1).flatten(1).sum(1)[erased] / 256
    assert 0 < area.min() and area.max() < 0.36 and area.mean() > 0.12
    assert torch.equal(out[7:29], erase(images[7:29], torch.arange(7, 29), epoch=4))


def test_erasing_comes_after_normalisation():
    half = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    plain, erased = (make_loader(make_set(), Augmentation(erasing=p), 12, **half) for p in (0.0, 1.0))
    plain, erased = next(plain.epoch(3)), next(erased.epoch(3))
    inside = (plain.images != erased.images).any(1)
    assert inside.flatten(1).any(1).all() and not inside.flatten(1).all(1).any()
    assert abs(erased.images.permute(0, 2, 3, 1)[inside].std() - 1) < 0.1


# ---- What the images depend on ----


@pytest.fixture(params=["tensor", "files"])
def image_set(request, tmp_path) -> ImageSet:
    if request.param == "tensor":
        return make_set()
    for k, pixels in enumerate(make_pixels(12, 30)):
        to_pillow(pixels).save(tmp_path / f"{k}.png")
    files = ImageFiles(FileList(tmp_path, [f"{k}.png" for k in range(12)]), CenterCrop(20, 24))
    return ImageSet(files, torch.arange(12) % 3, ["a", "b", "c"], str(tmp_path))


@pytest.mark.parametrize("name", EVERYTHING)
def test_images_depend_on_seed_epoch_and_index_alone(image_set, name):
    alone = make_loader(image_set, EVERYTHING[name])
    expected, state = list(alone.epoch(2)), torch.get_rng_state()
    many = make_loader(image_set, EVERYTHING[name], workers=2)
    list(many.epoch(0))
    torch.rand(5)
    assert same_batches(many.epoch(2), expected) and same_batches(many.epoch(2, start=1), expected[1:])
    torch.set_rng_state(state)
    assert same_batches(alone.epoch(2, start=2), expected[2:])
    assert torch.equal(state, torch.get_rng_state()), "the global generator is as before"
    assert not same_batches(alone.epoch(3), expected)
    assert not same_batches(make_loader(image_set, EVERYTHING[name], seed=4).epoch(2), expected)
    many.close()
    whole = {int(i): image for b in expected for i, image in zip(b.index, b.images, strict=True)}
    for other in make_loader(image_set, EVERYTHING[name], 6).epoch(2):  # batches of another size
        assert all(torch.equal(whole[int(i)], image) for i, image in zip(other.index, other.images, strict=True))


def test_two_processes_see_the_images_of_one():
    loader = make_loader(make_set(), EVERYTHING["padded"], 6)
    parts = [make_loader(make_set(), EVERYTHING["padded"], 6, shard=Shard(rank, 2)) for rank in (0, 1)]
    for whole, *own in zip(loader.epoch(1), *(part.epoch(1) for part in parts), strict=True):
        assert torch.equal(whole.images, torch.cat([batch.images for batch in own]))

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.data.datasets import load_evaluation
from engine.data.views import CenterCrop, SquashedView
from engine.errors import UserError
from evaluation.backgrounds import (
    add_background_noise,
    build_object_mask,
    draw_partner,
    has_pickles,
    read_background_dir,
    read_pickles,
    replace_background,
)


def box_tensor(*boxes: tuple) -> torch.Tensor:
    return torch.tensor(boxes, dtype=torch.long).view(-1, 4)


# ---- Generated backgrounds ----


def test_the_object_mask_is_the_union_of_the_boxes():
    boxes = [box_tensor((0, 2, 1, 5), (1, 4, 4, 7)), None, box_tensor(), box_tensor((3, 6, 0, 8))]
    mask = build_object_mask(boxes, 6, 8)
    assert mask.shape == (4, 1, 6, 8) and mask.dtype == torch.bool
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[0:2, 1:5] = expected[1:4, 4:7] = True
    assert torch.equal(mask[0, 0], expected)
    assert mask[1].all(), "an image without known boxes is all object"
    assert not mask[2].any(), "an image whose boxes lie outside the crop has no object"
    assert mask[3, 0, 3:].all() and not mask[3, 0, :3].any()
    assert build_object_mask([], 6, 8).shape == (0, 1, 6, 8)


def test_only_the_background_is_replaced():
    pixels, others = torch.zeros(2, 3, 6, 8), torch.ones(2, 3, 6, 8)
    changed = replace_background(pixels, build_object_mask([box_tensor((1, 3, 2, 6)), None], 6, 8), others)
    assert changed[0].sum() == 3 * (48 - 8) and changed[0, :, 1:3, 2:6].eq(0).all() and changed[1].eq(0).all()


def test_noise_is_added_to_the_background_only_and_clipped():
    pixels = torch.full((3, 3, 40, 50), 0.5)
    mask = build_object_mask([box_tensor((10, 20, 5, 30))] * 3, 40, 50)
    index = torch.tensor([4, 9, 4])
    changed = add_background_noise(pixels, mask, index, seed=1, std=0.1)
    noise = (changed - pixels)[~mask.expand_as(pixels)]
    assert (changed == pixels)[mask.expand_as(pixels)].all() and noise.std() == pytest.approx(0.1, rel=0.03)
    assert abs(noise.mean()) < 0.005
    assert torch.equal(changed[0], changed[2]) and not torch.equal(changed[0], changed[1])
    assert torch.equal(add_background_noise(pixels[1:2], mask[1:2], index[1:2], seed=1, std=0.1), changed[1:2]), (
        "independent of the batch"
    )
    assert not torch.equal(add_background_noise(pixels, mask, index, seed=2, std=0.1), changed)
    loud = add_background_noise(pixels, mask, index, seed=1, std=5.0)
    assert loud.min() == 0 and loud.max() == 1


@pytest.mark.parametrize("count", [2, 3, 50_000])
def test_no_image_is_its_own_background(count):
    index = torch.arange(count)
    found = draw_partner(index, count, seed=0)
    assert (found != index).all() and found.min() >= 0 and found.max() < count and found.dtype == torch.long
    assert torch.equal(draw_partner(index[1:2], count, seed=0), found[1:2])
    if count > 3:
        assert (draw_partner(index, count, seed=1) != found).float().mean() > 0.99
        assert abs(float(((found - index) % count).double().mean()) / count - 0.5) < 0.01
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        draw_partner(index[:1], 1, seed=0)


def test_the_largest_draw_does_not_select_the_image_itself(monkeypatch):
    monkeypatch.setattr("engine.data.sample_rng.uniform", lambda index, *_, **__: torch.full(index.shape, 1 - 2.0**-24))
    index = torch.tensor([0, 7, 49_999])
    assert draw_partner(index, 50_000, seed=0).tolist() == [49_999, 6, 49_998]


# ---- Ready-made images ----


def write_image(path: Path, level: int, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path, "PNG")


@pytest.fixture
def image_set(tmp_path):
    for level, name in enumerate(["cat/0.png", "cat/1.png", "dog/0.png"]):
        write_image(tmp_path / "data" / "val" / name, level)
    return load_evaluation("folder", data_dir=str(tmp_path / "data"), image_size=16)


def test_ready_made_images_are_found_by_path_with_any_extension(tmp_path, image_set):
    for level, name in [(200, "dog/0.jpg"), (100, "cat/0.png"), (150, "cat/1.JPEG")]:
        write_image(tmp_path / "rep" / name, level, (64, 48))
    made = read_background_dir(tmp_path / "rep", image_set, CenterCrop(16, 20))
    pixels, positions, _ = made.pixels.read([0, 1, 2])
    assert pixels.shape == (3, 16, 16, 3) and pixels.amax((1, 2, 3)).tolist() == [100, 150, 200]
    assert (
        torch.equal(made.labels, image_set.labels)
        and made.classes == image_set.classes
        and positions.tolist() == [0, 1, 2]
    )
    assert made.origin == str(tmp_path / "rep") and made.files.names() == ["cat/0.png", "cat/1.JPEG", "dog/0.jpg"]
    some = image_set.take(torch.tensor([2, 0]))
    again = read_background_dir(str(tmp_path / "rep"), some, SquashedView(16))
    assert again.pixels.read([0, 1])[0].amax((1, 2, 3)).tolist() == [200, 100]


def test_ready_made_images_are_found_by_unique_names(tmp_path, image_set):
    for level, name in [(50, "1.png"), (60, "dog/0.png"), (70, "other/7.png")]:
        write_image(tmp_path / "rep" / name, level)
    some = image_set.take(torch.tensor([1]))
    assert read_background_dir(tmp_path / "rep", some, SquashedView(8)).files.names() == ["1.png"]
    with pytest.raises(UserError, match=r"no image for 1 of 3: cat/0\.png\n--background_dir needs .*contains 1.png"):
        read_background_dir(
            tmp_path / "rep", image_set, SquashedView(8)
        )  # dog/0.png has the same name, but is another image


def test_problems_of_a_background_folder_are_named(tmp_path, image_set):
    with pytest.raises(UserError, match=r"rep: no such folder\n--background_dir needs"):
        read_background_dir(tmp_path / "rep", image_set, SquashedView(8))
    write_image(tmp_path / "rep" / "x.png", 1)
    with pytest.raises(UserError, match=r"no image for 3 of 3: cat/0.png, cat/1.png, dog/0.png\n"):
        read_background_dir(tmp_path / "rep", image_set, SquashedView(8))
    shapes = load_evaluation("shapes", image_size=24, limit=2)
    with pytest.raises(UserError, match=r"shapes.*no image files.*\nleave the option out"):
        read_background_dir(tmp_path / "rep", shapes, SquashedView(8))


# ---- Pickled sets ----


def write_pickles(folder: Path, images, labels, boxes) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in (("input", images), ("label", labels), ("bbox", boxes)):
        with open(folder / f"{name}.pkl", "wb") as file:
            pickle.dump(content, file, protocol=4)  # as in the published sets
    return folder


def test_a_pickled_set_is_cropped_with_its_boxes(tmp_path):
    images = [torch.randint(256, shape).byte().numpy() for shape in ((8, 12, 3), (11, 8, 3))]
    relative_boxes = [np.array([[0.25, 0.125, 0.75, 0.5], [0.0, 0.0, 0.1, 1.0]]), np.array([[0.0, 0.0, 1.0, 1.0]])]
    folder = write_pickles(tmp_path / "rep", images, [np.int64(1), 0], relative_boxes)
    assert has_pickles(folder) and not has_pickles(tmp_path)
    image_set, boxes = read_pickles(folder, ["cat", "dog"], 6)
    assert torch.equal(image_set.pixels[0], torch.from_numpy(images[0][1:7, 3:9]))
    assert torch.equal(image_set.pixels[1], torch.from_numpy(images[1][2:8, 1:7])), "5 / 2 is rounded to even"
    assert image_set.labels.tolist() == [1, 0] and image_set.classes == ["cat", "dog"] and image_set.files is None
    # x 3, 9 and y 1, 4 minus the margins 3 and 1; the second box lies left of the crop
    assert boxes[0].tolist() == [[0, 3, 0, 6]] and boxes[1].tolist() == [[0, 6, 0, 6]]
    whole = write_pickles(tmp_path / "arrays", np.stack(images[:1] * 2), np.array([0, 1]), [relative_boxes[0]] * 2)
    assert read_pickles(whole, ["cat", "dog"], 6)[0].pixels.shape == (2, 6, 6, 3)


class Harmful:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_cannot_run_code(tmp_path):
    image, box = np.zeros((8, 8, 3), np.uint8), np.array([[0.0, 0.0, 1.0, 1.0]])
    for number, row in enumerate([(Harmful, 0, box), (image, Harmful, box), (image, 0, Harmful)]):
        path = tmp_path / f"mark{number}"
        row = [each(path) if each is Harmful else each for each in row]
        folder = write_pickles(tmp_path / "bad", *([each] for each in row))
        with pytest.raises(UserError, match=r"bad: input.pkl, label.pkl, bbox.pkl hold no image set"):
            read_pickles(folder, ["cat"], 8)
        assert not path.exists()


@pytest.mark.parametrize(
    "image, labels, message",
    [
        (np.zeros((8, 8, 3), np.float32), [0], "image is float32"),
        (np.zeros((6, 12, 3), np.uint8), [0], r"image is uint8 \(6, 12, 3\); expected uint8 of at least 8"),
        (np.zeros((8, 8, 3), np.uint8), [3], "labels from 3 to 3 do not fit 1 classes"),
        (np.zeros((8, 8, 3), np.uint8), [0, 0], "shorter"),
        (np.zeros((8, 8), np.uint8), [0], "hold no image set"),
    ],
)
def test_problems_of_a_pickled_set_are_named(tmp_path, image, labels, message):
    folder = write_pickles(tmp_path / "bad", [image], labels, [np.array([[0.0, 0.0, 1.0, 1.0]])])
    with pytest.raises(UserError, match=message):
        read_pickles(folder, ["cat"], 8)
    (folder / "bbox.pkl").write_bytes((folder / "bbox.pkl").read_bytes()[:30])
    with pytest.raises(UserError, match=r"hold no image set.*\n--background_dir needs"):
        read_pickles(folder, ["cat"], 8)

"""A trained mask decoder as a saliency source."""

import csv

import pytest
import torch
from support import same_state, shapes_command
from torch.nn import functional as F

import train
from engine.errors import UserError
from mixing import MIXERS, build_mixer
from mixing.saliencymix import SaliencyMix
from mixing.show import __main__ as show
from saliency import build_source
from saliency.casm.boxes import find_centroids
from saliency.casm.network import load_casm
from saliency.casm.source import CASM

STATISTICS = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}  # of casm_file


def draw_disc(row: int, column: int, radius: int = 5, side: int = 32) -> torch.Tensor:
    """Return (side, side): 1 inside a disc, 0 elsewhere."""
    line = torch.arange(side)
    return ((line[:, None] - row).square() + (line - column).square() <= radius**2).float()


def test_casm_source_returns_the_masks_of_its_checkpoint(casm_file):
    images = torch.randn(4, 3, 32, 32)
    saved = load_casm(casm_file)
    masks = CASM(casm_file, **STATISTICS)(images, None)
    torch.testing.assert_close(masks, saved.network(images)[0][:, 0])
    assert masks.std() > 0
    assert not any(parameter.requires_grad for parameter in saved.network.parameters())


def test_images_are_converted_to_the_normalization_of_the_checkpoint(casm_file):
    images, mean, std = torch.rand(4, 3, 32, 32), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    inputs = [
        (images - torch.tensor(m).view(3, 1, 1)) / torch.tensor(s).view(3, 1, 1)
        for m, s in ((mean, std), STATISTICS.values())
    ]
    other = CASM(casm_file, mean=mean, std=std)(inputs[0], None)
    torch.testing.assert_close(other, CASM(casm_file, **STATISTICS)(inputs[1], None), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(96, 96), (40, 28), (12, 16)])
def test_images_are_resized_only_if_their_size_differs_a_lot(casm_file, height, width, monkeypatch):
    images, source = torch.randn(2, 3, height, width), CASM(casm_file, **STATISTICS)
    input_sizes, predict_masks = [], source.network.predict_masks
    monkeypatch.setattr(
        source.network, "predict_masks", lambda given: input_sizes.append(given.shape[-2:]) or predict_masks(given)
    )
    masks = source(images, None)
    assert input_sizes == [(32, 32) if (height, width) != (40, 28) else (40, 28)]
    assert masks.shape == (2, height, width) and masks.min() >= 0 and masks.max() <= 1
    scaled = F.interpolate(images, (32, 32), mode="bilinear", align_corners=False, antialias=True)
    if (height, width) != (40, 28):
        expected = source.network(scaled)[0]
        mode = {"mode": "area"} if height < 32 else {"mode": "bilinear", "align_corners": False}
        torch.testing.assert_close(masks, F.interpolate(expected, (height, width), **mode)[:, 0])


def test_constant_masks_become_zero_and_methods_count_them(casm_file):
    source = CASM(casm_file, **STATISTICS)
    for parameter in source.network.decoder.final.parameters():
        parameter.zero_()  # the mask is sigmoid(0) everywhere
    images, targets = torch.randn(5, 3, 32, 32), torch.eye(5)
    assert source(images, targets).eq(0).all()
    mixer = build_mixer("puzzlemix", mean=(0.5,) * 3, std=(0.5,) * 3)
    mixer(images, targets, source)
    assert int(mixer.replaced_maps) == 5


def test_points_are_the_center_of_the_object_not_a_corner_of_the_plateau(casm_file):
    source = CASM(casm_file, **STATISTICS)
    maps = torch.stack([draw_disc(10, 20), draw_disc(25, 6) + 0.3 * draw_disc(5, 28, 3), 0.5 + 0.1 * draw_disc(16, 16)])
    rows, columns = source.points(maps)
    assert rows.tolist() == [10, 25, 16] and columns.tolist() == [20, 6, 16]
    assert int(maps[0].flatten().argmax()) != 10 * 32 + 20, "the first maximum is another pixel"


def test_points_on_the_coarse_grid_match_those_of_all_pixels(casm_file):
    coarse = torch.rand(6, 1, 7, 7)
    smooth = F.interpolate(coarse, (56, 56), mode="bicubic", align_corners=False).clamp(0, 1)[:, 0]
    maps = smooth.repeat_interleave(4, 1).repeat_interleave(4, 2)
    rows, columns = CASM(casm_file, **STATISTICS).points(maps)
    expected = (find_centroids(maps) + 0.5).floor().long()
    assert rows.tolist() == expected[:, 0].tolist() and columns.tolist() == expected[:, 1].tolist()


def test_points_of_constant_maps_are_uniformly_random(casm_file):
    source = CASM(casm_file, **STATISTICS)
    rows, columns = source.points(torch.ones(400, 6, 9))
    assert rows.min() == 0 and rows.max() == 5 and columns.min() == 0 and columns.max() == 8
    assert rows.float().std() > 1 and columns.float().std() > 2


def test_saliencymix_centers_the_patch_on_the_point_of_the_source():
    maps = torch.stack([draw_disc(8, 8), draw_disc(20, 12)])

    class CenterSource:
        def __call__(self, images, targets):
            return maps

        def points(self, saliency):
            return CASM.points(self, saliency)

    images = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)])

    def find_patch_center(source) -> torch.Tensor:
        for seed in range(50):  # until the images are mixed with each other and the box is small
            torch.manual_seed(seed)
            mixed, soft = SaliencyMix(mix_prob=1.0)(images, torch.eye(2), source)
            if 0.03 < soft[0, 1] < 0.15:
                return mixed[0, 0].nonzero().float().mean(0)
        raise AssertionError("no suitable seed")

    middle = find_patch_center(CenterSource())
    assert (middle - torch.tensor([19.5, 11.5])).abs().max() <= 0.5
    corner = find_patch_center(lambda images, targets: maps)  # a function: the first maximum, the top of the disc
    assert (corner - torch.tensor([14.5, 11.5])).abs().max() <= 1


@pytest.mark.parametrize("name", sorted(name for name in MIXERS if MIXERS[name]))
def test_every_method_accepts_the_casm_source(name, casm_file):
    mixer = build_mixer(name, mean=(0.5,) * 3, std=(0.5,) * 3)
    source = mixer.build_source(lambda one: build_source("casm", casm=casm_file, **STATISTICS, **one.gradient_options))
    images, targets = torch.randn(6, 3, 32, 32), torch.eye(6)
    mixed, soft = mixer(images, targets, source)
    assert mixed.shape == images.shape and mixed.isfinite().all()
    torch.testing.assert_close(soft.sum(1), torch.ones(6))


def test_training_uses_the_casm_source(shapes_run, casm_file):
    words = ["--saliency", "casm", "--casm", casm_file, "--mix_prob", "1"]
    whole = shapes_run(*words, method="saliencymix", epochs=2, name="whole")
    other = shapes_run("--mix_prob", "1", method="saliencymix", epochs=2, name="other")
    states = [torch.load(run / "last.pt") for run in (whole, other)]
    assert not same_state(states[0]["model"], states[1]["model"]), "the default fine-grained maps give other weights"
    assert states[0]["config"]["casm"] == casm_file
    with open(whole / "log.csv") as file:
        assert all(float(row["saliency_seconds"]) > 0 for row in csv.DictReader(file))


def test_errors_and_warnings_about_the_casm_option(tmp_path, casm_file, capsys):
    with pytest.raises(SystemExit):
        train.main(shapes_command(tmp_path, "--saliency", "casm", method="puzzlemix"))
    assert "--saliency casm needs --casm FILE" in capsys.readouterr().err
    with pytest.raises(UserError, match="no such file"):
        train.main(shapes_command(tmp_path, "--saliency", "casm", "--casm", "gone.chk", method="puzzlemix"))
    train.main(shapes_command(tmp_path, "--casm", casm_file, method="puzzlemix", epochs=1))
    assert "no effect with --method puzzlemix: --casm" in capsys.readouterr().out


def test_mixing_show_draws_casm_maps(tmp_path, casm_file, few_shapes, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr("engine.drawing.figures.draw_mixtures", lambda path, **given: drawn.append(given))
    words = ["--dataset", "shapes", "--indices", "1", "2", "3", "--method", "saliencymix", "rmix", "--n", "1"]
    show.main([*words, "--saliency", "casm", "--casm", casm_file])
    assert drawn[0]["guide"] == "casm" and drawn[0]["saliency"].shape == (3, 32, 32)
    with pytest.raises(UserError, match="needs --casm FILE"):
        show.main([*words, "--saliency", "casm"])
    with pytest.raises(UserError, match="cam needs --model_path"):
        show.main([*words, "--saliency", "cam"])

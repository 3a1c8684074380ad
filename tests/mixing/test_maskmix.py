import pytest
import torch

import mixing.maskmix
from mixing.maskmix import MaskMix, draw_cells


def test_cells_by_hand():
    order = torch.tensor([[0.4, 0.1, 0.9, 0.3], [0.2, 0.3, 0.4, 0.5]])
    assert draw_cells(order, torch.tensor(0.26), 2).int().tolist() == [[[0, 1], [0, 1]], [[1, 1], [0, 0]]]
    assert draw_cells(order, torch.tensor([0.0, 1.0]), 2).int().sum((1, 2)).tolist() == [0, 4]
    assert draw_cells(order, torch.tensor([0.25, 0.51]), 2).int().tolist() == [[[0, 1], [0, 0]], [[1, 1], [1, 0]]]


def test_a_share_of_whole_cells_of_the_image_is_kept(monkeypatch):
    monkeypatch.setattr(mixing.maskmix, "draw_lam", lambda *_: torch.tensor(0.3, dtype=torch.float64))
    images = torch.arange(1.0, 7.0).view(6, 1, 1, 1).expand(6, 3, 8, 12)
    mixer = MaskMix(num_patches=4)
    mixed, soft = mixer(images, torch.eye(6), None)
    cells = mixed[:, 0].unflatten(1, (4, 2)).unflatten(3, (4, 3))
    assert torch.equal(cells, cells[:, :, :1, :, :1].expand_as(cells)), "cells of 2 x 3 pixels are whole"
    kept = (cells[:, :, 0, :, 0] == images[:, :1, :1, 0]).flatten(1)
    mixed_in = mixer.partner != torch.arange(6)
    assert kept[mixed_in].sum(1).eq(5).all()  # 0.3 of 16 cells, rounded up
    assert len({tuple(row) for row in kept[mixed_in].tolist()}) > 1, "the cells differ between the images"
    torch.testing.assert_close(soft.diag()[mixed_in], torch.full((int(mixed_in.sum()),), 5 / 16))


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (3, 3, 8, 12)])
def test_cells_must_divide_the_image(shape):
    images, targets = torch.rand(shape), torch.eye(3)[: shape[0]]
    mixed, soft = MaskMix()(images, targets, None)
    assert mixed.shape == shape and soft.sum(1).allclose(torch.ones(shape[0]))
    with pytest.raises(ValueError, match=r"num_patches: 8x\d+ pixels cannot be cut into 5x5 blocks; \[2, 4"):
        MaskMix(num_patches=5)(images, targets, None)


@pytest.mark.parametrize("options", [{"mixup_alpha": 0}, {"num_patches": 1}, {"mix_prob": -1}])
def test_wrong_hyper_parameters_raise_an_error(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        MaskMix(**options)

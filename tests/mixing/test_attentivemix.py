import pytest
import torch
from support import load_method_recording

from mixing import AttentiveMix
from mixing.attentivemix import choose_cells, count_cells
from mixing.ops import blend_pixels, upsample_blocks


def in_order(batch, cells):
    return torch.arange(cells).expand(batch, -1)


@pytest.mark.parametrize("case", ["attentive_a", "attentive_b"])
def test_mix_matches_the_published_code(case, method_golden):
    images, _ = load_method_recording(method_golden, case)
    attention = torch.from_numpy(method_golden[f"{case}_attention"])
    cells = attention[0].numel()
    count = torch.tensor(int(method_golden[f"{case}_k"]))
    if case == "attentive_a":
        assert count_cells(torch.tensor(float(method_golden[f"{case}_lam_draw"])), cells) == count
    mask = upsample_blocks(choose_cells(attention, count, in_order(4, cells)), 32, 32)
    assert mask.int().tolist() == method_golden[f"{case}_mask"].tolist()
    assert count / cells == method_golden[f"{case}_lam"]
    mixed = blend_pixels(images, torch.from_numpy(method_golden[f"{case}_perm"]).long(), mask)
    torch.testing.assert_close(mixed, torch.from_numpy(method_golden[f"{case}_mixed"]), rtol=0, atol=1e-6)


def test_cells_match_the_code_of_the_paper(method_golden):
    images = torch.from_numpy(method_golden["images"][method_golden["attentive_c_rows"]]).float()
    attention = torch.from_numpy(method_golden["attentive_c_attention"]).unsqueeze(0)
    count = torch.tensor(int(method_golden["attentive_c_k"]))
    assert count / 64 == method_golden["attentive_c_lam"]
    mask = choose_cells(attention, count, in_order(1, 64))
    assert mask[0].int().tolist() == method_golden["attentive_c_cells"].tolist()
    mixed = blend_pixels(images, torch.tensor([1, 0]), upsample_blocks(mask, 32, 32))[0]
    assert torch.equal(mixed, torch.from_numpy(method_golden["attentive_c_mixed_u8"]).float())


def test_cells_by_hand():
    attention = torch.tensor([[[1.0, 5.0], [5.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]])
    order = torch.tensor([[2, 1, 0, 3], [3, 0, 1, 2]])  # of the two fives, cell 2 comes first
    assert choose_cells(attention, torch.tensor(1), order).flatten(1).int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]
    each = choose_cells(attention, torch.tensor([3, 2]), order).flatten(1).int().tolist()
    assert each == [[0, 1, 1, 1], [1, 0, 0, 1]]
    assert count_cells(torch.tensor([0.0, 0.26, 0.99, 1.0]), 49).tolist() == [1, 12, 48, 49]


def test_images_show_where_they_are_salient_and_ties_are_random():
    images, targets = torch.rand(4, 3, 8, 8), torch.eye(4)
    saliency = torch.zeros(4, 8, 8)
    saliency[:, 2:4, 6:8] = 1
    mixer = AttentiveMix(num_patches=4, top_k=2)
    seen = set()
    for _ in range(6):
        mixer(images, targets, lambda *_: saliency)
        assert mixer.weight[..., 2:4, 6:8].eq(1).all()
        seen |= {tuple(row.tolist()) for row in mixer.weight.flatten(1).argmax(1, keepdim=True)}
    assert len(seen) > 2, "the second of two cells is any of those without saliency"


def test_errors():
    with pytest.raises(ValueError, match="num_patches: 12x8 pixels cannot be cut into 8x8 blocks"):
        AttentiveMix()(torch.rand(2, 3, 12, 8), torch.eye(2), lambda *_: torch.rand(2, 12, 8))
    for options in ({"top_k": 0}, {"top_k": 17, "num_patches": 4}, {"num_patches": 0}, {"mixup_alpha": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            AttentiveMix(**options)

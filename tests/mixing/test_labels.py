"""Label rules: the weights of two labels by the area, by the saliency that the mix shows, or by the mean of both."""

import pickle

import pytest
import torch
from support import load_method_recording, same_state
from torch.nn import functional as F

from mixing import MIXERS, Choice, CutMix, Mixer, build_mixer, compose_mixer, mixer_class
from mixing.base import LABEL_RULES, MAP_RULES
from mixing.ops import box_mask, find_saliency_share, normalize_sum
from saliency import Source

SMALL = {"block_num": (4,), "m_block_num": 2, "random_patches": (4,), "num_patches": 4, "mix_prob": 1.0}
MASKED = [name for name in MIXERS if not (mixer_class(name).keeps_labels or mixer_class(name).label_obstacle)]
RESIZING = {"resizemix", "snapmix"}  # they show the whole of what they paste, whatever its area
MOVING = RESIZING | {"sage", "puzzlemix"}  # or pixels leave the frame, or appear twice


class Counting:
    """A source with maps of its own, which counts its calls."""

    clean_weight, per_image, logits, has_gradient, calls = 0.0, True, None, False, 0

    def __init__(self, maps: torch.Tensor | None = None):
        self.maps = maps

    def __call__(self, images, targets):
        self.calls += 1
        return images.detach().abs().mean(1) if self.maps is None else self.maps

    def points(self, saliency):
        return None


class TwoHalves(Mixer):
    """The partner shows in the right half."""

    def mix_batch(self, images, targets, source):
        weight = torch.ones(1, *images.shape[-2:])
        weight[..., images.shape[-1] // 2 :] = 0
        partner = torch.arange(len(images)).flip(0)
        self.set_weight(images, lambda: weight, partner)
        return torch.where(weight.bool().unsqueeze(1), images, images[partner]), 0 * targets


def mix(mixer, source=None, images=None, seed=0):
    if images is None:  # of 4 x 4 cells, a few of which are salient
        images = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(5)).pow(8)
        images = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.manual_seed(seed)
    return mixer(images, torch.eye(6), source)


def own_share(mixer, soft):
    """Return the label weight of each image in its mix, and which images have another partner than themselves."""
    index = torch.arange(len(soft))
    return soft[index, index], mixer.partner != index


def boxed(golden, name, height, width):
    return box_mask(torch.from_numpy(golden[name]).long().unsqueeze(0), height, width).squeeze(1).float()


@pytest.mark.parametrize("case", ["transmix_a", "transmix_b", "transmix_c"])
def test_the_mean_is_the_rule_of_transmix(case, method_golden):
    """The map is that of the mixed image, in both places. Each cell of the attention counts at its corner pixel."""
    images, labels = load_method_recording(method_golden, case)
    height, width = images.shape[-2:]
    attention = torch.from_numpy(method_golden[f"{case}_attention"])
    cells, maps = torch.arange(attention.shape[-1]), torch.zeros(images[:, 0].shape)
    maps[:, (cells * height // len(cells)).unsqueeze(1), cells * width // len(cells)] = attention
    smoothing = float(method_golden[f"{case}_smoothing"])
    targets = (1 - smoothing) * F.one_hot(labels, 10) + smoothing / 10
    inside = boxed(method_golden, f"{case}_box", height, width)
    for rule, name in (("mean", "soft"), ("area", "soft_area")):
        mixer = Mixer()
        mixer.set_labels(rule)
        mixer.set_weight(images, lambda: 1 - inside, torch.arange(len(images)).flip(0))
        mixer.move_maps = lambda one: (one, one)
        soft = mixer.weigh_labels(images, targets, Counting(maps))
        torch.testing.assert_close(soft, torch.from_numpy(method_golden[f"{case}_{name}"]).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ["snapmix_a", "snapmix_b", "snapmix_c"])
def test_the_saliency_rule_weighs_as_snapmix_does(case, method_golden, monkeypatch):
    """Each image weighs what its map has outside of its box, its partner what the map has in the source box."""

    def recorded(name):
        return torch.from_numpy(method_golden[f"{case}_{name}"])

    images, labels = load_method_recording(method_golden, case)
    maps, partner, shown = recorded("map").float(), recorded("perm").long(), []
    keep = find_saliency_share
    monkeypatch.setattr("mixing.base.find_saliency_share", lambda *args: (shown.append(args), keep(*args))[1])
    monkeypatch.setattr("mixing.snapmix.draw_partner", lambda _: partner)
    boxes = iter(recorded(name).long().unsqueeze(0) for name in ("box", "box_partner"))
    mixer = build_mixer("snapmix")
    mixer.draw_boxes = lambda *_: next(boxes)
    mixer.set_labels("saliency")
    _, soft = mixer(images, F.one_hot(labels, 10).float(), lambda *_: maps)
    own, pasted, _ = shown[-1]
    equal, total = labels == labels[partner], own + pasted
    for one, name in ((own, "weight_own"), (pasted, "weight_partner")):  # for equal labels, it records the sum
        torch.testing.assert_close(torch.where(equal, total, one), recorded(name).float(), rtol=0, atol=1e-6)
    expected = F.one_hot(labels, 10) * (own / total).unsqueeze(1) + F.one_hot(labels[partner], 10) * (
        pasted / total
    ).unsqueeze(1)
    torch.testing.assert_close(soft, expected, rtol=0, atol=1e-6)


def test_label_weights_of_two_halves_by_hand():
    """Image 0 has its object in the left half, which it keeps; image 1 a quarter of it, in the right half."""
    maps = torch.zeros(2, 2, 4)
    maps[0, :, 0] = torch.tensor([5.0, 3.0])
    maps[1] = torch.tensor([[3.0, 0.0, 0.0, 1.0], [3.0, 0.0, 1.0, 0.0]])
    mixer, shares = TwoHalves(), {}
    for rule in LABEL_RULES:
        mixer.set_labels(rule)
        _, soft = mixer(torch.rand(2, 3, 2, 4), torch.eye(2), lambda *_: maps)
        shares[rule] = soft.diag().tolist()
        torch.testing.assert_close(soft.sum(1), torch.ones(2))
    assert shares["area"] == [0.5, 0.5]
    # mix 0 shows all of image 0 and 2/8 of image 1; mix 1 shows 6/8 of image 1 and nothing of image 0
    torch.testing.assert_close(torch.tensor(shares["saliency"]), torch.tensor([1 / 1.25, 1.0]))
    torch.testing.assert_close(torch.tensor(shares["mean"]), torch.tensor([(0.5 + 0.8) / 2, 0.75]))


def test_where_the_mix_shows_no_saliency_the_area_counts():
    maps = torch.zeros(2, 2, 4)
    maps[0, :, 3], maps[1, :, 0] = 1, 1  # mix 0 shows the left of image 0 and the right of image 1: nothing of either
    mixer = TwoHalves()
    mixer.set_labels("saliency")
    _, soft = mixer(torch.rand(2, 3, 2, 4), torch.eye(2), lambda *_: maps)
    assert soft.tolist() == [[0.5, 0.5], [0.5, 0.5]], "mix 1 shows all of both"


def test_a_target_that_is_soft_already_is_blended():
    targets = torch.tensor([[0.8, 0.2, 0.0], [0.0, 0.5, 0.5]])
    mixer = TwoHalves()
    mixer.set_labels("area")
    _, soft = mixer(torch.rand(2, 3, 2, 4), targets)
    torch.testing.assert_close(soft, targets.mean(0).expand(2, -1))


def test_cutmix_by_hand():
    """The object is in the left half of each image: a box in the right half brings nothing, and the label stays."""
    maps, seen = torch.zeros(6, 16, 16), 0
    maps[..., :8] = 1
    for rule in MAP_RULES:
        mixer = CutMix(mix_prob=1.0)
        mixer.set_labels(rule)
        for seed in range(30):
            _, soft = mix(mixer, lambda *_: maps, seed=seed)
            share, is_mixed = own_share(mixer, soft)
            if mixer.weight[..., :8].eq(1).all() and is_mixed.any():
                area = mixer.weight.mean((1, 2, 3))
                expected = torch.ones(6) if rule == "saliency" else (area + 1) / 2
                torch.testing.assert_close(share[is_mixed], expected[is_mixed])
                seen += bool(area.min() < 1)
    assert seen > 3


@pytest.mark.parametrize("name", [name for name in MASKED if name not in MOVING])
def test_without_saliency_all_rules_weigh_by_the_area(name):
    for maps in (torch.zeros(6, 16, 16), torch.full((6, 16, 16), 0.3)):
        results = []
        for rule in LABEL_RULES:
            mixer = build_mixer(name, **SMALL)
            mixer.set_labels(rule)
            results.append(mix(mixer, lambda *_, maps=maps: maps)[1])
        for soft in results[1:]:
            torch.testing.assert_close(soft, results[0], rtol=0, atol=1e-6)
        share, is_mixed = own_share(mixer, results[0])
        torch.testing.assert_close(share[is_mixed], mixer.weight.mean((1, 2, 3))[is_mixed], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MASKED)
def test_a_rule_changes_the_labels_alone_and_asks_for_the_maps_once(name):
    """The images, the partners and the weight maps stay bit for bit the same, and so do the random numbers."""
    expected, own_labels, differing = None, None, False
    own_calls = int(mixer_class(name).default_source is not None)
    for rule in (None, *LABEL_RULES):
        mixer, source = build_mixer(name, **SMALL), Counting()
        mixer.set_labels(rule)
        mixed, soft = mix(mixer, source)
        assert source.calls == max(own_calls, name != "mixup" and rule in MAP_RULES)
        assert mixer.maps is None and mixer.move_maps is None
        torch.testing.assert_close(soft.sum(1), torch.ones(6))
        assert soft.min() >= 0 and soft.max() <= 1 and soft.dtype == torch.float32
        kept = [mixed, mixer.weight, mixer.partner, torch.rand(3)]
        assert expected is None or same_state(kept, expected)
        expected, own_labels = expected or kept, soft if rule is None else own_labels
        differing |= not torch.equal(soft, own_labels) and rule in MAP_RULES
    assert differing == (name != "mixup")


def test_the_area_rule_is_the_own_rule_of_most_methods():
    for name in MASKED:
        own, mixer = build_mixer(name, **SMALL), build_mixer(name, **SMALL)
        mixer.set_labels("area")
        for seed in range(3):
            soft, by_area = (mix(one, Counting(), seed=seed)[1] for one in (own, mixer))
            if name != "snapmix":  # whose own rule is the saliency
                rounding = 1 / 256 if name == "fmix" else 1e-6  # its own labels follow the share before rounding
                torch.testing.assert_close(by_area, soft, rtol=0, atol=rounding)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["cutmix", "saliencymix", "guidedmixup"])
def test_an_invalid_map_is_uniform_and_counts_once(name, bad):
    maps = torch.rand(6, 16, 16) + 0.1
    maps[2] = bad
    mixer = build_mixer(name, **SMALL)
    mixer.set_labels("saliency")
    _, soft = mix(mixer, lambda *_: maps)
    assert soft.isfinite().all() and int(mixer.replaced_maps) == 1
    maps[2] = 1
    assert torch.equal(mix(mixer, lambda *_: maps)[1], soft)


def test_one_box_for_the_batch_asks_for_all_maps():
    results = []
    for rule in (None, "saliency"):
        source, seen = Counting(), []
        mixer = build_mixer("saliencymix", mix_prob=1.0, saliency_scope="batch")
        mixer.set_labels(rule)
        call = source.__call__
        results.append(
            mix(
                mixer,
                lambda images, targets, call=call, seen=seen: (seen.append(len(images)), call(images, targets))[1],
            )
        )
    assert seen == [6] and torch.equal(results[0][0], results[1][0]) and not torch.equal(results[0][1], results[1][1])


def test_a_batch_that_is_not_mixed_keeps_its_labels():
    mixer, source = build_mixer("cutmix", mix_prob=0.0), Counting()
    mixer.set_labels("saliency")
    images, targets = torch.rand(6, 3, 16, 16), torch.eye(6)
    mixed, soft = mixer(images, targets, source)
    assert mixed is images and soft is targets and source.calls == 0


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["s2mix"], "labels mean: S2Mix keeps the label of each image, so no label rule applies; take a method that "),
        (["none"], "labels mean: NoMix keeps the label of each image"),
        (["cutout"], "labels mean: Cutout keeps the label of each image"),
        (["none", "s2mix"], "labels mean: NoMix keeps the label of each image"),
        (["manifold"], "labels mean: ManifoldMixup mixes a hidden layer"),
        (["comixup"], "labels mean: CoMixup mixes more than two images"),
        (["recursivemix"], "labels mean: RecursiveMix mixes in images of earlier batches"),
        (["cutmix", "comixup"], "labels mean: CoMixup mixes more than two images"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"cutout": True, "mix_fraction": 0.5}])
def test_a_method_that_no_rule_fits_is_refused(names, message, options):
    if names != ["cutout"] or not options:
        with pytest.raises(ValueError, match=message) as error:
            compose_mixer(names, labels="mean", **options)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="labels must be area, saliency, mean or None, got 'median'"):
        compose_mixer(["cutmix"], labels="median")


def test_a_choice_applies_the_rule_to_each_method_that_mixes_labels():
    mixer = compose_mixer(["s2mix", "mixup", "cutmix", "saliencymix"], labels="saliency", mix_prob=1.0)
    assert isinstance(mixer, Choice) and [one.label_rule for one in mixer.mixers] == [None, None, *["saliency"] * 2]
    built = mixer.build_source(lambda one: one.default_source)
    assert built == ["spectral_residual", None, "gradient", "fine_grained"]


def test_a_method_without_saliency_gets_the_gradient_as_its_default_source():
    mixer = CutMix(mix_prob=1.0)
    for rule, source in (("mean", "gradient"), ("area", None), ("saliency", "gradient"), (None, None)):
        mixer.set_labels(rule)
        assert mixer.default_source == mixer.build_source(lambda one: one.default_source) == source
    mixer.set_labels("mean")
    with pytest.raises(ValueError, match="CutMix needs a saliency source .* its default source is gradient"):
        mix(mixer)
    assert CutMix.default_source is None


def mix_pair(mixer, maps, monkeypatch, rule="saliency"):
    """Mix two images with each other; returns the label weight of each in its own mix."""
    monkeypatch.setattr(f"mixing.{type(mixer).__name__.lower()}.draw_partner", lambda _: torch.tensor([1, 0]))
    mixer.set_labels(rule)
    mixed, soft = mixer(torch.rand(2, 3, *maps.shape[1:]), torch.eye(2), lambda *_: maps)
    return soft.diag()


def test_smmix_shows_the_window_that_it_has_moved(monkeypatch):
    """Each object fills one patch: an image keeps its own, and that of its partner is pasted where nothing was."""
    maps = torch.zeros(2, 8, 8)
    maps[0, :2, :2], maps[1, 4:6, 6:] = 1, 1
    own = {"num_patches": 4, "min_side_ratio": 0.25, "max_side_ratio": 0.25}
    for rule, share in (("saliency", 0.5), ("mean", (15 / 16 + 0.5) / 2)):
        assert mix_pair(build_mixer("smmix", **own), maps, monkeypatch, rule).tolist() == pytest.approx([share] * 2)


def test_what_sage_shifts_out_of_the_frame_does_not_count(monkeypatch):
    """All partners move by two columns: a quarter of object 1 leaves the frame, all of object 0 stays in it."""
    maps = torch.zeros(2, 2, 4)
    maps[0, :, 0], maps[1, :, 1], maps[1, :, 3] = 1, 3, 1
    mixer = build_mixer("sage", blur_sigma=0.0, update_ratio=1.0)
    mixer.find_offset = lambda *_: torch.tensor([[0, 2], [0, 2]])
    torch.testing.assert_close(mix_pair(mixer, maps, monkeypatch), torch.tensor([1 / 1.75, 0.5]))


def test_puzzlemix_shows_the_blocks_that_it_has_moved(monkeypatch):
    """The left blocks show the image, the right ones its partner; mix 1 shows two blocks twice."""
    maps = torch.zeros(2, 4, 4)
    maps[0, 0, 0], maps[1, 1, 3], maps[1, 3, 2] = 2, 1, 1  # block 0; blocks 1 and 3
    mask = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]).expand(2, -1, -1)
    image_blocks, partner_blocks = (
        torch.tensor([[0, 1, 2, 3], [3, 1, 3, 0]]),
        torch.tensor([[0, 3, 2, 1], [1, 0, 2, 0]]),
    )
    mixer = build_mixer("puzzlemix", block_num=(2,))
    mixer.solve_mask_and_transport = lambda *_: (mask, (image_blocks, partner_blocks, 2, 2))
    # mix 0: all of image 0, and blocks 3 and 1 of image 1; mix 1: half of image 1 twice, all of image 0 twice
    torch.testing.assert_close(mix_pair(mixer, maps, monkeypatch), torch.tensor([0.5, 1 / 3]))
    mixer.solve_mask_and_transport = lambda *_: (mask, None)
    maps[0, 0, 3] = 2  # without transport, mix 0 shows half of image 0, and mix 1 the other half and nothing of image 1
    torch.testing.assert_close(mix_pair(mixer, maps, monkeypatch), torch.tensor([0.5 / 1.5, 0.0]))


def test_resizemix_shows_the_whole_partner():
    maps, empty = torch.rand(6, 16, 16, generator=torch.Generator().manual_seed(1)).square(), 0
    for in_batch in (False, True):
        mixer = build_mixer("resizemix", resize_range=(0.0, 0.8), in_batch=in_batch)
        mixer.set_labels("saliency")
        for seed in range(12):
            share, is_mixed = own_share(mixer, mix(mixer, lambda *_: maps, seed=seed)[1])
            weight = mixer.weight.squeeze(1)
            kept, is_empty = (weight * normalize_sum(maps)).sum((1, 2)), weight.flatten(1).all(1)
            torch.testing.assert_close(share[is_mixed], (kept / (kept + ~is_empty.bool()))[is_mixed])
            empty += int((is_empty & is_mixed).sum())
    assert empty


@pytest.mark.parametrize("name", MASKED)
def test_a_part_of_a_batch_gets_the_labels_of_the_rule(name):
    """PartialMix mixes the last four images by the rule, and Chain weighs the labels of its last method."""
    images, targets = torch.rand(7, 3, 16, 16), torch.eye(7)
    partial = compose_mixer([name], labels="mean", mix_fraction=0.6, **SMALL)
    alone = compose_mixer([name], labels="mean", **SMALL)
    results = []
    for mixer, first in ((partial, 0), (alone, 3)):
        torch.manual_seed(4)
        results.append(mixer(images[first:], targets[first:], Counting())[1])
    assert torch.equal(results[0][:3], targets[:3]) and torch.equal(results[0][3:], results[1])
    chain = compose_mixer([name], labels="mean", cutout=True, cutout_length=4, **SMALL)
    _, soft = chain(images, targets, Counting())
    torch.testing.assert_close(soft.sum(1), torch.ones(7))
    assert chain.mixers[-1].label_rule == (None if name == "mixup" else "mean")


@pytest.mark.parametrize("name", MASKED)
def test_a_used_mixer_with_a_rule_can_be_pickled(name):
    mixer = build_mixer(name, **SMALL)
    mixer.set_labels("mean")
    mix(mixer, Counting())
    copied = pickle.loads(pickle.dumps(mixer))
    assert same_state(mix(copied, Counting(), seed=1), mix(mixer, Counting(), seed=1))


@pytest.mark.parametrize("name", [name for name in MASKED if not mixer_class(name).default_source])
def test_a_source_that_learns_gets_the_gradient_through_a_mix_without_saliency(name):
    images = torch.rand(6, 3, 16, 16).requires_grad_()
    mixer = build_mixer(name, **SMALL)
    mixer.set_labels("saliency")
    mixed, soft = mix(mixer, Counting(), images)
    coverage = Source.measure_coverage(mixed, images)
    assert not soft.requires_grad
    if name != "resizemix":  # which shows some pixels of the partner twice, others not at all
        torch.testing.assert_close(coverage.sum(), torch.tensor(6.0 * 256))

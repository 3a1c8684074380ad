import copy
import pickle

import pytest
import torch
from support import same_state

from mixing import (
    ALIASES,
    MIXERS,
    CutMix,
    SaliencyMix,
    build_mixer,
    compose_mixer,
    compose_options,
    hyper_parameters,
    mixer_class,
)
from mixing.base import FunctionSource, Mixer, as_source
from mixing.compose import Choice, NoMix, PartialMix
from mixing.cutmix import center_boxes_real
from mixing.cutout import Cutout, erase
from mixing.manifold import ManifoldMixup
from mixing.ops import blend, box_mask, center_boxes, draw_lam, paste
from mixing.saliencymix import find_peaks
from models import build_model
from saliency import Source
from saliency.static import FineGrained, FloatBytes

SHAPES = [(4, 3, 8, 8), (1, 3, 8, 8), (5, 3, 8, 12)]  # one image; an odd batch with H != W
TARGET_MIXERS = [name for name in MIXERS if "mix_prob" in hyper_parameters(name)]
SMALL = {"block_num": (2,), "m_block_num": 2, "random_patches": (2,), "num_patches": 4, "patches_per_side": (2,)}
SMALL |= {"grid_holes": (1, 2)}


def batch(shape, classes=5):
    images = torch.randn(shape)
    return images, torch.eye(classes)[torch.arange(shape[0]) % classes]


def centre(images, targets):
    """A source whose maps peak at row 2, column 3."""
    saliency = torch.zeros(len(images), *images.shape[-2:])
    saliency[:, 2, 3] = 1
    return saliency


@pytest.mark.parametrize("name", sorted(MIXERS))
@pytest.mark.parametrize("shape", SHAPES)
def test_every_method_keeps_shapes_and_inputs_and_repeats_with_the_seed(name, shape):
    images, targets = batch(shape)
    kept = images.clone(), targets.clone()
    for seed in range(8):
        torch.manual_seed(seed)
        mixer = build_mixer(name, mix_prob=1.0, **SMALL)
        mixed, soft = mixer(images, targets, centre)
        torch.manual_seed(seed)
        again = build_mixer(name, mix_prob=1.0, **SMALL)(images, targets, centre)
        assert mixed.shape == images.shape and soft.shape == targets.shape and mixed.dtype == images.dtype
        torch.testing.assert_close(soft.sum(1), torch.ones(shape[0]))
        assert torch.equal(images, kept[0]) and torch.equal(targets, kept[1]), "inputs were modified"
        assert torch.equal(mixed, again[0]) and torch.equal(soft, again[1]), "same seed, different results"


@pytest.mark.parametrize("copy_mixer", [copy.deepcopy, lambda mixer: pickle.loads(pickle.dumps(mixer))])
@pytest.mark.parametrize("name", sorted(MIXERS))
def test_a_copy_of_a_used_mixer_mixes_as_it_does(name, copy_mixer):
    images, targets = batch((4, 3, 8, 8))
    mixer = compose_mixer([name], cutout=name != "cutout", mix_prob=1.0, **SMALL)
    mixer(images, targets, centre)
    results = []
    for one in (copy_mixer(mixer), mixer):
        torch.manual_seed(0)
        results.append(one(images, targets, centre))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", sorted(MIXERS))
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_preserved(name, layout):
    images, targets = batch((4, 3, 16, 16))
    torch.manual_seed(2)
    mixed, _ = build_mixer(name, mix_prob=1.0, **SMALL)(images.contiguous(memory_format=layout), targets, centre)
    assert mixed.is_contiguous(memory_format=layout)


def test_paste_copies_the_box_and_weights_targets_by_its_area():
    images = torch.stack([torch.zeros(3, 4, 8), torch.ones(3, 4, 8)])
    boxes = torch.tensor([[0, 2, 4, 8], [0, 2, 4, 8]])
    mixed, soft = paste(images, torch.eye(2), torch.tensor([1, 0]), boxes)
    assert mixed[0, :, :2, 4:].eq(1).all() and mixed[0].sum() == 3 * 2 * 4
    torch.testing.assert_close(soft, torch.tensor([[0.75, 0.25], [0.25, 0.75]]))  # 8 of 32 pixels are pasted


def test_center_boxes_with_an_odd_side_lose_one_pixel():
    lam = torch.tensor(1 - (5 / 32) ** 2 - 1e-9, dtype=torch.float64)  # side 5
    assert center_boxes(torch.tensor([10]), torch.tensor([20]), lam, 32, 32).tolist() == [[8, 12, 18, 22]]
    lam = torch.tensor(1 - (1 / 32) ** 2 - 1e-9, dtype=torch.float64)  # side 1
    box = center_boxes(torch.tensor([10]), torch.tensor([20]), lam, 32, 32)
    assert not box_mask(box, 32, 32).any()


def test_integer_boxes_match_the_published_code(network_golden):
    lam = torch.from_numpy(network_golden["box_lam"])
    recorded = torch.from_numpy(network_golden["box_centre_and_box"]).long()
    boxes = center_boxes(recorded[:, 0], recorded[:, 1], lam, 32, 32)
    assert torch.equal(boxes[:, [0, 2, 1, 3]], recorded[:, 2:])


def test_real_boxes_truncate_only_the_clipped_edges():
    half = torch.tensor(1 - (9 / 32) ** 2, dtype=torch.float64)  # side 9.0
    box = center_boxes_real(torch.tensor([10.7]), torch.tensor([30.2]), half, 32, 32)
    assert box.tolist() == [[6, 15, 25, 32]]  # 6.2, 15.2, 25.7, 34.7 clipped to 32


def test_blend_mixes_images_and_targets_with_the_same_weight():
    images, targets = torch.tensor([0.0, 8.0]).view(2, 1, 1, 1), torch.eye(2)
    partner, lam = torch.tensor([1, 0]), torch.tensor(0.75, dtype=torch.float64)
    assert blend(images, partner, lam).flatten().tolist() == [2.0, 6.0]
    assert blend(targets, partner, lam).tolist() == [[0.75, 0.25], [0.25, 0.75]]
    assert blend(images, partner, torch.tensor([1.0, 0.5])).flatten().tolist() == [0.0, 4.0]
    half = blend(torch.tensor([1000.0, 0.0]).bfloat16(), partner, torch.tensor(0.7312, dtype=torch.float64))
    assert half.dtype == torch.bfloat16 and abs(half[0] - 731.2) < 2, "lam must not be rounded to bfloat16"


def test_draw_lam_follows_the_beta_distribution():
    images = torch.zeros(4, 1, 1, 1)
    lams = torch.stack([draw_lam(2.0, images) for _ in range(2000)])
    assert lams.dim() == 1 and abs(lams.mean() - 0.5) < 0.02 and abs(lams.var() - 0.05) < 0.01  # Beta(2, 2)
    assert draw_lam(1.0, images, per_image=True).shape == (4,)
    assert draw_lam(0.0, images) == 1 and draw_lam(0.0, images, per_image=True).eq(1).all()


def test_cutout_erases_squares_and_keeps_targets():
    images = torch.ones(2, 3, 8, 8)
    out = erase(images, torch.tensor([[4], [0]]), torch.tensor([[4], [7]]), 4)
    assert out[0, :, 2:6, 2:6].eq(0).all() and out[0].sum() == 3 * (64 - 16)
    assert out[1, :, :2, 5:].eq(0).all() and out[1].sum() == 3 * (64 - 6)  # clipped at the border
    two = erase(images[:1], torch.tensor([[2, 6]]), torch.tensor([[2, 6]]), 2)
    assert two.sum() == 3 * (64 - 8)
    targets = torch.eye(2)
    assert Cutout(4)(images, targets)[1] is targets


def test_cutmix_draws_one_box_per_batch_or_per_image():
    def outlines(mixer):
        torch.manual_seed(5)
        images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 32, 32)
        mixed, soft = mixer(images, torch.eye(8))
        changed = (mixed != images).flatten(1)
        return {tuple(row.nonzero().flatten().tolist()) for row in changed if row.any()}, soft

    assert len(outlines(CutMix(mix_prob=1.0))[0]) == 1
    assert len(outlines(CutMix(mix_prob=1.0, per_sample=True))[0]) > 1
    soft = outlines(CutMix(mix_prob=1.0, in_batch=True))[1]
    assert len(set(soft.amax(1).tolist())) > 2


def test_saliencymix_pastes_around_the_partners_peak():
    images, targets = batch((6, 3, 16, 16), 6)

    def source(images, targets):
        """Image k find_peaks in row 2 + 2 k, column 5."""
        saliency = torch.zeros(6, 16, 16)
        saliency[torch.arange(6), 2 + 2 * torch.arange(6), 5] = 1
        return saliency

    for scope in ("sample", "batch"):
        torch.manual_seed(1)
        mixed, soft = SaliencyMix(mix_prob=1.0, saliency_scope=scope)(images, targets, source)
        changed = (mixed != images).any(1)
        moved = [i for i in range(6) if changed[i].any()]
        assert len(moved) > 2
        if scope == "sample":
            assert all(changed[i, 2 + 2 * int((soft - targets)[i].argmax()), 5] for i in moved), "the partner's peak"
        else:
            assert all(torch.equal(changed[i], changed[moved[0]]) for i in moved), "one box for the batch"


@pytest.mark.parametrize("per_image", [True, False])
def test_one_box_for_the_batch_needs_one_map(per_image):
    class Brightness(Source):
        counts = []

        def __call__(self, images, targets):
            self.counts.append((len(images), len(targets)))
            return images.mean(1)

    images, targets = batch((6, 3, 16, 16), 6)
    source = Brightness()
    source.per_image = per_image
    torch.manual_seed(1)
    mixed, soft = SaliencyMix(mix_prob=1.0, saliency_scope="batch")(images, targets, source)
    torch.manual_seed(1)
    expected = SaliencyMix(mix_prob=1.0, saliency_scope="batch")(images, targets, lambda images, _: images.mean(1))
    assert source.counts == [(1, 1) if per_image else (6, 6)]
    assert torch.equal(mixed, expected[0]) and torch.equal(soft, expected[1])


def test_find_peaks_returns_the_first_maximum_in_row_major_order():
    saliency = torch.zeros(2, 3, 4)
    saliency[0, 1, 2] = saliency[0, 2, 1] = 1
    rows, columns = find_peaks(saliency)
    assert rows.tolist() == [1, 0] and columns.tolist() == [2, 0]


NORMALISATION = {"mean": (125.3 / 255, 123.0 / 255, 113.9 / 255), "std": (63.0 / 255, 62.1 / 255, 66.7 / 255)}


def test_saliencymix_matches_the_paper(static_golden):
    images = torch.from_numpy(static_golden["sm_normalised"])
    partner, lam = torch.from_numpy(static_golden["sm_index"]).long(), torch.from_numpy(static_golden["sm_lam"])
    rows, columns = find_peaks(FineGrained(**NORMALISATION)(images))
    assert torch.stack([rows, columns], 1).tolist() == static_golden["sm_paper_peak"].tolist()
    boxes = center_boxes(rows[partner], columns[partner], lam, 32, 32)
    assert boxes[:, [0, 2, 1, 3]].tolist() == static_golden["sm_paper_box"].tolist()
    mixed, soft = paste(images, torch.eye(8), partner, boxes)
    assert torch.equal(mixed, torch.from_numpy(static_golden["sm_paper_mixed"]))
    kept = torch.from_numpy(static_golden["sm_paper_lam"]).float()
    kept = torch.where(partner == torch.arange(8), 1.0, kept)
    torch.testing.assert_close(soft.diag(), kept)


def test_saliencymix_matches_the_published_code(static_golden):
    images = torch.from_numpy(static_golden["sm_normalised"])
    partner, lam = torch.from_numpy(static_golden["sm_index"]).long(), torch.from_numpy(static_golden["sm_lam"])
    rows, columns = find_peaks(FloatBytes(**NORMALISATION)(images[partner[:1]]))
    box = center_boxes(rows, columns, lam[0], 32, 32)
    assert box[:, [0, 2, 1, 3]].tolist() == [static_golden["sm_official_box"].tolist()]
    mixed, soft = paste(images, torch.eye(8), partner, box)
    assert torch.equal(mixed, torch.from_numpy(static_golden["sm_official_mixed"]))
    assert soft[0, 0] == float(static_golden["sm_official_lam"])


NETWORKS_WITH_STAGES = ["resnet20", "preactresnet18", "resnext29_4_24", "torchvision:resnet18", "timm:resnet10t"]


@pytest.mark.parametrize("model_name", NETWORKS_WITH_STAGES)
def test_manifold_mixup_mixes_the_drawn_stage(model_name):
    if model_name.startswith("timm:"):
        pytest.importorskip("timm")
    model = build_model(model_name, 5).eval()
    images, targets = batch((4, 3, 32, 32))
    mixer, depths = ManifoldMixup(), set()
    for seed in range(30):
        torch.manual_seed(seed)
        mixed, soft = mixer(images, targets)
        if mixer.depth in depths:
            continue
        depths.add(mixer.depth)
        assert torch.equal(mixed, images) == (mixer.depth > 0)
        with mixer.during(model), torch.no_grad():
            logits = model(mixed)
        with torch.no_grad():
            hidden, rest = images, model
            if mixer.depth:  # run the network twice, replacing the output of the stage by the mixed one
                taken = {}
                stage = model.get_submodule(model.stages[mixer.depth - 1])
                handle = stage.register_forward_hook(lambda m, i, o, taken=taken: taken.update(out=o))
                rest(hidden)
                handle.remove()
                swapped = blend(taken["out"], mixer.partner, mixer.lam)
                handle = stage.register_forward_hook(lambda m, i, o, swapped=swapped: swapped)
                expected = model(images)
                handle.remove()
            else:
                expected = model(blend(images, mixer.partner, mixer.lam))
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(soft, blend(targets, mixer.partner, mixer.lam))
    assert depths == {0, 1, 2}


@pytest.mark.parametrize("options", [{}, {"mix_fraction": 0.5}, {"cutout": True}])
@pytest.mark.parametrize("names", [["manifold"], ["mixup", "manifold"]])
def test_manifold_mixup_refuses_a_network_without_stages(names, options):
    model = build_model("torchvision:mobilenet_v2", 5)
    problem = "MobileNetV2 names no stages: use mixup, or a network with `stages`, the names of its stages as a tuple"
    with pytest.raises(ValueError, match=problem):
        compose_mixer(names, **options).check_network(model)
    mixer = ManifoldMixup()
    mixer.depth = 1
    with pytest.raises(ValueError, match=problem), mixer.during(model):
        pass


def test_manifold_mixup_removes_its_hook_even_on_an_error():
    model = build_model("resnet20", 5)
    mixer = ManifoldMixup()
    mixer.depth = 1
    with pytest.raises(RuntimeError), mixer.during(model):
        raise RuntimeError
    assert not model.layer1._forward_hooks


class Recorder(Mixer):
    def __init__(self, value):
        self.value = value

    def __call__(self, images, targets, source=None):
        self.source = source
        return images + self.value, targets


def test_choice_draws_one_method_per_batch_and_passes_its_source():
    mixers = [Recorder(1.0), Recorder(2.0)]
    choice = Choice(mixers)
    drawn = [float(choice(torch.zeros(1, 1, 1, 1), torch.ones(1, 1), ["a", "b"])[0]) for _ in range(200)]
    assert set(drawn) == {1.0, 2.0} and 70 < drawn.count(1.0) < 130
    assert (mixers[0].source, mixers[1].source) == ("a", "b")


def test_choice_without_weights_draws_as_ever():
    torch.manual_seed(3)
    expected = [int(torch.randint(3, ())) for _ in range(20)]
    torch.manual_seed(3)
    choice = compose_mixer(["none", "mixup", "cutmix"], mix_prob=0.0)
    assert [choice.draw_method() for _ in range(20)] == expected


@pytest.mark.parametrize("weights", [(2, 1), (1.5, 0, 0.5), (0, 3), (1, 0)])
def test_choice_draws_methods_in_proportion_to_their_weights_with_one_draw_each(weights):
    choice = pickle.loads(pickle.dumps(Choice([NoMix() for _ in weights], weights)))
    torch.manual_seed(0)
    drawn = [choice.draw_method() for _ in range(20_000)]
    after = torch.rand(())
    for index, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(drawn.count(index) / 20_000 - share) <= 4 * (share * (1 - share) / 20_000) ** 0.5
    torch.manual_seed(0)
    assert torch.rand(20_001)[-1] == after


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (["cutmix"], [1], "method_weights 1: there is only one method to draw; leave them out, or give more methods"),
        (["cutmix", "none"], [1, 2, 0.5], "method_weights 1 2 0.5: there are 2 methods; give 2 weights, one for each"),
        (
            ["cutmix", "none"],
            [2, -1],
            "method_weights 2 -1: give finite numbers of at least 0, and one of them above 0",
        ),
        (["cutmix", "none"], [0, 0], "method_weights 0 0: give finite"),
        (["cutmix", "none"], [float("nan"), 1], "method_weights nan 1: give finite"),
        (["cutmix", "none"], [float("inf"), 1], "method_weights inf 1: give finite"),
        (["cutmix", "none"], [], "there are 2 methods; give 2 weights"),
    ],
)
def test_weights_of_methods_that_are_no_probabilities_are_refused(names, weights, message):
    with pytest.raises(ValueError, match=message):
        compose_mixer(names, method_weights=weights)


def test_partial_mix_mixes_only_the_last_images():
    images, targets = batch((5, 3, 8, 8))
    mixer = PartialMix(Recorder(1.0), mix_fraction=0.5)
    mixed, _ = mixer(images, targets)
    assert torch.equal(mixed[:3], images[:3]) and torch.equal(mixed[3:], images[3:] + 1)


def test_partial_mix_mixes_only_the_last_rows_of_a_hidden_layer():
    mixer = PartialMix(ManifoldMixup(), mix_fraction=0.5)
    inner = mixer.mixers[0]
    inner.depth, inner.lam, inner.partner_fn = 1, torch.tensor(0.5), lambda: torch.tensor([1, 0])
    hidden = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert inner.mix_hidden(hidden).tolist() == [1.0, 2.0, 6.0, 6.0]


@pytest.mark.parametrize(
    ("kind", "shares"), [("fixed", [1, 1, 1, 1, 0]), ("scheduled", [0, 0.5, 1, 1, 0]), ("delayed", [0, 0, 1, 1, 0])]
)
def test_partial_mix_fraction_follows_the_schedule(kind, shares):
    mixer = PartialMix(NoMix(), 1.0, kind, 2, mix_off_epoch=1)
    seen = []
    for epoch in range(5):
        mixer.start_epoch(epoch, 5, 10)
        seen.append(mixer.fraction)
    assert seen == shares


def test_compose_mixer_builds_what_its_options_say():
    def source_of(mixer):
        return mixer.build_source(lambda one: one.default_source)

    mixer = compose_mixer(["cutmix"], mix_prob=0.25, mixup_alpha=None)
    assert isinstance(mixer, CutMix) and mixer.mix_prob == 0.25 and mixer.mixup_alpha == 1.0 and not source_of(mixer)
    mixer = compose_mixer(["none", "saliencymix"])
    assert isinstance(mixer, Choice) and source_of(mixer) == [None, "fine_grained"]
    by_method = {"cutmix": {"mix_prob": 1.0, "cutmix_box": "real"}}
    mixer = compose_mixer(["none", "cutmix"], method_options=by_method)
    assert (mixer.mixers[1].mix_prob, mixer.mixers[1].cutmix_box, source_of(mixer)) == (1.0, "real", None)
    mixer = compose_mixer(["cutmix"], method_options=by_method, mix_prob=0.1)
    assert mixer.mix_prob == 0.1, "an explicit option overrides method_options"
    mixer = compose_mixer(["mixup"], cutout=True, cutout_length=4, mix_off_epoch=2)
    images, targets = torch.ones(4, 3, 16, 16), torch.eye(4)
    mixer.start_epoch(9, 10, 3)
    mixed, soft = mixer(images, targets)
    assert mixed.eq(0).any() and torch.equal(soft, targets), "Cutout continues when mixing is off"
    known = compose_options(["none", "cutmix"])
    assert {"mix_off_epoch", "method_options", "cutmix_box", "n_holes"} <= set(known) and "rand_pos" not in known


@pytest.mark.parametrize("name", TARGET_MIXERS)
def test_class_indices_as_targets_raise_an_error(name):
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    for wrong in (labels, labels.float(), torch.eye(4).long()):
        with pytest.raises(ValueError, match="one_hot"):
            for _ in range(5):
                build_mixer(name, mix_prob=1.0, **SMALL)(images, wrong, centre)


def test_partial_mix_refuses_a_clean_loss():
    class Clean(Source):
        clean_weight = 0.3

    for options in ({"mix_fraction": 0.5}, {"mix_schedule": "scheduled", "mix_scheduled_epoch": 2}):
        with pytest.raises(ValueError, match="clean_weight 0"):
            compose_mixer(["sage"], **options).build_source(lambda one: Clean())
    assert compose_mixer(["sage"], mix_off_epoch=1).build_source(lambda one: Clean())
    assert compose_mixer(["sage"], mix_fraction=0.5).build_source(lambda one: Source())


SALIENCY_METHODS = ["saliencymix", "puzzlemix", "comixup", "sage", "rmix", "rlmix"]
SALIENCY_METHODS += ["guidedmixup", "snapmix", "attentivemix", "smmix", "s2mix"]


@pytest.mark.parametrize("name", SALIENCY_METHODS)
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_invalid_maps_are_replaced_by_uniform_ones_and_counted(name, bad):
    images, targets = batch((4, 3, 16, 16))
    mixer = build_mixer(name, mix_prob=1.0, **SMALL)
    saliency = torch.rand(4, 16, 16) + 0.1
    saliency[1] = bad
    mixed, soft = mixer(images, targets, lambda *_: saliency)
    assert mixed.isfinite().all() and soft.isfinite().all() and int(mixer.replaced_maps) == 1
    torch.testing.assert_close(soft.sum(1), torch.ones(4))
    mixed, soft = mixer(images, targets, lambda *_: torch.full((4, 16, 16), 2.0))
    assert mixed.isfinite().all() and int(mixer.replaced_maps) == 1, "a constant map is valid"


@pytest.mark.parametrize("name", SALIENCY_METHODS)
def test_gradients_flow_back_through_every_mix(name):
    """The bank needs the gradient with respect to the unmixed images, weighted by what the mix shows of them."""
    images, targets = batch((6, 3, 16, 16), 6)
    images.requires_grad_()
    mixer = build_mixer(name, mix_prob=1.0, **SMALL)
    for _ in range(5):
        mixed, soft = mixer(images, targets, lambda images, targets: images.abs().mean(1))
        assert not soft.requires_grad
        (weight,) = torch.autograd.grad(mixed, images, torch.ones_like(mixed))
        assert weight.min() >= 0 and weight.isfinite().all()
        # the weights of a mixed pixel sum to 1, except where SAGE has shifted the partner out of the frame
        shown = float(weight.sum()) / weight.numel()
        assert shown <= 1 + 1e-5 and (name == "sage" or shown > 1 - 1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mixup", {"mixup_alpha": -1}),
        ("cutmix", {"mixup_alpha": 0}),
        ("cutmix", {"cutmix_box": "round"}),
        ("saliencymix", {"saliency_scope": "image"}),
        ("manifold", {"mix_prob": 1.5}),
        ("cutout", {"cutout_length": 0}),
        ("puzzlemix", {"gamma": 1.1}),
        ("comixup", {"m_thres_type": "medium"}),
        ("sage", {"upper_lambda": 1.5}),
        ("sage", {"rand_pos": 2.0}),
        ("rmix", {"dirichlet_alpha": 0.0}),
        ("rlmix", {"grad_sim": False}),
        ("resizemix", {"resize_range": (0.8, 0.1)}),
        ("fmix", {"max_soft": 0.6}),
        ("gridmix", {"grid_holes": (0, 2)}),
        ("hmix", {"hmix_ratio": 2.0}),
        ("smmix", {"num_patches": 1}),
        ("maskmix", {"mixup_alpha": 0.0}),
        ("s2mix", {"mix_prob": 1.5}),
        ("nonsense", {}),
    ],
)
def test_wrong_hyper_parameters_raise_an_error(name, options):
    with pytest.raises(ValueError):
        build_mixer(name, **options)


def test_aliases_and_default_hyper_parameters():
    names = ("none", "mixup", "manifold", "puzzlemix", "comixup")
    assert {mixer_class(alias) for alias in ALIASES} == {mixer_class(name) for name in names}
    assert hyper_parameters("manifold")["mixup_alpha"] == 2.0 and hyper_parameters("cutmix")["mix_prob"] == 0.5


WEIGHTED = {  # method -> variants of its hyper-parameters
    "none": [{}],
    "cutout": [{"cutout_length": 6}, {"cutout_length": 6, "n_holes": 3}],
    "mixup": [{}, {"in_batch": True}],
    "cutmix": [{}, {"in_batch": True}, {"cutmix_box": "real"}],
    "saliencymix": [{}, {"saliency_scope": "batch"}],
    "puzzlemix": [{}, {"transport": False}, {"block_num": (4,), "t_size": 2}],
    "sage": [{}, {"search": "exhaustive"}],
    "rmix": [{}, {"patches_per_side": (2, 4)}],
    "rlmix": [{}],
    "guidedmixup": [{}, {"pairing": "random"}],
    "attentivemix": [{}, {"in_batch": True}],
    "resizemix": [{}, {"resize_mode": "bilinear", "in_batch": True}],
    "fmix": [{}, {"max_soft": 0.2, "in_batch": True}],
    "gridmix": [{"mixup_alpha": 1.0}, {"mixup_alpha": 1.0, "in_batch": True}],
    "smoothmix": [{}, {"in_batch": True}],
    "hmix": [{}, {"in_batch": True}],
    "gmix": [{}, {"in_batch": True}],
    "smmix": [{}, {"in_batch": True}],
    "maskmix": [{}, {"in_batch": True}],
    "s2mix": [{}],
}
MOVING = {"resizemix", "smmix", "s2mix"}  # methods that always move pixels


def fixed_maps(images, targets):
    return torch.rand(images[:, 0].shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("name", "options"), [(name, one) for name, cases in WEIGHTED.items() for one in cases])
def test_weight_is_the_share_of_the_first_image(name, options):
    """If image i is 1 and all others are 0, mixed image i is its weight."""
    mixer = build_mixer(name, mix_prob=0.8, **SMALL | options)
    assert mixer.weight is None, "before the first batch"
    mixer(torch.zeros(4, 3, 16, 16), torch.eye(4), fixed_maps)  # RL-Mix initialises its agent here
    seen = 0
    for seed in range(3):
        for i in range(4):
            images = torch.zeros(4, 3, 16, 16)
            images[i] = 1
            torch.manual_seed(seed)
            mixed, soft = mixer(images, torch.eye(4), fixed_maps)
            assert mixer.weight.shape == (4, 1, 16, 16) and mixer.weight.dtype == torch.float32
            if soft[i].max() < 1 or name in ("none", "cutout") or mixer.weight[i].eq(1).all():  # not its own partner
                torch.testing.assert_close(mixer.weight[i].expand(3, -1, -1), mixed[i])
                seen += bool(mixer.weight[i].min() < 1)
    assert seen > 2 or name in ("none", "s2mix")


def test_weight_is_none_where_no_such_map_exists():
    images, targets = batch((6, 3, 16, 16), 6)
    for name in ("manifold", "comixup"):
        mixer, found = build_mixer(name, mix_prob=0.5, **SMALL), set()
        for _ in range(12):
            mixed, soft = mixer(images, targets, fixed_maps)
            weight = mixer.weight
            if torch.equal(soft, targets):
                assert weight.eq(1).all()
            elif name == "manifold" and not torch.equal(mixed, images):
                assert weight.eq(mixer.lam.float()).all()
            else:
                assert weight is None
            found.add(weight is None)
        assert found == {True, False}


def test_composed_mixers_compose_the_weight():
    images, targets = torch.ones(6, 3, 16, 16), torch.eye(6)
    mixer = compose_mixer(["mixup"], cutout=True, cutout_length=6, mix_fraction=0.5)
    mixed, _ = mixer(images, targets)
    inner = mixer.mixers[1].mixers[0]
    assert mixer.weight.shape == (6, 1, 16, 16) and inner.weight.shape == (3, 1, 16, 16)
    holes = (mixed == 0)[:3, :1]  # the first three images are not mixed
    assert holes.any() and mixer.weight[:3].eq(0).equal(holes) and mixer.weight[:3].eq(1).equal(~holes)
    assert mixer.weight[3:].max() == inner.weight.max() < 1 and mixer.weight[3:].min() == 0
    mixer.start_epoch(0, 5, 3)
    mixer.mixers[1].fraction = 0.0
    mixed, _ = mixer(images, targets)
    assert torch.equal(mixer.weight, mixed[:, :1])
    mixer, found = compose_mixer(["none", "comixup", "cutout"], clean_lam=0.0, m_block_num=2), []
    for _ in range(12):
        mixed, _ = mixer(images, targets, [None, fixed_maps, None])
        found.append(mixer.drawn)
        assert (mixer.weight is None) == (mixer.drawn == 1)
        assert mixer.drawn == 1 or torch.equal(mixer.weight, mixed[:, :1])
    assert set(found) == {0, 1, 2}
    mixer = compose_mixer(["manifold"], mix_fraction=0.5)
    found = {mixer(images, targets) and mixer.weight is None for _ in range(20)}
    assert found == {True, False}


STILL = {"transport": False, "search": "grid", "rand_pos": 0.0}  # no block of PuzzleMix moves, no image of SAGE


def mix_by_weight(mixer, values):
    """Mix values (B, ...) with the weight map of each image and its partner, as docs/own_loop.md does."""
    weight = mixer.weight if values.dim() == 4 else mixer.weight.mean((1, 2, 3)).unsqueeze(1)
    return weight * values + (1 - weight) * values[mixer.partner]


@pytest.mark.parametrize("name", [name for name in WEIGHTED if name not in {"cutout", *MOVING}])
@pytest.mark.parametrize("mix_prob", [1.0, 0.0])
def test_weight_and_partner_mix_a_mask_as_the_method_mixes_it(name, mix_prob):
    masks, targets = torch.rand(5, 3, 16, 16), torch.eye(5)
    for options in WEIGHTED[name]:
        mixer = build_mixer(name, **SMALL | {"mix_prob": mix_prob} | options | STILL)
        assert mixer.partner is None, "before the first batch"
        for _ in range(6):
            mixed, soft = mixer(masks, targets, fixed_maps)
            assert mixer.partner.dtype == torch.long and mixer.partner.shape == (5,)
            torch.testing.assert_close(mix_by_weight(mixer, masks), mixed)
            rounding = 1 / 256 if name == "fmix" else 1e-6  # its targets follow the share that the mask is rounded from
            torch.testing.assert_close(mix_by_weight(mixer, targets), soft, rtol=1e-5, atol=rounding)
            if name == "none" or mix_prob == 0.0:
                assert mixer.weight.eq(1).all() and mixer.partner.tolist() == [*range(5)]


@pytest.mark.parametrize("name", ["puzzlemix", "sage", *sorted(MOVING)])
def test_the_partner_is_that_of_the_label_where_pixels_move(name):
    images, targets = batch((5, 3, 16, 16))
    mixer = build_mixer(name, **SMALL | {"block_num": (4,)})
    for _ in range(6):
        _, soft = mixer(images, targets, fixed_maps)
        torch.testing.assert_close(mix_by_weight(mixer, targets), soft)


def test_an_image_with_a_hole_is_its_own_partner():
    mixer, targets = Cutout(6), torch.eye(5)
    _, soft = mixer(torch.rand(5, 3, 16, 16), targets)
    assert mixer.weight.min() == 0 and mixer.partner.tolist() == [*range(5)] and soft is targets


def test_the_partner_of_a_hidden_layer_and_of_more_than_two_images():
    images, targets = batch((6, 3, 16, 16), 6)
    mixer, depths = build_mixer("manifold"), set()
    for _ in range(12):
        _, soft = mixer(images, targets)
        depths.add(mixer.depth)
        assert (mixer.weight is None) == (mixer.depth > 0)
        torch.testing.assert_close(blend(targets, mixer.partner, mixer.lam), soft)
    assert depths == {0, 1, 2}
    mixer, found = build_mixer("comixup", mix_prob=0.5, **SMALL), set()
    for _ in range(12):
        mixed, _ = mixer(images, targets, fixed_maps)
        assert (mixer.partner is None) == (mixer.weight is None) == (mixed is not images)
        found.add(mixer.partner is None)
    assert found == {True, False}


def test_composed_mixers_compose_the_partner():
    masks, targets = torch.rand(7, 3, 16, 16), torch.eye(7)
    mixer = compose_mixer(["mixup", "cutmix"], mix_fraction=0.5)
    for _ in range(12):
        mixed, soft = mixer(masks, targets)
        assert mixer.partner[:4].tolist() == [0, 1, 2, 3] and mixer.partner[4:].min() >= 4
        torch.testing.assert_close(mix_by_weight(mixer, masks), mixed)
        torch.testing.assert_close(mix_by_weight(mixer, targets), soft)
    mixer.fraction = 0.0
    mixer(masks, targets)
    assert mixer.partner.tolist() == [*range(7)]
    mixer = compose_mixer(["comixup"], mix_fraction=0.5, clean_lam=0.0, m_block_num=2)
    mixer(masks, targets, fixed_maps)
    assert mixer.partner is None
    mixer = compose_mixer(["mixup"], cutout=True)
    mixer(masks, targets)
    assert mixer.partner is None and mixer.mixers[-1].partner.shape == (7,)


def test_function_source_has_the_defaults_of_source():
    plain, default = as_source(fixed_maps), Source()
    for name in ("clean_weight", "per_image", "logits", "has_gradient"):
        assert vars(FunctionSource)[name] == vars(Source)[name]
    assert plain.points(None) == default.points(None) is None
    assert as_source(default) is default and as_source(None) is None


class Maps(torch.nn.Module):
    """A callable that is neither a function nor a Source."""

    def forward(self, images, targets):
        return fixed_maps(images, targets)


@pytest.mark.parametrize("name", SALIENCY_METHODS)
def test_any_callable_is_a_source(name):
    images, targets, results = torch.rand(5, 3, 16, 16), torch.eye(5), []
    for source in (fixed_maps, Maps()):
        torch.manual_seed(2)
        results.append(build_mixer(name, mix_prob=1.0, **SMALL)(images, targets, source))
    assert same_state(*results)


def test_chained_methods_give_the_gradient_options_of_the_last_one():
    sage = build_mixer("sage", blur_sigma=2.0, kernel_size=3)
    assert sage.gradient_options["blur_sigma"] == 2
    for mixer in (PartialMix(sage), compose_mixer(["sage"], cutout=True, blur_sigma=2.0, kernel_size=3)):
        assert mixer.gradient_options == sage.gradient_options


def test_a_missing_source_raises_an_error_that_names_the_default():
    images, targets = torch.rand(2, 3, 8, 8), torch.eye(2)
    with pytest.raises(ValueError, match="SaliencyMix needs a saliency source .* its default source is fine_grained"):
        SaliencyMix(mix_prob=1.0)(images, targets)

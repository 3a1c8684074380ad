import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from models import build_model
from saliency import CAM_METHODS, build_source
from saliency.cam.maps import (
    ActivationMaps,
    choose_methods,
    gradcam,
    gradcam_plus_plus,
    layercam,
    normalize_maps,
    upsample_maps,
)
from saliency.cam.tracing import list_layers

GRADIENTS = ("gradcam", "gradcam++", "layercam")
METHODS = tuple(name for name in CAM_METHODS if name != "attention")  # of networks without attention, too
CLASSES = 7
SIGNED = torch.tensor([[0.7, -2.1], [0.3, 1.4]])


def build(name: str) -> nn.Module:
    """Build one of our networks, or one of torchvision's if the name starts with `tv.`, with calibrated batch norm."""
    if name == "tv.vgg11":
        with torch.device("meta"):  # its linear layers take half a gigabyte
            model = torchvision.models.vgg11(init_weights=False)
        model.features = torchvision.models.vgg.make_layers([8, "M", 16, "M", 32, "M", 64, "M", 512, "M"])
        model.classifier = nn.Sequential(nn.Linear(512 * 49, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, CLASSES))
    elif name == "tv.vit":
        model = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=CLASSES)
        nn.init.normal_(model.heads.head.weight)
    elif name == "tv.swin":
        model = torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [1, 2], [2, 2], num_classes=CLASSES)
    elif name.startswith("tv."):
        options = {"init_weights": False} if name == "tv.googlenet" else {}
        model = getattr(torchvision.models, name.removeprefix("tv."))(num_classes=CLASSES, **options)
    else:
        model = build_model(name, CLASSES, 32)
    return calibrate_batch_norm(model)


def calibrate_batch_norm(model: nn.Module) -> nn.Module:
    """Set batch norm's statistics from random images. With initial ones, activations of deep networks vanish."""
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        layer.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 32, 32)) if norms else None
    return model.eval()


def small_network(**relu) -> nn.Module:
    torch.manual_seed(1)
    average = nn.AdaptiveAvgPool2d(1)
    first, second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2)
    middle = (nn.BatchNorm2d(4), nn.ReLU(**relu))
    return calibrate_batch_norm(
        nn.Sequential(first, *middle, second, nn.ReLU(**relu), average, nn.Flatten(), nn.Linear(6, CLASSES))
    )


def random_images(count: int = 3, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 3, side, side), torch.arange(1, 2 * count, 2) % CLASSES


def assert_agree(one: torch.Tensor, other: torch.Tensor, within: float = 1e-5) -> None:
    """Compare within `within` of the largest value, which must not be 0: zeros would agree with anything."""
    size = other.abs().max()
    assert one.shape == other.shape and size > 0
    assert (one - other).abs().max() <= within * size, f"{(one - other).abs().max() / size:.1e} of the largest"


# ---- Formulas ----


class Given(nn.Module):
    """Maps are the first two channels of the image; the gradient of class 0 at them is `gradients` (2, 2, 2)."""

    def __init__(self, gradients):
        super().__init__()
        self.maps = nn.Conv2d(3, 2, 1, bias=False)
        self.maps.weight.data = torch.eye(3)[:2, :, None, None]
        self.head = nn.Linear(8, 2)
        self.head.weight.data = torch.stack([torch.tensor(gradients).flatten(), torch.zeros(8)])

    def forward(self, images):
        return self.head(self.maps(images).flatten(1))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("gradcam", [[0.0, 0.0], [0.25, 0.0]]),  # means -1/4 and 1/2
        ("gradcam++", [[1 / 12, 5 / 12], [3 / 4, 1 / 3]]),  # 1 / (2 + 10) and 2 * 4 / (8 + 3 * 8)
        ("layercam", [[1.0, 2.0], [0.0, 0.0]]),
    ],
)
def test_formulas_computed_by_hand(method, expected):
    model = Given([[[1.0, 0.0], [0.0, -2.0]], [[0.0, 2.0], [0.0, 0.0]]])
    images = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [2.0, 0.0]], [[9.0, 9.0], [9.0, 9.0]]]])
    found = ActivationMaps(model, method)(images, torch.tensor([0]))
    torch.testing.assert_close(found, torch.tensor([expected]), atol=1e-6, rtol=0)


def test_cam_computed_by_hand():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    model[2].weight.data = torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 3.0]])
    images = torch.stack([SIGNED, SIGNED.T, 2 * SIGNED])[None].repeat(2, 1, 1, 1)
    found = ActivationMaps(model)(images, torch.tensor([0, 1]))
    torch.testing.assert_close(found, torch.stack([SIGNED - 2 * SIGNED.T, 6 * SIGNED]))


def test_scorecam_matches_a_loop_over_masked_images():
    model, (images, labels) = small_network(), random_images(2, 16)
    maps = model[:5](images)
    expected = []
    for image, label, channels in zip(images, labels, maps, strict=True):
        scores = []
        for channel in channels:
            mask = F.interpolate(channel[None, None], (16, 16), mode="bilinear", align_corners=True)[0]
            mask = (mask - mask.min()) / (mask.max() - mask.min() + 1e-8)
            scores.append(model((image * mask)[None])[0, label])
        expected.append((torch.stack(scores).softmax(0)[:, None, None] * channels).sum(0).relu())
    assert_agree(ActivationMaps(model, "scorecam")(images, labels), torch.stack(expected).detach())


OURS = ["resnet20", "preactresnet18", "wrn16_8", "resnext29_4_24", "imagenet_resnet18"]
WITH_AVERAGE = ["tv.mobilenet_v2", "tv.squeezenet1_0", "tv.densenet121", "tv.googlenet", "tv.swin", *OURS]


@pytest.mark.parametrize("name", WITH_AVERAGE)
def test_cam_averages_to_the_logit_and_is_gradcam_without_relu(name):
    model, (images, labels) = build(name), random_images(2, 64 if name.startswith(("tv.", "imagenet")) else 32)
    maps = ActivationMaps(model)
    cam = maps(images, labels)
    with torch.no_grad():
        logits = model(images)
    assert_agree(maps.logits, logits)
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    bias = last[-1].bias[labels] if last else 0
    assert_agree(cam.mean((1, 2)) + bias, logits.gather(1, labels[:, None])[:, 0])
    one_hot = F.one_hot(labels, CLASSES).float()
    gradcam = ActivationMaps(model, "gradcam")
    signed = gradcam(images, one_hot) - gradcam(images, -one_hot)  # the ReLU cuts one half, then the other
    assert_agree(signed * cam[0].numel(), cam)
    assert cam[0].numel() > 1


# ---- Networks and layers ----


VIT_LAYER = "encoder.layers.encoder_layer_1.ln_1"  # the input of the last attention


@pytest.mark.parametrize(("name", "layer"), [("tv.vgg11", "features"), ("tv.vit", VIT_LAYER)])
def test_networks_without_a_global_average_need_gradcam(name, layer):
    model, (images, labels) = build(name), random_images(side=64 if name == "tv.vgg11" else 32)
    for method in GRADIENTS:
        default = ActivationMaps(model, method)(images, labels)
        assert_agree(default, ActivationMaps(model, method, layer=layer)(images, labels), 0)
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no average .* use gradcam"):
        ActivationMaps(model)(images, labels)


@pytest.mark.parametrize("between", [nn.BatchNorm1d(6), nn.Linear(6, 6), nn.PReLU(6), nn.Hardswish(inplace=True)])
def test_cam_refuses_an_operation_between_the_average_and_the_linear_layer(between):
    model = small_network()
    with pytest.raises(ValueError, match="no average"):
        ActivationMaps(nn.Sequential(*model[:7], between, model[7]))(*random_images())


class Averaging(nn.Module):
    def __init__(self, average):
        super().__init__()
        self.body, self.head, self.average = nn.Sequential(*small_network()[:5]), nn.Linear(6, CLASSES), average

    def forward(self, images):
        return self.head(F.dropout(self.average(self.body(images)).flatten(1), 0.5, self.training))


@pytest.mark.parametrize(
    "average",
    [
        lambda maps: maps.mean((2, 3)),
        lambda maps: torch.mean(maps, dim=[-1, -2], keepdim=True),
        lambda maps: F.avg_pool2d(maps, maps.shape[-1]),
        lambda maps: torch._C._nn.adaptive_avg_pool2d(maps, 1),
        lambda maps: F.adaptive_avg_pool2d(F.avg_pool2d(maps, 3, 1, 1), (1, 1)),
    ],
)
def test_every_form_of_a_global_average_is_recognised(average):
    model, (images, labels) = Averaging(average), random_images()
    maps = ActivationMaps(model.train())
    assert_agree(
        maps(images, labels).mean((1, 2)) + model.head.bias[labels], maps.logits.gather(1, labels[:, None])[:, 0]
    )


def test_cam_refuses_max_pooling_and_partial_averages():
    for side, average in (
        (32, lambda maps: F.avg_pool2d(maps, maps.shape[-1] - 1)),
        (32, lambda maps: F.adaptive_max_pool2d(maps, 1)),
        (4, lambda maps: F.adaptive_max_pool2d(maps, 1)),  # maps of one place: the same as an average
    ):
        with pytest.raises(ValueError, match="no average"):
            ActivationMaps(Averaging(average))(*random_images(side=side))
    model, (images, labels) = Averaging(average).eval(), random_images()
    assert_agree(
        ActivationMaps(model, "gradcam")(images, labels), ActivationMaps(model, "gradcam", layer="body")(images, labels)
    )


class Excited(nn.Module):
    """Squeeze and excitation: its average is not in front of the classifier."""

    def __init__(self):
        super().__init__()
        self.maps, self.head = nn.Conv2d(3, 4, 5, 4), nn.Linear(4 * 49, CLASSES)

    def forward(self, images):
        maps = self.maps(images)
        return self.head((maps * F.adaptive_avg_pool2d(maps, 1).sigmoid()).flatten(1))


def test_maps_used_outside_their_pooling_get_the_whole_gradient():
    model, (images, labels) = Excited(), random_images()
    default = ActivationMaps(model, "layercam")(images, labels)
    assert_agree(default, ActivationMaps(model, "layercam", layer="maps")(images, labels))


@pytest.mark.parametrize("method", METHODS[1:])
def test_in_place_relu_after_the_layer_does_not_change_its_maps(method):
    images, labels = random_images(2, 16)
    maps = [ActivationMaps(small_network(inplace=i), method, layer="3")(images, labels) for i in (True, False)]
    assert_agree(*maps, 0)


def test_unknown_layer_name_suggests_the_nearest():
    model, (images, labels) = build("resnet20"), random_images()
    with pytest.raises(ValueError, match="ResNet has no layer 'layer3.2.con2'; the nearest is 'layer3.2.conv2'"):
        ActivationMaps(model, "gradcam", layer="layer3.2.con2")
    assert ActivationMaps(model, "gradcam", layer="layer2")(images, labels).shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("layer", "problem"),
    [
        ("6", r"layer '6' must return maps \(B, C, h, w\), but it returns \(3, 6\)"),
        ("unused", "does not use 'unused'"),
        ("side", "do not depend on 'side'"),
    ],
)
def test_layer_without_maps_or_without_effect_raises_an_error(layer, problem):
    model, (images, labels) = small_network(), random_images()
    model.unused, model.side = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    model.forward = lambda images: (model.side(images), model[:8](images))[1]
    with pytest.raises(ValueError, match=problem):
        ActivationMaps(model, "gradcam", layer=layer)(images, labels)
    assert not any(module._forward_hooks for module in model.modules())


def test_wrong_arguments_raise_an_error_naming_them():
    model, (images, labels) = small_network(), random_images()
    with pytest.raises(ValueError, match=r"got \(3, 3, 32, 32\) and \(2,\) of torch.int64"):
        ActivationMaps(model)(images, labels[:2])
    with pytest.raises(ValueError, match="unknown method 'gradcan'; choose from cam, gradcam"):
        ActivationMaps(model, "gradcan")
    with pytest.raises(ValueError, match="cam takes no layer"):
        ActivationMaps(model, layer="3")
    with pytest.raises(ValueError, match=r"must return logits \(B, K\), but it returns \(3, 6, 15, 15\)"):
        ActivationMaps(model[:5], "gradcam", layer="3")(images, labels)
    with pytest.raises(ValueError, match="neither a pooling of maps nor a convolution"):
        ActivationMaps(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2)), "gradcam")(images, labels)


@pytest.mark.parametrize(
    ("name", "side", "default"),
    [("resnet20", 32, ("layer3", (64, 8, 8))), ("wrn16_8", 32, ("bn1", (512, 8, 8)))]
    + [("tv.vgg11", 64, ("features", (512, 2, 2))), ("tv.vit", 32, (VIT_LAYER, (16, 4, 4)))],
)
def test_list_layers_marks_the_last_before_the_average(name, side, default):
    model = build(name)
    found = list_layers(model.train(), side)
    assert model.training and not any(module._forward_hooks for module in model.modules())
    assert [(name, shape) for name, shape, marked in found if marked] == [default]
    assert len({name for name, *_ in found}) == len(found)
    for name, shape, _ in found:
        assert isinstance(model.get_submodule(name), nn.Module) and len(shape) == 3
    assert list_layers(model, torch.randn(2, 3, side, side)) == found


def test_last_convolution_is_the_default_without_a_pooling():
    model, (images, labels) = (
        nn.Sequential(*small_network()[:5], nn.Flatten(), nn.Linear(6 * 49, 2)),
        random_images(2, 16),
    )
    assert [(name, why) for name, _, why in list_layers(model, 16)][-2:] == [("3", "the last convolution"), ("4", "")]
    assert_agree(
        ActivationMaps(model, "gradcam")(images, labels % 2),
        ActivationMaps(model, "gradcam", layer="3")(images, labels % 2),
    )


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize(("channels", "side"), [(8, 64), (16, 64), (24, 64)])
def test_maps_with_channels_last_equal_the_permuted_ones(method, channels, side):
    """Of a Swin whose maps are 16 x 16: 16 channels tell nothing by their shape."""
    torch.manual_seed(0)
    model = torchvision.models.SwinTransformer([4, 4], channels, [2], [2], [2, 2], num_classes=CLASSES).eval()
    images, labels = random_images(2, side)
    last, first = (ActivationMaps(model, method, layer=layer)(images, labels) for layer in ("norm", "permute"))
    assert last.shape == (2, 16, 16)
    assert_agree(last, first)
    shapes = {name: shape for name, shape, _ in list_layers(model, side)}
    assert shapes["features.1.0"] == shapes["norm"] == shapes["permute"] == (channels, 16, 16)
    assert shapes["features.1.0.mlp.0"] == (4 * channels, 16, 16)


@pytest.mark.parametrize(
    "last",
    [
        lambda maps: maps.permute(0, 2, 3, 1),
        lambda maps: maps.permute(dims=[0, 2, 3, 1]),
        lambda maps: torch.permute(input=maps, dims=(0, -2, -1, 1)),
        lambda maps: maps.movedim(1, -1),
    ],
)
def test_channels_last_are_recognised_however_the_dimensions_are_moved(last):
    class Last(nn.Module):
        def forward(self, maps):
            return last(maps)

    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)]
    first = nn.Sequential(nn.Conv2d(3, 8, 1), *head).eval()  # 8 channels of 8 x 8: the shape does not tell
    model = nn.Sequential(first[0], Last(), torchvision.ops.misc.Permute([0, 3, 1, 2]), *head).eval()
    images, labels = random_images(2, 8)
    assert_agree(
        ActivationMaps(model, "gradcam", layer="1")(images, labels),
        ActivationMaps(first, "gradcam", layer="0")(images, labels),
    )


def test_layers_inside_a_convnext_block_are_listed_channels_first():
    block = torchvision.models.convnext.CNBlock(32, 1.0, 0.0)
    model = nn.Sequential(nn.Conv2d(3, 32, 1), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2))
    shapes = {name: shape for name, shape, _ in list_layers(model.eval(), 32)}
    assert shapes["1.block.0"] == shapes["1.block.2"] == shapes["1.block.6"] == shapes["1"] == (32, 32, 32)
    assert shapes["1.block.3"] == (128, 32, 32)


@pytest.mark.parametrize("method", GRADIENTS)
def test_tokens_of_a_vit_form_a_grid_without_the_class_token(method):
    model, (images, labels) = build("tv.vit"), random_images()
    kept = []
    handle = model.get_submodule(VIT_LAYER).register_forward_hook(lambda _, given, output: kept.append(output))
    scores = model(images).gather(1, labels[:, None]).sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(scores, kept[0])  # (3, 17, 16), of the class token and 4 x 4 patches
    maps, gradient = (one[:, 1:].detach().permute(0, 2, 1).reshape(3, 16, 4, 4) for one in (kept[0], gradient))
    formulas = {"gradcam": gradcam, "gradcam++": gradcam_plus_plus, "layercam": layercam}
    assert_agree(ActivationMaps(model, method)(images, labels), formulas[method](maps, gradient))


@pytest.mark.parametrize("layer", ["encoder.layers.encoder_layer_1", "encoder.ln"])
def test_layer_of_which_only_the_class_token_is_used_is_refused(layer):
    with pytest.raises(ValueError, match=f"uses only the class token of '{layer}': name an earlier layer"):
        ActivationMaps(build("tv.vit"), "gradcam", layer=layer)(*random_images())


def test_windows_are_not_taken_for_maps():
    window = torchvision.models.maxvit.WindowPartition()
    model = nn.Sequential(nn.Conv2d(3, 24, 1), nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 2))
    model[1].forward = lambda maps: (window(maps, 4), maps)[1]
    model[1].add_module("window", window)
    assert "1.window" not in [name for name, *_ in list_layers(model, 32)]
    with pytest.raises(ValueError, match=r"must return maps .* it returns \(3, 64, 16, 24\)"):
        ActivationMaps(model, "gradcam", layer="1.window")(*random_images())


def test_cam_is_replaced_or_left_out_where_a_network_has_none():
    without, has = build("tv.vit"), build("resnet20")
    assert choose_methods(has, None, 32) == (["cam"], "")
    assert choose_methods(has, ["layercam", "cam"], 32) == (["layercam", "cam"], "")
    methods, note = choose_methods(without, None, 32)
    assert methods == ["gradcam"] and note.endswith("a single linear layer; using gradcam")
    assert choose_methods(without, ["cam", "layercam", "gradcam"], 32)[0] == ["layercam", "gradcam"]
    assert choose_methods(without, ["cam"], 32) == (["cam"], "")  # whose error says what to use


def test_last_call_of_a_repeated_module_counts():
    model, (images, labels) = small_network(), random_images()
    model[4] = model[2]
    assert [name for name, *_ in list_layers(model, 32)] == ["0", "1", "3", "2", "5"]
    assert_agree(
        ActivationMaps(model, "gradcam", layer="2")(images, labels), ActivationMaps(model, "gradcam")(images, labels)
    )


# ---- The network is restored ----


def state(model: nn.Module) -> list:
    numbers = [value.clone() for value in model.state_dict().values()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    return [numbers, grads, flags, [len(module._forward_hooks) for module in model.modules()]]


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return all(map(same, one, other)) if isinstance(one, (list, tuple)) else one == other


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", [None, "3"])
def test_network_keeps_its_flags_statistics_gradients_and_hooks(method, layer):
    if (method, layer) == ("cam", "3"):
        layer = None
    model, (images, labels) = small_network(), random_images(2, 16)
    expected = ActivationMaps(model, method, layer=layer)(images, labels)
    model.train()
    model[1].eval()
    model[0].requires_grad_(False)
    model[7].weight.grad = torch.ones_like(model[7].weight)
    model[0].register_forward_hook(lambda *_: None)
    before, kept = state(model), images.clone()
    maps = ActivationMaps(model, method, layer=layer)
    assert_agree(maps(images, labels), expected, 0)
    assert same(state(model), before) and torch.equal(images, kept)
    assert not images.requires_grad and not maps.logits.requires_grad

    model[7].register_forward_hook(lambda *_: 1 / 0)
    before = state(model)
    for attempt in (maps, ActivationMaps(model, method, layer=layer)):  # in the pass itself, and in the trace
        with pytest.raises(ZeroDivisionError):
            attempt(images, labels)
        assert same(state(model), before)
    assert torch.is_grad_enabled() and torch.overrides._get_current_function_mode() is None


@pytest.mark.parametrize("method", METHODS)
def test_frozen_networks_and_no_grad_callers_get_the_same_maps(method):
    model, (images, labels) = small_network(), random_images(2, 16)
    expected = ActivationMaps(model, method)(images, labels)
    model.requires_grad_(False)
    assert not expected.requires_grad
    for caller in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with caller:
            assert_agree(ActivationMaps(model, method)(images * 1, labels + 0), expected, 0)


@pytest.mark.parametrize("layer", [None, "3"])
def test_autograd_graph_starts_at_the_layer(layer):
    model, (images, labels) = small_network(), random_images(2, 16)
    expected, learned = ActivationMaps(model, "gradcam", layer=layer)(images, labels), []
    model[1].register_forward_hook(lambda module, given, output: learned.append(output.requires_grad))
    assert_agree(ActivationMaps(model, "gradcam", layer=layer)(images, labels), expected, 0)
    body, rest = model[:3], model[3:]
    model.forward = lambda images: rest(torch.no_grad()(body)(images))  # as in fine-tuning
    assert_agree(ActivationMaps(model, "gradcam", layer=layer)(images, labels), expected, 0)
    assert learned and not any(learned)


class Counting:
    """A compiler that only counts graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize("way", ["torch.compile", "model.compile"])
def test_compiled_networks_get_the_same_maps_and_stay_compiled(way):
    model, (images, labels), compiler = small_network(), random_images(2, 16), Counting()
    expected = {method: ActivationMaps(model, method)(images, labels) for method in METHODS}
    named = ActivationMaps(model, "gradcam", layer="3")(images, labels)
    if way == "torch.compile":
        model = torch.compile(model, backend=compiler)
    else:
        model.compile(backend=compiler)
    model(images)
    assert compiler.graphs == 1
    for method, maps in expected.items():
        assert_agree(ActivationMaps(model, method)(images, labels), maps)
    assert_agree(ActivationMaps(model, "gradcam", layer="3")(images, labels), named)
    assert "3" in [name for name, *_ in list_layers(model, 16)]
    model(images)
    assert compiler.graphs == 1


def test_compiled_submodule_keeps_its_name():
    model, (images, labels) = Averaging(lambda maps: maps.mean((2, 3))).eval(), random_images(2, 16)
    names = [name for name, *_ in list_layers(model, 16)]
    expected = {layer: ActivationMaps(model, "gradcam", layer=layer)(images, labels) for layer in ("body", "body.3")}
    model.body = torch.compile(model.body, backend="eager")
    assert [name for name, *_ in list_layers(model, 16)] == names
    for layer, maps in expected.items():
        assert_agree(ActivationMaps(model, "gradcam", layer=layer)(images, labels), maps)


# ---- Batches ----


@pytest.mark.parametrize("method", METHODS)
def test_maps_do_not_depend_on_the_rest_of_the_batch(method):
    model, (images, labels) = build("resnet20") if method in GRADIENTS else small_network(), random_images(4)
    maps = ActivationMaps(model, method)
    together = maps(images, labels)
    assert together.dtype == torch.float32
    alone = [maps(images[i : i + 1], labels[i : i + 1]) for i in range(4)]
    assert_agree(torch.cat(alone), together)
    assert_agree(maps(images, F.one_hot(labels, CLASSES).float()), together)
    assert (maps(images, labels.roll(1)) - together).abs().max() > 1e-3 * together.abs().max()


def test_soft_targets_weight_the_maps_of_their_classes():
    model, (images, labels) = small_network(), random_images()
    maps, other = ActivationMaps(model), labels.roll(1)
    soft = 0.3 * F.one_hot(labels, CLASSES) + 0.7 * F.one_hot(other, CLASSES)
    assert_agree(maps(images, soft), 0.3 * maps(images, labels) + 0.7 * maps(images, other))


def test_scorecam_is_independent_of_batch_size_and_skips_dead_channels():
    model, (images, labels) = small_network(), random_images(3, 16)
    model[3].bias.data[2] = -100.0  # dead everywhere
    passed, shown = [], []
    model.register_forward_pre_hook(lambda _, given: passed.append(len(given[0])))

    def progress(chunks):
        shown.append(len(chunks))
        return chunks

    expected = ActivationMaps(model, "scorecam", batch_size=100)(images, labels)
    for size, passes in ((1, 15), (4, 4), (15, 1)):  # 3 images, 5 live channels
        passed.clear()
        maps = ActivationMaps(model, "scorecam", batch_size=size, progress=progress)
        assert_agree(maps(images, labels), expected)
        assert shown.pop() == passes and len(passed) == passes + 3  # the trace, the maps, and the black image
        assert max(passed[3:]) == min(size, 15)
    model[3].bias.data[:] = -100.0
    assert ActivationMaps(model, "scorecam", progress=progress)(images, labels).eq(0).all() and shown == [0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_maps_are_close_and_float32(method, precision):
    model, (images, labels) = small_network(), random_images(2, 16)
    model[7].weight.data *= 2e-5  # gradients of 1e-7, one or two of the smallest steps of float16
    maps = ActivationMaps(model, method, precision=precision)
    found, expected = maps(images, labels), ActivationMaps(model, method)(images, labels)
    assert found.dtype == maps.logits.dtype == torch.float32 and not torch.equal(found, expected)
    assert_agree(found, expected, 0.05)
    with torch.autocast("cpu", torch.bfloat16):  # the caller's autocast must have no effect
        assert_agree(ActivationMaps(model, method)(images, labels), expected, 0)


# ---- Normalisation ----


def test_normalised_maps_span_0_to_1_and_invalid_ones_are_zero():
    nan, inf = SIGNED.clone(), SIGNED.clone()
    nan[0, 0], inf[1, 1] = torch.nan, torch.inf
    maps = torch.stack([SIGNED, 1e-30 * SIGNED, torch.full((2, 2), 5.0), torch.zeros(2, 2), nan, inf])
    for found in (normalize_maps(maps), upsample_maps(maps, (7, 5))):
        assert found[:2].amin((1, 2)).eq(0).all() and found[:2].amax((1, 2)).eq(1).all()
        assert found[2:].eq(0).all()
    assert upsample_maps(maps, (7, 5)).shape == (6, 7, 5)
    torch.testing.assert_close(normalize_maps(SIGNED[None]), (SIGNED[None] + 2.1) / 3.5)
    corners = upsample_maps(SIGNED[None], (4, 4))[0]
    torch.testing.assert_close(corners[::3, ::3], normalize_maps(SIGNED[None])[0])
    peak = F.pad(torch.ones(1, 1, 1), (1, 1, 1, 1))  # no pixel of the upsampled map has its centre here
    assert upsample_maps(peak, (6, 6)).max() == 1


# ---- Sources ----


@pytest.mark.parametrize("name", ["cam", "gradcam", "gradcam++", "layercam"])
def test_sources_upsample_the_positive_part(name):
    model, (images, labels) = small_network(), random_images(2, 16)
    source = build_source(name, model=model)
    maps = ActivationMaps(model, name)(images, labels).clamp_min(0)
    expected = F.interpolate(maps[:, None], (16, 16), mode="bilinear")[:, 0]
    assert_agree(source(images, F.one_hot(labels, CLASSES).float()), expected)


def test_cam_source_refuses_a_network_at_construction_or_first_call():
    with pytest.raises(ValueError, match="no average"):
        build_source("cam", model=build("tv.vgg11"))
    source = build_source("cam", model=build("tv.vit"))  # only accepts images of size 32
    with pytest.raises(ValueError, match="no average"):
        source(torch.randn(2, 3, 32, 32), torch.eye(CLASSES)[:2])


# ---- Comparison with the package grad-cam ----


@pytest.mark.parametrize(("name", "layer", "rounding"), [("small", "4", 4e-7), ("resnet20", "layer3", 2e-6)])
def test_maps_match_the_grad_cam_package(name, layer, rounding):
    package = pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    theirs = {"gradcam": "GradCAM", "gradcam++": "GradCAMPlusPlus", "layercam": "LayerCAM", "scorecam": "ScoreCAM"}
    model, (images, labels) = small_network() if name == "small" else build(name), random_images()
    for method, theirs_name in theirs.items():
        with getattr(package, theirs_name)(model, [model.get_submodule(layer)]) as cam:
            expected = torch.from_numpy(cam(images, [ClassifierOutputTarget(label.item()) for label in labels]))
        found = upsample_maps(ActivationMaps(model, method, layer=layer)(images, labels), (32, 32))
        assert (found - expected).abs().max() <= rounding and expected.amax((1, 2)).min() > 0.99, method

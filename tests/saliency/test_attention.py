import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from saliency import build_source
from saliency.cam.maps import ActivationMaps
from saliency.cam.tracing import list_layers

CLASSES = 5
TINY = {"embed_dim": 48, "num_heads": 3, "depth": 2, "num_classes": CLASSES}


def build_timm(name: str, **options) -> nn.Module:
    """Build a network of timm without zeros where it starts with zeros."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def build_swin(image_size: int = 0) -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.SwinTransformer([4, 4], 12, [1, 2], [2, 3], [7, 7], num_classes=CLASSES).eval()


def build_vit() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=CLASSES).eval()


def draw(*size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 3, *size), torch.tensor([1, 3, 0])


@torch.no_grad()
def record_input(model: nn.Module, layer: str, images: torch.Tensor) -> torch.Tensor:
    """Return the input of a layer."""
    kept = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _, given, output: kept.append(given[0]))
    model(images)
    handle.remove()
    return kept[-1]


@torch.no_grad()
def weigh(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, heads: int) -> torch.Tensor:
    """Return softmax(q k^T / sqrt d) of one linear layer for q, k and v: the mean over the heads, (B, N, N)."""
    query, key, _ = F.linear(tokens, weight, bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1).mean(1)


def check(model: nn.Module, images: torch.Tensor, expected: torch.Tensor) -> None:
    """expected: (B, h, w)."""
    maps = ActivationMaps(model, "attention")
    torch.testing.assert_close(maps(images, torch.tensor([1, 3, 0])), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(maps.logits, model(images).detach())
    saliency = build_source("attention", model=model)(images, torch.eye(CLASSES)[:3])
    resized = F.interpolate(expected[:, None], images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(saliency, resized, rtol=0, atol=1e-6)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_attention_of_a_torchvision_vit_is_that_of_its_class_token():
    model, (images, _) = build_vit(), draw(32, 32)
    layer = model.encoder.layers.encoder_layer_1.self_attention
    tokens = record_input(model, "encoder.layers.encoder_layer_1.ln_1", images)
    tokens = model.encoder.layers.encoder_layer_1.ln_1(tokens).detach()
    weights = weigh(tokens, layer.in_proj_weight, layer.in_proj_bias, 2)
    check(model, images, weights[:, 0, 1:].unflatten(1, (4, 4)))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("name", "options", "size", "prefix", "has_class"),
    [
        ("vit_tiny_patch16_224", {}, (64, 96), 1, True),
        ("deit_tiny_distilled_patch16_224", {}, (64, 64), 2, True),
        ("vit_small_patch14_reg4_dinov2", {"patch_size": 16}, (32, 48), 5, True),
        ("vit_base_patch16_reg4_gap_256", {}, (80, 48), 4, False),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, (64, 64), 1, False),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}, (48, 64), 0, False),
    ],
)
def test_attention_of_a_timm_vit_is_that_of_its_class_token_or_the_mean_over_the_grid(
    name, options, size, prefix, has_class, fused
):
    model, (images, _) = build_timm(name, img_size=size, **TINY | options), draw(*size)
    for block in model.blocks:
        block.attn.fused_attn = fused
    layer = model.blocks[-1].attn.qkv
    weights = weigh(record_input(model, "blocks.1.attn.qkv", images), layer.weight, layer.bias, 3)
    row = weights[:, 0] if has_class else weights[:, prefix:].mean(1)
    check(model, images, row[:, prefix:].unflatten(1, (size[0] // 16, size[1] // 16)))


def test_attention_of_a_swin_leaves_out_the_padding_of_its_window():
    model, (images, _) = build_swin(), draw(32, 48)
    layer = model.features[3][1].attn
    maps = record_input(model, "features.3.1.attn", images)  # (3, 4, 6, 24), in a window of 7 x 7
    padded = F.pad(maps, (0, 0, 0, 1, 0, 3)).flatten(1, 2)
    query, key, _ = layer.qkv(padded).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
    scores = query @ key.mT / 8**0.5 + layer.get_relative_position_bias()
    weights = scores.softmax(-1).mean(1).unflatten(2, (7, 7)).unflatten(1, (7, 7))
    check(model, images, weights[:, :4, :6, :4, :6].mean((1, 2)).detach())


def test_class_attention_has_one_query():
    model, (images, _) = build_timm("cait_xxs24_224", depth=1, num_classes=CLASSES, img_size=(32, 48)), draw(32, 48)
    layer, tokens = model.blocks_token_only[1].attn, record_input(model, "blocks_token_only.1.attn", images)
    query, key = (one.unflatten(-1, (4, -1)).transpose(1, 2) for one in (layer.q(tokens[:, :1]), layer.k(tokens)))
    weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1).mean(1)
    check(model, images, weights[:, 0, 1:].unflatten(1, (2, 3)).detach())


def test_attention_is_computed_in_float32_under_autocast():
    model, (images, labels) = build_vit(), draw(32, 32)
    exact = ActivationMaps(model, "attention")(images, labels)
    maps = ActivationMaps(model, "attention", precision=torch.bfloat16)(images, labels)
    assert maps.dtype is torch.float32
    torch.testing.assert_close(maps, exact, rtol=0.02, atol=1e-3)


def test_attention_follows_the_size_of_the_images():
    """Of a Swin whose last grid is one window at 56 pixels, and four at 64."""
    model, maps = build_swin(), None
    maps = ActivationMaps(model, "attention")
    assert maps(*draw(32, 48)).shape == (3, 4, 6) and maps(*draw(56, 56)).shape == (3, 7, 7)
    with pytest.raises(ValueError, match="SwinTransformer has no attention between all places of images of 64x64 pix"):
        maps(*draw(64, 64))
    assert maps(*draw(56, 40)).shape == (3, 7, 5)


@pytest.mark.parametrize(("name", "size"), [("resnet10t", 64), ("edgenext_xx_small", 64), ("mobilevit_xxs", 64)])
def test_networks_without_attention_between_all_places_are_refused(name, size):
    model, (images, labels) = build_timm(name, num_classes=CLASSES), draw(size, size)
    with pytest.raises(
        ValueError, match=f"has no attention between all places of images of {size}x{size} .*: use grad"
    ):
        ActivationMaps(model, "attention")(images, labels)
    with pytest.raises(ValueError, match="use gradcam"):
        build_source("attention", model=model, image_size=size)
    assert ActivationMaps(model, "gradcam")(images, labels).isfinite().all()


def test_attention_takes_no_layer():
    with pytest.raises(ValueError, match=r"attention takes no layer \('encoder'\): it always uses the last attention"):
        ActivationMaps(build_vit(), "attention", layer="encoder")


# ---- Tokens in activation maps ----


@pytest.mark.parametrize(
    ("name", "options", "size", "prefix"),
    [
        ("vit_small_patch14_reg4_dinov2", {"patch_size": 16}, (32, 48), 5),
        ("deit_tiny_distilled_patch16_224", {}, (64, 64), 2),
    ],
)
def test_all_tokens_before_the_grid_are_dropped(name, options, size, prefix):
    model, (images, labels) = build_timm(name, img_size=size, **TINY | options), draw(*size)
    kept = []
    handle = model.blocks[1].norm1.register_forward_hook(lambda _, given, output: kept.append(output))
    scores = model(images).gather(1, labels[:, None]).sum()
    handle.remove()
    gradient = torch.autograd.grad(scores, kept[0])[0][:, prefix:]
    grid = (size[0] // 16, size[1] // 16)
    expected = (gradient.relu() * kept[0][:, prefix:]).sum(2).relu().unflatten(1, grid).detach()
    for layer in (None, "blocks.1.norm1"):
        maps = ActivationMaps(model, "layercam", layer=layer)
        torch.testing.assert_close(maps(images, labels), expected)
        assert maps.layer == "blocks.1.norm1"


@pytest.mark.parametrize(
    ("name", "options", "layer", "shape"),
    [
        ("vit_base_patch16_reg4_gap_256", TINY, "norm", (4, 6)),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1, 1, 1)}, "norm", (2, 3)),
    ],
)
def test_the_default_of_networks_that_average_tokens_is_what_they_average(name, options, layer, shape):
    model = build_timm(name, **{"num_classes": CLASSES, "img_size": (64, 96)} | options)
    images, labels = draw(64, 96)
    default = ActivationMaps(model, "gradcam")(images, labels)
    assert default.shape == (3, *shape)
    torch.testing.assert_close(default, ActivationMaps(model, "gradcam", layer=layer)(images, labels))
    assert [name for name, _, reason in list_layers(model, images) if reason] == [layer]


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "twins_pcpvt_small", "mixer_s32_224"])
def test_cam_averages_to_the_logit_for_channels_last_and_tokens(name):
    options = {"depths": (1, 1, 1, 1)} if not name.startswith("mixer") else {}
    model = build_timm(name, num_classes=CLASSES, **options, **({} if name.startswith("twins") else {"img_size": 64}))
    images, labels = draw(64, 64)
    maps = ActivationMaps(model)
    head = model.get_classifier()
    means = maps(images, labels).mean((1, 2)) + head.bias[labels]
    torch.testing.assert_close(means, maps.logits.gather(1, labels[:, None])[:, 0])

"""ResNets for ImageNet, with the parameter names, shapes and outputs of torchvision's ResNets.

He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385, Table 1: a 7x7 stem of stride 2 and
max-pooling of stride 2, so that the first stage sees a quarter of the image side. As in torchvision, the 3x3
convolution of a bottleneck has the stride.
"""

import torch
from torch import nn
from torch.nn import functional as F

from models import IMAGENET_ALIASES, download_weights
from models.resnet import TABLE_1, BasicBlock, Bottleneck, ResNet

# torchvision's IMAGENET1K_V1 weights, trained without mixing. The later V2 weights were trained with Mixup and CutMix,
# which would bias a comparison of mixing methods, and they do not exist for 18 and 34 layers.
PRETRAINED = {
    "imagenet_resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "imagenet_resnet34": "https://download.pytorch.org/models/resnet34-b627a593.pth",
    "imagenet_resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "imagenet_resnet101": "https://download.pytorch.org/models/resnet101-63fe2227.pth",
    "imagenet_resnet152": "https://download.pytorch.org/models/resnet152-394f9c45.pth",
}


class ImageNetResNet(ResNet):
    """ResNet for large images: (B, 3, H, W) -> (B, num_classes), H and W of any size."""

    def __init__(self, block: type[nn.Module], depths: tuple[int, ...], num_classes: int):
        super().__init__(block, depths, num_classes, stride=2, kernel=7)

    def stem(self, images: torch.Tensor) -> torch.Tensor:
        """Apply convolution and max-pooling: (B, 3, H, W) -> (B, 64, H / 4, W / 4), rounded up."""
        return F.max_pool2d(super().stem(images), 3, stride=2, padding=1)


@torch.no_grad()
def zero_init(model: nn.Module) -> None:
    """Initialise every residual block as the identity: the last batch norm of its branch gets scale 0.

    The weights of the last layer are drawn with mean 0 and standard deviation 0.01; its biases are 0. Goyal et al.,
    "Accurate, Large Minibatch SGD", arXiv 1706.02677, Sec. 5.1. Raises ValueError for a network with other blocks.
    """
    if not isinstance(model, ResNet):
        supported = ", ".join([*IMAGENET_ALIASES, *IMAGENET_ALIASES.values()])
        raise ValueError(
            f"zero_init needs residual blocks that end in a batch norm; {type(model).__name__} has none; use one of "
            f"{supported}"
        )
    for block in model.modules():
        if isinstance(block, (BasicBlock, Bottleneck)):
            nn.init.zeros_(block.get_submodule(block.last_norm).weight)
    nn.init.normal_(model.fc.weight, 0.0, 0.01)
    nn.init.zeros_(model.fc.bias)


def load_pretrained(model: nn.Module, name: str) -> bool:
    """Load torchvision's ImageNet weights into the network `name`, from the cache or by download.

    Returns whether the last layer was left unchanged because its number of classes differs. Raises ValueError if there
    are no weights for the name, or if they are unavailable; the message names the file and where to put it.
    """
    name = IMAGENET_ALIASES.get(name, name)
    if name not in PRETRAINED or not isinstance(model, ImageNetResNet):
        raise ValueError(f"no ImageNet weights for {name!r}; they exist for {', '.join(PRETRAINED)}")
    weights, state = download_weights(PRETRAINED[name]), model.state_dict()
    fresh = weights["fc.bias"].shape != state["fc.bias"].shape
    head = {key: state[key] for key in ("fc.weight", "fc.bias")} if fresh else {}
    model.load_state_dict({**weights, **head})
    return fresh


def imagenet_resnet(depth: int, num_classes: int) -> ImageNetResNet:
    return ImageNetResNet(*TABLE_1[depth], num_classes)

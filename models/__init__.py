"""The classifiers by name. Importing this package does not import torch: the names serve `--help` as well."""

from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path

MODELS = {  # name -> (module, constructor, its first arguments)
    **{f"resnet{depth}": ("models.resnet", "resnet", depth) for depth in (18, 34, 50, 101, 152)},
    **{f"resnet{depth}": ("models.resnet", "NarrowResNet", depth) for depth in (20, 32, 44, 56, 110)},
    **{f"preactresnet{depth}": ("models.preact_resnet", "preactresnet", depth) for depth in (18, 34, 50, 101, 152)},
    "wrn28_10": ("models.wide_resnet", "WideResNet", 28, 10),
    "wrn16_8": ("models.wide_resnet", "WideResNet", 16, 8),
    "resnext29_4_24": ("models.resnext", "ResNeXt29", 4, 24),
    **{f"imagenet_resnet{n}": ("models.imagenet_resnet", "imagenet_resnet", n) for n in (18, 34, 50, 101, 152)},
}
ALIASES = {"wideresnet": "wrn28_10", "wrn28-10": "wrn28_10", "wrn16-8": "wrn16_8", "resnext29-4-24": "resnext29_4_24"}
IMAGENET_MODELS = [name for name in MODELS if name.startswith("imagenet_")]
IMAGENET_ALIASES = {name.removeprefix("imagenet_"): name for name in IMAGENET_MODELS}  # where images are large
DROPOUT_MODELS = {"wrn28_10", "wrn16_8"}
MAX_IMAGE_SIZE = 128  # side in pixels of the largest images for the other networks, which are for small ones


def __getattr__(name: str):
    """What only training on large images needs, without importing torch before it is used."""
    if name in ("load_pretrained", "zero_init"):
        return getattr(import_module("models.imagenet_resnet"), name)
    raise AttributeError(f"module 'models' has no attribute {name!r}")


def get_stem_stride(image_size: int) -> int:
    """1 up to 63 pixels, 2 from 64 on (Tiny-ImageNet), as the Puzzle Mix family of codes has it."""
    return 1 if image_size < 64 else 2


def build_model(name: str, num_classes: int, image_size: int = 32, dropout: float = 0.0):
    """The network `name` for square images of `image_size` pixels, with freshly drawn weights: (B, 3, H, W) -> (B,
    num_classes).

    dropout counts in the wide networks only. Raises ValueError for an unknown name, and for images that are too large
    for the network.
    """
    name = ALIASES.get(name, name)
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; there are {', '.join(MODELS)}")
    module, constructor, *arguments = MODELS[name]
    extra = {"dropout": dropout} if name in DROPOUT_MODELS else {}
    if name not in IMAGENET_MODELS:
        check_image_size(name, image_size)
        extra["stride"] = get_stem_stride(image_size)
    return getattr(import_module(module), constructor)(*arguments, num_classes, **extra)


def check_image_size(name: str, image_size: int) -> None:
    """Raise ValueError, with the network to take instead, if images are too large for `name`, one for small images."""
    if image_size > MAX_IMAGE_SIZE:
        right = IMAGENET_ALIASES.get(name) or f"one of {', '.join(IMAGENET_MODELS)}"
        side = image_size // get_stem_stride(image_size)
        raise ValueError(
            f"{name} is for images of at most {MAX_IMAGE_SIZE} pixels: at {image_size} its first stage would work on "
            f"{side}x{side}, 4 times the pixels that an ImageNet stem leaves it; take {right}"
        )


def find_matching_models(state: dict, like: str | None = None) -> list[str]:
    """Names of the networks whose state-dict keys and shapes equal those of `state`, whatever the number of classes.

    The step counters of batch norm do not count: files of old torch versions lack them. like: only the networks that
    this name may mean: `resnet50` is also said of imagenet_resnet50.
    """
    names = [ALIASES.get(like, like), IMAGENET_ALIASES.get(like)] if like else MODELS
    classes = count_classes(state)
    if not classes:
        return []
    wanted = get_shapes(state)
    return [name for name in names if name in MODELS and get_model_shapes(name, classes) == wanted]


def get_shapes(state: dict) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items() if not key.endswith("num_batches_tracked")}


@cache
def get_model_shapes(name: str, num_classes: int) -> dict[str, tuple[int, ...]]:
    import torch

    with torch.device("meta"):
        return get_shapes(build_model(name, num_classes).state_dict())


def count_classes(state: dict) -> int:
    """How many classes the weights of one of our networks are for; 0 if they are of none."""
    import torch

    bias = next((state[f"{head}.bias"] for head in ("fc", "linear", "classifier") if f"{head}.bias" in state), None)
    return len(bias) if isinstance(bias, torch.Tensor) and bias.ndim == 1 else 0


def count_parameters(names: Iterable[str], num_classes: int = 10) -> dict[str, int]:
    """Name -> number of parameters; nothing is allocated."""
    import torch

    with torch.device("meta"):
        return {name: sum(p.numel() for p in build_model(name, num_classes).parameters()) for name in names}


def list_models(names: Iterable[str], num_classes: int = 10) -> str:
    """A line for each network: its name and number of parameters."""
    counts = count_parameters(names, num_classes)
    return "\n".join(f"{name:20} {count:>12,} parameters" for name, count in counts.items())


def download_weights(url: str) -> dict:
    """The state dict at `url`, which torch.hub keeps in its cache; a download is compared with the hash in its name."""
    import torch

    cache = Path(torch.hub.get_dir()) / "checkpoints"
    file = cache / url.rsplit("/", 1)[-1]
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:  # of the network, the disk, the hash or the unpickler
        reason = (str(error).splitlines() or [""])[0][:200]
        if file.is_file():
            raise ValueError(f"{file}: damaged ({type(error).__name__}: {reason})\ndelete it and try again") from error
        raise ValueError(
            f"cannot download {url} ({type(error).__name__}: {reason})\nput the file {file.name} into {cache}"
        ) from error

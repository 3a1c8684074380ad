"""The classifiers by name. Importing this package does not import torch: the names serve `--help` as well."""

from importlib import import_module

MODELS = {  # name -> (module, constructor)
    **{f"resnet{depth}": ("models.resnet", f"resnet{depth}") for depth in (18, 34, 50, 101, 152)},
    **{f"resnet{depth}": ("models.resnet", f"resnet{depth}") for depth in (20, 32, 44, 56, 110)},
    **{f"preactresnet{depth}": ("models.preact_resnet", f"preactresnet{depth}") for depth in (18, 34, 50, 101, 152)},
    "wrn28_10": ("models.wide_resnet", "wrn28_10"),
    "wrn16_8": ("models.wide_resnet", "wrn16_8"),
    "resnext29_4_24": ("models.resnext", "resnext29_4_24"),
}
ALIASES = {"wideresnet": "wrn28_10", "wrn28-10": "wrn28_10", "wrn16-8": "wrn16_8", "resnext29-4-24": "resnext29_4_24"}
DROPOUT_MODELS = {"wrn28_10", "wrn16_8"}


def stem_stride(image_size: int) -> int:
    """1 up to 63 pixels, 2 from 64 on (Tiny-ImageNet), as the Puzzle Mix family of codes has it."""
    return 1 if image_size < 64 else 2


def build_model(name: str, num_classes: int, image_size: int = 32, dropout: float = 0.0):
    """The network `name` for square images of `image_size` pixels, with freshly drawn weights: (B, 3, H, W) -> (B,
    num_classes).

    dropout counts in the wide networks only. Raises ValueError for an unknown name.
    """
    name = ALIASES.get(name, name)
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; there are {', '.join(MODELS)}")
    module, constructor = MODELS[name]
    extra = {"dropout": dropout} if name in DROPOUT_MODELS else {}
    return getattr(import_module(module), constructor)(num_classes, stride=stem_stride(image_size), **extra)


def matching_models(state: dict, image_size: int = 32) -> list[str]:
    """Names of the networks whose state-dict keys and shapes equal those of `state`, whatever the number of classes.

    The step counters of batch norm do not count: files of old torch versions lack them.
    """
    import torch

    def shapes(tensors: dict) -> dict:
        return {key: tuple(value.shape) for key, value in tensors.items() if not key.endswith("num_batches_tracked")}

    classes = class_count(state)
    if not classes:
        return []
    with torch.device("meta"):
        return [name for name in MODELS if shapes(build_model(name, classes, image_size).state_dict()) == shapes(state)]


def class_count(state: dict) -> int:
    """How many classes the weights of one of our networks are for; 0 if they are of none."""
    bias = next((state[f"{head}.bias"] for head in ("fc", "linear", "classifier") if f"{head}.bias" in state), None)
    return len(bias) if bias is not None and bias.dim() == 1 else 0


def parameter_counts(num_classes: int = 10) -> dict[str, int]:
    """Name -> number of parameters, for every network; nothing is allocated."""
    import torch

    with torch.device("meta"):
        return {name: sum(p.numel() for p in build_model(name, num_classes).parameters()) for name in MODELS}

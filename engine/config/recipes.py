"""Recipes: published training settings. `--recipe NAME` sets the options that are not given; a typed option wins.

For small images: `shapes` and `small` are this project's own, `small` for a few hundred to a few thousand images;
`saliencymix` follows Uddin et al. (arXiv 2006.01791); `puzzle` is the setting that Puzzle Mix, Co-Mixup and SAGE share
(300 epochs); `rmix` follows R-Mix (arXiv 2212.04875). For ImageNet: `cutmix300` is the setting of CutMix and
SaliencyMix; `fast100` is the one of Puzzle Mix, Co-Mixup and R-Mix, in three phases. `openmixup`, `s2mix`,
`vit_cifar`, `deit` and `fine_tune` are in engine/config/modern_recipes.py.
"""

from collections.abc import Sequence

from engine.config.modern_recipes import Typed, deit, fine_tune, openmixup, s2mix, vit_cifar
from engine.config.shared_settings import (
    COMMON,
    IMAGENET_METHOD_OPTIONS,
    get_small_method_options,
    merge_method_options,
)

RECIPES = {
    "shapes": {
        **COMMON,
        "model": "resnet20",
        "dataset": "shapes",
        "epochs": 20,
        "batch_size": 64,
        "lr": 0.1,
        "weight_decay": 5e-4,
        "scheduler": "onecycle",
        "schedule": [10, 15],
        "crop_padding": 2,
        "vis_epoch": 20,
    },
    "saliencymix": {
        **COMMON,
        "model": "resnet50",
        "dataset": "cifar10",
        "epochs": 200,
        "batch_size": 128,
        "lr": 0.1,
        "weight_decay": 5e-4,
        "scheduler": "multistep",
        "schedule": [60, 120, 160],
        "gammas": [0.2],
        "trad_augment": False,
        "crop_padding": 4,
    },
    "puzzle": {
        **COMMON,
        "model": "preactresnet18",
        "dataset": "cifar100",
        "epochs": 300,
        "batch_size": 100,
        "lr": 0.2,
        "scheduler": "multistep",
        "schedule": [100, 200],
        "loss": "softmax_bce",
        "crop_padding": 2,
    },
    "rmix": {
        **COMMON,
        "model": "preactresnet18",
        "dataset": "cifar100",
        "epochs": 300,
        "batch_size": 100,
        "lr": 0.2,
        "scheduler": "onecycle",
        "schedule": [150, 225],
        "max_lr": 0.29947526988779305,
        "div_factor": 100.0,
        "crop_padding": 2,
        "drop_last": True,
    },
    "small": {
        **COMMON,
        "model": "resnet18",
        "dataset": "folder",
        "epochs": 100,
        "batch_size": 16,
        "lr": 0.02,
        "weight_decay": 5e-4,
        "scheduler": "cosine",
        "crop_padding": 4,
        "drop_last": True,
    },
    "openmixup": openmixup,
    "s2mix": s2mix,
    "vit_cifar": vit_cifar,
    "fine_tune": fine_tune,
}
IMAGENET_RECIPES = {
    "cutmix300": {
        **COMMON,
        "model": "imagenet_resnet50",
        "dataset": "imagenet",
        "epochs": 300,
        "batch_size": 256,
        "lr": 0.1,
        "scheduler": "multistep",
        "schedule": [75, 150, 225],
        "color_jitter": 0.4,
        "lighting": 0.1,
        "method_options": IMAGENET_METHOD_OPTIONS,
    },
    "fast100": {
        **COMMON,
        "model": "imagenet_resnet50",
        "dataset": "imagenet",
        "phases": "15:small:128:0.08:1024,40:large:224:0.087:448,100:large:224:0.087:448",
        "lr_points": "0:0.5,8:1.0,15:0.125,15:0.2,40:0.02,65:0.002,90:0.0002,100:0.00002",
        "lr": 1.0,
        "no_decay_bn": True,
        "zero_init": True,
        "scheduler": "points",
        "method_options": {
            **IMAGENET_METHOD_OPTIONS,
            "puzzlemix": {**IMAGENET_METHOD_OPTIONS["puzzlemix"], "beta": 1.5},
        },
        "phase_options": [
            {"puzzlemix": {"clean_lam": 1.0}},
            {"puzzlemix": {"clean_lam": 1.0}},
            {"puzzlemix": {"clean_lam": 0.0}},
        ],
    },
    "deit": deit,
    "fine_tune": fine_tune,
    "none": {
        **COMMON,
        "model": "imagenet_resnet50",
        "dataset": "imagenet",
        "scheduler": "constant",
        "method_options": {},
    },
}
RECIPE_ALIASES = {"small_photos": "fine_tune"}  # the name in earlier versions
RECIPE_METHODS = {
    "puzzle": {"mixup", "manifold", "puzzlemix", "comixup", "sage"},
    "rmix": {"rmix", "rlmix"},
}  # all other methods: saliencymix


def choose_recipe(given: dict, methods: list[str], large_images: bool) -> str:
    """Return the recipe that `--recipe auto` means. given: options that were typed or saved. methods: those of the run.

    large_images: whether imagenet_train.py asks.
    """
    dataset = given.get("dataset")
    if dataset == "folder" and given.get("pretrained"):
        return "fine_tune"
    if large_images:
        return "cutmix300"
    if dataset == "shapes" or not {"method", "model", "dataset"} & given.keys():
        return "shapes"
    return next((recipe for recipe, family in RECIPE_METHODS.items() if methods[0] in family), "saliencymix")


def get_recipe_options(
    name: str, *, dataset: str | None, model: str | None, method: Sequence[str] = (), batch_size: int | None = None
) -> dict[str, object]:
    """Return the options of a recipe for what was typed of dataset, model, method and batch_size; None or (): nothing.

    `method_options` maps a method to its hyper-parameters. `phase_options` lists, for each phase, hyper-parameters that
    are added to them.
    """
    recipe = (RECIPES | IMAGENET_RECIPES)[RECIPE_ALIASES.get(name, name)]
    if callable(recipe):
        return recipe(Typed(dataset, model, method, batch_size))
    options = dict(recipe)
    if name in IMAGENET_RECIPES:
        return options
    dataset, model = dataset or options["dataset"], model or options["model"]
    if name == "saliencymix" and model.startswith("wrn"):
        options["dropout"] = 0.3
    own: dict[str, dict] = {}
    if dataset == "tiny-imagenet":
        options["crop_padding"] = 4
        own |= {method: {"mixup_alpha": 0.2} for method in ("mixup", "manifold")}
        own["puzzlemix"] = {"clean_lam": 1.0}
    if name == "puzzle":
        alpha = {"mixup_alpha": 0.2} if dataset == "tiny-imagenet" else {}
        own["cutmix"] = {**alpha, "mix_prob": 1.0, "cutmix_box": "real"}
    return options | {"method_options": merge_method_options(get_small_method_options(dataset, model), own)}

"""Recipes: published training settings. `--recipe NAME` sets the options that are not given; a typed option wins.

For small images: `shapes` and `small` are this project's own, `small` for a few hundred to a few thousand images;
`saliencymix` follows Uddin et al. (arXiv 2006.01791); `puzzle` is the setting that Puzzle Mix, Co-Mixup and SAGE share
(300 epochs); `rmix` follows R-Mix (arXiv 2212.04875). For ImageNet: `cutmix300` is the setting of CutMix and
SaliencyMix; `fast100` is the one of Puzzle Mix, Co-Mixup and R-Mix, in three phases. `small_photos` is `small` for
photos at 224 pixels, best with pretrained weights.
"""

COMMON = {  # shared by nearly all recipes
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 1e-4,
    "schedule": [],
    "gammas": [0.1],
    "div_factor": 25.0,
    "pct_start": 0.3,
    "final_div_factor": 1e4,
    "loss": "ce",
    "trad_augment": True,
    "drop_last": False,
}
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
}
IMAGENET_METHOD_OPTIONS = {  # by method; sage then tries as many offsets at 224 pixels as with 0.01 at 32 pixels
    "mixup": {"mixup_alpha": 0.2},
    "cutmix": {"mix_prob": 1.0},
    "saliencymix": {"mix_prob": 1.0},
    "puzzlemix": {"neigh_size": 2, "t_size": -1},
    "comixup": {"mixup_alpha": 1.0, "m_part": 16, "m_niter": 3, "m_stride": 8, "clean_lam": 1.0},
    "sage": {"rand_pos": 0.0002, "upper_lambda": 0.6, "update_ratio": 0.7},
    "rmix": {"patches_per_side": (2, 4), "dirichlet_alpha": 0.2, "pairing": "reversed", "clean_lam": 1.0},
    "rlmix": {"patches_per_side": (2, 4), "dirichlet_alpha": 0.2, "pairing": "reversed", "clean_lam": 1.0},
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
    "small_photos": {
        **COMMON,
        "model": "imagenet_resnet18",
        "dataset": "folder",
        "epochs": 30,
        "batch_size": 32,
        "lr": 0.01,
        "scheduler": "cosine",
        "drop_last": True,
        "method_options": IMAGENET_METHOD_OPTIONS,
    },
    "none": {
        **COMMON,
        "model": "imagenet_resnet50",
        "dataset": "imagenet",
        "scheduler": "constant",
        "method_options": {},
    },
}
RECIPE_METHODS = {
    "puzzle": {"mixup", "manifold", "puzzlemix", "comixup", "sage"},
    "rmix": {"rmix", "rlmix"},
}  # all other methods: saliencymix


def choose_recipe(methods: list[str], dataset: str | None, is_default: bool) -> str:
    """Return the recipe that `--recipe auto` means. is_default: no method, model or dataset is given."""
    if dataset == "shapes" or is_default:
        return "shapes"
    return next((recipe for recipe, family in RECIPE_METHODS.items() if methods[0] in family), "saliencymix")


def get_recipe_options(name: str, *, dataset: str | None, model: str | None) -> dict[str, object]:
    """Return the options of a recipe for this dataset and model. None: those of the recipe.

    `method_options` maps a method to its hyper-parameters. `phase_options` lists, for each phase, hyper-parameters that
    are added to them.
    """
    if name in IMAGENET_RECIPES:
        return dict(IMAGENET_RECIPES[name])
    options = dict(RECIPES[name])
    dataset, model = dataset or options["dataset"], model or options["model"]
    if name == "saliencymix" and model.startswith("wrn"):
        options["dropout"] = 0.3
    by_method: dict[str, dict] = {"sage": get_sage_options(dataset, model)}
    if dataset in ("cifar10", "cifar100", "shapes"):
        by_method["puzzlemix"] = {"t_size": 4}
    if dataset == "tiny-imagenet":
        options["crop_padding"] = 4
        by_method |= {method: {"mixup_alpha": 0.2} for method in ("mixup", "manifold")}
        by_method["puzzlemix"] = {"clean_lam": 1.0}
    if name == "puzzle":
        alpha = {"mixup_alpha": 0.2} if dataset == "tiny-imagenet" else {}
        by_method["cutmix"] = {**alpha, "mix_prob": 1.0, "cutmix_box": "real"}
    options["method_options"] = by_method
    return options


def get_sage_options(dataset: str, model: str) -> dict[str, float]:
    """Return the published upper_lambda and update_ratio of SAGE; by default those of PreActResNet-18 on CIFAR-10."""
    if model.startswith(("wrn", "wideresnet", "resnext")):
        return {"upper_lambda": 0.7, "update_ratio": 0.5}
    return {"upper_lambda": 0.5 if dataset == "cifar100" else 0.6, "update_ratio": 0.7}

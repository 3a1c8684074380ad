"""Published training set-ups, `--recipe NAME`: each fills in the options that were not given. A typed option always
wins.

`shapes` is ours; `saliencymix` Uddin et al. (arXiv 2006.01791); `puzzle` the setting that Puzzle Mix, Co-Mixup and SAGE
share (300 epochs); `rmix` R-Mix (arXiv 2212.04875).
"""

SGD = {"momentum": 0.9, "nesterov": True}
RECIPES = {
    "shapes": {
        "model": "resnet20",
        "dataset": "shapes",
        "epochs": 12,
        "batch_size": 64,
        **SGD,
        "lr": 0.1,
        "weight_decay": 5e-4,
        "scheduler": "onecycle",
        "schedule": [6, 9],
        "gammas": [0.1],
        "div_factor": 25.0,
        "pct_start": 0.3,
        "final_div_factor": 1e4,
        "loss": "ce",
        "trad_augment": True,
        "crop_padding": 2,
        "drop_last": False,
        "vis_epoch": 12,
    },
    "saliencymix": {
        "model": "resnet50",
        "dataset": "cifar10",
        "epochs": 200,
        "batch_size": 128,
        **SGD,
        "lr": 0.1,
        "weight_decay": 5e-4,
        "scheduler": "multistep",
        "schedule": [60, 120, 160],
        "gammas": [0.2],
        "div_factor": 25.0,
        "pct_start": 0.3,
        "final_div_factor": 1e4,
        "loss": "ce",
        "trad_augment": False,
        "crop_padding": 4,
        "drop_last": False,
    },
    "puzzle": {
        "model": "preactresnet18",
        "dataset": "cifar100",
        "epochs": 300,
        "batch_size": 100,
        **SGD,
        "lr": 0.2,
        "weight_decay": 1e-4,
        "scheduler": "multistep",
        "schedule": [100, 200],
        "gammas": [0.1],
        "div_factor": 25.0,
        "pct_start": 0.3,
        "final_div_factor": 1e4,
        "loss": "bce",
        "trad_augment": True,
        "crop_padding": 2,
        "drop_last": False,
    },
    "rmix": {
        "model": "preactresnet18",
        "dataset": "cifar100",
        "epochs": 300,
        "batch_size": 100,
        **SGD,
        "lr": 0.2,
        "weight_decay": 1e-4,
        "scheduler": "onecycle",
        "schedule": [150, 225],
        "gammas": [0.1],
        "max_lr": 0.29947526988779305,
        "div_factor": 100.0,
        "pct_start": 0.3,
        "final_div_factor": 1e4,
        "loss": "ce",
        "trad_augment": True,
        "crop_padding": 2,
        "drop_last": True,
    },
}
FAMILIES = {
    "puzzle": {"mixup", "manifold", "puzzlemix", "comixup", "sage"},
    "rmix": {"rmix", "rlmix"},
}  # the others: saliencymix


def recipe_for(methods: list[str], dataset: str | None, named: bool) -> str:
    """The recipe of `--recipe auto`. named: whether the user chose a method, a model or a data set at all."""
    if dataset == "shapes" or not named:
        return "shapes"
    return next((recipe for recipe, family in FAMILIES.items() if methods[0] in family), "saliencymix")


def recipe_options(name: str, *, dataset: str | None, model: str | None) -> dict[str, object]:
    """The options of a recipe for this data set and model (None: the recipe's own).

    `method_options` are those of single methods: hyper-parameters by method name.
    """
    options = dict(RECIPES[name])
    dataset, model = dataset or options["dataset"], model or options["model"]
    if name == "saliencymix" and model.startswith("wrn"):
        options["dropout"] = 0.3
    by_method: dict[str, dict] = {"sage": sage_options(dataset, model)}
    if dataset in ("cifar10", "cifar100", "shapes"):
        by_method["puzzlemix"] = {"t_size": 4}
    if dataset == "tiny-imagenet":
        options["crop_padding"] = 4
        by_method |= {method: {"mixup_alpha": 0.2} for method in ("mixup", "manifold", "cutmix")}
        by_method["puzzlemix"] = {"clean_lam": 1.0}
    if name == "puzzle":
        by_method["cutmix"] = {**by_method.get("cutmix", {}), "mix_prob": 1.0, "cutmix_box": "real"}
    options["method_options"] = by_method
    return options


def sage_options(dataset: str, model: str) -> dict[str, float]:
    """SAGE's published upper_lambda and update_ratio; elsewhere those of PreActResNet-18 on CIFAR-10."""
    if model.startswith(("wrn", "wideresnet", "resnext")):
        return {"upper_lambda": 0.7, "update_ratio": 0.5}
    return {"upper_lambda": 0.5 if dataset == "cifar100" else 0.6, "update_ratio": 0.7}

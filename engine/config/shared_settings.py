"""Options, and hyper-parameters of the methods, that several recipes set."""

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


def get_small_method_options(dataset: str, model: str) -> dict[str, dict]:
    """Return method -> hyper-parameters for small images: SAGE's published ones, and PuzzleMix's size of the blocks."""
    by_method: dict[str, dict] = {"sage": get_sage_options(dataset, model)}
    if dataset in ("cifar10", "cifar100", "shapes"):
        by_method["puzzlemix"] = {"t_size": 4}
    return by_method


def get_sage_options(dataset: str, model: str) -> dict[str, float]:
    """Return the published upper_lambda and update_ratio of SAGE; by default those of PreActResNet-18 on CIFAR-10."""
    if model.startswith(("wrn", "wideresnet", "resnext")):
        return {"upper_lambda": 0.7, "update_ratio": 0.5}
    return {"upper_lambda": 0.5 if dataset == "cifar100" else 0.6, "update_ratio": 0.7}


def merge_method_options(base: dict[str, dict], own: dict[str, dict]) -> dict[str, dict]:
    """Return the hyper-parameters of each method, where those of `own` win over those of `base`."""
    return {name: {**base.get(name, {}), **own.get(name, {})} for name in {**base, **own}}

"""Option names of earlier codes: aliases of our options, shorthands, and options that are ignored.

The commands in the READMEs of those codes keep working. `--help` shows none of these names.
"""

from engine.config.option_types import boolean, choice, float_in_range, int_at_least

OPTION_ALIASES = {  # our option -> aliases; an alias is dropped in a command that has an option of that name
    "arch": ["model"],
    "backbone_checkpoint": ["backbone"],
    "batch_size": ["cnn_batch_size"],
    "checkpoint": ["resume"],
    "cutmix_probab": ["cutmix_prob"],
    "data_dir": ["data"],
    "epochs": ["cnn_epoch"],
    "gammas": ["lr_step_gamma"],
    "image_path": ["image"],
    "iters": ["iterations"],
    "labels": ["class_list"],
    "lr": ["learning_rate"],
    "lr_casme": ["learning_rate_casme"],
    "mix_fraction": ["prob_mix"],
    "mixup_alpha": ["alpha"],
    "model": ["arch", "model_name"],
    "model_path": ["checkpoint", "resume"],
    "name": ["tag", "add_name", "expname"],
    "root_dir": ["output_dir"],
    "saliency_probab": ["salmix_prob"],
    "save_every": ["save_epoch"],
    "schedule": ["milestones"],
    "target_class": ["class"],
    "trad_augment": ["data_augmentation"],
    "weight_decay": ["decay", "wd"],
    "workers": ["num_workers"],
}
IGNORED_LEGACY_OPTIONS = sorted(  # accepted and ignored: processes for graph cuts, unused flags, file names
    "mp parallel mixing_workers initial_channels job_id env shuffle_data use_scheduler".split()
    + "cnn_save_path scheduler_save_path rl_save_path".split()
)
# hidden options by group: name -> arguments of Parser.option()
LEGACY_DEVICE_OPTIONS = {
    "ngpu": {"type": int_at_least()},  # 0: --device cpu, 1: --device cuda
    "use_fp16": {"type": boolean, "default": False},  # --amp fp16
}
LEGACY_TRACKER_OPTIONS = {"wandb_key": {}}  # visible in the process list; WANDB_API_KEY in the environment is safer
LEGACY_EVALUATION_OPTIONS = dict.fromkeys(  # accepted and ignored by evaluate.py
    ("cutout", "trad_augment", "log_off", "parallel", "evaluate"), {"type": boolean}
)
LEGACY_METHOD_OPTIONS = {"grad_sim": {"type": boolean}}  # rlmix: reward similar saliency, the only reward
LEGACY_MIXING_OPTIONS = {
    "saliency_probab": {"type": float_in_range(0, 1)},  # --method saliencymix --mix_prob P
    "cutmix_probab": {"type": float_in_range(0, 1)},  # --method cutmix --mix_prob P
    "train": {"type": choice(["vanilla", "mixup", "mixup_hidden"])},  # Puzzle Mix's name for --method
    "box": {"type": boolean, "default": False},  # with --train mixup: cutmix
    "graph": {"type": boolean, "default": False},  # with --train mixup: puzzlemix
    "comix": {"type": boolean},  # --method comixup; false: --method none --recipe puzzle
    "saliency_legacy_float": {"type": boolean, "default": False},  # SaliencyMix as in its published code
    **{name: {"nargs": "?"} for name in IGNORED_LEGACY_OPTIONS},
}

SAVED_VALUES = {("loss", "bce"): "softmax_bce"}  # an option and its value in files of earlier versions -> today's value
EARLIER_VALUES = {  # options that runs of earlier versions did not have -> what those runs did
    "optimizer": "sgd",
    "betas": None,
    "eps": None,
    "no_decay_1d": False,
    "layer_decay": None,
    "freeze": None,
    "min_lr": 0.0,
    "warmup_lr": None,
    "bce_target_thresh": None,
    "ema_ramp": False,
    "auto_augment": "none",
    "method_weights": None,
}


def translate_saved(saved: dict) -> dict:
    """Return the options of a saved classifier run as today's version would have saved them. {} stays empty."""
    renamed = {key: value for (key, before), value in SAVED_VALUES.items() if saved.get(key) == before}
    return (EARLIER_VALUES if "lr" in saved else {}) | saved | renamed


def translate_legacy(typed: dict) -> tuple[dict, list[str]]:
    """Return the typed options under their current names, and notes on the translations that a user should know.

    Raises ValueError if two options name different methods, and for --ngpu above 1.
    """
    typed, notes = translate_methods(typed)
    if typed.pop("use_fp16", False):
        typed["amp"] = "fp16"
    if (gpus := typed.pop("ngpu", None)) is not None:
        if gpus > 1:
            raise ValueError(
                f"--ngpu {gpus}: start the script with torchrun --nproc_per_node {gpus} to use several GPUs"
            )
        typed["device"] = "cuda" if gpus else "cpu"
    if typed.pop("saliency_legacy_float", False):
        typed = {"saliency": "float_bytes", "saliency_scope": "batch", **typed}
        notes.append("--saliency_legacy_float means --saliency float_bytes --saliency_scope batch")
    if "per_sample" in typed and "saliencymix" in typed.get("method", []):
        typed.setdefault("saliency_scope", "sample" if typed["per_sample"] else "batch")
        if "cutmix" not in typed["method"]:
            del typed["per_sample"]
    return typed, notes


def translate_methods(typed: dict) -> tuple[dict, list[str]]:
    """Translate the shorthands that name a method, and remove the ignored options. Return as translate_legacy()."""
    typed, notes = dict(typed), []
    named = {"--method " + " ".join(typed["method"]): typed["method"]} if "method" in typed else {}
    for option, method in (("saliency_probab", "saliencymix"), ("cutmix_probab", "cutmix")):
        if chance := typed.pop(option, 0):
            named[f"--{option} {chance:g}"] = [method]
            typed["mix_prob"] = chance
    box, graph = typed.pop("box", False), typed.pop("graph", False)
    if train := typed.pop("train", None):
        mixed = "puzzlemix" if graph else "cutmix" if box else "mixup"
        method = {"vanilla": "none", "mixup": mixed, "mixup_hidden": "manifold"}[train]
        old = f"--train {train}" + (" --box" if box else "") + (" --graph" if graph else "")
        named[old] = [method]
        notes.append(f"{old} means --method {method}")
    if (comix := typed.pop("comix", None)) is not None:
        old, method = f"--comix {str(comix).lower()}", "comixup" if comix else "none"
        named[old] = [method]
        typed = typed if comix else {"recipe": "puzzle", **typed}
        notes.append(f"{old} means --method {method}" + ("" if comix else " --recipe puzzle"))
    if ignored := [f"--{key}" for key in IGNORED_LEGACY_OPTIONS if typed.pop(key, None) is not None]:
        notes.append(f"{' '.join(ignored)}: ignored; used by an earlier code only")
    if len({tuple(methods) for methods in named.values()}) > 1:
        raise ValueError(
            f"{' and '.join(named)} name different methods; to draw one of several per batch, use --method A B"
        )
    if named:
        typed["method"] = next(iter(named.values()))
    return typed, notes

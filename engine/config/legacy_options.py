"""Options of the five earlier codes, translated into today's."""

IGNORED_LEGACY_OPTIONS = {  # accepted without effect: graph-cut processes, unused flags, file names
    *("mp", "parallel", "mixing_workers", "initial_channels", "job_id", "env", "shuffle_data", "use_scheduler"),
    *("cnn_save_path", "scheduler_save_path", "rl_save_path"),
}


def translate_legacy(typed: dict) -> tuple[dict, list[str]]:
    """Shorthands and older names in today's terms: the options, and a line for each translation worth showing.

    Raises ValueError where two methods are asked for at once, or several GPUs.
    """
    typed, lines = dict(typed), []
    named = {"--method " + " ".join(typed["method"]): typed["method"]} if "method" in typed else {}
    for option, method in (("saliency_probab", "saliencymix"), ("cutmix_probab", "cutmix")):
        if chance := typed.pop(option, 0):
            named[f"--{option} {chance:g}"] = [method]
            typed["mix_prob"] = chance
    box, graph = typed.pop("box", False), typed.pop("graph", False)
    if train := typed.pop("train", None):
        mixed = "puzzlemix" if graph else "cutmix" if box else "mixup"
        today = {"vanilla": "none", "mixup": mixed, "mixup_hidden": "manifold"}[train]
        old = f"--train {train}" + (" --box" if box else "") + (" --graph" if graph else "")
        named[old] = [today]
        lines.append(f"{old} is --method {today}")
    if (comix := typed.pop("comix", None)) is not None:
        old, today = f"--comix {str(comix).lower()}", "comixup" if comix else "none"
        named[old] = [today]
        typed = typed if comix else {"recipe": "puzzle", **typed}
        lines.append(f"{old} is --method {today}" + ("" if comix else " --recipe puzzle"))
    if ignored := [f"--{key}" for key in sorted(IGNORED_LEGACY_OPTIONS) if typed.pop(key, None) is not None]:
        lines.append(f"{' '.join(ignored)}: of an earlier code, without meaning here")
    if len({tuple(methods) for methods in named.values()}) > 1:
        raise ValueError(f"{' and '.join(named)} name different methods; several drawn per batch are --method A B")
    if named:
        typed["method"] = next(iter(named.values()))
    if typed.pop("use_fp16", False):
        typed["amp"] = "fp16"
    if (gpus := typed.pop("ngpu", None)) is not None:
        if gpus > 1:
            raise ValueError(f"--ngpu {gpus}: several GPUs are used by torchrun --nproc_per_node {gpus} in front")
        typed["device"] = "cuda" if gpus else "cpu"
    if typed.pop("saliency_legacy_float", False):
        typed = {"saliency": "float_bytes", "saliency_scope": "batch", **typed}
        lines.append("--saliency_legacy_float is --saliency float_bytes --saliency_scope batch")
    if "per_sample" in typed and "saliencymix" in typed.get("method", []):
        typed.setdefault("saliency_scope", "sample" if typed["per_sample"] else "batch")
        if "cutmix" not in typed["method"]:
            del typed["per_sample"]
    return typed, lines

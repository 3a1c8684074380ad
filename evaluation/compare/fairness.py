"""What differs between the groups of a comparison, and which of it makes the comparison unfair."""

from engine.runtime.text import format_count
from evaluation.compare.groups import Group, format_value
from evaluation.compare.metrics import METRICS
from evaluation.compare.runs import Run
from evaluation.compare.statistics import get_curve

UNFAIR_OPTIONS = {  # what makes a comparison of methods unfair -> the options whose difference causes it
    "recipe differs": ["recipe"],
    "network differs": ["model", "model_args", "dropout"],
    "initial weights differ": ["init_from", "pretrained", "freeze"],
    "length of training differs": ["epochs", "phases"],
    "batch size differs": ["batch_size", "accumulate", "drop_last"],
    "training images differ": ["labels_per_class", "valid_labels_per_class"],
    "image size differs": ["image_size", "crop_size", "eval_resize", "interpolation", "norm"],
    "augmentation differs": [
        *("trad_augment", "crop_padding", "crop_padding_mode", "min_scale", "color_jitter", "lighting", "auto_augment"),
        *("rand_augment_ops", "rand_augment_magnitude", "rand_augment_std", "rand_augment_prob", "random_erasing"),
    ],
    "optimizer differs": [
        *("optimizer", "lr", "max_lr", "momentum", "nesterov", "betas", "eps", "weight_decay", "no_decay_bn"),
        *("no_decay_1d", "layer_decay", "clip_grad"),
    ],
    "schedule differs": ["scheduler", "schedule", "gammas", "lr_points", "warmup_epochs", "warmup_lr", "min_lr"],
    "loss differs": ["loss", "label_smoothing", "bce_target_thresh"],
}


def find_option_differences(groups: list[Group]) -> dict[str, list[str]]:
    """Return option -> its value in each group as text, for the options that differ between groups."""
    keys = dict.fromkeys(key for group in groups for key in group.options)
    values = {key: [format_value(group.options.get(key)) for group in groups] for key in keys}
    return {key: found for key, found in values.items() if len(set(found)) > 1}


def list_warnings(groups: list[Group]) -> list[str]:
    """Return a line for each thing that makes the comparison of the groups unfair or uncertain."""
    differences = find_option_differences(groups)
    warnings = []
    for title, options in UNFAIR_OPTIONS.items():
        texts = [
            f"--{option} {join_values(zip_labels(groups, differences[option]))}"
            for option in options
            if option in differences
        ]
        warnings += [f"{title}: {'; '.join(texts)}"] if texts else []
    runs = [run for group in groups for run in group.runs]
    warnings += [
        *describe_record(groups, "precision", "precision", "accuracies and times are not those of one set-up"),
        *describe_parameters(groups, "model" in differences),
        *describe_unmixed(groups),
        *describe_record(groups, "commit", "commit of the code", "its results may have moved in between"),
        *describe_record(groups, "device", "device", "do not compare minutes and images/s"),
        *describe_folders(runs),
        *describe_seeds(groups),
        *describe_best(runs),
    ]
    if damaged := [str(run.folder) for run in runs if (run.result or {}).get("test_unreadable")]:
        warnings.append(f"test files that could not be read do not count in {', '.join(damaged)}")
    return warnings


def zip_labels(groups: list[Group], values: list[str]) -> dict[str, list[str]]:
    """Return value -> labels of the groups that have it."""
    found: dict[str, list[str]] = {}
    for group, value in zip(groups, values, strict=True):
        found.setdefault(value, []).append(group.label)
    return found


def join_values(found: dict[str, list[str]], shown: int = 4) -> str:
    """Return who has which value, such as `200 (none; cutmix), 300 (puzzlemix)`."""
    texts = []
    for value, names in found.items():
        more = f" and {len(names) - shown} more" if len(names) > shown else ""
        texts.append(f"{value} ({'; '.join(names[:shown])}{more})")
    return ", ".join(texts)


def describe_record(groups: list[Group], key: str, title: str, consequence: str) -> list[str]:
    """Return a warning if an entry of config.json is not the same in all runs that record it."""
    found: dict[str, list[str]] = {}
    for group in groups:
        for value in dict.fromkeys(run.config.get(key) for run in group.runs):
            if value is not None:
                found.setdefault(value[:10] if key == "commit" else str(value), []).append(group.label)
    return [f"{title} differs: {join_values(found)}; {consequence}"] if len(found) > 1 else []


def describe_parameters(groups: list[Group], other_model: bool) -> list[str]:
    """Return a warning if networks of one name differ in size. other_model: a warning names the networks already."""
    return (
        [] if other_model else describe_record(groups, "parameters", "number of parameters", "networks are not equal")
    )


def describe_unmixed(groups: list[Group]) -> list[str]:
    """Return a warning if only some of the groups that mix also train on the unmixed images."""
    mixing = [group for group in groups if group.options["method"] != ["none"]]
    found = zip_labels(mixing, [find_clean_part(group.runs[0]) for group in mixing])
    remedy = "another --clean_weight, not only another method"
    return [f"training on unmixed images too: {join_values(found)}; {remedy}"] if len(found) > 1 else []


def find_clean_part(run: Run) -> str:
    """Return how a run also trains on the unmixed images: no, by --clean_weight, or as its method has it."""
    weight = run.options.get("clean_weight")
    if weight is not None:
        return f"--clean_weight {weight:g}" if weight else "no"
    values = run.config.get("hyper_parameters") or {}
    methods = [own for phase in (values if isinstance(values, list) else [values]) for own in phase.values()]
    own = any(one.get("clean_lam") or one.get("update_ratio", 1) < 1 for one in methods)
    return "by the method" if own and run.options.get("saliency") in (None, "gradient") else "no"


def describe_folders(runs: list[Run]) -> list[str]:
    """Return a warning if runs on one's own images have read them from different folders."""
    folders = sorted({str(run.options.get("data_dir")) for run in runs})
    if runs[0].options["dataset"] != "folder" or len(folders) < 2:
        return []
    return [f"the images are read from several folders: {', '.join(folders)}; are they the same?"]


def describe_seeds(groups: list[Group]) -> list[str]:
    """Return warnings on groups with one finished seed, and on groups with different seeds."""
    finished = [group for group in groups if group.finished]
    warnings = []
    if single := [group.label for group in finished if len(group.finished) == 1]:
        warnings.append(f"one seed only, so no spread: {'; '.join(single)}")
    seeds = zip_labels(finished, [" ".join(str(run.seed) for run in group.finished) for group in finished])
    return warnings + ([f"finished seeds differ: {join_values(seeds)}"] if len(seeds) > 1 else [])


def describe_best(runs: list[Run]) -> list[str]:
    """Return a warning if the best epoch is chosen on the test images."""
    chosen = [bool(get_curve(run, METRICS["valid_top1"])) for run in runs if run.history]
    if all(chosen):
        return []
    some = f" in {format_count(chosen.count(False), 'run')} of {len(chosen)}" if any(chosen) else ""
    return [f"the best epoch is chosen on the test images{some}, which flatters it: report the last epoch"]

"""Show what mixing methods make of your own images: python -m mixing.show --images cat.jpg dog.jpg --method all"""

import copy
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import saliency
from engine.config.mixing_options import add_method_options
from engine.config.option_types import choices, int_at_least
from engine.config.options import DATASETS, FIGURE_FORMATS, add_common_options, add_dataset_option
from engine.config.parser import Parser, check_figure_path
from engine.config.select import select_kwargs
from engine.errors import UserError, explain_missing
from engine.launch import run_main
from mixing import ALIASES, MIXERS, build_mixer, hyper_parameters, mixer_class
from saliency import build_source

METHODS = [name for name in MIXERS if name != "none"]
MAX_DRAWS = 60  # batches mixed per method to find images in which another one shows
STATIC_SOURCE = "fine_grained"  # replaces a source that needs a network if there is no network
NETWORK_SOURCES = ("gradient", "cam", "gradcam", "gradcam++", "layercam", "attention")


def build_parser() -> Parser:
    parser = Parser("Mix a few images with one or several methods and draw the results.", prog="python -m mixing.show")
    parser.group("input and output")
    parser.option("--images", nargs="+", metavar="FILE", help="two or more image files; their centre square is used")
    add_dataset_option(parser, DATASETS)
    add_common_options(parser, "data_dir", "seed")
    parser.option(
        "--indices",
        type=int_at_least(),
        nargs="+",
        default=[0, 1, 2, 3],
        help="positions of training images",
    )
    parser.option(
        "--method", type=choices([*METHODS, "all"], ALIASES), nargs="+", default=["all"], help="methods, or all"
    )
    parser.option(
        "--model_path",
        metavar="FILE",
        help="trained classifier whose gradient guides the mixing; without it, a static map does",
    )
    add_common_options(parser, "model", "model_args", image_size={"shown": "the classifier's, or 224"})
    parser.option("--n", type=int_at_least(1), default=4, help="mixed images per method")
    parser.option("--output", "-o", default="mix.png", metavar="FILE", help=".png, .pdf or .svg file to write")
    add_common_options(parser, "dpi")
    add_method_options(parser, sources=saliency)
    return parser


def main(argv: list[str] | None = None) -> dict:
    """Draw the figure. Returns the label weights of the mixed images, method -> (n, number of inputs)."""
    options = read_options(build_parser(), argv)

    import torch  # imported late, so that --help is fast

    from engine.drawing.figures import draw_mixtures, is_constant

    # ---- Images and saliency ----
    inputs = load_inputs(**select_kwargs(options, load_inputs))
    images, statistics = inputs.images, {"mean": inputs.mean, "std": inputs.std}
    guide = options["saliency"] or ("gradient" if inputs.network else STATIC_SOURCE)
    settings = {"network": inputs.network, **statistics, **select_kwargs(options, saliency.list_source_options())}
    maps = compute_maps(guide, images, **settings)
    if constant := [name for name, one in zip(inputs.names, maps, strict=True) if is_constant(one)]:
        print(f"note: {guide} saliency is the same everywhere in {', '.join(constant)}, so it guides nothing there")

    # ---- Methods ----
    def make_source(mixer):
        return choose_source(options["saliency"], mixer.default_source, mixer.gradient_options, **settings)

    rows, weights, colours = [], {}, palette(len(images))
    for name in list_methods(**select_kwargs(options, list_methods)):
        given = select_kwargs(options, list(hyper_parameters(name))) | statistics | {"mix_prob": 1.0}
        chosen = select_kwargs(options, ["labels", "n", "seed"])
        mixed, shares, weights[name], time_ms = mix_with(name, images, make_source, **chosen, **given)
        rows.append((f"{name}\n{time_ms:.1f} ms", mixed, torch.tensordot(shares, colours, ([1], [0])), weights[name]))
        title = f"{name}: {time_ms:.1f} ms per batch of {len(images)}; label weights of the mixed images:"
        print_label_weights(title, weights[name], inputs.names)

    # ---- Figure ----
    draw_mixtures(
        options["output"],
        images=images,
        names=inputs.names,
        saliency=maps,
        guide="pixel gradient" if guide == "gradient" else guide,
        rows=rows,
        colours=colours,
        dpi=options["dpi"],
        **statistics,
    )
    print(f"written: {options['output']}")
    return weights


def read_options(parser: Parser, argv: list[str] | None) -> dict:
    """Return the options, with their defaults. Exits with a usage error if they do not fit together."""
    options = {**parser.defaults, **parser.read(argv)}
    if (options["images"] is None) == (options["dataset"] is None):
        parser.error("give either --images with two or more files, or --dataset")
    if len(options["images"] or options["indices"]) < 2:
        parser.error("mixing needs at least two images")
    for key in ("model", "model_args"):
        if options[key] and not options["model_path"]:
            parser.error(f"--{key} needs --model_path, the file with the weights")
    check_figure_path(parser, "--output", options["output"], FIGURE_FORMATS)
    if missing := [file for file in options["images"] or () if not Path(file).is_file()]:
        parser.error(f"--images {' '.join(missing)}: {explain_missing(missing[0])}")
    return options


def list_methods(*, method: list[str], labels: str | None) -> list[str]:
    """Return the methods to draw. `all` with a label rule means those that a rule applies to."""
    if "all" not in method:
        return method
    classes = {name: mixer_class(name) for name in METHODS}
    return [name for name, cls in classes.items() if not (labels and (cls.keeps_labels or cls.label_obstacle))]


@dataclass(frozen=True)
class Inputs:
    """The images to mix, and the classifier that guides the mixing."""

    images: Any  # (B, 3, S, S) tensor, normalised
    names: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    network: Any  # a torch module in evaluation mode, or None


def load_inputs(*, images, dataset, data_dir, indices, image_size, model_path, model, model_args) -> Inputs:
    """Load the files `images`, or the training images `indices` of `dataset`, normalised as the classifier expects."""
    import models
    from engine.data.image_set import STATISTICS
    from engine.inference.classifier import load_classifier, normalize

    given = {"model": model, "model_args": model_args, "image_size": image_size}
    classifier = load_classifier(model_path, models, **given) if model_path else None
    size = image_size or (classifier.image_size if classifier else None)
    if dataset:
        pixels, names, mean, std = read_examples(dataset, data_dir, indices, size)
    else:
        pixels, names = read_files(images, size or 224)
        mean, std = STATISTICS["imagenet"]
    mean, std = (classifier.mean, classifier.std) if classifier else (tuple(mean), tuple(std))
    if classifier:
        classifier.check_size(pixels.shape[-1])
    return Inputs(normalize(pixels, mean, std), names, mean, std, classifier and classifier.network)


def read_examples(dataset: str, data_dir: str, indices: list[int], image_size: int | None) -> tuple:
    """Return training images: pixels (B, 3, S, S) in 0..1, names, and the mean and std of the data set."""
    import torch

    from engine.data.datasets import load_data

    data = load_data(dataset, data_dir=data_dir, image_size=image_size)
    if max(indices) >= len(data.train):
        raise UserError(f"--indices: {dataset} has {len(data.train)} training images, from 0")
    part = data.train.take(torch.tensor(indices))
    in_memory = isinstance(part.pixels, torch.Tensor)
    pixels = part.resize_batch(part.pixels) if in_memory else part.pixels.read_all(0, lambda x, **_: x)[0]
    names = [f"{data.classes[label]} ({index})" for label, index in zip(part.labels, indices, strict=True)]
    return pixels.permute(0, 3, 1, 2).float() / 255, names, data.mean, data.std


def read_files(files: list[str], size: int) -> tuple:
    """Return the centre squares of image files: pixels (B, 3, size, size) in 0..1, and names."""
    import torch

    from engine.data.decode import BadImage, decode_center
    from engine.runtime.text import get_distinct_names

    try:
        pixels = torch.stack([torch.from_numpy(decode_center(Path(file), size)) for file in files])
    except BadImage as error:
        raise UserError(f"--images {error}") from error
    paths = [Path(file) for file in files]
    return pixels.permute(0, 3, 1, 2).float() / 255, get_distinct_names([path.stem for path in paths], paths)


def choose_source(wanted: str | None, default: str, gradient_options: dict, *, network, mean, std, **source_options):
    """Build the source `wanted` or, if it is None, the method's own source `default`. source_options: those of --help.

    Without a network, a static source replaces a default that needs one. Raises ValueError for a source that cannot be
    used here.
    """
    name = wanted or default
    if name == "bank":
        raise ValueError("--saliency bank is learned while a classifier trains: choose another source")
    if name == "casm" and not source_options["casm"]:
        raise ValueError("--saliency casm needs --casm FILE, made by python -m saliency.casm train")
    if name in NETWORK_SOURCES and network is None:
        if wanted:
            raise ValueError(f"--saliency {name} needs --model_path, a trained classifier")
        name = STATIC_SOURCE
    given = source_options | gradient_options | {"mode": "eval", "clean_weight": 0.0}
    source = build_source(name, model=network, mean=mean, std=std, **given)
    return PredictedClassSource(source) if name in NETWORK_SOURCES else source


class PredictedClassSource:
    """A source that runs a classifier on images without labels: it uses the predicted classes as targets."""

    clean_weight = 0.0

    def __init__(self, source):
        self.source, self.has_gradient, self.per_image = source, source.has_gradient, source.per_image

    @property
    def logits(self):
        return self.source.logits

    def __call__(self, images, targets):
        return self.source(images, self.predict(images))

    def gradient(self, images, targets):
        return self.source.gradient(images, self.predict(images))

    def reduce(self, gradient):
        return self.source.reduce(gradient)

    def points(self, saliency):
        return self.source.points(saliency)

    def predict(self, images):
        """Return one-hot targets of the predicted classes, (B, K)."""
        import torch
        from torch.nn import functional as F

        with torch.no_grad():
            logits = self.source.model(images)
        return F.one_hot(logits.argmax(1), logits.shape[1]).float()


def compute_maps(guide: str, images, **settings):
    """Return the saliency (B, H, W) of the source `guide`. Raises UserError if it cannot be used here."""
    try:
        return choose_source(guide, guide, {}, **settings)(images, None)
    except ValueError as error:
        raise UserError(str(error)) from error


def mix_with(name: str, images, make_source, *, labels: str | None, n: int, seed: int, **hyper_parameters) -> tuple:
    """Mix with the method `name` and return collect_mixtures(). Raises UserError if it cannot mix these images."""
    try:
        mixer = build_mixer(name, **hyper_parameters)
        mixer.set_labels(labels)
        mixer.check_size(*images.shape[-2:])
        return collect_mixtures(mixer, images, mixer.build_source(make_source), n, seed)
    except ValueError as error:
        raise UserError(f"--method {name}: {error}") from error


def collect_mixtures(mixer, images, source, count: int, seed: int) -> tuple:
    """Mix until `count` mixed images show another image, or for at most MAX_DRAWS batches.

    Returns mixed images (n, 3, H, W), the share of each input at their pixels (n, B, H, W), their label weights (n, B),
    and the median milliseconds of a call. If no image shows another one, images that changed are returned, or unchanged
    ones.
    """
    import torch

    targets = torch.eye(len(images))
    mixer(images, targets, source)  # warm-up; RL-Mix also initialises its agent here
    found, milliseconds = {2: [], 1: [], 0: []}, []  # 2: another image shows; 1: the image has changed; 0: it has not
    for draw in range(MAX_DRAWS):
        torch.manual_seed(1000 * seed + draw)
        before = copy.deepcopy(mixer)
        begin = time.perf_counter()
        result, labels = mixer(images, targets, source)
        milliseconds.append(1000 * (time.perf_counter() - begin))
        shares = pixel_shares(before, images, targets, source, 1000 * seed + draw)
        for row in range(len(images)):
            changed = not torch.equal(result[row], images[row])  # Manifold Mixup may have mixed a hidden layer only
            kind = changed + (changed and bool(labels[row].max() < 0.99))
            found[kind].append((result[row], shares[row], labels[row]))
        if len(found[2]) >= count:
            break
    best = next(kind for kind in found.values() if kind)[:count]
    mixed, shares, soft = (torch.stack(column).detach() for column in zip(*best, strict=True))
    return mixed, shares, soft, sorted(milliseconds)[len(milliseconds) // 2]


def pixel_shares(mixer, images, targets, source, seed: int):
    """Return the share of image j in each pixel of mixed image i, (B, B, H, W).

    It is the derivative of one with respect to the other, by forward-mode differentiation with the random draws
    repeated. mixer: as it was before it mixed them. What RecursiveMix shows of earlier batches is the share of none.
    """
    import torch
    from torch.autograd import forward_ad
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shares = []
    for index in range(len(images)):
        torch.manual_seed(seed)
        tangent = torch.zeros_like(images)
        tangent[index] = 1
        # of the kernels of attention, which a source may run, only this one has forward-mode derivatives
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch warns about its own internals
            mixed, _ = copy.deepcopy(mixer)(forward_ad.make_dual(images, tangent), targets, source)
            shares.append(forward_ad.unpack_dual(mixed).tangent[:, 0])
    return torch.stack(shares, 1)


def palette(count: int):
    """Return `count` distinct colours, (count, 3) in 0..1."""
    import torch
    from matplotlib import colormaps

    colours = [colormaps["tab10" if count <= 10 else "tab20"](k % 20)[:3] for k in range(count)]
    return torch.tensor(colours, dtype=torch.float32)


def print_label_weights(title: str, soft, names: list[str]) -> None:
    """Print a line for each mixed image: the share of each input, largest first. soft (n, inputs)."""
    print(title)
    for weights in soft:
        order = weights.argsort(descending=True)
        print("   " + ", ".join(f"{float(weights[k]):.2f} {names[int(k)]}" for k in order if weights[k] > 0.005))


if __name__ == "__main__":
    run_main(main)

"""Mix your own pictures: python -m mixing.show --images cat.jpg dog.jpg --method all"""

import time
import warnings
from pathlib import Path

import saliency
from engine.config.mixing_options import add_method_options
from engine.config.option_types import choices, int_at_least
from engine.config.options import DATASETS, add_common_options, add_dataset_option
from engine.config.parser import Parser
from engine.errors import UserError
from engine.launch import run_main
from mixing import ALIASES, MIXERS, build_mixer
from saliency import build_source

METHODS = [name for name in MIXERS if name != "none"]
TRIES = 60  # draws, of which those that mix are shown
WITHOUT_NETWORK = "fine_grained"
THROUGH_NETWORK = ("gradient", "cam", "gradcam", "gradcam++", "layercam")


def build_parser() -> Parser:
    parser = Parser("Mix a few pictures with one or several methods and draw what becomes of them.")
    parser.group("what")
    parser.option("--images", nargs="+", metavar="FILE", help="two or more pictures; the middle square is taken")
    add_dataset_option(parser, DATASETS)
    add_common_options(parser, "data_dir", "seed")
    parser.option(
        "--indices", type=int_at_least(), nargs="+", metavar="N", default=[0, 1, 2, 3], help="which training images"
    )
    parser.option(
        "--method", type=choices([*METHODS, "all"], ALIASES), nargs="+", default=["all"], metavar="NAME", help="or all"
    )
    parser.option(
        "--model_path",
        metavar="FILE",
        help="a trained classifier, whose gradient guides the methods that take one; without: a static map",
    )
    parser.option("--model", metavar="NAME", help="its network, ours or torchvision's, if the file does not say")
    parser.option("--image_size", type=int_at_least(8), shown="the classifier's, else 224", metavar="PIXELS")
    parser.option("--n", type=int_at_least(1), default=4, help="mixed images of each method")
    parser.option("--output", "-o", default="mix.png", metavar="FILE", help="the picture to write")
    add_method_options(parser, sources=saliency)
    return parser


def main(argv: list[str] | None = None) -> dict:
    """Draw; returns the label weights of each method's mixed images, name -> (n, inputs)."""
    parser = build_parser()
    options = {**parser.defaults, **parser.read(argv)}
    if (options["images"] is None) == (options["dataset"] is None):
        parser.error("give either --images, two or more files, or --dataset")
    if len(options["images"] or options["indices"]) < 2:
        parser.error("mixing takes two images or more")
    if options["model"] and not options["model_path"]:
        parser.error(f"--model {options['model']} needs --model_path, the file of its weights")
    if not options["output"].endswith(".png"):
        parser.error(f"--output {options['output']}: the picture is a .png")
    if missing := [file for file in options["images"] or () if not Path(file).is_file()]:
        parser.error(f"--images {' '.join(missing)}: no such file")
    methods = METHODS if "all" in options["method"] else options["method"]

    import torch

    from engine.drawing import figures

    model, images, names, statistics = load(options)
    rows, weights = [], {}
    guide = options["saliency"] or ("gradient" if model else WITHOUT_NETWORK)
    try:
        maps = choose_source(options | {"saliency": guide}, None, model, statistics)(images, None)
    except ValueError as error:
        raise UserError(str(error)) from error
    for name in methods:
        try:
            mixer = build_mixer(name, **options | statistics | {"mix_prob": 1.0})
            mixer.check_size(*images.shape[-2:])
            source = mixer.build_source(lambda one: choose_source(options, one, model, statistics))
            mixed, shares, soft, milliseconds = collect(mixer, images, source, options["n"], options["seed"])
        except ValueError as error:
            raise UserError(f"--method {name}: {error}") from error
        weights[name] = soft
        rows.append((f"{name}\n{milliseconds:.1f} ms", mixed, shares, soft))
        print(f"{name}: {milliseconds:.1f} ms for {len(images)} images")
        for one in soft:
            order = one.argsort(descending=True)
            print("   " + ", ".join(f"{float(one[k]):.2f} {names[int(k)]}" for k in order if one[k] > 0.005))
    figures.draw_mixtures(
        options["output"],
        images=images,
        names=names,
        saliency=maps,
        guide="pixel gradient" if guide == "gradient" else guide,
        rows=[
            (text, mixed, torch.tensordot(shares, palette(len(images)), dims=([1], [0])), soft)
            for text, mixed, shares, soft in rows
        ],
        colours=palette(len(images)),
        **statistics,
    )
    print(f"written: {options['output']}")
    return weights


def palette(count: int):
    """(count, 3) colours, of pixels in 0..1, that tell the inputs apart."""
    import torch
    from matplotlib import colormaps

    colours = [colormaps["tab10" if count <= 10 else "tab20"](k % 20)[:3] for k in range(count)]
    return torch.tensor(colours, dtype=torch.float32)


def load(options: dict) -> tuple:
    """The network or None, images (B, 3, S, S) normalised, their names, and the statistics they are normalised by."""
    import torch

    import models
    from engine.data.datasets import load_data
    from engine.data.decode import BadImage, decode_center
    from engine.data.image_set import STATISTICS
    from engine.inference.classifier import load_classifier

    model, size, statistics = None, options["image_size"] or 224, STATISTICS["imagenet"]
    if options["model_path"]:
        known = load_classifier(options["model_path"], models, model=options["model"], image_size=options["image_size"])
        model, statistics = known.network, (known.mean, known.std)
        size = options["image_size"] or known.image_size
    if options["dataset"]:
        data = load_data(options["dataset"], data_dir=options["data_dir"], image_size=options["image_size"])
        if max(options["indices"]) >= len(data.train):
            raise UserError(f"--indices: {options['dataset']} has {len(data.train)} training images, from 0")
        part = data.train.take(torch.tensor(options["indices"]))
        pixels = part.pixels if isinstance(part.pixels, torch.Tensor) else part.pixels.read_all(0, lambda x, **_: x)[0]
        names = [
            f"{data.classes[label]} ({index})" for label, index in zip(part.labels, options["indices"], strict=True)
        ]
        if not options["model_path"]:
            statistics = (data.mean, data.std)
    else:
        try:
            pixels = torch.stack([torch.from_numpy(decode_center(Path(file), size)) for file in options["images"]])
        except BadImage as error:
            raise UserError(f"--images {error}") from error
        names = [Path(file).stem for file in options["images"]]
    mean, std = statistics
    pixels = pixels.permute(0, 3, 1, 2).float() / 255
    images = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    return model, images, names, {"mean": tuple(mean), "std": tuple(std)}


def choose_source(options: dict, mixer, model, statistics: dict):
    """What guides a method here: its own source, or a static map where that takes a network and there is none. mixer
    None: the plain gradient.
    """
    name = options["saliency"] or mixer.default_source
    if name == "bank":
        raise ValueError("--saliency bank: it is learned while a classifier trains; choose another")
    if name == "casm" and not options["casm"]:
        raise ValueError("--saliency casm needs --casm FILE, made by python -m saliency.casm train")
    if name in THROUGH_NETWORK and model is None:
        if options["saliency"]:
            raise ValueError(f"--saliency {name} needs --model_path, a trained classifier")
        name = WITHOUT_NETWORK
    settings = (mixer.gradient_options if mixer else {}) | {"mode": "eval", "clean_weight": 0.0}
    settings |= {"saliency_size": options["saliency_size"], "casm": options["casm"]}
    source = build_source(name, model=model, **statistics, **settings)
    return Predicted(source) if name in THROUGH_NETWORK else source


class Predicted:
    """A source that looks through a network at a class, for images without labels: it looks at the first choice."""

    def __init__(self, source):
        self.source = source

    def __call__(self, images, targets):
        return self.source(images, self.first_choice(images))

    def first_choice(self, images):
        import torch
        from torch.nn import functional as F

        with torch.no_grad():
            logits = self.source.model(images)
        return F.one_hot(logits.argmax(1), logits.shape[1]).float()

    def __getattr__(self, name):
        found = getattr(self.source, name)
        return (lambda images, targets: found(images, self.first_choice(images))) if name == "gradient" else found


def collect(mixer, images, source, count: int, seed: int) -> tuple:
    """`count` mixed images (n, 3, H, W), whose pixels they show (n, B, H, W), label weights (n, B), and the
    milliseconds of one call. The first that hold a part of another image; of a method that has none, the first changed.
    """
    import torch

    targets = torch.eye(len(images))
    mixer(images, targets, source)  # RL-Mix draws its agent once
    found, milliseconds = {2: [], 1: [], 0: []}, []  # by how much became of the image
    for draw in range(TRIES):
        torch.manual_seed(1000 * seed + draw)
        begin = time.perf_counter()
        result, labels = mixer(images, targets, source)
        milliseconds.append(1000 * (time.perf_counter() - begin))
        showing = weights_of(mixer, images, targets, source, 1000 * seed + draw)
        for row in range(len(images)):
            changed = not torch.equal(result[row], images[row])  # manifold may mix behind a layer, unseen
            kind = changed + (changed and bool(labels[row].max() < 0.99))
            found[kind].append((result[row], showing[row], labels[row]))
        if len(found[2]) >= count:
            break
    best = next(kind for kind in found.values() if kind)[:count]
    middle = sorted(milliseconds)[len(milliseconds) // 2]
    return *(torch.stack(one).detach() for one in zip(*best, strict=True)), middle


def weights_of(mixer, images, targets, source, seed: int):
    """(B, B, H, W): the weight of image j at every pixel of mixed image i, as the derivative of one by the other."""
    import torch
    from torch.autograd import forward_ad

    found = []
    for one in range(len(images)):
        torch.manual_seed(seed)
        tangent = torch.zeros_like(images)
        tangent[one] = 1
        with forward_ad.dual_level(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch about itself
            mixed, _ = mixer(forward_ad.make_dual(images, tangent), targets, source)
            found.append(forward_ad.unpack_dual(mixed).tangent[:, 0])
    return torch.stack(found, 1)


if __name__ == "__main__":
    run_main(main)

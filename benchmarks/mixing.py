"""Measure the cost of each method: python benchmarks/mixing.py --model preactresnet18 --batch_size 100

Prints Markdown tables; every batch is mixed. The first has the time of a training step of every method relative to an
unmixed step, next to the minimum set by the number of network passes: 1 without an additional pass, 4/3 with a forward
pass for activation maps, 5/3 with a pass for the gradient at the pixels, 2 if that pass also trains on the unmixed
batch. `NAME +` is a method with --clean_weight. All methods run in turns in one process, so that slow moments of the
machine affect them alike. The second has the time of mixing alone, on gradients of the given network. With PuzzleMix or
Co-Mixup among the methods, others have the energies of PuzzleMix masks with their gap to a lower bound, and the
objective of Co-Mixup. If the package gco-wrapper is installed, they also have the same for graph cuts.
benchmarks/memory.py measures memory.
"""

import time

from common import add_method_options, median_ms, read_options, setup_device, synchronize

import models
from engine.config.option_types import boolean, choice, float_in_range, int_at_least
from engine.config.options import DATASET_ALIASES, DATASETS, add_device_options
from engine.config.parser import Parser
from engine.config.recipes import get_recipe_options
from engine.drawing.tables import format_markdown, make_rows
from engine.launch import run_main
from mixing import MIXERS, OWN_CLEAN_LOSS_OFF, build_mixer
from models import build_model
from saliency import CAM_METHODS, build_source

BLOCKS = (2, 4, 8, 16)
STEP_COLUMNS = {  # keys of a row
    "step": ("step, ms", ".2f"),
    "ratio": ("step / plain step", ".3f"),
    "bound": ("lowest possible (network passes only)", ".2f"),
    "saliency": ("saliency, ms", ".2f"),
    "mixing": ("mixing, ms", ".2f"),
}
ALONE_COLUMNS = {"ms": ("mixing only, ms", ".2f"), "gco": ("the same with gco, ms", ".2f")}
MASK_COLUMNS = {
    "energy": ("mean energy", ".5f"),
    "gap": ("mean gap to the lower bound", ".1e"),
    "largest": ("largest gap", ".1e"),
}
DRAWS = 5  # of lambda and partners, for the quality of the solvers


def build_parser() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    parser.group("benchmark")
    add_method_options(parser, model="preactresnet18", methods=[name for name in MIXERS if name != "none"])
    parser.option("--init_from", metavar="FILE", help="weights of the network; gradients of trained networks differ")
    parser.option(
        "--rand_pos", type=float_in_range(0, 1), shown="recipe", help="sage: fraction of all offsets that is tried"
    )
    parser.option(
        "--dataset",
        type=choice(DATASETS, DATASET_ALIASES),
        default="shapes",
        metavar="NAME",
        help="name of the dataset",
    )
    parser.option("--data_dir", "--data", metavar="DIR", default="data", help="folder of the dataset")
    parser.option(
        "--clean_weight", type=float_in_range(), shown="none", help="also time each method with this --clean_weight"
    )
    parser.option("--norm", metavar="NAME", default="own", help="own, imagenet or half")
    parser.option("--batch_size", type=int_at_least(2), default=100, help="images per step")
    parser.option(
        "--image_size", type=int_at_least(8), shown="that of the dataset", help="side of the images in pixels"
    )
    parser.option(
        "--steps", type=int_at_least(), default=20, help="timed steps of each method; 0: time mixing alone only"
    )
    parser.option("--repeats", type=int_at_least(), default=20, help="timed calls of mixing alone; 0: time steps only")
    parser.option("--compile", type=boolean, default=False, help="compile the network with torch.compile")
    add_device_options(parser)
    return parser


def main(argv: list[str] | None = None) -> dict:
    parser = build_parser()
    options = read_options(parser, argv)

    import torch

    from engine.data.datasets import load_data

    if options["threads"]:
        torch.set_num_threads(options["threads"])
    device, precision, device_text = setup_device(options)
    place = {key: options[key] for key in ("data_dir", "image_size", "norm")}
    data = load_data(options["dataset"], limit=4 * options["batch_size"], **place)
    bench = Bench(options, data, device, precision)
    print(f"{options['model']}, batch {options['batch_size']}, {data.image_size} pixels, {device_text}")
    result = {}
    if options["steps"]:
        result["steps"] = bench.time_steps()
    if options["repeats"]:
        result["alone"] = bench.time_alone()
        result["quality"] = bench.measure_masks() | bench.measure_labellings()
    return result


class Bench:
    """A network, a loader, and for every method a mixer with its saliency source."""

    def __init__(self, options: dict, data, device, precision):
        import torch

        from engine.data.augment import Augmentation
        from engine.data.loader import DeviceLoader
        from engine.training.compilation import compile_network
        from engine.training.evaluate import load_initial_weights
        from engine.training.loss import LOSSES, get_cross_entropy_scale
        from engine.training.network_step import StepConfig
        from engine.training.sources import SourceBuilder
        from engine.training.state import TrainingState

        self.options, self.device, self.loss_fn = options, device, LOSSES["softmax_bce"]
        self.classes = len(data.classes)
        self.statistics = {"mean": data.mean, "std": data.std}
        loader_options = {"device": device, "channels_last": options["channels_last"], "seed": 0, "drop_last": True}
        self.loader = DeviceLoader(
            data.train,
            options["batch_size"],
            shuffle=True,
            augmentation=Augmentation(2),
            **loader_options,
            **self.statistics,
        )
        layout = torch.channels_last if options["channels_last"] else torch.contiguous_format
        self.model = build_model(options["model"], self.classes, data.image_size)
        if options["init_from"]:
            load_initial_weights(self.model, options["init_from"], data.classes, models, options["model"])
        self.model = self.model.to(device, memory_format=layout)
        if options["compile"]:
            compile_network(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-4, momentum=0.9, fused=device.type != "mps")
        self.source_options = {
            **self.statistics,
            "model": self.model,
            "num_images": len(data.train),
            "device": device,
        }
        self.source_options |= {"training_loss": self.loss_fn, "precision": precision}
        self.source_options |= {"saliency_size": options["saliency_size"]}
        self.source_options |= {"cross_entropy_scale": get_cross_entropy_scale("softmax_bce", self.classes)}
        chosen = {key: options[key] for key in ("saliency", "saliency_size")}
        state = TrainingState(self.model, self.optimizer, kernels=options["kernels"])
        self.configs, self.sources = {}, {}  # by clean_weight
        for weight in {None, options["clean_weight"]}:
            config = self.configs[weight] = StepConfig(self.loss_fn, self.classes, precision, clean_weight=weight)
            self.sources[weight] = SourceBuilder(build_source, state, data, config, loss="softmax_bce", **chosen)
        self.side, self.methods = data.image_size, {}
        for name in ["none", *options["method"]]:
            try:
                self.methods[name] = *self.build(name), None
                if (weight := options["clean_weight"]) is not None and name != "none":
                    self.methods[f"{name} +"] = *self.build(name, clean_weight=weight), weight
            except ValueError as error:
                print(f"{name} is left out: {error}")

    def build(self, name: str, clean_weight: float | None = None, **wanted) -> tuple:
        """Return the mixer of a method, with the settings of the recipe puzzle, and its saliency source."""
        published = get_recipe_options("puzzle", dataset=self.options["dataset"], model=self.options["model"])
        own = {**published["method_options"].get(name, {}), "rand_pos": self.options["rand_pos"]}
        own["kernels"] = self.options["kernels"]
        own |= OWN_CLEAN_LOSS_OFF if clean_weight is not None else {}
        mixer = build_mixer(name, **{**own, **self.statistics, "mix_prob": 1.0, **wanted})
        mixer.check_size(self.side, self.side)
        return mixer, mixer.build_source(self.sources[clean_weight])

    def step(self, name: str, epoch: int):
        """Run one training step and return the seconds of its parts."""
        from engine.training import EpochMonitor, TrainingState, train_one_epoch

        monitor, (mixer, source, weight) = EpochMonitor(self.device), self.methods[name]
        state = TrainingState(self.model, self.optimizer, mixer=mixer, source=source)
        train_one_epoch(state, self.loader, self.configs[weight], epoch=epoch, monitor=monitor, max_steps=1)
        return monitor.watch.seconds()

    def minimum(self, name: str) -> float | None:
        """Return the minimum time of a step relative to a plain step, set by the number of network passes."""
        mixer, source, weight = self.methods[name]
        if self.options["saliency_size"]:
            return None  # depends on the network
        saliency = source and (self.options["saliency"] or mixer.default_source)
        if saliency == "gradient":
            return 2.0 if weight or source.clean_weight else 5 / 3
        return 1 + bool(weight) + (1 / 3 if saliency in CAM_METHODS else 0)

    def time_steps(self) -> dict:
        """Print and return the times of a training step of each method."""
        laps: dict[str, dict[str, list[float]]] = {name: {} for name in self.methods}
        for turn in range(-2, self.options["steps"]):
            for name in self.methods:
                seconds = self.step(name, max(turn, 0))
                if turn >= 0:
                    for key, value in {**seconds, "step": sum(seconds.values())}.items():
                        laps[name].setdefault(key, []).append(value)
        rows = []
        for name, parts in laps.items():
            row = {key: median_ms(values) for key, values in parts.items()} | {"name": name}
            ratios = [a / b for a, b in zip(parts["step"], laps["none"]["step"], strict=True)]
            rows.append(row | {"ratio": median_ms(ratios) / 1000, "bound": self.minimum(name)})
        print(format_markdown(make_rows(rows, STEP_COLUMNS, "name", "method")))
        return {row["name"]: row for row in rows}

    def load_batch(self):
        """Return the images of a batch and their one-hot targets."""
        from torch.nn import functional as F

        batch = next(self.loader.epoch(0))
        targets = F.one_hot(batch.labels, self.classes).float()
        return batch.images, targets

    def time_alone(self) -> dict:
        """Print and return the median milliseconds of mixing with precomputed saliency, for each method."""
        images, targets = self.load_batch()
        rows = []
        for name, (mixer, source, weight) in self.methods.items():
            if name == "none" or weight is not None:  # mixing itself does not depend on the weight
                continue
            maps = source and self.precompute(mixer, images, targets)
            variants = {name: {}}
            if name == "puzzlemix":
                variants = {f"puzzlemix {n}": {"block_num": (n,)} for n in self.list_blocks()}
            for text, wanted in variants.items():
                row = {"name": text}
                if name == "rlmix":  # its agent reads the gradient at the mixed images
                    row["ms"] = self.time(mix_and_learn, mixer, images, targets, maps)
                else:
                    row["ms"] = self.time(self.build(name, **wanted)[0], images, targets, maps)
                if name in ("puzzlemix", "comixup") and has_gco():
                    graph = self.build(name, **wanted, solver="gco")[0]
                    row["gco"] = self.time(graph, images, targets, maps, repeats=5)
                rows.append(row)
        print(f"\n{format_markdown(make_rows(rows, ALONE_COLUMNS, 'name', 'method'))}")
        return {row["name"]: row["ms"] for row in rows}

    def list_blocks(self) -> list[int]:
        """Return the numbers of blocks along a side, of BLOCKS, that divide the images."""
        return [n for n in BLOCKS if self.side % n == 0]

    def precompute(self, mixer, images, targets):
        """Return a source that returns the gradient of a mixer for this batch, without computing it again."""
        from mixing.base import FunctionSource

        settings = self.source_options | mixer.gradient_options | {"clean_weight": 0.0}
        source = build_source("gradient", **settings)
        saliency = source(images, targets)
        cached_source = FunctionSource(lambda images, targets: saliency)
        cached_source.logits = source.logits
        return cached_source

    def time(self, call, *args, repeats: int | None = None) -> float:
        """Return the median milliseconds of call(*args)."""
        laps = []
        for _ in range(3 + (repeats or self.options["repeats"])):
            begin = time.perf_counter()
            call(*args)
            synchronize(self.device)
            laps.append(time.perf_counter() - begin)
        return median_ms(laps[3:])

    def collect(self, name: str, keys: tuple[str, ...], **wanted) -> list:
        """Mix a batch DRAWS times by a method with these options, and return the values of these attributes of it."""
        import torch

        images, targets = self.load_batch()
        mixer, found = self.build(name, **wanted)[0], []
        maps = self.precompute(mixer, images, targets)
        for seed in range(DRAWS):
            torch.manual_seed(seed)
            mixer(images, targets, maps)
            found.append([getattr(mixer, key) for key in keys])
        return [torch.cat(values) for values in zip(*found, strict=True)]

    def measure_masks(self) -> dict:
        """Print and return the gaps of the energies of the masks of PuzzleMix to a lower bound, for each solver."""
        rows = []
        for n in self.list_blocks() if "puzzlemix" in self.methods else ():
            energy, bound = self.collect("puzzlemix", ("energy", "bound"), block_num=(n,))
            energies = {"parallel": energy}
            if has_gco():
                energies["gco"] = self.collect("puzzlemix", ("energy",), block_num=(n,), solver="gco")[0]
            for solver, energy in energies.items():
                gap = (energy - bound).clamp_min(0)
                row = {"name": f"{n} {solver}", "energy": energy.mean(), "gap": gap.mean(), "largest": gap.max()}
                rows.append({key: value if key == "name" else float(value) for key, value in row.items()})
        if rows:
            print(f"\n{format_markdown(make_rows(rows, MASK_COLUMNS, 'name', 'PuzzleMix: blocks a side, solver'))}")
        return {row["name"]: row["gap"] for row in rows}

    def measure_labellings(self) -> dict:
        """Print and return the objective of Co-Mixup, the mean over the parts of a batch, for each solver."""
        if "comixup" not in self.methods:
            return {}
        solvers = ("parallel", "gco") if has_gco() else ("parallel",)
        found = {name: float(self.collect("comixup", ("objective",), solver=name)[0].mean()) for name in solvers}
        values = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
        print(f"\nCo-Mixup objective, mean over parts of a batch: {values}")
        return {f"comixup {name}": value for name, value in found.items()}


def mix_and_learn(mixer, images, targets, source):
    """Mix a batch and pass a gradient back, for a method that reads the gradient at the mixed images."""
    mixer(images, targets, source)
    mixer.after_backward(images)


def has_gco() -> bool:
    from mixing.solvers import import_gco

    try:
        import_gco()
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    run_main(main)

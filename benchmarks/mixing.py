"""Measure the cost of each method: python benchmarks/mixing.py --model preactresnet18 --batch_size 100

Prints two tables; every batch is mixed. The first has the time of a training step of every method relative to an
unmixed step, next to the minimum set by the number of network passes: 1 without an additional pass, 5/3 with a pass
for the gradient at the pixels, 2 if the unmixed batch is trained on too. `NAME +` is a method with --clean_weight. All
methods run in turns in one process, so that slow moments of the machine affect them alike. The second has the time of
mixing alone, on gradients of the given network, the energies of PuzzleMix masks with their gap to a lower bound, and
the objective of Co-Mixup. If the package gco-wrapper is installed, it also has the same for graph cuts.
"""

import subprocess
import sys
import time
from pathlib import Path

from common import add_method_options, median_ms, read_options, setup_device, synchronize

import models
from engine.config.option_types import boolean, choice, float_in_range, int_at_least
from engine.config.options import DATASET_ALIASES, DATASETS, add_device_options
from engine.config.parser import Parser
from engine.config.recipes import get_recipe_options
from engine.launch import run_main
from mixing import OWN_CLEAN_LOSS_OFF, build_mixer
from models import build_model
from saliency import build_source

METHODS = ["mixup", "cutmix", "saliencymix", "puzzlemix", "comixup", "sage", "rmix", "rlmix"]
METHODS += ["resizemix", "fmix", "gridmix", "smoothmix", "hmix", "gmix"]
METHODS += ["guidedmixup", "snapmix", "attentivemix", "smmix", "maskmix", "s2mix"]
BLOCKS = (2, 4, 8, 16)


def build_parser() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    parser.group("benchmark")
    add_method_options(parser, model="preactresnet18", methods=METHODS)
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
    parser.option("--peak_of", metavar="NAME", help="print only the peak memory of this method (used internally)")
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
    if options["peak_of"]:
        bench.step(options["peak_of"], 0)
        bench.step(options["peak_of"], 1)
        return print(f"peak {bench.peak_mb():.1f}") or {}
    print(f"{options['model']}, batch {options['batch_size']}, {data.image_size} pixels, {device_text}")
    result = {}
    if options["steps"]:
        result["steps"] = bench.time_steps(argv if argv is not None else sys.argv[1:])
    if options["repeats"]:
        result["alone"] = bench.time_alone()
        result["quality"] = bench.measure_quality()
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

    def minimum(self, name: str) -> float:
        """Return the minimum time of a step relative to a plain step, set by the number of network passes."""
        _, source, weight = self.methods[name]
        if self.options["saliency_size"]:
            return float("nan")  # depends on the network
        if weight:
            return 2.0
        if type(source).__name__ != "Gradient":
            return 1.0
        return 2.0 if source.clean_weight else 5 / 3

    def peak_mb(self) -> float:
        """Return the peak memory of the device or, on a CPU, of this process, in MiB."""
        import torch

        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        try:  # getrusage() would include the memory of the parent process
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return float("nan")
        return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10

    def peak_of(self, name: str, argv: list[str]) -> float:
        """Return the peak memory of a step in MiB. On a CPU the step runs in a process of its own."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step(name, 0)
            return self.peak_mb()
        command = [sys.executable, __file__, *argv, "--method", name.removesuffix(" +"), "--peak_of", name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return float(output.split("peak")[-1])

    def time_steps(self, argv: list[str]) -> dict:
        """Print and return the times and the memory of a training step of each method."""
        laps: dict[str, dict[str, list[float]]] = {name: {} for name in self.methods}
        for turn in range(-2, self.options["steps"]):
            for name in self.methods:
                seconds = self.step(name, max(turn, 0))
                if turn >= 0:
                    for key, value in {**seconds, "step": sum(seconds.values())}.items():
                        laps[name].setdefault(key, []).append(value)
        table = {}
        print(
            f"{'method':14} {'step ms':>9} {'x plain':>9} {'minimum':>7} {'saliency ms':>11} {'mixing ms':>9} "
            f"{'MiB':>7}"
        )
        for name, parts in laps.items():
            row = {key: median_ms(parts.get(key, [0.0])) for key in ("step", "saliency", "mixing", "data", "network")}
            row["ratio"] = median_ms([a / b for a, b in zip(parts["step"], laps["none"]["step"], strict=True)]) / 1000
            row |= {"bound": self.minimum(name), "peak": self.peak_of(name, argv)}
            print(
                f"{name:14} {row['step']:9.2f} {row['ratio']:9.3f} {row['bound']:7.2f} {row['saliency']:11.2f} "
                f"{row['mixing']:9.2f} {row['peak']:7.0f}"
            )
            table[name] = row
        return table

    def load_batch(self):
        """Return the images of a batch and their one-hot targets."""
        from torch.nn import functional as F

        batch = next(self.loader.epoch(0))
        targets = F.one_hot(batch.labels, self.classes).float()
        return batch.images, targets

    def time_alone(self) -> dict:
        """Print and return the median milliseconds of mixing with precomputed saliency, for each method."""
        images, targets = self.load_batch()
        height, width = images.shape[-2:]
        blocks = [n for n in BLOCKS if height % n == 0 and width % n == 0]
        table = {}
        print(f"\n{'mixing alone':16} {'ms':>9} {'with gco ms':>12}")
        for name, (mixer, source, weight) in self.methods.items():
            if source is None or weight is not None:  # mixing itself does not depend on the weight
                continue
            cached_source = precompute(
                build_source("gradient", **self.source_options | mixer.gradient_options | {"clean_weight": 0.0}),
                images,
                targets,
            )
            if name == "puzzlemix":
                variants = {f"puzzlemix {n}": {"block_num": (n,)} for n in blocks}
            else:
                variants = {name: {}}
            for text, wanted in variants.items():
                if name == "rlmix":  # its agent reads the gradient at the mixed images
                    milliseconds = self.time(mix_and_learn, mixer, images, targets, cached_source)
                else:
                    own = self.build(name, **wanted)[0]
                    milliseconds = self.time(own, images, targets, cached_source)
                cut = None
                if name in ("puzzlemix", "comixup") and has_gco():
                    graph = self.build(name, **wanted, solver="gco")[0]
                    cut = self.time(graph, images, targets, cached_source, repeats=5)
                table[text] = milliseconds
                print(f"{text:16} {milliseconds:9.2f} {'' if cut is None else f'{cut:12.2f}'}")
        return table

    def time(self, call, *args, repeats: int | None = None) -> float:
        """Return the median milliseconds of call(*args)."""
        laps = []
        for _ in range(3 + (repeats or self.options["repeats"])):
            begin = time.perf_counter()
            call(*args)
            synchronize(self.device)
            laps.append(time.perf_counter() - begin)
        return median_ms(laps[3:])

    def measure_quality(self) -> dict:
        """Print and return the energies of PuzzleMix and the objective of Co-Mixup over five draws, for each solver."""
        import torch

        images, targets = self.load_batch()
        height, width = images.shape[-2:]
        table, solvers = {}, ["parallel", "gco"] if has_gco() else ["parallel"]
        if "puzzlemix" in self.methods:
            print(f"\n{'mask energies':16} {'mean':>9} {'mean gap':>10} {'largest gap':>12}")
        for n in BLOCKS if "puzzlemix" in self.methods else ():
            if height % n or width % n:
                continue
            energies, bound = {}, None
            for solver in solvers:
                mixer = self.build("puzzlemix", block_num=(n,), solver=solver)[0]
                cached_source = precompute(
                    build_source("gradient", **self.source_options | mixer.gradient_options), images, targets
                )
                found = []
                for seed in range(5):
                    torch.manual_seed(seed)
                    mixer(images, targets, cached_source)
                    found.append((mixer.energy, mixer.bound))
                energies[solver] = torch.cat([energy for energy, _ in found])
                if solver == "parallel":
                    bound = torch.cat([low for _, low in found])
            for solver, energy in energies.items():
                gap = (energy - bound).clamp_min(0)
                print(
                    f"{n:2} {solver:13} {float(energy.mean()):9.5f} {float(gap.mean()):10.1e} {float(gap.max()):12.1e}"
                )
                table[f"{n} {solver}"] = float(gap.mean())
        if "comixup" in self.methods:
            objectives = {}
            for solver in solvers:
                mixer = self.build("comixup", solver=solver)[0]
                settings = self.source_options | mixer.gradient_options | {"clean_weight": 0.0}
                cached_source = precompute(build_source("gradient", **settings), images, targets)
                found = []
                for seed in range(5):
                    torch.manual_seed(seed)
                    mixer(images, targets, cached_source)
                    found.append(mixer.objective)
                objectives[solver] = torch.cat(found)
            print(
                "\nCo-Mixup objective, mean over parts of a batch: "
                + ", ".join(f"{solver} {float(value.mean()):.2f}" for solver, value in objectives.items())
            )
            table |= {f"comixup {solver}": float(value.mean()) for solver, value in objectives.items()}
        return table


def mix_and_learn(mixer, images, targets, source):
    """Mix a batch and pass a gradient back, for a method that reads the gradient at the mixed images."""
    mixer(images, targets, source)
    mixer.after_backward(images)


def precompute(source, images, targets):
    """Return a source that returns the maps of `source` for this batch, without computing them again."""
    from mixing.base import FunctionSource

    saliency = source(images, targets)
    cached_source = FunctionSource(lambda images, targets: saliency)
    cached_source.logits = source.logits
    return cached_source


def has_gco() -> bool:
    from mixing.solvers import import_gco

    try:
        import_gco()
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    run_main(main)

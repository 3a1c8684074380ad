"""What each method costs: python benchmarks/mixing.py --model preactresnet18 --batch_size 100

Two tables. The training step of every method over the plain one, all in one process and taking turns so that a slow
moment of the machine hits them alike, beside the bound that the network passes alone set: 1 without a pass of its own,
5/3 for a pass to the pixels only, 2 where the clean loss is trained on too. Then mixing alone, on the gradients of the
network at hand: milliseconds of every method (of PuzzleMix at each block size), the energies of PuzzleMix's masks with
their distance from a lower bound, and Co-Mixup's objective; beside each the same problems solved by graph cuts, where
the package gco-wrapper is installed. Every batch is mixed.
"""

import subprocess
import sys
import time
from pathlib import Path

from common import median_ms, read_options, setup_device, wait_for

from engine.config.option_types import boolean, choice, float_in_range, int_at_least
from engine.config.options import DATASET_ALIASES, DATASETS, add_device_options
from engine.config.parser import Parser
from engine.config.recipes import get_recipe_options
from engine.launch import run_main
from mixing import ALIASES, MIXERS, build_mixer
from models import ALIASES as MODEL_ALIASES
from models import MODELS, build_model, find_matching_models
from saliency import ALIASES as SOURCE_ALIASES
from saliency import SOURCES, build_source

METHODS = ["mixup", "cutmix", "saliencymix", "puzzlemix", "comixup", "sage", "rmix", "rlmix"]
BLOCKS = (2, 4, 8, 16)


def build_parser() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    parser.group("what")
    parser.option("--model", type=choice(MODELS, MODEL_ALIASES), default="preactresnet18", metavar="NAME")
    parser.option("--init_from", metavar="FILE", help="weights for it: trained networks have other gradients")
    parser.option("--method", type=choice(MIXERS, ALIASES), nargs="+", default=METHODS, metavar="NAME")
    parser.option("--saliency", type=choice(SOURCES, SOURCE_ALIASES), metavar="SOURCE", help="in place of each own")
    parser.option("--saliency_size", type=int_at_least(8), metavar="PIXELS", help="of the gradient's pass")
    parser.option("--rand_pos", type=float_in_range(0, 1), help="sage: share of the offsets that is tried")
    parser.option("--dataset", type=choice(DATASETS, DATASET_ALIASES), default="shapes", metavar="NAME")
    parser.option("--data_dir", "--data", default="data")
    parser.option("--norm", default="own", help="own, imagenet or half")
    parser.option("--batch_size", type=int_at_least(2), default=100)
    parser.option("--image_size", type=int_at_least(8), help="in pixels [the data set's]")
    parser.option("--steps", type=int_at_least(), default=20, help="steps timed of each method; 0: only mixing alone")
    parser.option("--repeats", type=int_at_least(), default=20, help="calls timed of each method alone; 0: only steps")
    parser.option("--threads", type=int_at_least(1), help="of the processor [all]")
    parser.option("--compile", type=boolean, default=False)
    parser.option("--peak_of", metavar="NAME", help="only the memory that a step of this method takes, for the table")
    add_device_options(parser)
    return parser


def main(argv: list[str] | None = None) -> dict:
    parser = build_parser()
    options = read_options(parser, argv)

    import torch

    from engine.data.datasets import load_data

    if options["threads"]:
        torch.set_num_threads(options["threads"])
    device, precision, where = setup_device(options)
    place = {key: options[key] for key in ("data_dir", "image_size", "norm")}
    data = load_data(options["dataset"], limit=4 * options["batch_size"], **place)
    bench = Bench(options, data, device, precision)
    if options["peak_of"]:
        bench.step(options["peak_of"], 0)
        bench.step(options["peak_of"], 1)
        return print(f"peak {bench.peak_mb():.1f}") or {}
    print(f"{options['model']}, batch {options['batch_size']}, {data.image_size} pixels, {where}")
    result = {}
    if options["steps"]:
        result["steps"] = bench.time_steps(argv if argv is not None else sys.argv[1:])
    if options["repeats"]:
        result["alone"] = bench.time_alone()
        result["quality"] = bench.quality()
    return result


class Bench:
    """A network, batches, and a mixer with its source for every method."""

    def __init__(self, options: dict, data, device, precision):
        import torch

        from engine.data.augment import Augmentation
        from engine.data.loader import DeviceLoader
        from engine.training.evaluate import load_initial_weights
        from engine.training.loss import LOSSES, get_cross_entropy_scale

        self.options, self.device, self.precision, self.loss_fn = options, device, precision, LOSSES["bce"]
        self.classes = len(data.classes)
        self.statistics = {"mean": data.mean, "std": data.std}
        feed = {"device": device, "channels_last": options["channels_last"], "seed": 0, "drop_last": True}
        self.batches = DeviceLoader(
            data.train, options["batch_size"], shuffle=True, augmentation=Augmentation(2), **feed, **self.statistics
        )
        layout = torch.channels_last if options["channels_last"] else torch.contiguous_format
        self.model = build_model(options["model"], self.classes, data.image_size)
        if options["init_from"]:
            load_initial_weights(self.model, options["init_from"], self.classes, find_matching_models)
        self.model = self.model.to(device, memory_format=layout)
        if options["compile"]:
            self.model.compile()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-4, momentum=0.9, fused=device.type != "mps")
        self.share = {**self.statistics, "model": self.model, "num_images": len(data.train), "device": device}
        self.share |= {"training_loss": self.loss_fn, "precision": precision}
        self.share |= {"saliency_size": options["saliency_size"]}
        self.share |= {"cross_entropy_scale": get_cross_entropy_scale("bce", self.classes)}
        self.side, self.parts = data.image_size, {}
        for name in ["none", *options["method"]]:
            try:
                self.parts[name] = self.build(name)
            except ValueError as error:
                print(f"left out: {name}: {error}")

    def build(self, name: str, **wanted) -> tuple:
        """The method `name`, as train.py would have it, and its source."""
        published = get_recipe_options("puzzle", dataset=self.options["dataset"], model=self.options["model"])
        own = {**published["method_options"].get(name, {}), "rand_pos": self.options["rand_pos"]}
        mixer = build_mixer(name, **{**own, **self.statistics, "mix_prob": 1.0, **wanted})
        mixer.check_size(self.side, self.side)
        source = mixer.build_source(
            lambda one: build_source(
                self.options["saliency"] or one.default_source, **self.share | one.gradient_options
            )
        )
        return mixer, source

    def step(self, name: str, epoch: int):
        """Seconds of one training step, by part."""
        from engine.training import EpochMonitor, StepConfig, TrainingState, train_one_epoch

        monitor, (mixer, source) = EpochMonitor(self.device), self.parts[name]
        state = TrainingState(self.model, self.optimizer, mixer=mixer, source=source)
        config = StepConfig(self.loss_fn, self.classes, self.precision)
        train_one_epoch(state, self.batches, config, epoch=epoch, monitor=monitor, max_steps=1)
        return monitor.watch.seconds()

    def bound(self, name: str) -> float:
        source = self.parts[name][1]
        if self.options["saliency_size"]:
            return float("nan")  # it depends on the network
        if type(source).__name__ != "Gradient":
            return 1.0
        return 2.0 if source.clean_weight else 5 / 3

    def peak_mb(self) -> float:
        import torch

        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        try:  # getrusage would tell of the parent's memory too
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return float("nan")
        return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10

    def peak_of(self, name: str, argv: list[str]) -> float:
        """Highest memory of a step: of the device's allocator, or on a CPU of a process of its own."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step(name, 0)
            return self.peak_mb()
        command = [sys.executable, __file__, *argv, "--method", name, "--peak_of", name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return float(output.split("peak")[-1])

    def time_steps(self, argv: list[str]) -> dict:
        laps: dict[str, dict[str, list[float]]] = {name: {} for name in self.parts}
        for turn in range(-2, self.options["steps"]):
            for name in self.parts:
                seconds = self.step(name, max(turn, 0))
                if turn >= 0:
                    for key, value in {**seconds, "step": sum(seconds.values())}.items():
                        laps[name].setdefault(key, []).append(value)
        table = {}
        print(
            f"{'method':12} {'step ms':>9} {'x vanilla':>9} {'bound':>6} {'saliency ms':>11} {'mixing ms':>9} {'MB':>7}"
        )
        for name, parts in laps.items():
            row = {key: median_ms(parts.get(key, [0.0])) for key in ("step", "saliency", "mixing", "data", "network")}
            row["ratio"] = median_ms([a / b for a, b in zip(parts["step"], laps["none"]["step"], strict=True)]) / 1000
            row |= {"bound": self.bound(name), "peak": self.peak_of(name, argv)}
            print(
                f"{name:12} {row['step']:9.2f} {row['ratio']:9.3f} {row['bound']:6.2f} {row['saliency']:11.2f} "
                f"{row['mixing']:9.2f} {row['peak']:7.0f}"
            )
            table[name] = row
        return table

    def ready(self):
        """A batch with one-hot targets, and the network's saliency for every source that takes one."""
        from torch.nn import functional as F

        batch = next(self.batches.epoch(0))
        targets = F.one_hot(batch.labels, self.classes).float()
        return batch.images, targets

    def time_alone(self) -> dict:
        """Median milliseconds of mixing, its saliency computed beforehand, for each method."""
        images, targets = self.ready()
        height, width = images.shape[-2:]
        blocks = [n for n in BLOCKS if height % n == 0 and width % n == 0]
        table = {}
        print(f"\n{'mixing alone':16} {'ms':>9} {'with gco ms':>12}")
        for name, (mixer, source) in self.parts.items():
            if source is None:
                continue
            ready = precompute(
                build_source("gradient", **self.share | mixer.gradient_options | {"clean_weight": 0.0}), images, targets
            )
            if name == "puzzlemix":
                variants = {f"puzzlemix {n}": {"block_num": (n,)} for n in blocks}
            else:
                variants = {name: {}}
            for text, wanted in variants.items():
                if name == "rlmix":  # its agent needs the gradient at the mixed images
                    milliseconds = self.time(learn, mixer, images, targets, ready)
                else:
                    own = self.build(name, **wanted)[0]
                    milliseconds = self.time(own, images, targets, ready)
                cut = None
                if name in ("puzzlemix", "comixup") and has_gco():
                    graph = self.build(name, **wanted, solver="gco")[0]
                    cut = self.time(graph, images, targets, ready, repeats=5)
                table[text] = milliseconds
                print(f"{text:16} {milliseconds:9.2f} {'' if cut is None else f'{cut:12.2f}'}")
        return table

    def time(self, call, *args, repeats: int | None = None) -> float:

        laps = []
        for _ in range(3 + (repeats or self.options["repeats"])):
            begin = time.perf_counter()
            call(*args)
            wait_for(self.device)
            laps.append(time.perf_counter() - begin)
        return median_ms(laps[3:])

    def quality(self) -> dict:
        """Energies of PuzzleMix's masks and Co-Mixup's objective over a few batches, ours and by graph cuts."""
        import torch

        images, targets = self.ready()
        height, width = images.shape[-2:]
        table, solvers = {}, ["parallel", "gco"] if has_gco() else ["parallel"]
        if "puzzlemix" in self.parts:
            print(f"\n{'mask energies':16} {'mean':>9} {'mean gap':>10} {'largest gap':>12}")
        for n in BLOCKS if "puzzlemix" in self.parts else ():
            if height % n or width % n:
                continue
            energies, bound = {}, None
            for solver in solvers:
                mixer = self.build("puzzlemix", block_num=(n,), solver=solver)[0]
                ready = precompute(build_source("gradient", **self.share | mixer.gradient_options), images, targets)
                found = []
                for seed in range(5):
                    torch.manual_seed(seed)
                    mixer(images, targets, ready)
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
        if "comixup" in self.parts:
            objectives = {}
            for solver in solvers:
                mixer = self.build("comixup", solver=solver)[0]
                settings = self.share | mixer.gradient_options | {"clean_weight": 0.0}
                ready = precompute(build_source("gradient", **settings), images, targets)
                found = []
                for seed in range(5):
                    torch.manual_seed(seed)
                    mixer(images, targets, ready)
                    found.append(mixer.objective)
                objectives[solver] = torch.cat(found)
            print(
                "\nCo-Mixup objective, mean over parts: "
                + ", ".join(f"{solver} {float(value.mean()):.2f}" for solver, value in objectives.items())
            )
            table |= {f"comixup {solver}": float(value.mean()) for solver, value in objectives.items()}
        return table


def learn(mixer, images, targets, source):
    """A call and what follows the backward pass, for a method that reads the gradient at the mixed images."""
    mixer(images, targets, source)
    mixer.after_backward(images)


def precompute(source, images, targets):
    """A source that returns what `source` finds in this batch, without computing it again."""
    from mixing.base import FunctionSource

    saliency = source(images, targets)
    ready = FunctionSource(lambda images, targets: saliency)
    ready.logits = source.logits
    return ready


def has_gco() -> bool:
    from mixing.solvers.graphcut import import_gco

    try:
        import_gco()
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    run_main(main)

"""Measure the cost of the data pipeline: python benchmarks/data.py --model preactresnet18 --batch_size 100

Prints the time of a plain training step relative to the network alone on a batch that is already on the device; the
share of a step that goes to reading, cropping, flipping and normalising images, next to a torchvision pipeline; and the
time of the static saliency maps of a batch.
"""

import time

from common import median_ms, read_options, setup_device, synchronize

from engine.config.option_types import boolean, choice, int_at_least
from engine.config.options import add_device_options
from engine.config.parser import Parser
from engine.launch import run_main
from mixing import NoMix
from models import ALIASES, MODELS, build_model


def build_parser() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    parser.group("benchmark")
    parser.option(
        "--model", type=choice(MODELS, ALIASES), default="preactresnet18", metavar="NAME", help="network architecture"
    )
    parser.option("--batch_size", type=int_at_least(1), default=100, help="images per step")
    parser.option("--image_size", type=int_at_least(8), default=32, help="side of the images in pixels")
    parser.option("--steps", type=int_at_least(1), default=20, help="number of timed steps")
    parser.option("--keep_blocks", type=boolean, default=True, help="keep freed CPU memory, as the training scripts do")
    add_device_options(parser)
    parser.defaults["workers"] = 2
    return parser


def main(argv: list[str] | None = None) -> dict:
    parser = build_parser()
    options = read_options(parser, argv)

    import torch

    from engine.data.image_set import ImageSet

    device, precision, device_text = setup_device(options, backends=options["keep_blocks"])
    size = options["image_size"]
    pixels = torch.randint(0, 256, (50 * options["batch_size"], size, size, 3), dtype=torch.uint8)
    part = ImageSet(pixels, torch.arange(len(pixels)) % 10, list("abcdefghij"), "noise")
    print(f"{options['model']}, batch {options['batch_size']}, {size} pixels, {device_text}")
    bare, plain = time_plain(part, options, device, precision)
    print(f"plain step {plain:.2f} ms, {plain / bare:.3f} times the network alone on a batch that is already loaded")
    table = {"bare": bare, "plain": plain, "data": time_data(part, options, device, plain)}
    table["maps"] = time_maps(pixels[: options["batch_size"]].permute(0, 3, 1, 2).contiguous(), device)
    return table


def time_plain(part, options: dict, device, precision) -> tuple[float, float]:
    """Return the median milliseconds of the network alone on a loaded batch, and of a plain training step."""
    import torch

    from engine.data.augment import Augmentation
    from engine.data.loader import DeviceLoader
    from engine.training import LOSSES, EpochMonitor, StepConfig, TrainingState, train_one_epoch

    half = (0.5, 0.5, 0.5)
    loader_options = {"device": device, "mean": half, "std": half, "channels_last": options["channels_last"]}
    batches = DeviceLoader(part, options["batch_size"], shuffle=True, augmentation=Augmentation(4), **loader_options)
    layout = torch.channels_last if options["channels_last"] else torch.contiguous_format
    model = build_model(options["model"], 10, options["image_size"]).to(device, memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=device.type in ("cpu", "cuda"))
    fixed, laps = next(batches.epoch()), ([], [])
    state, config = TrainingState(model, optimizer, mixer=NoMix()), StepConfig(LOSSES["ce"], 10, precision)
    for turn in range(-2, options["steps"]):
        monitor = EpochMonitor(device)
        bare = time_network(model, optimizer, fixed, precision)
        train_one_epoch(state, batches, config, epoch=max(turn, 0), monitor=monitor, max_steps=1)
        if turn >= 0:
            laps[0].append(bare)
            laps[1].append(sum(monitor.watch.seconds().values()))
    return median_ms(laps[0]), median_ms(laps[1])


def time_network(model, optimizer, batch, precision) -> float:
    """Return the seconds of forward pass, loss, backward pass and update on a loaded batch, the minimum of a step."""
    from torch.nn import functional as F

    from engine.runtime.device import autocast
    from engine.training.stopwatch import Stopwatch

    watch = Stopwatch(batch.images.device)
    watch.start()
    optimizer.zero_grad(set_to_none=True)
    with autocast(batch.images.device, precision):
        logits = model(batch.images)
    F.cross_entropy(logits.float(), batch.labels).backward()
    optimizer.step()
    watch.lap("step")
    return watch.seconds()["step"]


def time_data(part, options: dict, device, plain: float) -> dict[str, float]:
    """Return the milliseconds per batch of our pipeline and of torchvision transforms in a DataLoader."""
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    from engine.data.augment import Augmentation
    from engine.data.loader import DeviceLoader

    half, size = (0.5, 0.5, 0.5), options["image_size"]
    loader_options = {"device": device, "mean": half, "std": half, "channels_last": options["channels_last"]}
    batches = DeviceLoader(part, options["batch_size"], shuffle=True, augmentation=Augmentation(4), **loader_options)

    class TransformDataset(Dataset):
        transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(size, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(half, half),
            ]
        )

        def __len__(self):
            return len(part)

        def __getitem__(self, index):
            return self.transform(part.pixels[index].permute(2, 0, 1)), part.labels[index]

    def time_batches(stream) -> float:
        begin, count = time.perf_counter(), 0
        for images, *_ in stream:
            images.to(device)
            count += 1
        synchronize(device)
        return 1000 * (time.perf_counter() - begin) / count

    time_batches(batches.epoch(0))
    ours = time_batches(batches.epoch(1))
    torchvision_ms = {}
    for workers in (0, options["workers"]):
        torchvision_ms[workers] = time_batches(
            DataLoader(TransformDataset(), options["batch_size"], shuffle=True, num_workers=workers)
        )
    share = 100 * ours / plain
    print(f"data: {ours:.2f} ms per batch, {share:.1f} % of a plain step")
    print(
        "      torchvision in a DataLoader: "
        + ", ".join(f"{value:.1f} ms with {workers} workers" for workers, value in torchvision_ms.items())
    )
    return {"ours": ours, "share": share, "torchvision": torchvision_ms}


def time_maps(images, device, repeats: int = 20) -> dict[str, float]:
    """Return the milliseconds of the fine-grained and the spectral-residual maps of one batch."""
    from saliency.static import fine_grained, spectral_residual

    images, result = images.to(device), {}
    for name, function in (("fine_grained", fine_grained), ("spectral_residual", spectral_residual)):
        laps = []
        for _ in range(repeats + 3):
            begin = time.perf_counter()
            function(images)
            synchronize(device)
            laps.append(time.perf_counter() - begin)
        result[name] = median_ms(laps[3:])
    result["opencv"] = time_opencv(images)
    opencv_text = f" (one by one in OpenCV contrib: {result['opencv']:.2f} ms)" if result["opencv"] else ""
    print(
        f"maps of a batch: fine-grained {result['fine_grained']:.2f} ms{opencv_text}, "
        f"spectral residual {result['spectral_residual']:.2f} ms"
    )
    return result


def time_opencv(images, repeats: int = 20) -> float | None:
    """Return the milliseconds of the fine-grained maps in OpenCV, or None without its contrib modules."""
    import cv2

    if not hasattr(cv2, "saliency"):
        return None
    detector = cv2.saliency.StaticSaliencyFineGrained_create()
    arrays, laps = images.permute(0, 2, 3, 1).flip(-1).contiguous().cpu().numpy(), []
    for _ in range(repeats):
        begin = time.perf_counter()
        for array in arrays:
            detector.computeSaliency(array)
        laps.append(time.perf_counter() - begin)
    return median_ms(laps)


if __name__ == "__main__":
    run_main(main)

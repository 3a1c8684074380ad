"""The files of a CASM training run: checkpoint, pool of past classifiers, log and plots."""

import glob
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from engine.config.resume_rules import check_changed_options
from engine.data.image_set import Data
from engine.data.loader import DeviceLoader
from engine.drawing import figures
from engine.errors import UserError
from engine.runtime.checkpoint import Checkpoint, read_file, save_checkpoint
from engine.runtime.claim import check_claim
from engine.runtime.files import write_atomic
from engine.training.run_folder import RunFolder
from engine.training.start import RunKind, Start
from saliency.casm.network import SUFFIX, CasmNetwork
from saliency.casm.setup import RESUME_RULES, resolve_options
from saliency.casm.training import CasmStats

LOG_COLUMNS = {  # published title -> key of the history; each is logged for training and for evaluation images
    "accuracy": "accuracy",
    "masked_accuracy": "masked_accuracy",
    "mask_mean": "avg_mask",
    "mask_std": "std_mask",
    "mask_entropy": "entropy",
    "mask_tv": "tv",
}
CURVES = {  # y axis -> key of the history -> label of the curve
    "accuracy (%)": {
        "accuracy": "training",
        "val_accuracy": "evaluation",
        "masked_accuracy": "training, masked out",
        "val_masked_accuracy": "evaluation, masked out",
    },
    "mask area (%)": {"avg_mask": "training", "val_avg_mask": "evaluation"},
}


def locate_casm_runs(options: dict) -> tuple[Path, str]:
    """Return the folder of CASM runs and the prefix of the names of unnamed ones."""
    return Path(options["casms_path"]), options["reproduce"] or "casm"


def find_resume(options: dict, locate_runs: Callable) -> Path | None:
    """Return the checkpoint to resume from, or None. `auto` means that of --name, if it exists."""
    if options["resume"] != "auto":
        return options["resume"] and Path(options["resume"])
    path = locate_runs(options)[0] / (options["name"] + SUFFIX)
    return path if path.exists() else None


def check_writable(folders: list[Path]) -> None:
    """Create these folders if they are missing. Raises UserError if one cannot be created or written to."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(
                f"cannot write to the folder {folder}: {error.strerror}\nname another with --casms-path or --log-path"
            ) from error


class CasmFolder(RunFolder):
    """The files of a run: the checkpoint NAME.chk (`path`) with its pool next to it; NAME.log and plots in log_path.

    fresh: delete the checkpoint and pool of an earlier run of this name.
    """

    resume_flag, parent_flag, suffix = "--resume", "--casms-path", SUFFIX

    @staticmethod
    def get_lock(path: Path) -> Path:
        return path.with_name(f".{path.name}.lock")

    @staticmethod
    def find(checkpoint: Path) -> Path:
        return checkpoint

    @staticmethod
    def list_runs(parent: Path) -> list[str]:
        return sorted(file.name.removesuffix(SUFFIX) for file in parent.glob(f"*{SUFFIX}"))

    @staticmethod
    def find_namesakes(parent: Path, name: str) -> list[Path]:
        return []

    @staticmethod
    def check_free(path: Path) -> None:
        if path.exists():
            raise UserError(
                f"{path} exists already\nresume the run with --resume {path}, start it again with --overwrite, or give "
                "another --name"
            )

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(SUFFIX)

    @property
    def last(self) -> Path:
        return self.path

    @property
    def nonfinite(self) -> Path:
        return self.path.with_name(f"{self.name}_nonfinite.pt")

    def list_stale(self, fresh: bool) -> Iterator[Path]:
        name = glob.escape(self.name)
        for own in (f"{name}{SUFFIX}", f"{name}.pool_*.pt"):
            yield from self.path.parent.glob(f".{own}.part*")
        if fresh:
            yield from [self.path, self.nonfinite, *self.find_pools()]

    def find_pools(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self.name)}.pool_*.pt"))

    def say(self, text: str) -> None:
        print(text, flush=True)

    def write_config(self, options: dict, device: torch.device, kind: str, **more) -> None:
        """Remember the options; write_log() puts them in the first line of NAME.log."""
        self.options, self.log_path = options, Path(options["log_path"] or self.path.parent)

    def write_log(self, history: list[dict]) -> None:
        """Write NAME.log (options, column titles, one line per epoch, as published) and draw the curves, NAME.png."""
        titles = [f"{title}_{part}" for title in self.columns for part in ("train", "val")]
        lines = [", ".join(f"{key}={value}" for key, value in sorted(self.options.items()))]
        lines += [" ".join(["epoch", "seconds", *titles])]
        for row in history:
            numbers = [row[f"{part}{key}"] for key in LOG_COLUMNS.values() for part in ("", "val_")]
            texts = ["nan" if number is None else f"{number:.6g}" for number in [row["seconds"], *numbers]]
            lines.append(" ".join([str(row["epoch"]), *texts]))
        text = "\n".join(lines) + "\n"
        write_atomic(self.log_path / f"{self.name}.log", lambda side: side.write_text(text, encoding="utf-8"))
        if history:
            keys = CURVES["mask area (%)"]
            percent = [row | {key: 100 * row[key] for key in keys if row.get(key) is not None} for row in history]
            figures.draw_epoch_panels(self.place_figure(), percent, CURVES, self.name, dpi=self.options["dpi"])

    def place_figure(self, suffix: str = "") -> Path:
        """Return the path of a figure, by default that of the curves."""
        return self.log_path / f"{self.name}{suffix}.{self.options['figure_format']}"

    def save(self, content: Checkpoint, also: Sequence[str] = ()) -> None:
        """Write the snapshots of the pool to their own file, then the checkpoint, which names that file.

        The previous pool file is deleted last, so that a run killed at any moment leaves a checkpoint with its pool.
        """
        check_claim(self.get_lock(self.path))
        pool = None
        if content["pool"]:
            step = f"_step{content['step']}" if content["inside"] else ""
            pool = self.path.with_name(f"{self.name}.pool_{content['epoch']:03d}{step}.pt")
            save_checkpoint(pool, content["pool"])
        save_checkpoint(self.path, {**content, "pool": pool and pool.name})
        for stale in self.find_pools():
            if stale != pool:
                stale.unlink()

    @torch.no_grad()
    def draw_masks(self, network: CasmNetwork, data: Data) -> Path:
        """Draw NAME_masks.png: eight evaluation images, their masks, and the masked-out images. Return its path."""
        examples = data.test.with_replacement().subsample(8)
        device = next(network.parameters()).device
        (batch,) = DeviceLoader(examples, len(examples), device=device, mean=data.mean, std=data.std).epoch()
        masks = network.eval()(batch.images)[0]
        pixels, masked_out = (
            figures.to_pixels(images, data.mean, data.std) for images in (batch.images, batch.images * (1 - masks))
        )
        names = [data.classes[label] for label in batch.labels]
        rows = [("images", pixels, names), ("mask", masks[:, 0].cpu().numpy(), None), ("masked out", masked_out, None)]
        path = self.place_figure("_masks")
        figures.draw_image_rows(path, rows, self.name, limits=(0, 1), dpi=self.options["dpi"])
        return path


def load_saved_pool(start: Start) -> None:
    """Load the pool of a saved run into its checkpoint. Raises UserError if the pool file is missing."""
    saved = start.saved
    if isinstance(saved["rng"], dict):  # checkpoint of a version that saved only between epochs
        saved |= {"rng": [saved["rng"]], "best": {"value": -1.0, "epoch": 0}, "before": None, "inside": None}
    path = saved["pool"] and start.folder.with_name(saved["pool"])
    if path and not path.is_file():
        raise UserError(
            f"{path} is missing: it holds the past classifiers, without which this run cannot be resumed\n"
            "put the file back, or start again with --overwrite"
        )
    saved["pool"] = read_file(path) if path else []


def format_epoch(row: dict, epochs: int, options: dict) -> str:
    """Return the console line of an epoch."""
    return (
        f"epoch {row['epoch']}/{epochs}  acc {row['accuracy']:.1f} (val {row['val_accuracy']:.1f}) %  masked-out acc "
        f"{row['masked_accuracy']:.1f} (val {row['val_masked_accuracy']:.1f}) %  mask area {row['avg_mask']:.3f} "
        f"(val {row['val_avg_mask']:.3f})  confused {row['confused']:.1f} %  {row['seconds']:.1f} s"
    )


CASM_RUN = RunKind(
    name="casm",
    resolve=resolve_options,
    check_resume=partial(check_changed_options, rules=RESUME_RULES),
    locate_runs=locate_casm_runs,
    format_epoch=format_epoch,
    columns=list(LOG_COLUMNS),
    find_resume=find_resume,
    folder_type=CasmFolder,
    stats_type=CasmStats,
    lower_rate=lambda options: ("a lower --lr-casme" + (" or --lr" if not options["fixed_classifier"] else ""), False),
    data_remedy="name the folder that it was started with as DATA, or start another run under another --name",
)

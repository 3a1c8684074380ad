"""What a training run of maps leaves behind: the checkpoint and its pool, the log, the pictures."""

import glob
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from engine.data.image_set import Data
from engine.data.loader import DeviceLoader
from engine.drawing import figures
from engine.errors import Terminated, UserError
from engine.runtime.checkpoint import FORMAT, get_versions, read_file, save_checkpoint
from engine.runtime.files import write_atomic
from saliency.casm.network import SUFFIX, Casm
from saliency.casm.pool import snapshot_megabytes
from saliency.casm.setup import pool_notes
from saliency.casm.training import CasmState

LOG_COLUMNS = {  # as published: title -> column of the history, in training and (val_) on evaluation images
    "accuracy": "accuracy",
    "masked_accuracy": "masked_accuracy",
    "mask_mean": "avg_mask",
    "mask_std": "std_mask",
    "mask_entropy": "entropy",
    "mask_tv": "tv",
}
CURVES = {  # axis -> column of the history -> name
    "accuracy (%)": {
        "accuracy": "training",
        "val_accuracy": "evaluation",
        "masked_accuracy": "training, masked out",
        "val_masked_accuracy": "evaluation, masked out",
    },
    "area of the masks": {"avg_mask": "training", "val_avg_mask": "evaluation"},
}


class CasmRun:
    """The files of one run: `place` is its checkpoint, NAME.chk; NAME.log and NAME.png lie in log_path."""

    def __init__(self, place: Path, options: dict, *, anew: bool):
        """Raises UserError rather than write over another run."""
        self.place, self.options = place, options
        self.logs = Path(options["log_path"] or place.parent)
        if anew and place.exists() and not options["overwrite"]:
            raise UserError(
                f"{place} is there already\ngo on with it by --resume {place}, start it anew with --overwrite, or give "
                "another --name"
            )
        for folder in (place.parent, self.logs):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                raise UserError(
                    f"cannot write to the folder {folder}: {error.strerror}\nname another with --casms-path, --log-path"
                ) from error

    def clear(self) -> None:
        """Take away what an earlier run of this name has left: once all is there that this one needs."""
        for stale in [self.place, *self.pools()]:
            stale.unlink(missing_ok=True)

    @property
    def name(self) -> str:
        return self.place.name.removesuffix(SUFFIX)

    def pools(self) -> list[Path]:
        return sorted(self.place.parent.glob(f"{glob.escape(self.name)}.pool_*.pt"))

    def save(self, state: CasmState, data: Data, history: list[dict], precision: str) -> None:
        """The checkpoint of the finished epochs. The pool goes first, into a file of its own for each epoch, and the
        last one goes away last: whenever the run is killed, the checkpoint and its own pool are there.
        """
        epoch, pool = len(history), None
        if len(state.pool):
            pool = self.place.with_name(f"{self.name}.pool_{epoch:03d}.pt")
            save_checkpoint(pool, state.pool.state_dict())
        content = {
            "format": FORMAT,
            "kind": "casm",
            "epoch": epoch,
            "precision": precision,
            **state.state(),
            "pool": pool and pool.name,
            "config": self.options,
            "classes": list(data.classes),
            "num_classes": len(data.classes),
            "image_size": data.image_size,
            "mean": list(data.mean),
            "std": list(data.std),
            "history": history,
            "versions": get_versions(),
        }
        save_checkpoint(self.place, content)
        for stale in self.pools():
            if stale != pool:
                stale.unlink()

    def read_pool(self, saved: dict) -> list:
        """The snapshots that belong to a checkpoint. Raises UserError where their file is gone."""
        if not saved["pool"]:
            return []
        path = self.place.with_name(saved["pool"])
        if not path.is_file():
            raise UserError(
                f"{path}: the past classifiers of this run are gone, and without them it cannot go on as it was"
            )
        return read_file(path)

    def write_log(self, history: list[dict]) -> None:
        """Every option, the columns, and a line an epoch, as the published program has them, and the curves."""
        titles = [f"{title}_{part}" for title in LOG_COLUMNS for part in ("train", "val")]
        lines = [", ".join(f"{key}={value}" for key, value in sorted(self.options.items()))]
        lines += [" ".join(["epoch", "seconds", *titles])]
        for row in history:
            numbers = [row[f"{part}{key}"] for key in LOG_COLUMNS.values() for part in ("", "val_")]
            texts = ["nan" if number is None else f"{number:.6g}" for number in [row["seconds"], *numbers]]
            lines.append(" ".join([str(row["epoch"]), *texts]))
        text = "\n".join(lines) + "\n"
        write_atomic(self.logs / f"{self.name}.log", lambda side: side.write_text(text, encoding="utf-8"))
        figures.draw_epoch_panels(self.logs / f"{self.name}.png", history, CURVES, self.name)

    @torch.no_grad()
    def draw_masks(self, network: Casm, data: Data) -> Path:
        """NAME_masks.png: eight evaluation images, their masks, and what the masks leave of them."""
        first = data.test.subsample(8)
        device = next(network.parameters()).device
        (batch,) = DeviceLoader(first, len(first), device=device, mean=data.mean, std=data.std).epoch()
        masks = network.eval()(batch.images)[0]
        shown, hidden = (
            figures.to_pixels(images, data.mean, data.std) for images in (batch.images, batch.images * (1 - masks))
        )
        names = [data.classes[label] for label in first.labels]
        rows = [("images", shown, names), ("mask", masks[:, 0].cpu().numpy(), None), ("masked out", hidden, None)]
        path = self.logs / f"{self.name}_masks.png"
        figures.draw_image_rows(path, rows, self.name)
        return path

    @contextmanager
    def stopping_well(self) -> Iterator[None]:
        """Around training: Ctrl-C and SIGTERM end it with the way to go on."""

        def stop(number: int, frame) -> None:
            raise Terminated(self.way_on())

        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, stop) if main else None
        try:
            yield
        except KeyboardInterrupt:
            print(f"\n{self.way_on()}")
            raise
        finally:
            if main:
                signal.signal(signal.SIGTERM, before)

    def way_on(self) -> str:
        if not self.place.exists():
            return "no epoch was finished, so nothing is kept"
        return f"the last finished epoch is kept: continue with --resume {self.place}"


def log_header(record: CasmRun, data: Data, state: CasmState, iterations: int, *, where: str, notes: list[str]) -> None:
    """What is about to run, on what, and what the user may want to know before waiting for it."""
    options = record.options
    print(data.train.summary("train") + "\n" + data.test.summary("val"))
    print(
        f"{options['model']}: {options['epochs']} epochs of {iterations} iterations of {options['batch_size']} images, "
        f"{'adversarial' if options['adversarial'] else 'entropy'} form, lambda_r {options['lambda_r']:g}, classifier "
        f"{'trained along' if state.train_classifier else 'fixed'}, on {where}; writing {record.place}"
    )
    if state.past_classifier:
        size, epochs = snapshot_megabytes(state.network.classifier), options["epochs"]
        print("\n".join(pool_notes(state.pool, size, epochs=epochs, iterations=iterations)))
    for note in [*notes, *data.warnings]:
        print(f"note: {note}", flush=True)


def format_epoch(row: dict, epochs: int) -> str:
    """One epoch in a line."""
    return (
        f"epoch {row['epoch']}/{epochs}  right {row['accuracy']:.1f} (val {row['val_accuracy']:.1f}) %  masked out "
        f"{row['masked_accuracy']:.1f} ({row['val_masked_accuracy']:.1f}) %  mask {row['avg_mask']:.3f} "
        f"({row['val_avg_mask']:.3f})  confused {row['confused']:.1f} %  {row['seconds']:.1f} s"
    )

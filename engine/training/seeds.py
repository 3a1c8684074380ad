"""--seeds: train the same run once for each seed, one after the other, and summarise the results."""

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from engine.errors import Terminated, UserError
from engine.inference.metrics import summarize_values
from engine.runtime.distributed import (
    broadcast_from_main,
    is_main_process,
    load_across_restarts,
    restart_count,
    store_across_restarts,
)
from engine.runtime.files import write_json
from engine.runtime.text import format_count
from engine.training.console import CLASSIFIER, MEDIAN_EPOCHS
from engine.training.run_folder import RunFolder, describe_search, writes_files
from engine.training.start import start_processes

SUMMARY = {  # entry of the summary -> how the last lines name it, and its value in a result.json
    "last_top1": ("last epoch", lambda result: result["last_top1"]),
    "best_top1": ("best epoch", lambda result: result["best"]["test_top1"]),
    "median_of_last_ten_top1": (
        f"median of the last {MEDIAN_EPOCHS} evaluated epochs",
        lambda result: result["median_of_last_ten_top1"],
    ),
}


def train_seeds(train: Callable[[dict, dict, list[str]], dict | None], typed: dict, options: dict, notes: list[str]):
    """Train a run for each of --seeds in the folder NAME/seed_N, and write seeds.json with the results and their means.

    train(typed options, all options, notes): trains one run and returns the content of its result.json, in the main
    process. With --checkpoint auto, and after torchrun has restarted the processes, finished runs are left as they are,
    an unfinished one is resumed, and the others start. Returns the content of seeds.json in the main process. Raises
    UserError if the folder already holds runs.
    """
    start_processes(options["device"], options["timeout"])
    folder = find_seeds_folder(options)
    resume = bool(options["checkpoint"] or restart_count())
    typed, results = {key: value for key, value in typed.items() if key != "seeds"}, {}
    for number, seed in enumerate(options["seeds"], 1):
        own = {"seed": seed, "name": f"{folder.name}/seed_{seed}", "checkpoint": "auto" if resume else None}
        own["wandb_name"] = f"{options['wandb_name'] or folder.name}_seed_{seed}"
        path = folder / f"seed_{seed}"
        finished = broadcast_from_main(lambda path=path: read_finished_result(path, options)) if resume else None
        if finished:
            CLASSIFIER.check_resume({**typed, "seed": seed}, read_options(path), force=options["force_config"])
        print(f"seed {seed} ({number} of {len(options['seeds'])})" + (": already finished" if finished else ""))
        with explain_resume(folder):
            result = finished or train({**typed, **own}, {**options, **own, "seeds": []}, list(notes))
        results[seed] = result
    return summarize_seeds(folder, results, write=writes_files(options)) if is_main_process() else None


def find_seeds_folder(options: dict) -> Path:
    """Return the folder of the runs: that of --name; without a name, the newest one to resume or a new one.

    Raises UserError if it is the folder of a single run, or if new runs were asked for and it already holds some.
    """
    earlier = load_across_restarts("seeds folder")
    folder = Path(earlier) if earlier else Path(broadcast_from_main(lambda: str(locate_seeds_folder(options))))
    store_across_restarts("seeds folder", str(folder))
    if writes_files(options) and not earlier:
        broadcast_from_main(lambda: check_folder(folder, new=not (options["checkpoint"] or options["overwrite"])))
    return folder


def locate_seeds_folder(options: dict) -> Path:
    """See find_seeds_folder(); without its check."""
    parent, prefix = CLASSIFIER.locate_runs(options)
    if options["name"]:
        return parent / options["name"]
    if options["checkpoint"]:
        if dated := sorted(parent.glob(f"{prefix}_????????-??????*/seed_*/last.pt")):
            return dated[-1].parents[1]
        found = describe_search(options, CLASSIFIER.locate_runs, RunFolder)
        raise UserError(f"--checkpoint auto: no runs of --seeds to resume at {found}\ngive their --name")
    base = f"{prefix}_{datetime.now():%Y%m%d-%H%M%S}"
    names = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(2)))
    return next(parent / name for name in names if not (parent / name).exists())


def check_folder(folder: Path, *, new: bool) -> None:
    """Raise UserError, with the remedy, if a single run lies in the folder. new: also if runs of --seeds do."""
    if any((folder / name).exists() for name in ("last.pt", "previous.pt")):
        raise UserError(
            f"{folder} already holds a run without --seeds\nchoose another --name, or leave --seeds out and resume it "
            f"with --checkpoint {folder}"
        )
    if new and (held := RunFolder.list_seeds(folder)):
        raise UserError(
            f"{folder} already holds {', '.join(held)}\nresume with --checkpoint auto --name {folder.name}, replace "
            "them with --overwrite, or choose another --name"
        )


def read_finished_result(path: Path, options: dict) -> dict | None:
    """Return the result of a run that has finished all of its epochs; None if there is none, or if result.json is
    damaged: a resume writes it again.
    """
    try:
        result = json.loads((path / "result.json").read_text(encoding="utf-8"))
        return result if result["epochs"] >= options["epochs"] else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def read_options(path: Path) -> dict:
    """Return the options in the config.json of a run folder."""
    return json.loads((path / "config.json").read_text(encoding="utf-8"))["options"]


@contextmanager
def explain_resume(folder: Path) -> Iterator[None]:
    """When a run is stopped, also say how to resume all of them."""
    remedy = f"all seeds: repeat the command with --checkpoint auto --name {folder.name}"
    try:
        yield
    except Terminated as stopped:
        raise Terminated(f"{stopped}; {remedy}") from None
    except KeyboardInterrupt:
        if is_main_process():
            print(remedy, file=sys.stderr)
        raise


def summarize_seeds(folder: Path, results: dict[int, dict], *, write: bool) -> dict:
    """Print mean and standard deviation over the seeds, write seeds.json, and return its content."""
    summary = {key: summarize_values(list(map(get, results.values()))) for key, (_, get) in SUMMARY.items()}
    if min(len(result["last_ten_epochs"]) for result in results.values()) < MEDIAN_EPOCHS:
        del summary["median_of_last_ten_top1"]  # hardly more than the last epoch
    seeds = f"{format_count(len(results), 'seed')} ({', '.join(map(str, results))})"
    lines = [f"{seeds}, top-1 accuracy on the test images:"]
    for key, values in summary.items():
        spread = f" +- {values['std']:.2f}" if values["n"] > 1 else ""
        lines.append(f"  {SUMMARY[key][0]}: {values['mean']:.2f}{spread} % (n = {values['n']})")
    if len(results) > 1:
        lines.append("  +- is the standard deviation of a sample (n - 1)")
    named = {f"seed_{seed}" for seed in results}
    if others := [name for name in RunFolder.list_seeds(folder) if write and name not in named]:
        lines.append(f"note: {folder} also holds {', '.join(others)}; name all seeds in --seeds to include them")
    print("\n".join(lines), flush=True)
    content = {"seeds": {str(seed): result for seed, result in results.items()}, "summary": summary}
    if write:
        write_json(folder / "seeds.json", content)
        print(f"results in {folder / 'seeds.json'}; compare runs with python -m evaluation.compare {folder}")
    return content

"""Evaluate trained classifiers: python evaluate.py --model_path runs/cifar10/resnet20/my_run"""

import shlex
import sys
from functools import partial

from engine.config.select import select_kwargs
from engine.launch import run_main
from evaluation.options import REFERENCE_OPTIONS, add_trained_options, build_parser, list_measurements, read_options


def main(argv: list[str] | None = None) -> list[dict]:
    """Evaluate every classifier; returns what --output holds."""
    # ---- Options ----
    parser = build_parser()
    typed, options, notes = read_options(parser, argv)
    task, count = options["task"], len(options["model_path"])

    from engine.data.datasets import load_evaluation
    from engine.runtime import distributed
    from engine.runtime.device import choose_device, choose_precision, setup_backends
    from evaluation.context import EvalSession, check_same_images
    from evaluation.loading import build_context, load_classifiers, load_images, print_info
    from evaluation.reports import report_card, report_task
    from evaluation.robustness import add_mean_corruption_errors
    from evaluation.tasks import run_plan

    if options["info"]:
        return [print_info(path) for path in options["model_path"]]

    # ---- Device ----
    device = choose_device(options["device"])
    distributed.init_processes(device, options["timeout"])
    setup_backends(device, seed=0, deterministic=False)
    precision, _ = choose_precision(options["amp"], device)
    shared = select_kwargs(options, ["batch_size", "workers", "channels_last", "held_out", "seed"])
    session = EvalSession(device, precision, **shared)
    for note in notes:
        print(f"note: {note}")

    # ---- Classifiers: the images of each, and what is measured on them ----
    contexts, plans = [], []
    for classifier in load_classifiers(**select_kwargs(options, load_classifiers)):
        own = add_trained_options(parser, typed, options, classifier)
        own |= REFERENCE_OPTIONS if len(contexts) == count else {}
        data = load_images(session, "limit" in typed, **select_kwargs(own, load_evaluation))
        contexts.append(build_context(classifier, data, session, **select_kwargs(own, build_context)))
        with contexts[-1].named_errors():  # what is missing is said now, not when the others have worked for an hour
            plans.append(plan_task(contexts[-1], own))
    if task != "accuracy":
        check_same_images(contexts, f"--task {task}")

    # ---- Measure ----
    results = [run_plan(context, plan) for context, plan in zip(contexts, plans, strict=True)]
    distributed.shut_down_processes()
    if not distributed.is_main_process():
        return []
    results, references = results[:count], results[count:]
    if options["reference"]:
        add_mean_corruption_errors(results, references)

    # ---- Report ----
    command = shlex.join(["python", "evaluate.py", *map(str, sys.argv[1:] if argv is None else argv)])
    report = report_card if task == "card" else report_task
    report(results, command, **select_kwargs(options, report))
    return results


def plan_task(context, options: dict):
    """Look up all that the task needs, so that what is missing is said before any work; returns what does the work."""
    from evaluation.tasks import PLANNERS, measure_card

    planners = {name: PLANNERS[name] for name in list_measurements(options)}
    plans = {name: planner(context, **select_kwargs(options, planner)) for name, planner in planners.items()}
    return partial(measure_card, context.dataset, plans) if options["task"] == "card" else plans[options["task"]]


if __name__ == "__main__":
    run_main(main)

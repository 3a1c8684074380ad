"""Evaluate trained classifiers: python evaluate.py --model_path runs/cifar10/resnet20/my_run"""

import shlex
import sys
from collections.abc import Callable
from functools import partial

import evaluation
from engine import data, runtime
from engine.config.parser import Parser
from engine.config.select import select_kwargs
from engine.launch import run_main
from evaluation.options import REFERENCE_OPTIONS, build_parser, merge_trained_options, read_options
from evaluation.task_options import list_measurements


def main(argv: list[str] | None = None) -> list[dict]:
    """Evaluate every classifier. Return one result for each, as in --output; [] in all but the main process."""
    parser = build_parser()
    typed, options, notes = read_options(parser, argv)
    if options["info"]:
        return [evaluation.print_info(path) for path in options["model_path"]]
    if options["export"]:
        return [evaluation.run_export(parser, typed, options, notes)]

    # ---- Device ----
    device = runtime.choose_device(options["device"])
    runtime.init_processes(device, options["timeout"])
    runtime.setup_backends(device, seed=0, deterministic=False)
    precision, _ = runtime.choose_precision(options["amp"], device)
    common = select_kwargs(options, ["batch_size", "workers", "channels_last", "held_out", "seed"])
    session = evaluation.EvalSession(device, precision, **common)
    for note in notes:
        print(f"note: {note}")
    command = shlex.join(["python", "evaluate.py", *map(str, sys.argv[1:] if argv is None else argv)])
    if options["predict"]:
        return predict(parser, typed, options, session, command)

    # ---- Classifiers, their images, and what to measure ----
    contexts, plans, count = [], [], len(options["model_path"])
    for classifier in evaluation.load_classifiers(**select_kwargs(options, evaluation.load_classifiers)):
        own = merge_trained_options(parser, typed, options, classifier)
        own |= REFERENCE_OPTIONS if len(contexts) == count else {}
        images = evaluation.load_images(session, "limit" in typed, **select_kwargs(own, data.load_evaluation))
        context = evaluation.build_context(classifier, images, session, **select_kwargs(own, evaluation.build_context))
        contexts.append(context)
        plans.append(plan_task(context, own))
    evaluation.check_same_images(contexts, options["task"])

    # ---- Measurements ----
    results = [evaluation.run_plan(context, plan) for context, plan in zip(contexts, plans, strict=True)]
    runtime.shut_down_processes()
    if not runtime.is_main_process():
        return []
    results, references = results[:count], results[count:]
    if options["reference"]:
        evaluation.add_mean_corruption_errors(results, references)

    # ---- Report ----
    report = evaluation.report_card if options["task"] == "card" else evaluation.report_task
    report(results, command, **select_kwargs(options, report))
    return results


def predict(parser: Parser, typed: dict, options: dict, session, command: str) -> list[dict]:
    """Classify the pictures of --predict. Return one result for each classifier; [] in all but the main process."""
    files = evaluation.find_pictures(**select_kwargs(options, evaluation.find_pictures))
    as_folder = typed | {"dataset": "folder", "on_bad_image": options["on_bad_image"]}
    contexts = []
    for classifier in evaluation.load_classifiers(**select_kwargs(options, evaluation.load_classifiers)):
        own = merge_trained_options(parser, as_folder, options, classifier)
        own = select_kwargs(own, evaluation.build_picture_context)
        contexts.append(evaluation.build_picture_context(classifier, files, session, **own))
    results = [evaluation.predict_pictures(context, options["topk"]) for context in contexts]
    runtime.shut_down_processes()
    if not runtime.is_main_process():
        return []
    evaluation.report_predictions(results, command, **select_kwargs(options, evaluation.report_predictions))
    return results


def plan_task(context, options: dict) -> Callable[[], dict]:
    """Prepare the measurements of the task for one classifier and return a function that runs them.

    All inputs are looked up here, so that a missing file is reported at once and not after an hour of work.
    """
    planners = {name: evaluation.PLANNERS[name] for name in list_measurements(options)}
    with context.named_errors():
        plans = {name: plan(context, **select_kwargs(options, plan)) for name, plan in planners.items()}
    return partial(evaluation.measure_card, context, plans) if options["task"] == "card" else plans[options["task"]]


if __name__ == "__main__":
    run_main(main)

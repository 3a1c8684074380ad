"""Compare training runs: python -m evaluation.compare RUN ..."""

import shlex
import sys
from pathlib import Path

from engine.config.option_types import choice, path
from engine.config.options import add_common_options
from engine.config.parser import Parser
from engine.errors import UserError
from engine.launch import run_main
from evaluation.compare.metrics import METRICS

PROGRAM = "python -m evaluation.compare"


def build_parser() -> Parser:
    parser = Parser(
        "Compare runs of train.py and imagenet_train.py. Runs that differ in their seed only are one group; tables, "
        "figures and a web page give its mean and its spread, and what makes the comparison of the groups unfair.",
        prog=PROGRAM,
        positional="RUN ...",
    )
    parser.group("runs")
    parser.option(
        "runs", type=path, nargs="*", metavar="RUN", help="run folders, folders that hold runs, or patterns of them"
    )
    parser.option("--metric", type=choice(METRICS), default="top1", help="what is compared")
    parser.option(
        "--baseline",
        metavar="LABEL",
        shown="the first group without mixing, else the first group",
        help="group of which the others' differences are taken, by seed",
    )
    parser.group("output")
    parser.option("--out", "-o", metavar="DIR", default="compare", help="folder of tables, figures and page")
    overwrite = {"help": "replace an earlier comparison in this folder"}
    add_common_options(parser, "dpi", "figure_format", overwrite=overwrite)
    return parser


def main(argv: list[str] | None = None) -> dict:
    """Compare the runs and write tables and figures. Returns the content of compare.json."""
    parser = build_parser()
    options = {**parser.defaults, **parser.read(argv)}
    if not options["runs"]:
        parser.error("no runs given; name run folders, or a folder that holds them, such as runs/cifar10/resnet50")
    out = Path(options["out"])
    if (out / "compare.json").exists() and not options["overwrite"]:
        parser.error(f"--out {out}: holds a comparison; replace it with --overwrite, or choose another folder")

    # imported late, so that --help is fast
    from engine.runtime.files import write_atomic, write_json
    from evaluation.compare import tables
    from evaluation.compare.comparison import compare_runs, describe_groups
    from evaluation.compare.figures import draw_comparison
    from evaluation.compare.page import format_page
    from evaluation.compare.runs import find_runs

    # ---- Compare ----
    comparison = compare_runs(*find_runs(options["runs"]), options["metric"], options["baseline"])
    print(describe_groups(comparison.groups))
    print(tables.format_text(comparison))
    for line in [*comparison.warnings, *comparison.left_out]:
        print(f"note: {line}")

    # ---- Write ----
    create_folder(out)
    command = shlex.join([*PROGRAM.split(), *map(str, sys.argv[1:] if argv is None else argv)])
    texts = {"md": tables.format_markdown(comparison), "csv": tables.format_csv(comparison)}
    texts["html"] = format_page(comparison, command)
    for name, text in texts.items():
        write_atomic(out / f"compare.{name}", lambda side, text=text: side.write_text(text, encoding="utf-8"))
    paths = draw_comparison(comparison, out, options["figure_format"], dpi=options["dpi"])
    content = tables.make_json(comparison)
    write_json(out / "compare.json", content)
    print(
        f"files in {out}: compare.csv, compare.html, compare.json, compare.md, {', '.join(path.name for path in paths)}"
    )
    return content


def create_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path}: cannot create this folder ({error.strerror}); name another one") from error


if __name__ == "__main__":
    run_main(main)

"""Run the main() of a script: exit codes, one-line error messages, and --debug for tracebacks."""

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from engine.errors import Terminated, UserError, get_compile_error, get_first_error_line


def run_main(main: Callable[[], None]) -> None:
    """Call the main() of a script and exit with its exit code.

    The codes: 0 success, 1 an error that is explained in a line, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM. Of several
    processes only the main process prints.
    """
    debug = "--debug" in sys.argv
    if "WORLD_SIZE" in os.environ and not debug:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # torch reads it; it would print a page per error
    try:
        main()
    except BrokenPipeError:  # the reader of our output has exited, as in `train.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("\nstopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except Terminated as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped by SIGTERM: {stopped}", file=sys.stderr)
        sys.exit(143)
    except Exception as error:
        if debug:
            traceback.print_exc()
        script = Path(sys.argv[0])
        report_error(f"{script.parent.name if script.stem == '__main__' else script.name}: {explain_error(error)}")
        sys.exit(1)


def report_error(text: str) -> None:
    """Print an error that ends the program, once for all processes."""
    if "WORLD_SIZE" in os.environ and "engine.runtime.distributed" in sys.modules:
        sys.modules["engine.runtime.distributed"].report_error(text)
    else:
        print(text, file=sys.stderr)


def explain_error(error: Exception) -> str:
    """Return one or two lines that explain an error to the user."""
    if isinstance(error, UserError):
        return str(error)
    distributed = sys.modules.get("engine.runtime.distributed")
    if distributed and distributed.is_connection_error(error):
        first = get_first_error_line(error)
        return (
            f"lost connection to another process: {first}\nsaved checkpoints are intact; resume with --checkpoint auto"
        )
    no_memory = re.search("not enough memory|can't allocate memory", str(error))  # of the CPU
    if type(error).__name__ == "OutOfMemoryError" or no_memory:
        remedy = "try a smaller --batch_size or --image_size (detect.py: --min_size)"
        return f"out of memory: {str(error).splitlines()[0]}\n{remedy}"
    if "more than 1 value per channel" in str(error):  # such as --mix_fraction, which leaves one image of a batch
        return "batch norm on feature maps of 1x1 pixel needs at least 2 images\nuse a larger --batch_size"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile failed: {get_compile_error(error)}\nrun or resume without it: --compile false"
    if "DataLoader" in str(error):  # killed, out of shared memory, or without an answer
        return (
            f"the worker processes that read images failed: {str(error).splitlines()[0]}\ngive them more memory (in a "
            "container also shared memory: docker run --shm-size 8g) or read without them: --workers 0"
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full: {error}"
    first = (str(error).splitlines() or [""])[0]
    return f"unexpected {type(error).__name__}: {first}\nrun again with --debug to see the traceback"

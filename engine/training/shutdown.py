"""Save the state of a run and tell how to resume it, however it ends."""

import sys
from collections.abc import Callable
from contextlib import contextmanager

from engine.errors import Terminated, UserError
from engine.runtime.checkpoint import save_checkpoint
from engine.runtime.distributed import barrier, is_main_process
from engine.training.run_folder import RunFolder
from engine.training.running_sums import EpochStats, NonFiniteLoss, TrainingInterrupted
from engine.training.state import TrainingState


@contextmanager
def graceful_shutdown(run: RunFolder, parts: TrainingState, keep: Callable[[EpochStats], None]):
    """Around an epoch: a loss that is no number, Ctrl-C and SIGTERM end with the way to go on. keep(tally) saves the
    epoch as far as it went.
    """
    last = run.path / "last.pt"

    def go_on() -> str:
        if run.off or not last.exists():
            return "no epoch was finished, so nothing is kept"
        return f"what was saved last is kept: continue with --checkpoint {last}"

    try:
        yield
    except NonFiniteLoss as error:
        saved = ""
        if not run.off:
            evidence = {"model": parts.model.state_dict(), "step": error.step, "index": error.index}
            save_checkpoint(run.path / "nonfinite.pt", {**evidence, "weights_of_step": error.now, **error.evidence})
            saved = f"; weights and the batch's image numbers are in {run.path / 'nonfinite.pt'}"
        barrier()  # who ends first ends the others, and so would the one that saves
        scale = f", loss scale {parts.scaler.get_scale():g}" if parts.scaler else ""
        raise UserError(
            f"{error}, lr by now {parts.scheduler.get_last_lr()[0]:g}{scale}{saved}\n"
            f"try a lower --lr, --clip_grad 1, or --amp bf16 or off; {go_on()}"
        ) from error
    except TrainingInterrupted as stopped:
        keep(stopped.tally)
        barrier()
        where = f"{stopped.tally.step} steps into the epoch; "
        raise Terminated(where + (f"continue with --checkpoint {last}" if last.exists() else go_on())) from None
    except KeyboardInterrupt:
        if is_main_process():
            print(f"\n{go_on()}", file=sys.stderr)
        raise

"""Where an optimizer step falls in a run: epoch, step within the epoch, steps per epoch."""

from collections.abc import Sequence


class StepSchedule:
    """Where an optimizer step falls, in a run whose phases may have different numbers of steps an epoch.

    phases: (last epoch, steps an epoch) of each, in order. After its end the last phase goes on.
    """

    def __init__(self, phases: Sequence[tuple[int, int]]):
        self.phases = list(phases)

    def first_step(self, epoch: int) -> int:
        """How many steps come before `epoch`."""
        before, begin = 0, 0
        for end, steps in self.phases[:-1]:
            before += (min(epoch, end) - min(epoch, begin)) * steps
            begin = end
        return before + max(0, epoch - begin) * self.phases[-1][1]

    def place(self, step: int) -> tuple[int, int, int]:
        """The epoch of a step, its number in the epoch, and how many steps that epoch has."""
        begin = 0
        for end, steps in self.phases[:-1]:
            if step < (end - begin) * steps:
                break
            step -= (end - begin) * steps
            begin = end
        else:
            steps = self.phases[-1][1]
        return begin + step // steps, step % steps, steps

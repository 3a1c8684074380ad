"""Solvers of the optimisation problems inside the methods, for a whole batch at once."""

SOLVERS = ("parallel", "gco")  # ours, in torch; graph cuts, as the authors of PuzzleMix and Co-Mixup use them
THRESHOLDS = (0.0, 0.01, -0.01, 0.05, -0.05)  # that round a relaxed solution, in units of the mean |f|


def check_solver(name: str) -> str:
    """Return the name. Raises ValueError for an unknown solver, and for gco if its package is missing."""
    if name not in SOLVERS:
        raise ValueError(f"solver must be {' or '.join(SOLVERS)}, got {name!r}")
    if name == "gco":
        from .graphcut import import_gco

        import_gco()  # so that a missing package is reported now and not at the first batch
    return name

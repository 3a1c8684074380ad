"""Solvers of the optimisation problems inside the methods, for a whole batch at once."""

SOLVERS = ("parallel", "gco")  # ours, in torch; graph cuts, as the authors of PuzzleMix and Co-Mixup use them
THRESHOLDS = (0.0, 0.01, -0.01, 0.05, -0.05)  # that round a relaxed solution, in units of the mean |f|


def check_solver(name: str) -> str:
    """Return the name. Raises ValueError for an unknown solver, and for gco if its package is missing."""
    if name not in SOLVERS:
        raise ValueError(f"solver must be {' or '.join(SOLVERS)}, got {name!r}")
    if name == "gco":
        import_gco()  # so that a missing package is reported now and not at the first batch
    return name


def import_gco():
    """Return the module gco. Raises ValueError, naming the package to install, if it is missing."""
    try:
        import gco
    except ImportError as error:
        raise ValueError(
            "solver gco needs a package: pip install gco-wrapper (Python 3.10 or 3.11; pygco, another package, cannot "
            "be built offline). The default solver, parallel, needs none"
        ) from error
    return gco

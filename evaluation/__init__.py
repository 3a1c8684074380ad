"""What evaluate.py measures beyond accuracy: robustness, calibration, out-of-distribution detection, localisation."""

ATTACKS = ("fgsm", "pgd")  # names that --help knows without importing torch

"""What evaluate.py measures beyond accuracy: robustness, calibration, out-of-distribution detection, localisation."""

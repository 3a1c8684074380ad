"""Solvers of the optimisation problems inside the methods, for a whole batch at once."""

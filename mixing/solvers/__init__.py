"""The optimization problems inside the methods, solved for the whole batch at once."""

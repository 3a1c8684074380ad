"""Options: how they are declared, filled in and checked."""

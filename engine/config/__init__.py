"""Command-line options: declare, fill in and check them."""

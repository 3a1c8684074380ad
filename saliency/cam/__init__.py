"""Class activation maps of any network."""

"""Draw figures and format tables."""

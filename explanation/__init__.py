"""Where a network looks: explanations of single images."""

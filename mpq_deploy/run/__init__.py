"""A run: its folder, the view of it that stages read, their order, and what they need of memory."""

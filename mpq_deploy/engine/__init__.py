"""Targets (one YAML each), builders in a child process, and the check of what they built."""

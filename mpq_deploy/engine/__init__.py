"""Targets (one YAML each), builders that run in a child process, and the check of what was built."""

"""Reports: HTML for people, Markdown for pull requests, JSON for scripts."""

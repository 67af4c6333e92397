"""Programs for developers, run in the root of a checkout as `python -m tools.<name>`."""

"""What several test files use, and the programs that tests start."""

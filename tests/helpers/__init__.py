"""Helpers of several test files, and programs that tests start."""

"""Helpers for several test files, and programs started by tests."""

"""The tests, by level."""

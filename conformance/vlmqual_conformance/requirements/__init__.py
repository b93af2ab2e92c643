"""Requirement files, one or more for each family."""

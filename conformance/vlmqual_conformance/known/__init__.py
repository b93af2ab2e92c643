"""Known failures of foreign libraries."""

"""Tests over a user's own checkpoint, with or without a reference of it."""

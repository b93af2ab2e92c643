"""Ways to execute a loaded model."""

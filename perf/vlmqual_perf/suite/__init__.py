"""What pytest collects to show measured rows through pytest-benchmark."""

"""The performance harness: plan, runner, statistics, and the pytest-benchmark front."""

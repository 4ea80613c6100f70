"""Run a grid of methods, tasks and seeds."""

"""Make the report, its figures and the tables of README.md from bench/results."""

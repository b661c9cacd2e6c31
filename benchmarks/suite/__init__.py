"""A suite of jobs to choose defaults on, and of others to judge them on: `python -m
benchmarks.suite`.
"""

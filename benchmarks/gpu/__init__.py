"""One command for a machine with a GPU: checks, times, tunes, unattended (`python -m
benchmarks.gpu`).
"""

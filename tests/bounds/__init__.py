"""Every kernel in every form, executed without a GPU as Triton compiles it (`python -m
tests.bounds`); no test of pytest's.
"""

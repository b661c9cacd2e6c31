"""Modelled times on GPUs (`python -m benchmarks.roofline`); nothing in this folder is a
measurement.
"""

from benchmarks.roofline.tables import figures, sweep, table

__all__ = ["figures", "sweep", "table"]

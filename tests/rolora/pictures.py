"""The pictures in a run's own folder, composed but not painted: painting them takes as long as
training a tiny model. Programs of their own and tests/rolora/run/test_plots.py paint them.
"""

import importlib.util


def unpainted(setattr_=setattr):
    """From here on a figure that is saved in a folder `plots` is an empty file."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    painted = Figure.savefig

    def savefig(self, path, **options):
        if getattr(path, "parent", None) is not None and path.parent.name == "plots":
            path.touch()
        else:
            painted(self, path, **options)

    setattr_(Figure, "savefig", savefig)

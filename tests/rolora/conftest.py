"""Small model folders with real tokenizers, and data files, made once a session."""

import pytest

from tests.models import make_files


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("shared"))

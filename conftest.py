"""Examples in docstrings run in an empty folder: what they write is gone afterwards."""

import pytest


@pytest.fixture(autouse=True)
def _empty_folder_for_examples(request, monkeypatch):
    if isinstance(request.node, pytest.DoctestItem):
        monkeypatch.chdir(request.getfixturevalue("tmp_path"))

"""Searches for a broken claim leave torch as they found it."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _threads_as_found():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)

"""Fixtures of the tests of ops."""

import pytest
import torch


@pytest.fixture
def _one_thread(_same_start: None) -> None:
    """Products this small spend their time waiting for a second thread."""
    torch.set_num_threads(1)

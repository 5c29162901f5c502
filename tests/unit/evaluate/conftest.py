"""What the tests of this room share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_same_start):
    """Models this small spend their time waiting for a second thread."""
    torch.set_num_threads(1)

import pytest
import torch


@pytest.fixture
def float64():
    """Modules and tensors made in the test are float64, drawn from one seed."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

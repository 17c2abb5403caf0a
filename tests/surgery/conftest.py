import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """The models are tiny: several threads only wait for each other, the more so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

"""The accuracy matrix as it is counted, saved, and agreed on by ranks."""

import math

import pytest
import torch
from torch import distributed, multiprocessing, nn

from trainkit.measure import continual
from trainkit.task.accuracy_matrix import AccuracyMatrix

COUNTS = {(0, 0): (9, 10), (1, 0): (5, 10), (1, 1): (16, 20), (2, 0): (4, 10), (2, 1): (10, 20), (2, 2): (30, 40)}
RANKS = 2


def filled(tasks: int = 3, cells: dict = COUNTS) -> AccuracyMatrix:
    matrix = AccuracyMatrix(tasks)
    for (trained, evaluated), (correct, total) in cells.items():
        matrix.update(trained, evaluated, torch.tensor(correct), torch.tensor(total))
    return matrix


def test_counts_become_shares_and_numbers():
    matrix = filled()
    R = torch.tensor([[0.9, math.nan, math.nan], [0.5, 0.8, math.nan], [0.4, 0.5, 0.75]], dtype=torch.float64)
    assert torch.equal(matrix.matrix().nan_to_num(-1), R.nan_to_num(-1))
    found = matrix.compute()
    assert found["final_average_accuracy"] == R[2].mean()
    assert found["forgetting_chaudhry"] == continual.forgetting_chaudhry(R)
    assert float(found["stream_accuracy_avalanche"]) == pytest.approx(44 / 70)
    assert "fwt" not in found


def test_batches_add_up():
    matrix = AccuracyMatrix(2)
    matrix.update(0, 0, 3, 4)
    matrix.update(0, 0, torch.tensor(0), torch.tensor(4))
    assert matrix.matrix()[0, 0] == 3 / 8


def test_in_mid_stream_the_numbers_are_of_the_tasks_so_far():
    assert filled(cells={}).compute() == {}
    first = filled(cells={(0, 0): (9, 10)}).compute()
    assert {name: float(value) for name, value in first.items()} == {
        "final_average_accuracy": 0.9, "average_anytime_accuracy": 0.9, "stream_accuracy_avalanche": 0.9,
        "learning_accuracy": 0.9, "first_learned": 0.9, "last_learned": 0.9,
    }  # fmt: skip
    second = filled(cells={cell: counts for cell, counts in COUNTS.items() if cell[0] < 2}).compute()
    assert float(second["final_average_accuracy"]) == pytest.approx((0.5 + 0.8) / 2)
    assert float(second["forgetting_avalanche"]) == pytest.approx(0.9 - 0.5)


def test_forward_transfer_needs_the_untrained_network_and_the_tasks_to_come():
    matrix = filled()
    matrix.update(0, 1, 6, 20)
    matrix.update(1, 2, 12, 40)
    assert "fwt" not in matrix.compute()
    for task, total in enumerate((10, 20, 40)):
        matrix.note_random(task, total // 10, total)
    assert matrix.random().tolist() == [0.1, 0.1, 0.1]
    assert float(matrix.compute()["fwt"]) == pytest.approx((0.3 - 0.1 + 0.3 - 0.1) / 2)
    assert matrix.matrix()[2].tolist() == [0.4, 0.5, 0.75]  # the untrained network has a row of its own


def test_a_joint_stream_has_only_its_last_row():
    found = filled(cells={(2, k): (8, 10) for k in range(3)}).compute()
    assert set(found) == {"final_average_accuracy", "last_learned", "stream_accuracy_avalanche"}


def test_it_is_saved_and_goes_on(tmp_path):
    holder = nn.ModuleDict({"class": filled(cells={(0, 0): (9, 10)})})
    torch.save(holder.state_dict(), tmp_path / "x.pt")
    again = nn.ModuleDict({"class": AccuracyMatrix(3)})
    again.load_state_dict(torch.load(tmp_path / "x.pt", weights_only=True))
    matrix = again["class"]
    assert isinstance(matrix, AccuracyMatrix)
    for cell, counts in COUNTS.items():
        if cell != (0, 0):
            matrix.update(*cell, *counts)
    assert matrix.compute() == filled().compute()
    with pytest.raises(ValueError, match="of 3 tasks, this run's of 5"):
        nn.ModuleDict({"class": AccuracyMatrix(5)}).load_state_dict(torch.load(tmp_path / "x.pt"))


@pytest.mark.parametrize("cell", [(-1, 0), (3, 0), (0, 3), (0, -1)])
def test_tasks_that_there_are_not(cell):
    with pytest.raises(ValueError, match="from 0 to 2"):
        filled().update(*cell, 1, 1)
    with pytest.raises(ValueError, match="at least 1 task"):
        AccuracyMatrix(0)


def on_rank(rank: int, folder: str) -> None:
    """Each rank counts a part of each cell; saves what it has before anything is computed."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    matrix = AccuracyMatrix(3)
    for (trained, evaluated), (correct, total) in COUNTS.items():
        mine = (correct - 1, total - 3) if rank else (1, 3)
        matrix.update(trained, evaluated, *mine)
    torch.save((matrix.state_dict(), matrix.compute()), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_every_rank_holds_the_whole_matrix(tmp_path):
    multiprocessing.spawn(on_rank, (str(tmp_path),), nprocs=RANKS)
    for rank in range(RANKS):
        state, found = torch.load(tmp_path / f"{rank}.pt")
        restored = AccuracyMatrix(3)
        restored.load_state_dict(state)
        assert found == restored.compute() == filled().compute()

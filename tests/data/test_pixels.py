"""Images: splits, standardization, augmentation, and the layout of folders as the hub keeps them."""

import io

import numpy as np
import pytest
import torch

from trainkit.data.digits import Digits
from trainkit.data.images import Images
from trainkit.data.pixels import Shuffled, crop


@pytest.fixture(scope="module")
def digits():
    data = Digits(batch_size=64)
    data.prepare_data()
    return data


def test_digits_are_all_there_once_and_every_part_has_all_classes(digits):
    assert sum(len(split.labels) for split in digits.splits.values()) == 1797
    assert digits.facts() == {"image": [1, 8, 8], "classes": 10}
    for split in digits.splits.values():
        assert set(split.labels) == set(range(10))


def test_an_epoch_shows_each_training_image_at_most_once_standardized(digits):
    batches = list(digits.train_dataloader())
    assert len(batches) == len(digits.splits["train"].labels) // 64
    images = torch.cat([images for images, _ in batches])
    assert len(torch.unique(images, dim=0)) == len(images)
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02


def test_the_order_follows_from_seed_and_epoch(digits):
    def labels(seed, epoch):
        return Shuffled(digits).epoch(seed, epoch)(slice(0, 200))[1].tolist()

    assert labels(0, 1) == labels(0, 1)
    assert labels(0, 1) != labels(0, 2)
    assert labels(0, 1) != labels(1, 1)


def test_augmentation_does_not_depend_on_how_an_epoch_is_shared_out():
    data = Digits(batch_size=8, augment="crop_flip", pad=2)
    data.prepare_data()
    draw = Shuffled(data).epoch(0, 0)
    whole, parts = draw(slice(0, 8))[0], torch.cat([draw(slice(i, i + 2))[0] for i in range(0, 8, 2)])
    assert torch.equal(whole, parts)
    plain = Digits(batch_size=8)
    plain.prepare_data()
    assert not torch.equal(whole, Shuffled(plain).epoch(0, 0)(slice(0, 8))[0])


def test_a_crop_is_the_window_of_the_padded_image():
    image = torch.arange(12.0).view(1, 1, 3, 4)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
    for down in range(5):
        for right in range(5):
            made = crop(image, 2, np.array([down]), np.array([right]))
            assert torch.equal(made, padded[:, :, down : down + 3, right : right + 4])


def folder(path, splits, size=4, column="img"):
    import datasets
    from PIL import Image

    for split, count in splits.items():
        rng = np.random.default_rng(count)
        rows = []
        for number in range(count):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(file, "PNG")
            rows.append({column: {"bytes": file.getvalue(), "path": None}, "label": number % 3})
        features = datasets.Features({column: datasets.Image(), "label": datasets.Value("int64")})
        datasets.Dataset.from_list(rows, features=features).to_parquet(path / f"{split}-00000-of-00001.parquet")
    return str(path)


def test_a_folder_in_the_hubs_layout(tmp_path):
    data = Images(name=folder(tmp_path, {"train": 40, "test": 9}), batch_size=4)
    data.prepare_data()
    assert data.facts() == {"image": [3, 4, 4], "classes": 3}
    assert {name: len(split.labels) for name, split in data.splits.items()} == {"train": 36, "val": 4, "test": 9}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"field": "picture"}, r"data\.field=picture: no such column"),
        ({"batch_size": 100}, r"data\.batch_size=100 is more than the 36"),
        ({"classes": 7}, r"data\.classes was 7,? (and )?is 3"),
    ],
)
def test_mistakes_are_named(tmp_path, words, sentence):
    data = Images(name=folder(tmp_path, {"train": 40, "test": 9}), **({"batch_size": 4} | words))

    def start():
        data.prepare_data()
        data.facts()

    with pytest.raises(ValueError, match=sentence):
        start()


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"without \.parquet files"):
        Images(name=str(tmp_path)).prepare_data()

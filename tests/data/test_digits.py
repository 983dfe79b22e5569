import numpy as np
import pytest

from multitask_jax.data import digits


@pytest.fixture(scope="module")
def splits() -> digits.Splits:
    return digits.load(seed=0)


def rows(split: digits.Split) -> set[bytes]:
    return {image.tobytes() for image in split.images}


def test_every_image_is_in_one_part(splits: digits.Splits) -> None:
    assert sum(len(s.digits) for s in splits) == 1797
    # No scan occurs twice in the data, so bytes tell images apart.
    assert [len(rows(s)) for s in splits] == [len(s.digits) for s in splits]
    train, validation, test = (rows(s) for s in splits)
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_images_and_proportions(splits: digits.Splits) -> None:
    for split in splits:
        assert split.images.shape == (len(split.digits), 8, 8)
        assert split.images.dtype == np.float32
        assert split.images.min() == 0
        assert split.images.max() == 1
        share = np.bincount(split.digits) / len(split.digits)
        np.testing.assert_allclose(share, 0.1, atol=0.01)


def test_seed_decides_the_split(splits: digits.Splits) -> None:
    again, other = digits.load(seed=0), digits.load(seed=1)
    np.testing.assert_array_equal(again.test.images, splits.test.images)
    assert rows(other.test) != rows(splits.test)


@pytest.mark.parametrize("task", digits.TASKS)
def test_labels_are_valid(splits: digits.Splits, task: str) -> None:
    images, labels = digits.examples(splits.train, task)
    classes = digits.TASKS[task].classes
    assert images.shape == splits.train.images.shape
    assert images.dtype == np.float32
    assert labels.dtype == np.int32
    assert set(labels.tolist()) == set(range(classes))
    assert classes <= digits.CLASSES


def test_tasks_are_what_they_say(splits: digits.Splits) -> None:
    split = splits.test
    parity = digits.examples(split, "parity")
    np.testing.assert_array_equal(parity.images, split.images)
    assert parity.digits[split.digits == 7].all()
    assert not parity.digits[split.digits == 4].any()
    turned = digits.examples(split, "turned").images
    # The top row, read from the left, becomes the left column, read from below.
    np.testing.assert_array_equal(turned[:, ::-1, 0], split.images[:, 0])
    negative = digits.examples(split, "negative").images
    np.testing.assert_array_equal(negative, 1 - split.images)


def test_errors_say_what_to_do(splits: digits.Splits) -> None:
    with pytest.raises(ValueError, match="'rotated', expected one of digit, parity"):
        digits.examples(splits.test, "rotated")
    with pytest.raises(ValueError, match="sum below 1"):
        digits.load(validation=0.5, test=0.5)

"""A process's share of data."""

import numpy as np
import pytest

from keras_gemma2.training.packing import pack
from keras_gemma2.training.samples import Sample
from keras_gemma2.training.shares import share_of

pytestmark = pytest.mark.backend_free


def test_shares_are_of_one_size_and_have_no_row_twice():
    rows = list("abcdefg")
    assert [share_of(rows, index, 3) for index in range(3)] == [["a", "d"], ["b", "e"], ["c", "f"]]
    assert share_of(rows, 0, 1) == rows
    assert share_of(tuple(rows), 1, 2) == ("b", "d", "f")
    assert share_of({"prompts": rows, "responses": rows[::-1]}, 1, 2) == {"prompts": ["b", "d", "f"], "responses": ["f", "d", "b"]}


def test_each_part_of_a_tuple_is_shared_out():
    ids = np.arange(8).reshape(4, 2)
    x, y, weights = share_of(({"token_ids": ids, "padding_mask": ids}, None, ids[:, 0]), 1, 2)
    assert x["token_ids"].tolist() == [[2, 3], [6, 7]] == x["padding_mask"].tolist() and y is None and weights.tolist() == [2, 6]


def test_packed_samples():
    packed = pack([Sample(np.arange(1, 6), np.ones(5)) for _ in range(4)], 4, 0)
    share = share_of(packed, 1, 2)
    assert share.y.shape == (2, 4) and share.rows == packed.rows[1::2] and share.x["token_ids"].shape == (2, 4)


def test_a_dataset_of_tensorflow():
    tf = pytest.importorskip("tensorflow")
    rows = tf.data.Dataset.range(7)
    assert [list(share_of(rows, index, 3).as_numpy_iterator()) for index in range(3)] == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize(
    "data, error, message",
    [
        ((row for row in "ab"), TypeError, "rows in memory.*Received: .*generator.*DistributedSampler"),
        (["a"], ValueError, "a row or more for each of the 2 processes"),
        ({"prompts": ["a", "b"], "responses": ["a"]}, ValueError, r"the same number of rows.*\[1, 2\]"),
    ],
)
def test_what_has_no_shares(data, error, message):
    with pytest.raises(error, match=message):
        share_of(data, 0, 2)

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest

from vlmqual_contract.errors import VlmqualError
from vlmqual_contract.wire import Channel, Closed, Late


@pytest.fixture
def pair():
    left_read, right_write = os.pipe()
    right_read, left_write = os.pipe()
    left, right = Channel(left_read, left_write), Channel(right_read, right_write)
    yield left, right
    left.close()
    right.close()


def exchange(pair, body):
    left, right = pair
    sender = threading.Thread(target=left.send, args=(body,))
    sender.start()
    received = right.receive(time.monotonic() + 30)
    sender.join()
    return received


def test_plain_data_and_arrays_arrive_as_they_were_sent(pair):
    arrays = {
        "scalar": np.array(1.5),
        "empty": np.zeros((0, 3), np.int64),
        "bool": np.array([True, False]),
        "strided": np.arange(12, dtype=">i4").reshape(3, 4)[:, ::2],
        "half": np.array([np.nan, np.inf, -0.0], np.float16),
        "large": np.arange(3_000_000, dtype=np.float32),
    }
    received = exchange(pair, {"text": "ä\n", "none": None, "nested": [1, {"x": 2.5}], "arrays": arrays})
    assert received["text"] == "ä\n"
    assert received["none"] is None
    assert received["nested"] == [1, {"x": 2.5}]
    for name, array in arrays.items():
        got = received["arrays"][name]
        assert got.dtype == array.dtype, name
        assert got.shape == array.shape, name
        np.testing.assert_array_equal(got, array, err_msg=name)


def test_objects_are_refused_before_anything_is_sent(pair):
    left, _ = pair
    for value in (object(), np.array([object()])):
        with pytest.raises(TypeError, match="plain data"):
            left.send({"value": value})


def test_silence_ends_at_the_deadline(pair):
    _, right = pair
    with pytest.raises(Late):
        right.receive(time.monotonic() + 0.05)


def test_a_reader_that_never_reads_ends_the_sender_at_its_deadline(pair):
    left, _ = pair
    with pytest.raises(Late):
        left.send({"large": np.zeros(4_000_000)}, time.monotonic() + 0.2)


def test_a_closed_pipe_is_told_from_a_late_one(pair):
    left, right = pair
    left.close()
    with pytest.raises(Closed):
        right.receive(time.monotonic() + 5)
    with pytest.raises(Closed):
        right.send({"a": 1})


def test_an_absurd_length_is_refused_instead_of_read(pair):
    left, right = pair
    os.write(left._write_fd, b"\xff" * 8)
    with pytest.raises(VlmqualError, match="bytes was announced"):
        right.receive(time.monotonic() + 5)

from __future__ import annotations

import datetime
import threading
from collections import OrderedDict
from os import pipe

import numpy as np
import pytest

from vlmqual_contract.subject import Image, LibraryServer, RemoteLibrary, Tensor, Tuple
from vlmqual_contract.wire import Channel


class ToyTensor:
    """Stands for a tensor of a framework."""

    def __init__(self, array, dtype):
        self.array, self.dtype = array, dtype


class Shape:
    sides = 0

    def __init__(self, name, sides=4, *, colour=None, **more):
        self.name, self.sides, self.colour, self.more = name, sides, colour, more
        self.parts = OrderedDict(a=[1, 2], b=ToyTensor(np.arange(3.0), "float16"))

    @classmethod
    def square(cls):
        return cls("square")

    def echo(self, value):
        return value

    def kind_of(self, value):
        return type(value).__name__

    def area(self, image):
        return image.size, image.mode


class ToyLibrary:
    name, version, families = "toy", "3", ("mllama",)

    def resolve(self, name):
        return {"Shape": Shape}[name] if name == "Shape" else getattr(self, "no " + name)

    def to_array(self, value):
        return value.array if isinstance(value, ToyTensor) else None

    def from_array(self, array, dtype=None):
        return ToyTensor(array, dtype)


@pytest.fixture
def library():
    server = LibraryServer(ToyLibrary())
    near_read, far_write = pipe()
    far_read, near_write = pipe()
    near, far = Channel(near_read, near_write), Channel(far_read, far_write)

    about = {"name": "toy", "version": "3", "families": ["mllama"]}

    def request(body):
        def answer():
            message = far.receive()
            try:
                far.send(about if message["op"] == "library" else server.ask(message))
            except Exception as error:  # the caller waits for an answer and asserts on it
                far.send({"error": repr(error)})

        thread = threading.Thread(target=answer)
        thread.start()
        near.send(body)
        reply = near.receive()
        thread.join()
        assert "error" not in reply, reply
        return reply

    remote = RemoteLibrary(request)
    remote.server = server
    yield remote
    near.close()
    far.close()


def test_objects_stay_in_the_library_and_their_attributes_are_read_by_path(library):
    shape = library.call("Shape", "box", 6, colour="red", extra=1.5)
    assert shape.type_name == "Shape"
    assert (shape.get("name"), shape.get("sides"), shape.get("colour")) == ("box", 6, "red")
    assert shape.get("more.extra") == 1.5
    assert shape.get("parts.a.1") == 2
    assert shape.has("parts.a")
    assert not shape.has("parts.c")
    shape.set("colour", "blue")
    assert shape.get("colour") == "blue"
    assert library.call("Shape.square").get("name") == "square"


def test_tensors_become_arrays_and_arrays_become_tensors(library):
    shape = library.call("Shape", "box")
    np.testing.assert_array_equal(shape.get("parts.b"), np.arange(3.0))
    assert shape.call("kind_of", Tensor(np.zeros(2))) == "ToyTensor"
    assert shape.call("kind_of", np.zeros(2)) == "ndarray"
    np.testing.assert_array_equal(shape.call("echo", Tensor(np.ones(2))), np.ones(2))


@pytest.mark.parametrize("value", [None, True, 3, 2.5, "x", [1, [2]], {"a": {"b": [None]}}, float("inf")])
def test_plain_values_survive_both_ways(library, value):
    assert library.call("Shape", "box").call("echo", value) == value


def test_tuples_lists_and_dicts_with_number_keys_keep_their_type(library):
    shape = library.call("Shape", "box")
    assert shape.call("echo", Tuple((1, 2))) == (1, 2)
    assert shape.call("echo", {1: "a"}) == {1: "a"}
    assert shape.type_of("parts")[:2] == ("OrderedDict", "dict")


def test_images_arrive_as_pictures(library, tmp_path):
    shape = library.call("Shape", "box")
    size, mode = shape.call("area", Image(np.zeros((2, 5, 3), np.uint8)))
    assert (size, mode) == ((5, 2), "RGB")
    assert shape.call("area", Image(np.zeros((2, 5), np.uint8), "RGBA"))[1] == "RGBA"


def test_a_signature_is_plain_data(library):
    parameters = library.signature("Shape")
    assert [(p.name, p.kind, p.required, p.default) for p in parameters] == [
        ("name", "POSITIONAL_OR_KEYWORD", True, None),
        ("sides", "POSITIONAL_OR_KEYWORD", False, 4),
        ("colour", "KEYWORD_ONLY", False, None),
        ("more", "VAR_KEYWORD", True, None),
    ]


def test_names_can_lead_outside_the_library(library):
    assert library.call("datetime:date.fromordinal", 1).type_name == "date"
    assert library.get("sys:maxsize") > 0
    assert not library.exists("datetime:no_such_name")
    assert not library.exists("NoSuchClass")
    assert library.exists("Shape.square")
    assert datetime.date.fromordinal(1).year == 1


def test_mappings_are_read_item_by_item(library):
    items = library.call("Shape", "box").mapping("parts")
    assert items["a"] == [1, 2]
    np.testing.assert_array_equal(items["b"], np.arange(3.0))


def test_forgotten_objects_are_released_in_the_worker(library):
    for _ in range(5):
        library.call("Shape", "box")
    library.exists("Shape")
    assert len(library.server._objects) <= 1, "objects whose handles are gone must not pile up"

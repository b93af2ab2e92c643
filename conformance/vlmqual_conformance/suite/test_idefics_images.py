"""Idefics' images: what the image processor takes, the values that it makes, what a transform replaces, addresses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite.idefics_objects import (
    ALLOWED,
    MEAN,
    SIDE,
    STD,
    IdeficsObjects,
    idefics_objects,
    plain,
    processed,
    same,
    squared,
)
from vlmqual_conformance.suite.image_server import served
from vlmqual_conformance.suite.library_objects import image, picture
from vlmqual_contract.subject import Handle, Image, Parameter, RemoteLibrary

SIZES = [(20, 100), (100, 20), (28, 28), (5, 9), (300, 211)]


@pytest.fixture
def idefics(library: RemoteLibrary) -> IdeficsObjects:
    """Objects of the library under test."""
    return idefics_objects(library)


def default_of(parameter: Parameter) -> Any:
    """A default value; that of an enumeration whose members are strings as the string."""
    value = parameter.default
    return value.get("value") if isinstance(value, Handle) else value


# signatures and defaults ------------------------------------------------------------------------------------------


@requirement("IDEFICS-IMG-001")
def test_parameters_of_the_image_processor(idefics: IdeficsObjects) -> None:
    *named, last = idefics.library.signature("IdeficsImageProcessor")
    assert [(item.name, item.default) for item in named] == [
        ("image_size", 224),
        ("image_mean", None),
        ("image_std", None),
        ("image_num_channels", 3),
    ]
    assert last.kind == "VAR_KEYWORD", "further keywords are not taken"


@requirement("IDEFICS-IMG-006")
def test_parameters_of_preprocess(idefics: IdeficsObjects) -> None:
    first, *named, last = idefics.library.signature("IdeficsImageProcessor.preprocess")
    assert (first.name, first.required) == ("images", True)
    assert [(item.name, default_of(item)) for item in named] == [
        ("image_num_channels", 3),
        ("image_size", None),
        ("image_mean", None),
        ("image_std", None),
        ("transform", None),
        ("return_tensors", "pt"),
    ]
    assert last.kind == "VAR_KEYWORD", "further keywords are not taken"


@requirement("IDEFICS-IMG-002")
def test_pictures_have_224_pixels_by_default(idefics: IdeficsObjects) -> None:
    assert idefics.default_images.get("image_size") == 224


@requirement("IDEFICS-IMG-003")
def test_the_default_mean_is_the_documented_constant(idefics: IdeficsObjects) -> None:
    assert tuple(idefics.default_images.get("image_mean") or ()) == MEAN


@requirement("IDEFICS-IMG-004")
def test_the_default_standard_deviation_is_the_documented_constant(idefics: IdeficsObjects) -> None:
    assert tuple(idefics.default_images.get("image_std") or ()) == STD


@requirement("IDEFICS-IMG-005")
def test_pictures_have_three_channels_by_default(idefics: IdeficsObjects) -> None:
    assert idefics.default_images.get("image_num_channels") == 3


# values -----------------------------------------------------------------------------------------------------------


@requirement("IDEFICS-IMG-007", "IDEFICS-IMG-003", "IDEFICS-IMG-004")
def test_a_default_image_processor_normalises_with_the_default_constants(idefics: IdeficsObjects) -> None:
    pixels = picture(60, 80)
    made = processed(idefics.default_images, Image(pixels))
    assert np.isfinite(made).all(), "there are values that are no numbers"
    same(made, squared(pixels, 224, MEAN, STD)[None])


@requirement("IDEFICS-IMG-008")
def test_several_images_become_one_tensor(idefics: IdeficsObjects) -> None:
    called = idefics.library.call("builtins:map", idefics.images, [[image(20, 30), image(40, 10)]])
    made = idefics.call("collections:UserList", called)  # holds what the call returned, so that its type can be asked
    assert made.type_of("0")[0] == "Tensor"
    assert made.get("0").shape == (2, 3, SIDE, SIDE)


@requirement("IDEFICS-IMG-009")
def test_a_size_may_be_given_for_a_call(idefics: IdeficsObjects) -> None:
    pixels = picture(60, 80)
    same(processed(idefics.images, Image(pixels), image_size=14), squared(pixels, 14)[None])
    assert idefics.images.get("image_size") == SIDE, "the call changed the processor"


@requirement("IDEFICS-IMG-010")
def test_values_are_divided_by_255_and_normalised_by_channel(idefics: IdeficsObjects) -> None:
    mean, std = [0.5, 0.25, 0.0], [0.25, 0.5, 2.0]
    colours, wanted = (255, 0, 51), (2.0, -0.5, 0.1)  # (1 - 0.5) / 0.25, (0 - 0.25) / 0.5, 0.2 / 2
    made = [
        processed(idefics.images, plain(20, 30, *colours), image_mean=mean, image_std=std),
        processed(idefics.new_image_processor(image_mean=mean, image_std=std), plain(20, 30, *colours)),
    ]
    for found in made:
        assert found.shape == (1, 3, SIDE, SIDE)
        for channel, value in enumerate(wanted):
            np.testing.assert_allclose(found[0, channel], value, atol=1e-6, err_msg=f"channel {channel}")
    assert list(idefics.images.get("image_mean")) == [0, 0, 0], "the call changed the processor"


@requirement("IDEFICS-IMG-011")
@pytest.mark.parametrize(("byte", "wanted"), [(255, 1.5), (0, -0.5)])
def test_mean_and_standard_deviation_may_be_one_number(idefics: IdeficsObjects, byte: int, wanted: float) -> None:
    options: dict[str, Any] = {"image_mean": 0.25, "image_std": 0.5}
    made = [
        processed(idefics.new_image_processor(**options), plain(20, 30, byte)),
        processed(idefics.images, plain(20, 30, byte), **options),
    ]
    for found in made:
        np.testing.assert_allclose(found, wanted, atol=1e-6)


@requirement("IDEFICS-IMG-013")
def test_a_wide_image_is_squeezed_into_the_square(idefics: IdeficsObjects) -> None:
    pixels = np.zeros((20, 100, 3), np.uint8)
    pixels[:, 50:] = 255
    made = processed(idefics.new_image_processor(224), Image(pixels))
    assert made.shape == (1, 3, 224, 224)
    assert (made[..., :112] < 0.5).all(), "the left half is not black throughout"
    assert (made[..., 112:] > 0.5).all(), "the right half is not white throughout"


@requirement("IDEFICS-IMG-013")
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_images_of_any_ratio_are_resized_bicubically(idefics: IdeficsObjects, height: int, width: int) -> None:
    pixels = picture(height, width, height)
    same(processed(idefics.images, Image(pixels)), squared(pixels)[None], f"{height} x {width}")


# transform, addresses, files --------------------------------------------------------------------------------------


@requirement("IDEFICS-IMG-012")
def test_a_transform_replaces_all_other_rules(idefics: IdeficsObjects) -> None:
    results = np.arange(2 * 3 * 7 * 7, dtype=np.float32).reshape(2, 3, 7, 7)
    transform = idefics.transform(*results)
    made = processed(idefics.images, [image(20, 30), image(40, 10)], transform=transform)
    np.testing.assert_array_equal(made, results)
    assert transform.get("call_count") == 2
    sizes = [transform.get(f"call_args_list.{call}.args.0.size") for call in range(2)]
    assert sizes == [(30, 20), (10, 40)], "it is not called with the images as they are"


@requirement("IDEFICS-IMG-015")
@pytest.mark.parametrize("listed", [True, False], ids=["list", "single"])
def test_addresses_become_images(idefics: IdeficsObjects, listed: bool) -> None:
    pixels = picture(20, 30)
    processor = idefics.new_image_processor(**ALLOWED)
    with served(idefics.library, pixels) as address:
        made = processor.call("fetch_images", [address, address] if listed else address)
    assert isinstance(made, list) == listed
    for found in made if listed else [made]:
        assert "Image" in found.bases, f"{found.type_name} is no PIL image"
        np.testing.assert_array_equal(idefics.library.call("numpy:asarray", found), pixels)
    assert not listed or len(made) == 2


@requirement("IDEFICS-IMG-014")
def test_an_image_processor_can_be_saved_and_loaded(idefics: IdeficsObjects, tmp_path: Path) -> None:
    mean, std = [0.5, 0.25, 0.0], [0.25, 0.5, 2.0]
    idefics.new_image_processor(42, image_mean=mean, image_std=std).call("save_pretrained", str(tmp_path))
    assert (tmp_path / "preprocessor_config.json").is_file()
    loaded = idefics.call("IdeficsImageProcessor.from_pretrained", str(tmp_path))
    assert loaded.get("image_size") == 42
    assert list(loaded.get("image_mean")) == mean
    assert list(loaded.get("image_std")) == std
    assert loaded.get("image_num_channels") == 3
    pixels = picture(60, 80)
    same(processed(loaded, Image(pixels)), squared(pixels, 42, mean, std)[None])

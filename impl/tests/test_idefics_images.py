"""The image processor of Idefics, against the documented options, figures made by hand, and transformers."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from idefics_processor_objects import MEAN, NEW, SIDE, STD, exact_square, reference_image_processor
from PIL import Image
from processor_objects import noise_image

from vlmqual_contract import fixtures
from vlmqual_impl import AutoImageProcessor, IdeficsImageProcessor, image_urls, images_idefics
from vlmqual_impl.image_files import ImageError, read_image

PICTURES = sorted(path.name for path in (fixtures.root() / "images").glob("*.*") if path.suffix != ".md")
#: What 4.46.3 cannot read.
ONLY_NEW = {"edge-1x1.png", "edge-1x40.png", "edge-3x3.png", "edge-3x50.png", "edge-40x1.png", "edge-50x3.png"}


def _plain(image: Any, side: int = SIDE, **options: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Pixels of one image in 0..255, (3, s, s)."""
    made = IdeficsImageProcessor(image_size=side, image_mean=0.0, image_std=1 / 255, **options)(image)
    return np.asarray(made[0])


# documented names ----------------------------------------------------------------------------------------------------


def test_signatures_are_the_documented_ones() -> None:
    # IDEFICS-IMG-001, IDEFICS-IMG-006
    constructor = inspect.signature(IdeficsImageProcessor.__init__).parameters
    assert [(name, one.default) for name, one in constructor.items()][1:-1] == [
        ("image_size", 224),
        ("image_mean", None),
        ("image_std", None),
        ("image_num_channels", 3),
    ]
    assert [*constructor][-1] == "kwargs"
    preprocess = inspect.signature(IdeficsImageProcessor.preprocess).parameters
    assert [(name, one.default) for name, one in preprocess.items()][2:-1] == [
        ("image_num_channels", 3),
        ("image_size", None),
        ("image_mean", None),
        ("image_std", None),
        ("transform", None),
        ("return_tensors", "pt"),
    ]
    assert [*preprocess][1] == "images"
    assert [*preprocess][-1] == "kwargs"


def test_defaults_are_the_documented_ones() -> None:
    # IDEFICS-IMG-002, IDEFICS-IMG-003, IDEFICS-IMG-004, IDEFICS-IMG-005
    processor = IdeficsImageProcessor()
    assert processor.image_size == 224
    assert processor.image_mean == [0.48145466, 0.4578275, 0.40821073]
    assert processor.image_std == [0.26862954, 0.26130258, 0.27577711]
    assert processor.image_num_channels == 3
    assert processor.fetch is None


# pixels --------------------------------------------------------------------------------------------------------------


def test_the_default_is_a_tensor_of_squares_with_mean_and_deviation_applied() -> None:
    # IDEFICS-IMG-007, IDEFICS-IMG-008
    colours = [(255, 0, 51), (0, 102, 204)]
    made = IdeficsImageProcessor()([Image.new("RGB", (30, 50), colour) for colour in colours])
    assert isinstance(made, torch.Tensor)
    assert (made.shape, made.dtype) == ((2, 3, 224, 224), torch.float32)
    for image, colour in zip(made, colours, strict=True):
        for channel, value, mean, std in zip(image, colour, MEAN, STD, strict=True):
            assert torch.allclose(channel, torch.tensor((value / 255 - mean) / std), rtol=0, atol=1e-6)


def test_both_sides_are_resized_whatever_their_ratio() -> None:
    # IDEFICS-IMG-013: half black, half white; the border stays in the middle, and no row differs from another
    array = np.zeros((20, 100, 3), np.uint8)
    array[:, 50:] = 255
    made = _plain(Image.fromarray(array), 224)
    assert made.shape == (3, 224, 224)
    assert np.array_equal(made, np.broadcast_to(made[0, 0], made.shape))
    assert made[0, 0, 111] < 127.5 < made[0, 0, 112]
    assert set(made[0, 0, :105].round()) == {0}
    assert set(made[0, 0, 119:].round()) == {255}


@pytest.mark.parametrize("size", [(60, 44), (28, 28), (9, 61), (300, 14), (20, 13)])
def test_resizing_is_by_the_cubic_kernel_that_widens_where_an_image_shrinks(size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(3).integers(60, 190, (size[1], size[0], 3), dtype=np.uint8))
    # Bytes are rounded after each pass: half a level, which the second pass makes 0.63 at most, and half a level.
    assert np.abs(_plain(image).transpose(1, 2, 0) - exact_square(image, SIDE)).max() < 1.13


def test_transparent_pixels_become_white_in_proportion() -> None:
    # ALGORITHMS 4.1
    for alpha, wanted in [(0, 255), (255, 10), (51, 206)]:  # 255 - 245 * alpha / 255
        assert _plain(Image.new("RGBA", (4, 4), (10, 10, 10, alpha))).round().max() == wanted


@pytest.mark.parametrize("name", PICTURES)
def test_every_bundled_picture_has_the_pixels_of_transformers(name: str) -> None:
    if not NEW and name in ONLY_NEW:
        pytest.skip("4.46.3 cannot read images with a side of 1 or 3 pixels")
    with Image.open(fixtures.root() / "images" / name) as opened:
        opened.load()
    for image in (opened, read_image(fixtures.root() / "images" / name)):
        wanted = reference_image_processor()(image, return_tensors="np" if NEW else "pt")
        made = IdeficsImageProcessor()(image, return_tensors="np")
        assert made.dtype == np.float32
        assert np.array_equal(made, np.asarray(wanted)), f"{name} in mode {image.mode} differs"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "I", "F"])
def test_every_mode_of_pillow_has_the_pixels_of_transformers(mode: str) -> None:
    image = noise_image(40, 31)
    if mode == "LAB":
        image = Image.frombytes("LAB", image.size, image.tobytes())
    else:
        via = {"PA": "P", "RGBa": "RGBA"}.get(mode)
        image = (image.convert(via) if via else image).convert(mode)
    try:
        wanted = reference_image_processor(image_size=SIDE)(image, return_tensors="np" if NEW else "pt")
    except (ValueError, OSError, TypeError) as error:
        pytest.skip(f"transformers does not read {mode}: {error}")
    made = IdeficsImageProcessor(image_size=SIDE)(image, return_tensors="np")
    assert np.array_equal(made, np.asarray(wanted))


@pytest.mark.parametrize("seed", range(12))
def test_pixels_are_those_of_transformers_for_any_size_and_option(seed: int) -> None:
    rng = np.random.default_rng(seed)
    side = int(rng.integers(1, 90))
    options = {
        "image_mean": rng.uniform(0, 1, 3).tolist() if seed % 3 else float(rng.uniform()),
        "image_std": rng.uniform(0.1, 1, 3).tolist() if seed % 2 else float(rng.uniform(0.1)),
    }
    images = [noise_image(*(int(n) for n in rng.integers(4, 200, 2)), seed=seed) for _ in range(3)]
    wanted = reference_image_processor(image_size=side, **options)(images, return_tensors="np" if NEW else "pt")
    assert np.array_equal(IdeficsImageProcessor(image_size=side, **options)(images, return_tensors="np"), wanted)


# options of a call ---------------------------------------------------------------------------------------------------


def test_a_call_overrides_the_options() -> None:
    # IDEFICS-IMG-009, IDEFICS-IMG-010, IDEFICS-IMG-011
    processor = IdeficsImageProcessor(image_size=14)
    white = Image.new("RGB", (10, 20), "white")
    made = processor(white, image_size=28, image_mean=[0.5, 0.25, 0.0], image_std=[0.25, 0.5, 2.0])
    assert made.shape == (1, 3, 28, 28)
    assert made.amin((0, 2, 3)).tolist() == made.amax((0, 2, 3)).tolist() == [2.0, 1.5, 0.5]
    assert set(processor(white, image_mean=0.5, image_std=0.5).flatten().tolist()) == {1.0}
    assert processor.image_size == 14
    assert processor.image_mean == MEAN


def test_a_transform_replaces_all_rules_and_its_results_are_stacked() -> None:
    # IDEFICS-IMG-012
    images = [noise_image(9, 7), Image.new("RGBA", (3, 4))]
    seen: list[Any] = []

    def transform(image: Any) -> torch.Tensor:
        seen.append(image)
        return torch.full((3, 7, 7), float(len(seen)))

    made = IdeficsImageProcessor()(images, transform=transform)
    assert made.shape == (2, 3, 7, 7)
    assert made[:, 0, 0, 0].tolist() == [1.0, 2.0]
    assert seen[0] is images[0]
    assert seen[1] is images[1], "a transform gets the images as they were passed"
    with pytest.raises(ValueError, match=r"the images have the shapes .*\(1, 2, 3\).*they have to be equal"):
        IdeficsImageProcessor()(images, transform=lambda image: torch.zeros(1, 2, len(image.mode)))


def test_one_image_lists_and_arrays_are_accepted() -> None:
    image = noise_image(30, 20)
    processor = IdeficsImageProcessor(image_size=SIDE)
    wanted = processor([image])
    array = np.asarray(image)
    for same in (
        image,
        (image,),
        array,
        [array],
        array[None],
        torch.from_numpy(array.copy()),
        array.transpose(2, 0, 1),
    ):
        assert torch.equal(processor(same), wanted)
    assert processor([]) == []  # IDEFICS-IMG-008, ALGORITHMS 4.1
    assert processor([], transform=lambda image: image) == []


def test_kinds_of_results() -> None:
    images = [noise_image(30, 20), noise_image(3, 4)]
    processor = IdeficsImageProcessor(image_size=SIDE)
    several = processor(images, return_tensors=None)
    assert isinstance(several, list)
    assert [type(one) for one in several] == [np.ndarray] * 2
    assert np.array_equal(np.stack(several), processor(images, return_tensors="np"))
    assert np.array_equal(np.stack(several), processor(images).numpy())
    with pytest.raises(ValueError, match="tf"):
        processor(images, return_tensors="tf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": 28.0}, r"image_size is 28\.0"),
        ({"image_size": True}, "image_size is True"),
        ({"image_num_channels": 1}, "image_num_channels is 1"),
        ({"image_mean": [0.5, 0.5]}, "mean"),
        ({"image_std": 0}, "std"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IdeficsImageProcessor(**options)(noise_image(4, 4))
    with pytest.raises(ValueError, match=message):
        IdeficsImageProcessor()(noise_image(4, 4), **options)


def test_what_is_no_image_or_option_is_refused() -> None:
    processor = IdeficsImageProcessor()
    with pytest.raises(TypeError, match="preprocess does not know do_resize"):
        processor(noise_image(4, 4), do_resize=False)
    with pytest.raises(ValueError, match="not a list of lists"):
        processor([[noise_image(4, 4)]])
    with pytest.raises(TypeError):
        processor([None])
    with pytest.raises(ImageError, match=r"nowhere\.png does not exist"):
        processor("nowhere.png")
    with pytest.raises(ValueError, match="do_resize is False; Idefics has no other than True"):
        IdeficsImageProcessor(do_resize=False)
    for size in ({"shortest_edge": 28}, {"height": 28, "width": 14}):
        with pytest.raises(ValueError, match=r"size .* is not valid; it has to be height and width"):
            IdeficsImageProcessor.from_dict({"size": size})
    assert IdeficsImageProcessor.from_dict({"size": {"height": 28, "width": 28}}).image_size == 28


# files and addresses -------------------------------------------------------------------------------------------------


def test_files_are_read(tmp_path: Path) -> None:
    image = noise_image(30, 20)
    image.save(tmp_path / "a.png")
    processor = IdeficsImageProcessor(image_size=SIDE)
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        assert torch.equal(processor(path), processor(image))


def test_addresses_need_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    # IDEFICS-IMG-015
    image, limits = noise_image(30, 20), []

    def fetch(url: str, given: Any) -> Image.Image:
        limits.append(given)
        return image

    monkeypatch.setattr(image_urls, "fetch_image", fetch)
    monkeypatch.setattr("vlmqual_impl.api.idefics_processing.fetch_image", fetch)
    url = "https://example.org/a.png"
    with pytest.raises(ImageError, match="only with fetch=True"):
        IdeficsImageProcessor()(url)
    assert limits == []
    mine = image_urls.ImageFetch(timeout_s=3)
    processor = IdeficsImageProcessor(image_size=SIDE, fetch=mine)
    assert torch.equal(processor(url), processor(image))
    assert processor.fetch_images([url, [url]]) == [image, [image]]
    assert processor.fetch_images(url) is image
    assert limits == [mine] * 4
    assert IdeficsImageProcessor().fetch_images([url]) == [image], "who calls fetch_images asks for it"
    assert limits[-1] == image_urls.ImageFetch()
    with pytest.raises(TypeError, match="Image is no address"):
        processor.fetch_images([image])


def test_fetch_images_refuses_addresses_of_this_network() -> None:
    with pytest.raises(ImageError, match=r"127\.0\.0\.1 is not a public address"):
        IdeficsImageProcessor().fetch_images(["http://127.0.0.1:9/a.png"])


# saved ---------------------------------------------------------------------------------------------------------------


def test_a_saved_image_processor_loads_here_and_in_transformers(tmp_path: Path) -> None:
    # IDEFICS-IMG-014
    processor = IdeficsImageProcessor(
        image_size=SIDE, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], fetch=True
    )
    processor.save_pretrained(tmp_path / "new" / "folder")
    values = json.loads((tmp_path / "new" / "folder" / "preprocessor_config.json").read_text("utf-8"))
    assert "fetch" not in values, "permission is never taken from a file"
    image = noise_image(50, 40)
    for loaded in (
        IdeficsImageProcessor.from_pretrained(tmp_path / "new" / "folder"),
        AutoImageProcessor.from_pretrained(tmp_path / "new" / "folder"),
    ):
        assert isinstance(loaded, IdeficsImageProcessor)
        assert (loaded.image_size, loaded.image_mean, loaded.fetch) == (SIDE, [0.1, 0.2, 0.3], None)
        assert torch.equal(loaded(image), processor(image))
    theirs = type(reference_image_processor()).from_pretrained(tmp_path / "new" / "folder")
    assert np.array_equal(np.asarray(theirs(image, return_tensors="pt")), processor(image, return_tensors="np"))


def test_what_transformers_saves_loads_here(tmp_path: Path) -> None:
    theirs = reference_image_processor(image_size=SIDE, image_std=[0.4, 0.5, 0.6])
    theirs.save_pretrained(tmp_path)
    loaded = IdeficsImageProcessor.from_pretrained(tmp_path, image_mean=[0.5, 0.5, 0.5], fetch=True)
    assert (loaded.image_size, loaded.image_std, loaded.image_mean) == (SIDE, [0.4, 0.5, 0.6], [0.5, 0.5, 0.5])
    assert loaded.fetch == image_urls.ImageFetch()
    with pytest.raises(TypeError, match="sighs"):
        IdeficsImageProcessor.from_pretrained(tmp_path, sighs=3)


def test_a_file_cannot_permit_fetching(tmp_path: Path) -> None:
    for value in (True, "yes"):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_size": 28, "fetch": value}))
        assert IdeficsImageProcessor.from_pretrained(tmp_path).fetch is None


def test_images_of_samples_are_packed_with_zeros_behind_them() -> None:
    # IDEFICS-PROC-010
    ones = [np.full((3, 2, 2), value, np.float32) for value in (1, 2, 3)]
    packed = images_idefics.pack([ones[:1], ones[1:], []], 2, (3, 2, 2))
    assert packed[:, :, 0, 0, 0].tolist() == [[1, 0], [2, 3], [0, 0]]
    assert packed.shape == (3, 2, 3, 2, 2)
    assert images_idefics.pack([[]], 1, (3, 5, 5)).shape == (1, 1, 3, 5, 5)

"""Images to tensors: decoding, resizing, augmentation and normalisation."""

import io
import warnings

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_processor
from transformers import (
    BitImageProcessorPil,
    ConvNextImageProcessorPil,
    DeiTImageProcessorPil,
    EfficientNetImageProcessor,
    EfficientNetImageProcessorPil,
    ViTImageProcessorPil,
)

from dynammo_peft.data import BatchTransform, decode_images, resized_image_processor


def noise_image(height=40, width=56, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def image_dataset(*images):
    """Images in a data set; bytes are those of a file."""
    entries = [{"bytes": image, "path": None} if isinstance(image, bytes) else image for image in images]
    return datasets.Dataset.from_dict({"image": entries}, features=datasets.Features({"image": datasets.Image()}))


def decode(image, processor):
    (decoded,) = decode_images(image_dataset(image), "image", processor, progress=False)
    assert decoded.dtype == torch.uint8
    return decoded.permute(1, 2, 0).numpy()


def batch(count, height=8, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def pixels_after(images, seed=0, **augmentation):
    """Augmented images, without normalisation."""
    transform = BatchTransform(mean=(0.0,) * 3, std=(1 / 255,) * 3, **augmentation)
    augmented = transform(images, transform.draw(len(images), torch.Generator().manual_seed(seed)))
    assert augmented.shape == images.shape
    return augmented.round().numpy()


def reflected_crops(image, reach):
    """Each crop of an image that was padded by reflection, by its offset from the middle."""
    (up, left), (height, width) = reach, image.shape[1:]
    padded = np.pad(image, ((0, 0), (up, up), (left, left)), mode="reflect")
    for y in range(2 * up + 1):
        for x in range(2 * left + 1):
            yield (y - up, x - left), padded[:, y : y + height, x : x + width]


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1"])
def test_decoding_is_pils_conversion_and_resize(mode):
    image = noise_image()
    image.putalpha(Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 56), dtype=np.uint8)))
    image = image.convert(mode)
    expected = image.convert("RGB").resize((32, 24), Image.BILINEAR)
    processor = ViTImageProcessorPil(size={"height": 24, "width": 32})
    np.testing.assert_array_equal(decode(image, processor), np.asarray(expected))


@pytest.mark.parametrize(
    ("processor", "resized_to", "crop"),
    [
        # Stretched to 36 x 36, of which the middle 32 x 32.
        (
            DeiTImageProcessorPil(size={"height": 36, "width": 36}, crop_size={"height": 32, "width": 32}),
            (36, 36),
            (2, 2),
        ),
        # The shorter side to 32 / 0.875 = 36, so 40 x 60 to 36 x 54; of it the middle 32 x 32.
        (ConvNextImageProcessorPil(size={"shortest_edge": 32}), (36, 54), (2, 11)),
    ],
)
def test_decoding_crops_as_the_processor_says(processor, resized_to, crop):
    image = noise_image(40, 60)
    resized = np.asarray(image.resize(resized_to[::-1], Image.BICUBIC))
    expected = resized[crop[0] : crop[0] + 32, crop[1] : crop[1] + 32]
    np.testing.assert_array_equal(decode(image, processor), expected)


def test_many_images_keep_their_order():
    colours = np.random.default_rng(0).integers(0, 256, (40, 3), dtype=np.uint8)
    images = [Image.fromarray(np.broadcast_to(colour, (9, 7, 3)).copy()) for colour in colours]
    decoded = decode_images(image_dataset(*images), "image", tiny_processor(4), progress=False)
    np.testing.assert_array_equal(decoded.permute(0, 2, 3, 1), np.broadcast_to(colours[:, None, None], (40, 4, 4, 3)))


def test_photographs_stand_upright():
    # Cameras write the pixels as the sensor lay and note in EXIF how to turn them; datasets turns them.
    file, exif = io.BytesIO(), Image.Exif()
    exif[274] = 6
    noise_image(32, 16).save(file, "jpeg", exif=exif)
    upright = image_dataset(file.getvalue())[0]["image"]
    assert upright.size == (32, 16)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 32})
    np.testing.assert_array_equal(decode(file.getvalue(), processor), np.asarray(upright))


def test_sixteen_bit_grey_images_keep_their_contrast():
    # Pillow's own conversion cuts everything above 255 of 65535 to white.
    grey = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "png")
    decoded = decode(file.getvalue(), tiny_processor(32)).astype(int)
    assert np.abs(decoded - grey[..., None] / 257).max() <= 1


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (np.linspace(0, 4095, 1024), "uint16", "0 to 65535, and some have none above 4095"),  # 12 bits
        (np.linspace(0, 255, 1024), "int32", "0 to 65535, and some have none above 4095"),
        (np.linspace(0, 1, 1024), "float32", "0 to 255, and some have none above 15"),
        (np.linspace(0, 65535, 1024), "uint16", None),
        (np.linspace(0, 65535, 1024), "int32", None),
        (np.linspace(0, 255, 1024), "float32", None),
        (np.linspace(0, 4000, 1024), "float32", "from 0 to 255, and some have others"),
        (np.linspace(-1024, 60000, 1024), "int32", "from 0 to 65535, and some have others"),
        (np.linspace(-1, 256, 1024), "float32", None),  # rounding
        (np.zeros(1024), "uint16", None),  # black
        (np.linspace(0, 15, 1024), "uint8", None),  # all there is
    ],
)
def test_grey_images_of_another_range_are_named(values, kind, expected):
    file = io.BytesIO()
    Image.fromarray(values.reshape(32, 32).astype(kind)).save(file, "tiff")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decoded = decode(file.getvalue(), tiny_processor(32))
    assert decoded.shape == (32, 32, 3)
    messages = [str(warning.message) for warning in caught if "PIL's mode" in str(warning.message)]
    assert len(messages) == (expected is not None)
    assert expected is None or expected in messages[0]


@pytest.mark.parametrize(
    "processor",
    [
        tiny_processor(16),
        DeiTImageProcessorPil(size={"height": 20, "width": 20}, crop_size={"height": 16, "width": 16}),
        ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.7], image_std=[0.3, 0.4, 0.5]),
        ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=0.3, image_std=0.2),
        ViTImageProcessorPil(size={"height": 16, "width": 16}, do_normalize=False),
        ViTImageProcessorPil(size={"height": 16, "width": 16}, rescale_factor=1 / 127.5),
        ViTImageProcessorPil(size={"height": 16, "width": 16}, do_rescale=False),
        ViTImageProcessorPil(size={"height": 16, "width": 16}, do_rescale=False, do_normalize=False),
    ],
    ids=["vit", "deit", "channels", "scalar", "no_normalize", "rescale_factor", "no_rescale", "raw"],
)
def test_without_augmentation_the_batch_is_what_the_processor_gives(processor):
    images = [noise_image(seed=seed) for seed in range(3)]
    decoded = decode_images(image_dataset(*images), "image", processor, progress=False)
    expected = processor(images, return_tensors="pt")["pixel_values"].float()
    transformed = BatchTransform.from_image_processor(processor)(decoded)
    assert transformed.dtype == torch.float32
    torch.testing.assert_close(transformed, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("processor_cls", [EfficientNetImageProcessor, EfficientNetImageProcessorPil])
def test_processors_with_further_steps_are_refused(processor_cls):
    size = {"size": {"height": 16, "width": 16}}
    for further in ({"include_top": True}, {"rescale_offset": True}, {"include_top": True, "rescale_offset": True}):
        processor = processor_cls(**{"include_top": False, "rescale_offset": False, **further}, **size)
        options = " and ".join(f"{name}=False" for name in further)
        with pytest.raises(ValueError, match=f"^EfficientNetImageProcessor.* does more to pixels.*; set {options}.$"):
            BatchTransform.from_image_processor(processor)
    processor = processor_cls(include_top=False, rescale_offset=False, **size)
    decoded = decode_images(image_dataset(noise_image()), "image", processor, progress=False)
    expected = processor(noise_image(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(BatchTransform.from_image_processor(processor)(decoded), expected)


def test_one_mean_for_all_channels():
    # Processors of backbones for grey images name one channel; the images have three equal ones.
    processor = ViTImageProcessorPil(image_mean=[0.5], image_std=[0.25])
    images = batch(2, 8, 8)
    transformed = BatchTransform.from_image_processor(processor)(images)
    torch.testing.assert_close(transformed, (images / 255 - 0.5) / 0.25)


def test_transforming_does_not_change_the_images():
    images = batch(4)
    before = images.clone()
    BatchTransform((0.5,) * 3, (0.5,) * 3)(images, BatchTransform.draw(4))
    assert torch.equal(images, before)


@pytest.mark.parametrize(("option", "axis"), [("horizontal_flip", 2), ("vertical_flip", 1)])
def test_about_half_of_the_images_are_mirrored(option, axis):
    images = batch(400)
    switches = {"horizontal_flip": False, "vertical_flip": False, option: True}
    augmented = pixels_after(images, crop_padding=0.0, **switches)
    mirrored = []
    for image, result in zip(images.numpy(), augmented):
        mirrored.append(np.array_equal(result, np.flip(image, axis)))
        assert mirrored[-1] or np.array_equal(result, image)
    # Five standard deviations around the half of 400.
    assert 150 < sum(mirrored) < 250


def test_no_augmentation_if_all_is_switched_off():
    images = batch(20)
    augmented = pixels_after(images, horizontal_flip=False, vertical_flip=False, crop_padding=0.0)
    np.testing.assert_array_equal(augmented, images)


def test_crops_are_crops_of_the_reflected_image():
    images = batch(200)
    # A quarter of 8 x 12 pixels: at most 2 down or up, and 3 to the left or right.
    augmented = pixels_after(images, horizontal_flip=False, crop_padding=0.25)
    offsets = []
    for image, result in zip(images.numpy(), augmented):
        matching = [offset for offset, crop in reflected_crops(image, (2, 3)) if np.array_equal(crop, result)]
        assert len(matching) == 1
        offsets += matching
    # Every shift happens, and those down do not depend on those across.
    assert {y for y, _ in offsets} == set(range(-2, 3))
    assert {x for _, x in offsets} == set(range(-3, 4))
    assert len(set(offsets)) > 25


def test_all_augmentations_together():
    images = batch(60)
    augmented = pixels_after(images, horizontal_flip=True, vertical_flip=True, crop_padding=0.125)
    seen = set()
    # An eighth of 8 x 12 pixels, rounded: 1 and 2.
    for image, result in zip(images.numpy(), augmented):
        for flips in [(), (1,), (2,), (1, 2)]:
            if any(np.array_equal(np.flip(crop, flips), result) for _, crop in reflected_crops(image, (1, 2))):
                seen.add(flips)
                break
        else:
            pytest.fail("not a mirrored crop of its image")
    assert len(seen) == 4


def test_augmentation_is_drawn_from_the_generator():
    images = batch(20)
    results = [pixels_after(images, seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_augmentation_without_a_generator_follows_the_global_seed():
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(BatchTransform.draw(20))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    state = torch.random.get_rng_state()
    BatchTransform.draw(20, torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.random.get_rng_state())


def test_an_images_augmentation_does_not_depend_on_its_batch():
    images, transform = batch(9), BatchTransform((0.5,) * 3, (0.5,) * 3, vertical_flip=True)
    drawn = transform.draw(9)
    parts = [transform(images[part], drawn[part]) for part in (slice(0, 2), slice(2, 3), slice(3, 9))]
    assert torch.equal(torch.cat(parts), transform(images, drawn))


def test_the_largest_number_drawn_is_the_largest_shift():
    # An image of one row, each pixel its place.
    images = torch.arange(100, dtype=torch.uint8).repeat(1, 3, 2, 1)
    transform = BatchTransform((0.0,) * 3, (1 / 255,) * 3, horizontal_flip=False, crop_padding=0.045)
    drawn = torch.tensor([[0.5, torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)), 1.0, 1.0]])
    assert transform(images, drawn)[0, 0, 0, :90].tolist() == list(range(4, 94))


@pytest.mark.parametrize("size", [48, 400])
@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(image_mean=[0.1, 0.2, 0.3]),
        ConvNextImageProcessorPil(image_mean=[0.1, 0.2, 0.3]),
        DeiTImageProcessorPil(image_mean=[0.1, 0.2, 0.3]),
        BitImageProcessorPil(image_mean=[0.1, 0.2, 0.3]),
        BitImageProcessorPil(image_mean=[0.1, 0.2, 0.3], do_center_crop=False),
    ],
    ids=["vit", "convnext", "deit", "bit", "bit_without_crop"],
)
def test_a_resized_processor_gives_squares(processor, size):
    before = processor.to_dict()
    resized = resized_image_processor(processor, size)
    assert decode(noise_image(40, 60), resized).shape == (size, size, 3)
    assert type(resized) is type(processor)
    assert list(resized.image_mean) == [0.1, 0.2, 0.3]
    assert processor.to_dict() == before

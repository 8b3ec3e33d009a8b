"""Crops, mirrors, mean and colour noise against plain PIL and numpy loops."""

import numpy as np
import pytest
import torch
from conftest import pictures
from PIL import Image

from data.augment import Augment, epoch_tables, random_crops
from data.store import Crops

PCA = {"eigenvalues": [900.0, 100.0, 4.0], "eigenvectors": np.linalg.qr(np.arange(9).reshape(3, 3) ** 2.0)[0].tolist()}


def by_pil(images, offsets, mirror, size):
    """The same crops with PIL, one picture at a time: (n, size, size, 3) uint8."""
    out = []
    for pixels, (top, left), flip in zip(images, offsets, mirror, strict=True):
        picture = Image.fromarray(pixels).crop((left, top, left + size, top + size))
        out.append(np.asarray(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else picture))
    return np.stack(out)


def test_random_crops_and_mirrors_equal_pil():
    images = pictures(40, (72, 72, 3))
    tables = epoch_tables(3, 1, 40, 8)
    samples = np.random.default_rng(0).permutation(40)[:25]
    ours = random_crops(torch.from_numpy(images), samples, Crops(tables.offsets[samples], tables.mirror[samples], 64))
    theirs = by_pil(images[samples], tables.offsets[samples], tables.mirror[samples], 64)
    assert np.array_equal(ours.numpy(), theirs)
    inputs = Augment(64, np.zeros((1, 1, 3))).train(ours, tables.colour[samples])
    assert inputs.shape == (25, 3, 64, 64)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(inputs.permute(0, 2, 3, 1).numpy(), theirs.astype(np.float32))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("mirror", "margin"), [(False, 8), (True, 8), (None, 0)])
def test_crops_at_the_edges(mirror, margin, channels):
    """All or none mirrored; the first and the last offset of the first and the last picture; nothing to cut off; the
    same picture twice; no picture at all."""
    size = 72 - margin
    images = pictures(6, (72, 72, 3))[..., :channels]
    samples = np.array([5, 0, 5, 2, 0, 5])
    offsets = np.array([[margin, margin], [0, 0], [0, margin], [margin // 2, 1 % (margin + 1)], [margin, 0], [0, 0]])
    flips = np.arange(6) % 2 == 0 if mirror is None else np.full(6, mirror)
    ours = random_crops(torch.from_numpy(images), samples, Crops(offsets, flips, size))
    assert np.array_equal(ours.numpy(), loop(images[samples], offsets, flips, size))
    none = random_crops(torch.from_numpy(images), samples[:0], Crops(offsets[:0], flips[:0], size))
    assert none.shape == (0, size, size, channels)


def loop(images, offsets, mirror, size):
    cut = [p[top : top + size, left : left + size] for p, (top, left) in zip(images, offsets, strict=True)]
    return np.stack([p[:, ::-1] if flip else p for p, flip in zip(cut, mirror, strict=True)])


@pytest.mark.parametrize(("stored", "size"), [(72, 64), (256, 224), (73, 64)])
def test_ten_crops_equal_pil(stored, size):
    """Four corners and centre, then the same mirrored (paper, section 4.1)."""
    images = pictures(3, (stored, stored, 3))
    edge, middle = stored - size, (stored - size) // 2
    corners = [(0, 0), (0, edge), (edge, 0), (edge, edge), (middle, middle)]
    views = list(Augment(size, np.zeros((1, 1, 3))).ten_crop(torch.from_numpy(images)))
    assert len(views) == 10
    for number, view in enumerate(views):
        theirs = by_pil(images, [corners[number % 5]] * 3, [number >= 5] * 3, size)
        assert np.array_equal(view.permute(0, 2, 3, 1).numpy(), theirs.astype(np.float32)), number
    center = Augment(size, np.zeros((1, 1, 3))).center(torch.from_numpy(images))
    assert torch.equal(center, views[4])


def test_offsets_are_uniform_with_both_ends():
    """33 x 33 offsets for 224 of 256, mirror in half of the cases; chi-squared over 200,000 draws."""
    tables = epoch_tables(0, 0, 200_000, 32)
    for column in (0, 1):
        counts = np.bincount(tables.offsets[:, column], minlength=33)
        assert len(counts) == 33
        assert counts.min() > 0
        expected = 200_000 / 33
        assert ((counts - expected) ** 2 / expected).sum() < 69  # 32 degrees of freedom: passed by chance in 0.9998
    assert abs(np.corrcoef(tables.offsets.T)[0, 1]) < 0.01
    assert abs(tables.mirror.mean() - 0.5) < 0.005
    assert abs(tables.colour.mean()) < 0.01
    assert abs(tables.colour.std() - 1) < 0.01


def test_tables_depend_on_seed_and_epoch_alone():
    first, again = epoch_tables(1, 2, 500, 8), epoch_tables(1, 2, 500, 8)
    for name in ("order", "offsets", "mirror", "colour"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
        for other in (epoch_tables(1, 3, 500, 8), epoch_tables(2, 2, 500, 8)):
            assert not np.array_equal(getattr(first, name), getattr(other, name)), name
    straight = epoch_tables(1, 2, 500, 8, mirrored=False)
    assert not straight.mirror.any()
    assert np.array_equal(straight.offsets, first.offsets)
    assert np.array_equal(np.sort(first.order), np.arange(500))


def test_runs_of_pictures_are_cropped_and_mirrored_alike():
    """The 2012 code: 32 pictures in a row, in the order of training, share offsets and mirroring; the colour noise
    stays each picture's own. A run of 1 is what there is without the option."""
    tables, single = epoch_tables(1, 2, 100, 32, crop_runs=32), epoch_tables(1, 2, 100, 32)
    assert np.array_equal(tables.order, single.order)
    assert np.array_equal(tables.colour, single.colour)
    runs = [tables.order[i : i + 32] for i in range(0, 100, 32)]
    assert all(len(np.unique(tables.offsets[run], axis=0)) == len(set(tables.mirror[run])) == 1 for run in runs)
    assert len({tuple(tables.offsets[run[0]]) for run in runs}) == len(runs) == 4
    assert np.array_equal(epoch_tables(1, 2, 100, 32, crop_runs=1).offsets, single.offsets)
    counts = np.bincount(epoch_tables(0, 0, 320_000, 32, crop_runs=32).offsets[:, 0], minlength=33)
    assert counts.min() > 0


def test_mean_images_centre_is_subtracted_from_every_crop():
    """Wherever the crop lies (2012 code), and from mirrored crops unmirrored."""
    images, mean = pictures(20, (72, 72, 3)), np.random.default_rng(1).random((72, 72, 3)).astype(np.float32) * 255
    tables, samples = epoch_tables(0, 0, 20, 8), np.arange(20)
    assert 0 < tables.mirror.sum() < 20
    crops = random_crops(torch.from_numpy(images), samples, Crops(tables.offsets, tables.mirror, 64))
    ours = Augment(64, mean).train(crops, tables.colour)
    theirs = by_pil(images, tables.offsets, tables.mirror, 64) - mean[4:68, 4:68]
    assert np.array_equal(ours.permute(0, 2, 3, 1).numpy(), theirs)
    channel = np.array([[[10.0, 20.0, 30.0]]])
    ours = Augment(64, channel).center(torch.from_numpy(images))
    assert np.array_equal(ours.permute(0, 2, 3, 1).numpy(), images[:, 4:68, 4:68] - channel.astype(np.float32))


@pytest.mark.parametrize("channels", [1, 3])
def test_inputs_may_take_the_memory_of_earlier_ones(channels):
    crops = torch.from_numpy(pictures(16, (64, 64, 3))[..., :channels].copy())
    tables = epoch_tables(0, 0, 16, 0)
    augment = Augment(64, np.full((64, 64, channels), 9.0), colour="2012", pca=PCA)
    first = augment.train(crops[:8], tables.colour[:8])
    fresh = augment.train(crops[8:], tables.colour[8:])
    again = augment.train(crops[8:], tables.colour[8:], out=first)
    assert again.data_ptr() == first.data_ptr()
    assert torch.equal(again, fresh)
    assert again.is_contiguous(memory_format=torch.channels_last)


def test_grey_pictures_become_three_equal_channels():
    images = pictures(5, (72, 72))[..., None]
    mean = np.full((72, 72, 1), 7.0)
    out = Augment(64, mean).center(torch.from_numpy(images))
    assert out.shape == (5, 3, 64, 64)
    for channel in range(3):
        assert np.array_equal(out[:, channel].numpy(), images[:, 4:68, 4:68, 0] - np.float32(7))


@pytest.mark.parametrize("colour", ["2012", "paper"])
def test_colour_noise_is_the_sources(colour):
    """[p1 p2 p3][a1 s1, a2 s2, a3 s3]^T once a picture, a ~ N(0, 0.1): s are standard deviations and the sum is
    divided by 1.1 (2012 code), or eigenvalues of pixels in 0..1, here times 255 (paper, section 4.1)."""
    images, tables, samples = pictures(8, (72, 72, 3)), epoch_tables(5, 0, 8, 8), np.arange(8)
    cut = random_crops(torch.from_numpy(images), samples, Crops(tables.offsets, tables.mirror, 64))
    ours = Augment(64, np.zeros((1, 1, 3)), colour=colour, pca=PCA).train(cut, tables.colour)
    crops = by_pil(images, tables.offsets, tables.mirror, 64).astype(np.float64)
    augment, plain = Augment(64, np.zeros((1, 1, 3)), colour=colour, pca=PCA), Augment(64, np.zeros((1, 1, 3)))
    tests = zip(augment.ten_crop(torch.from_numpy(images)), plain.ten_crop(torch.from_numpy(images)), strict=True)
    assert all(torch.equal(one, other) for one, other in tests)  # neither noise nor the division in testing
    assert torch.equal(augment.center(torch.from_numpy(images)), plain.center(torch.from_numpy(images)))
    values, vectors = np.array(PCA["eigenvalues"]), np.array(PCA["eigenvectors"])  # one vector a row
    scale = np.sqrt(values) if colour == "2012" else values / 255**2 * 255
    for row in range(8):
        shift = vectors.T @ (0.1 * tables.colour[row] * scale)
        expected = (crops[row] + shift) / (1.1 if colour == "2012" else 1)
        np.testing.assert_allclose(ours[row].permute(1, 2, 0), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, [10]), (12, [120]), (13, [117, 13]), (60, [120] * 5), (200, [200] * 10)]
)
def test_views_of_few_pictures_come_together(count, sizes):
    """At most 128 pictures at a time, unless one view has more; each view whole, in the order of ten_crop."""
    images = torch.randint(0, 256, (count, 9, 8, 3), dtype=torch.uint8)
    augment = Augment(5, np.zeros((9, 8, 3), np.float32))
    batches = list(augment.views(images, ten_crop=True))
    assert [len(inputs) for inputs in batches] == sizes
    assert torch.equal(torch.cat(batches), torch.cat(list(augment.ten_crop(images))))
    assert all(inputs.is_contiguous(memory_format=torch.channels_last) for inputs in batches)
    (center,) = augment.views(images)
    assert torch.equal(center, augment.center(images))

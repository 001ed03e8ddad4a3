"""The scores against hand-computed values, Pillow, and a brute-force reference."""

from __future__ import annotations

import doctest
import importlib
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import MetricCollection

from loco_diffusion.conditions import Colorization, Deblur
from loco_diffusion.images import to_pil, to_tensor
from loco_diffusion.metrics import BlurMSE, EdgeF1, GrayMSE, MaskedMSE, PixelMSE
from loco_diffusion.metrics.functional import blur_mse, edge_f1, gray_mse, luma, masked_mse, pixel_mse


def pictures(number: int, seed: int, side: int = 20) -> Tensor:
    """Random pictures (N, 3, side, side + 4) with values k/255."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, 3, side, side + 4), generator=generator) / 255


def edge_map(*rows: str) -> Tensor:
    """A map (1, 3, H, W) drawn with # on dots."""
    return torch.tensor([[float(c == "#") for c in row] for row in rows]).expand(
        1, 3, len(rows), len(rows[0])
    )


def brute_force_f1(found: np.ndarray, wanted: np.ndarray, tolerance: int) -> float:
    def hits(these: np.ndarray, those: np.ndarray) -> int:
        places = np.argwhere(those)
        return sum(
            bool((np.abs(places - p).max(1) <= tolerance).any()) for p in np.argwhere(these) if len(places)
        )

    if not found.any() and not wanted.any():
        return 1.0
    if not found.any() or not wanted.any():
        return 0.0
    precision, recall = hits(found, wanted) / found.sum(), hits(wanted, found) / wanted.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_f1_by_hand() -> None:
    found = edge_map("#..#", "#...", "....", "...#")
    wanted = edge_map("#...", ".#..", "....", ".#..")
    # strict: 1 hit of 4 found and 3 wanted; within 1 px: 2 of 4 found, 2 of 3 wanted
    assert edge_f1(found, wanted).item() == pytest.approx(2 / 7)
    assert edge_f1(found, wanted, tolerance=1).item() == pytest.approx(
        2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)
    )


def test_f1_of_empty_maps() -> None:
    empty, line = edge_map("....", "...."), edge_map("####", "....")
    for tolerance in (0, 1):
        assert edge_f1(empty, empty, tolerance).tolist() == [1.0]
        assert edge_f1(empty, line, tolerance).tolist() == [0.0]
        assert edge_f1(line, empty, tolerance).tolist() == [0.0]
        assert edge_f1(line, line, tolerance).tolist() == [1.0]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), density=st.sampled_from([0.0, 0.02, 0.1, 0.5]), tolerance=st.integers(0, 2)
)
def test_f1_against_brute_force(seed: int, density: float, tolerance: int) -> None:
    rng = np.random.default_rng(seed)
    found, wanted = rng.random((2, 3, 9, 11)) < np.array([density, 0.1])[:, None, None, None]
    scores = edge_f1(
        *(torch.from_numpy(m).float()[:, None].expand(3, 3, 9, 11) for m in (found, wanted)), tolerance
    )
    expected = [brute_force_f1(f, w, tolerance) for f, w in zip(found, wanted, strict=True)]
    assert scores.tolist() == pytest.approx(expected, abs=1e-6)


def test_pixel_mse_by_hand_and_in_half_precision() -> None:
    preds, target = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    preds[0, 0] = 30 / 255  # 900 in one of three channels
    preds[1, :, 0, 0] = 1  # 65025 in one of 16 pixels
    assert pixel_mse(preds, target).tolist() == pytest.approx([300.0, 65025 / 16])
    assert pixel_mse(preds.half(), target.half()).tolist() == pytest.approx([300.0, 65025 / 16])


def test_masked_mse_looks_at_hidden_pixels_only() -> None:
    preds, target = pictures(3, 0), pictures(3, 1)
    hidden = torch.zeros(3, 20, 24, dtype=torch.bool)
    hidden[0, 2:9, 3:5] = hidden[1, :1, :1] = hidden[2] = True
    expected = [
        (255 * (p - t)[:, h]).square().mean().item() for p, t, h in zip(preds, target, hidden, strict=True)
    ]
    assert masked_mse(preds, target, hidden).tolist() == pytest.approx(expected, rel=1e-5)
    changed = torch.where(hidden[:, None], preds, 1 - preds)
    assert torch.equal(masked_mse(changed, target, hidden), masked_mse(preds, target, hidden))
    assert masked_mse(preds, target, hidden)[2].item() == pytest.approx(
        pixel_mse(preds, target)[2].item(), rel=1e-5
    )
    with pytest.raises(ValueError, match="hidden pixel"):
        masked_mse(preds, target, torch.zeros_like(hidden))
    with pytest.raises(ValueError, match="hidden has shape"):
        masked_mse(preds, target, hidden[:, :4])


def test_luma_is_that_of_pillow() -> None:
    batch = pictures(4, 2, side=64)
    for picture, gray in zip(batch, luma(batch), strict=True):
        assert np.array_equal(np.asarray(to_pil(picture).convert("L")), gray.numpy())


@pytest.mark.parametrize(
    ("score", "extract"), [(gray_mse, Colorization().extract), (blur_mse, Deblur().extract)]
)
def test_gray_and_blur_errors_are_those_of_the_condition_maps(score, extract) -> None:
    preds, target = pictures(3, 3, side=48), pictures(3, 4, side=48)
    maps = [torch.stack([to_tensor(extract(to_pil(p))) for p in batch]) for batch in (preds, target)]
    assert score(preds, target).tolist() == pytest.approx(pixel_mse(*maps).tolist(), rel=1e-5)
    assert score(preds, preds).tolist() == [0, 0, 0]


def test_blur_radius_counts() -> None:
    preds, target = pictures(1, 5, side=128), pictures(1, 6, side=128)
    assert (
        blur_mse(preds, target, radius=8.0) < blur_mse(preds, target, radius=2.0) < pixel_mse(preds, target)
    )


@pytest.mark.parametrize("score", [edge_f1, pixel_mse, gray_mse, blur_mse])
def test_bad_tensors_are_refused(score) -> None:
    good = pictures(2, 0)
    with pytest.raises(ValueError, match="shape"):
        score(good, good[:1])
    with pytest.raises(ValueError, match="shape"):
        score(good[:, :1], good[:, :1])
    for bad in (good * 255, good - 0.5, good * float("nan")):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            score(bad, good)


METRICS = {
    "f1": (EdgeF1, {}, edge_f1),
    "f1_1px": (EdgeF1, {"tolerance": 1}, edge_f1),
    "rgb": (PixelMSE, {}, pixel_mse),
    "gray": (GrayMSE, {}, gray_mse),
    "blur": (BlurMSE, {}, blur_mse),
    "blur_2": (BlurMSE, {"radius": 2.5}, blur_mse),
}


@pytest.mark.parametrize("name", METRICS)
def test_metric_is_the_mean_over_pictures_of_unequal_batches(name: str) -> None:
    metric_class, options, score = METRICS[name]
    preds, target = pictures(5, 7), pictures(5, 8)
    metric = metric_class(**options)
    batch_value = metric(preds[:4], target[:4])
    assert batch_value.item() == pytest.approx(
        score(preds[:4], target[:4], **options).mean().item(), rel=1e-5
    )
    metric = pickle.loads(pickle.dumps(metric))
    metric.update(preds[4:], target[4:])
    assert metric.compute().item() == pytest.approx(score(preds, target, **options).mean().item(), rel=1e-5)
    assert metric.higher_is_better is (metric_class is EdgeF1)
    metric.reset()
    metric.update(target, target)
    assert metric.compute().item() == (1.0 if metric_class is EdgeF1 else 0.0)


def test_two_processes_add_up() -> None:
    preds, target = pictures(5, 9), pictures(5, 10)
    first, second = PixelMSE(), PixelMSE()
    first.update(preds[:2], target[:2])
    second.update(preds[2:], target[2:])
    first.merge_state(second)
    assert first.compute().item() == pytest.approx(pixel_mse(preds, target).mean().item(), rel=1e-5)


def test_a_collection_does_not_mix_scores_up() -> None:
    """torchmetrics shares the states of metrics that agree on the first batch, here all of them."""
    scores = {name: metric_class(**options) for name, (metric_class, options, _) in METRICS.items()}
    collection = MetricCollection({**scores, "hidden": MaskedMSE()})
    preds, target = pictures(2, 11), pictures(2, 12)
    hidden = torch.zeros(2, 20, 24, dtype=torch.bool)
    hidden[:, :5] = True
    collection.update(target, target, hidden=hidden)
    collection.update(preds, target, hidden=hidden)
    values = collection.compute()
    for name, (_, options, score) in METRICS.items():
        expected = torch.cat([score(target, target, **options), score(preds, target, **options)]).mean()
        assert values[name].item() == pytest.approx(expected.item(), rel=1e-5), name
    assert values["hidden"].item() == pytest.approx(
        masked_mse(preds, target, hidden).mean().item() / 2, rel=1e-5
    )


@pytest.mark.parametrize("module", ["functional", "edges", "pixels"])
def test_docstring_examples(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"loco_diffusion.metrics.{module}"))
    assert result.attempted > 0 and result.failed == 0

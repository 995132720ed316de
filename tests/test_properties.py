"""What must hold of AU-PRO and AU-sPRO for any maps and masks; hypothesis looks for exceptions."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from support.metrics import au_pro, au_spro, pro_curve

LIMITS = st.floats(0.01, 1)
TEN = st.lists(st.floats(-1e6, 1e6, width=32), min_size=10, max_size=10, unique=True)
search = settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def cases(draw, rectangles=False):
    """(maps, masks): one to four images of one to six pixels a side, few distinct scores; a region
    and a normal pixel at least. With `rectangles` a mask has one region or none."""
    side, scores = st.integers(1, 6), st.integers(0, 9).map(float)
    shapes = draw(st.lists(st.tuples(side, side), min_size=1, max_size=4))
    maps = [draw(arrays(np.float32, shape, elements=scores)) for shape in shapes]
    masks = [np.zeros(shape, bool) if rectangles else draw(arrays(bool, shape)) for shape in shapes]
    for mask in masks if rectangles else ():
        (h, w), present = mask.shape, draw(st.booleans())
        y, x = draw(st.integers(0, h - 1)), draw(st.integers(0, w - 1))
        mask[y : draw(st.integers(y + 1, h)), x : draw(st.integers(x + 1, w))] = present
    assume(any(m.any() for m in masks) and not all(m.all() for m in masks))
    return maps, masks


@search
@given(cases(), LIMITS, TEN)
def test_only_the_order_of_scores_counts(case, limit, values):
    maps, masks = case
    table = np.unique(np.array(values, np.float32))  # a strictly increasing transform of 0 … 9
    assume(len(table) == 10)  # −0 and 0 are one
    transformed = [table[m.astype(int)] for m in maps]
    assert au_pro(transformed, masks, limit) == au_pro(maps, masks, limit)


@search
@given(cases(), LIMITS, st.randoms(use_true_random=False))
def test_the_order_of_images_does_not_count(case, limit, random):
    maps, masks = case
    order = random.sample(range(len(maps)), len(maps))
    shuffled = au_pro([maps[i] for i in order], [masks[i] for i in order], limit)
    assert shuffled == pytest.approx(au_pro(maps, masks, limit), abs=1e-12)


@search
@given(cases(), LIMITS)
def test_bounds(case, limit):
    for rate in pro_curve(*case):
        assert rate[0] == 0 and rate[-1] == 1 and (np.diff(rate) >= 0).all()
    assert 0 <= au_pro(*case, limit) <= 1 + 1e-12


@search
@given(cases(), LIMITS)
def test_higher_scores_in_the_defects_are_never_worse(case, limit):
    maps, masks = case
    raised = [np.where(mask, m + 1, m) for m, mask in zip(maps, masks)]
    assert au_pro(raised, masks, limit) >= au_pro(maps, masks, limit) - 1e-12
    assert au_pro([mask.astype(np.float32) for mask in masks], masks, limit) == pytest.approx(1)


@search
@given(cases(rectangles=True), LIMITS, st.integers(1, 36))
def test_spro_falls_from_1_pixel_to_pro_at_the_whole_area(case, limit, area):
    maps, masks = case
    found = []
    for a in (area, area + 1, 36):
        regions = [[(m, min(a, m.sum()))] if m.any() else [] for m in masks]
        found.append(au_spro(maps, regions, limit))
    assert found[2] == pytest.approx(au_pro(maps, masks, limit), abs=1e-12)
    assert 0 <= found[1] <= found[0] + 1e-12 <= 1 + 2e-12

"""What must hold of AU-PRO and AU-sPRO for any maps and masks; hypothesis looks for counterexamples, ties and tiny images first."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from metrics import au_pro, au_spro, pro_curve

LIMITS = st.floats(0.01, 1)
search = settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def cases(draw):
    """(maps, masks): one to four images of one to six pixels a side, few distinct scores; a region and a normal pixel at least."""
    shapes = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4))
    maps = [draw(arrays(np.float32, shape, elements=st.integers(0, 9).map(float))) for shape in shapes]
    masks = [draw(arrays(bool, shape)) for shape in shapes]
    assume(any(m.any() for m in masks) and not all(m.all() for m in masks))
    return maps, masks


@st.composite
def rectangles(draw):
    """Like `cases`, but a mask has one region or none."""
    maps, _ = draw(cases())
    masks = [np.zeros(m.shape, bool) for m in maps]
    for mask in masks:
        (h, w), present = mask.shape, draw(st.booleans())
        y, x = draw(st.integers(0, h - 1)), draw(st.integers(0, w - 1))
        mask[y : draw(st.integers(y + 1, h)), x : draw(st.integers(x + 1, w))] = present
    assume(any(m.any() for m in masks) and not all(m.all() for m in masks))
    return maps, masks


@search
@given(cases(), LIMITS, st.lists(st.floats(-1e6, 1e6, width=32), min_size=10, max_size=10, unique=True))
def test_only_the_order_of_scores_counts(case, limit, values):
    maps, masks = case
    table = np.sort(np.array(values, np.float32))  # any strictly increasing transform of the ten scores
    assume(len(np.unique(table)) == 10)  # −0 and 0 are one
    assert au_pro([table[m.astype(int)] for m in maps], masks, limit) == au_pro(maps, masks, limit)


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
    fpr, pro = pro_curve(*case)
    for rate in (fpr, pro):
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
@given(rectangles(), LIMITS)
def test_spro_saturating_at_the_area_is_pro(case, limit):
    maps, masks = case
    regions = [[(mask, mask.sum())] if mask.any() else [] for mask in masks]
    assert au_spro(maps, regions, limit) == pytest.approx(au_pro(maps, masks, limit), abs=1e-12)


@search
@given(rectangles(), LIMITS, st.integers(1, 36))
def test_spro_grows_as_saturation_shrinks(case, limit, area):
    maps, masks = case
    values = [au_spro(maps, [[(m, min(a, m.sum()))] if m.any() else [] for m in masks], limit) for a in (area, area + 1)]
    assert 0 <= values[1] <= values[0] + 1e-12 <= 1 + 2e-12

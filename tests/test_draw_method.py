"""The picture of the method in the docs is drawn by its script, and its numbers are right."""

import runpy
import xml.etree.ElementTree as ET

import pytest
import torch

from documents import ROOT
from unbraid.splitting.published import published_masks

SCRIPT = runpy.run_path(str(ROOT / "tools/draw_method.py"))
CLASSES = {"clocks": 0, "cauliflowers": 1}


def words(picture):
    return [element.text for element in ET.fromstring(picture).iter() if element.text]


def test_the_picture_in_the_docs_is_the_one_that_is_drawn():
    assert SCRIPT["PICTURE"].read_text() == SCRIPT["draw"]()


def test_the_numbers_follow_the_method():
    weight = torch.tensor(SCRIPT["WEIGHT"])
    arvs = [weight * torch.tensor(SCRIPT["POOLED"][name]) for name in CLASSES]
    cosine = float(torch.cosine_similarity(*arvs, dim=0))
    assert f"cosine of the two ARVs = {cosine:.2f}" in words(SCRIPT["draw"]())
    assert cosine < SCRIPT["GAMMA"]
    assert float(arvs[0].sum()) * SCRIPT["GRADIENT"] / SCRIPT["POSITIVE"] >= SCRIPT["TAU"]
    for name, k in CLASSES.items():
        told = SCRIPT["responses"](name)
        assert told["whole"] == pytest.approx(float(arvs[k].sum()))
        assert told["whole"] == pytest.approx(sum(told.values()) - told["whole"])
        mask = torch.tensor(SCRIPT["MASKS"][k])
        assert told[name] == pytest.approx(float(arvs[k] @ mask))
    sides = published_masks(arvs, 0.5, 1)  # whose inputs these are by the published rule, too
    assert ((torch.tensor(SCRIPT["MASKS"]) > 0.5) <= sides.bool()).all()

"""The app over a run of places: crops on its pages, whole images to try, places on the bench."""

import io
import json

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import unbraid
from explored import make_run, open_own, serve
from unbraid.base.errors import UsageError
from unbraid.exploring.bench import lay_out
from unbraid.exploring.explorer import RUN, open_explorer
from unbraid.reporting.crops import Crops
from unbraid.running.folders import Thresholds

SEEN = """[v2.Grayscale(), v2.Resize(28), v2.CenterCrop(28), v2.PILToTensor(),
    v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.286], [0.353])]"""
OWN = f"""
import torch
from torchvision.transforms import v2
from unbraid.demo.network import load_network

def build():
    return load_network(), v2.Compose({SEEN})
"""
THRESHOLDS = Thresholds(tau=0.03, gamma=0.9, concepts="clusters")


@pytest.fixture(scope="module")
def of_places(tmp_path_factory):
    home = tmp_path_factory.mktemp("places")
    transform = v2.Compose(eval(SEEN, {"v2": v2, "torch": torch}))
    folder = make_run(home, transform, thresholds=THRESHOLDS, places=300, labels="predicted")
    (home / "own.py").write_text(OWN)
    return open_own(folder)


@pytest.fixture
def explorer(of_places, tmp_path):
    return open_explorer(of_places, tmp_path / "splits")


@pytest.fixture
def served(explorer):
    yield from serve(explorer)


def test_all_answers_are_of_places(explorer, of_places):
    assert of_places.missing == ()
    assert explorer.overview()["ofPlaces"]
    channel = of_places.split.channels[0].channel
    view = explorer.channel(RUN, channel)
    places = [int(shot["picture"].removeprefix("val/")) for shot in view["shots"]]
    scan = of_places.run.val_scan.places
    image = torch.cat(list(scan.columns("image")))[places]
    assert len(image.unique()) == len(places)
    evaluated = {own.channel: own for own in of_places.run.evaluation.channels}[channel]
    assert view["figures"][0]["figure"] == f"{evaluated.separation_error:.3f}"
    json.dumps([explorer.thumbs(RUN), view, explorer.bench(RUN, channel, 40)], allow_nan=False)


def test_a_place_is_shown_as_its_crop_and_looked_at_as_the_whole_image(explorer, of_places):
    crops = of_places.val_images
    assert isinstance(crops, Crops)
    small = next(n for n in range(len(crops)) if crops.picture(n).size != (28, 28))
    whole = f"val/whole/{crops.source(small)}"
    sizes = {
        name: Image.open(io.BytesIO(explorer.picture_file(name, 480)[0])).size
        for name in (f"val/{small}", whole)
    }
    assert sizes == {f"val/{small}": crops.picture(small).size, whole: (28, 28)}
    view = explorer.explain(RUN, f"val/{small}", None)
    assert view["picture"] == whole
    assert view == explorer.explain(RUN, whole, None)
    model2 = unbraid.apply(of_places.network.model, of_places.split)
    image = of_places.network.transform(explorer.seen(whole).picture)
    own = unbraid.explain(model2, image, heatmaps=False)[0]
    assert [row["gate"] for row in view["rows"]] == [concept.name for concept, _ in own.strongest]
    for wrong in (f"val/{len(crops)}", "val/whole/999999", "val/x", "other/whole/1", "val/whole/x"):
        with pytest.raises(UsageError, match=r"The run has no|have none of this number"):
            explorer.explain(RUN, wrong, None)


def test_the_bench_has_one_place_of_an_image_and_parts_a_channel(explorer, of_places):
    channel, scan = of_places.split.channels[0].channel, of_places.train_scan
    image = torch.cat(list(scan.columns("image")))
    laid = lay_out(scan, None, channel, 50)
    assert len(image[laid.index].unique()) == len(laid.index) == 50
    response = torch.cat([r.pooled[:, 0] for r in scan.shards()]).double()
    response = response @ scan.weight[channel].double()
    best = {}
    for n in response.argsort(descending=True, stable=True).tolist():
        best.setdefault(int(image[n]), n)
    assert laid.index.tolist() == list(best.values())[:50]
    shown = explorer.bench(RUN, channel, 60)["images"]
    groups = [[one["index"] for one in shown if one["group"] == k][:10] for k in (0, 1)]
    made = explorer.part(RUN, channel, groups, ["one", "two"])
    assert [concept["name"] for concept in made["channel"]["concepts"]] == ["one", "two"]
    assert made["channel"]["figures"]
    saved = explorer.save(made["split"], "by hand")
    again = unbraid.Split.load(saved["path"])
    assert [len(again.clusters[n].images) for (n,) in again[channel].concepts] == [10, 10]


def test_the_page_says_places_and_opens_whole_images(browser, served):
    page, said = browser.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(served.address)
    page.wait_for_selector(".shots img")
    page.click(".shots a.frame")
    page.wait_for_selector(".concepts li")
    assert "/val/whole/" in page.get_attribute(".seen .frame img", "src")
    channel = served.explorer.opened.split.channels[0].channel
    page.goto(f"{served.address}#bench?channel={channel}")
    page.wait_for_selector(".tile img")
    assert "these places of training images" in page.inner_text("#view")
    assert said == []
    page.close()

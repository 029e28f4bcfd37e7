"""Pages stay small, whatever was found, and say where the rest is."""

from pages import Blobs, notes, read, sections
from unbraid.measuring.before_after import BeforeAfter, ClassChange, Confusion, Flip
from unbraid.reporting import pictures, view
from unbraid.reporting import report as report_module
from unbraid.reporting.before_after import before_after_page


def test_the_page_of_an_edit_keeps_its_bounds_and_says_where_the_rest_is():
    images = Blobs(60, 0)
    changes = BeforeAfter(
        *(60, 60, 40, 30),
        classes=tuple(ClassChange(k, f"class {k}", 9, 5, 4) for k in range(300)),
        confusions=tuple(Confusion(f"class {k}", "ant", 1, 2) for k in range(250)),
        flips=tuple(
            Flip(k, own, f"class {own}", "ant", "bee", 0.5) for k, own in enumerate(images.targets)
        ),
    )
    options = {"title": "x", "edits": [("0.0", "ants", "off")], "files": ["edited.pt"]}
    text = before_after_page(changes, dataset=images, sight=None, predicted=False, **options)
    assert text.count("<figure>") == 48
    tables = [len(table.rows()) for table in read(text).all("table")]
    assert sorted(tables)[-2:] == [200, 200]
    told = read(text).text
    assert "the first 200 are shown, all are in edit.json" in told
    assert "The first 200 of 250 are shown, all are in edit.json" in told


def test_report_has_no_more_rows_of_pictures_thumbnails_and_names_than_the_bounds(
    run, write, monkeypatch
):
    first, *others = run.split.channels
    assert others
    taken, take = [], report_module.take_pictures
    monkeypatch.setattr(
        report_module, "take_pictures", lambda *own: taken.append(take(*own)) or taken[-1]
    )
    write()
    for name in ("_MOST_THUMBS", "_MOST_CIRCUITS"):
        monkeypatch.setattr(pictures, name, 1)
    monkeypatch.setattr(report_module, "_MAX_CHIPS", 1)
    monkeypatch.setattr(report_module, "_MAX_WORDS", 5)
    few = read(write())
    for kind in ("thumbs", "nodes"):
        channels = [{place[0] for place in getattr(own, kind)} for own in taken]
        assert len(channels[0]) > 1
        assert channels[1] == {min(channels[0], key=[*sections(write())].index)}
    for row in few.all("table", "overview")[0].all("tbody")[0].all("tr"):
        n_more = len(run.found.concepts[int(row.attributes["data-channel"])]) - 1
        assert len(row.all("span", "chip")) == 1
        assert f"and {n_more} more" in row.text
        assert len(row.attributes["data-names"]) == 5
    monkeypatch.setattr(view, "MAX_ROWS", 1 + len(first.concepts))
    page = write()
    assert len(sections(page)) == 1
    assert f"only the 1 channel with the lowest cosines of {1 + len(others)} is" in notes(page)

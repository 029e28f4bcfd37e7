"""The page of an edit: however much changed, it stays small and says where the rest is."""

from pages import Blobs, read
from unbraid.measuring.before_after import BeforeAfter, ClassChange, Confusion, Flip
from unbraid.reporting.before_after import before_after_page


def test_the_page_has_no_more_rows_and_pictures_than_the_bounds_and_says_where_the_rest_is():
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

"""Bounds of disk, memory and time are those that the pages tell users."""

import pytest

from documents import ROOT
from unbraid.base import progress, schema
from unbraid.exploring import bench
from unbraid.finding import cosine_intervals
from unbraid.images import sample as first_images
from unbraid.networks import spec
from unbraid.reporting import pictures, report, view
from unbraid.running import circuits, edit, first_look, measures, run, sample, several
from unbraid.scanning import accuracy, every, place_shards, places
from unbraid.scanning.shards import images_per_shard
from unbraid.splitting import material

WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TIMES = {30.0: "half minute", 1800.0: "half an hour"}
PARTS = {10: "tenth", 16: "sixteenth"}
GIB = 2**30
TOLD = {
    "scale.md": (
        f"a {PARTS.get(sample.PART)} of the set, "
        f"at least {sample.LEAST:,} and at most {sample.MOST:,} images",
        f"at most {sample.MAX_BYTES / GIB:g} GiB per set",
        f"At most {measures.MAX_ABLATED} channels are switched off",
        f"as much as {WORDS[int(measures.MAX_PASSES)]} passes through the whole network",
        f"begins no channel after {run.SECONDS:g} s",
        "on {train:,} training and {val:,} validation images".format(**first_images.SIZES),
        f"Of more than {first_images.MOST_CLASSES} classes it takes",
        f"A run on {first_look.LARGE:,} training images or more",
        f"of {images_per_shard(False)} ({images_per_shard(True)} if the scan keeps positions)",
        f"some [positions](glossary.md#position) of {spec.SAMPLED_IMAGES} images",
        f"at most {4 * spec._SAMPLED_NUMBERS / 2**20:g} MiB",
        f"as {material._BYTES_AT_ONCE / GIB:g} GiB hold the images of",
        f"in at most {cosine_intervals.MOST_JUDGED:,} pairs",
        f"a line comes every {TIMES.get(progress.SECONDS_OF_LINES)}",
        f"that takes longer than {WORDS[int(progress.PATIENCE)]} seconds",
    ),
    "data.md": (
        f"With {accuracy.LONG:,} images or more, unbraid looks at a sample",
        f"a {PARTS.get(accuracy._PART)} of them, at most {accuracy._MOST}.",
    ),
    "layers.md": (
        f"take at most {every.DISK / 1e9:g} GB together",
        f"splits at most {several.N_MEASURED} of them",
        f"After {TIMES.get(several.MEASURED_SECONDS)} the other layers are searched only",
        f"After {TIMES.get(several.FULL_SECONDS)} no report is begun",
        f"The {WORDS[several.N_FULL]} layers with the most surely polysemantic channels",
        f"{circuits.N_CHANNELS} channels",
        f"{circuits.N_IMAGES} images",
    ),
    "places.md": (
        f"**{places.N_DRAWN} places drawn evenly**",
        f"(at most {4 * places._DRAWN_NUMBERS / 2**20:g} MiB)",
        f"Above {place_shards._MOST_BYTES / 1e9:g} GB a scan is refused",
    ),
    "format.md": (
        f"at most {place_shards._MOST_PLACES:,} places",
        f"(2^{place_shards._SHARD_NUMBERS.bit_length() - 1} inputs)",
        f"at most {schema.MAX_BYTES / 2**20:g} MiB",
    ),
    "steering.md": (f"at most {edit.MOST_IMAGES:,} validation images",),
    "explore.md": (f"at most {WORDS[bench.MOST_GROUPS]} groups",),
    "report.md": (
        f"at most {view.MAX_ROWS} rows of reference images",
        f"and {report.SECTIONS / 1e6:g} MB",
        f"at most {report.LIST / 1e6:g} MB each",
        f"of the first {pictures._MOST_THUMBS} channels in the list",
        f"in the circuits of the first {pictures._MOST_CIRCUITS}",
    ),
}


@pytest.mark.parametrize("page", TOLD)
def test_pages_tell_the_bounds_that_hold(page):
    text = (ROOT / "docs" / page).read_text()
    assert [words for words in TOLD[page] if words not in text] == []

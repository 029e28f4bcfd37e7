"""A small run whose names mean harm, and the app over it, as tests use them."""

import threading
import time
from dataclasses import dataclass
from pathlib import Path

import uvicorn

import unbraid
from unbraid.demo.network import CLASSES, LAYER, load_images, load_network, preprocess
from unbraid.exploring.explorer import Explorer
from unbraid.exploring.opened import open_run
from unbraid.exploring.server import listen, make_app
from unbraid.images.open import open_images
from unbraid.running import run as running
from unbraid.running.folders import Thresholds
from unbraid.scanning.scan_options import Loading

HOSTILE = {
    "Trouser": '<img src=x onerror="window.harmed=1">',
    "Bag": "\"'>&amp;<b>bag\n\U0001f45c",
    "Sandal": "\u202elong" * 30,
    "Coat": "${harmed}`'); harmed=1;('",
}
NAMES = tuple(HOSTILE.get(name, name) for name in CLASSES)
TITLE = '<script>window.harmed=1</script> & "title"\n\''
OWN = f"""

from unbraid.demo.network import load_network, preprocess
def build():
    return load_network(), preprocess, {NAMES!r}
"""


def make_run(home, transform=preprocess, **asked):
    """A finished run over folders of pictures with hostile names."""
    (home / "own.py").write_text(OWN, encoding="utf-8")
    for split, part, n in (("train", "train", 60), ("test", "val", 30)):
        images = load_images(split)
        for label, name in enumerate(NAMES):
            own = [k for k, other in enumerate(images.targets) if other == label][:n]
            place = home / "data" / part / name
            place.mkdir(parents=True)
            for k in own:
                images.picture(k).save(place / f"{k} <i>\n'\".png")
    train, val = (
        open_images(home / "data" / part, transform, outputs=NAMES) for part in ("train", "val")
    )
    options = {"thresholds": Thresholds(tau=0.03), "loading": Loading(), "features": False}
    options |= {"source": {"model": f"{home / 'own.py'}:build", "data": str(home / "data")}}
    options |= {"say": lambda _: None, "title": TITLE}
    made = running.run(load_network(), LAYER, train, val, home / "run", **options | asked)
    assert len(made.split.channels) >= 3
    return home / "run"


def open_own(folder, **changed):
    """Open it with its network, which is code of one's own."""
    options = {"model": f"{folder.parent / 'own.py'}:build"} | changed
    return open_run(folder, **options)


@dataclass
class Served:
    address: str
    explorer: Explorer
    folder: Path


def serve(explorer):
    """Let the app listen until the generator is closed."""
    own = listen(0)
    config = uvicorn.Config(make_app(explorer), log_level="critical", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [own]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Served(f"http://127.0.0.1:{own.getsockname()[1]}/", explorer, explorer.save_to)
    server.should_exit = True
    thread.join(10)


def logits_by_hand(explorer, picture, gates):
    """The logits of a picture under gates, as a user of the library computes them."""
    network = explorer.opened.network
    model2 = unbraid.apply(network.model, explorer.opened.split)
    image = network.transform(explorer.seen(picture).picture)[None]
    for name, value in gates.items():
        channel, concept = name.split(".")
        model2.gate(LAYER, int(channel), concept if concept == "rest" else int(concept), value)
    return model2(image)[0].detach()

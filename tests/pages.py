"""A small real run, and its report: written, read back, and hard to show."""

import base64
import hashlib
import re
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

import unbraid
from unbraid import Evaluation, Findings, Scan, Split

HOSTILE = ("<script>x</script>", "\"'><img src=x>&amp;", "\u202egnirts")
NAMES = (*HOSTILE, "digital clock, \udcff")  # the last as of a folder's bad name
LONG = "long" * 25_000
BROKEN = 5


class Blobs(Dataset):
    """Images of four classes; one cannot be read."""

    classes, broken = NAMES, (BROKEN,)

    def __init__(self, n, seed):
        noise = torch.Generator().manual_seed(seed)
        bases = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(9))
        self.targets = [n % 4 for n in range(n)]
        self.x = bases[self.targets] + 0.7 * torch.randn(n, 3, 8, 8, generator=noise)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError("truncated")
        return self.x[index], self.targets[index]


@dataclass
class Run:
    network: nn.Sequential
    images: Blobs
    train_scan: Scan
    scan: Scan
    found: Findings
    split: Split
    evaluation: Evaluation

    def report(self, path, **changed):
        names = ("scan", "found", "split", "evaluation", "train_scan")
        arguments = {name: getattr(self, name) for name in names} | {"dataset": self.images}
        text = unbraid.report(path, **(arguments | changed)).read_text(encoding="utf-8")
        assert_harmless(text)
        return text


def make_network():
    first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, stride=2, padding=1)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), *head)


def make_run(folder):
    torch.manual_seed(0)
    network = make_network()
    train, val = Blobs(160, 0), Blobs(150, 1)
    optimizer = torch.optim.Adam(network.parameters(), 2e-2)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(network(train.x), torch.tensor(train.targets)).backward()
        optimizer.step()
    train_scan = unbraid.scan(network, "2", train, folder / "a", skip_broken=True)
    scan = unbraid.scan(network, "2", val, folder / "b", skip_broken=True, positions=True)
    found = unbraid.find(train_scan, p=0.5, gamma=0.9)
    assert len(found.concepts) >= 2, "the fixture must find something to report"
    split = unbraid.split(train_scan, found, method="published", rho=0.7)
    network2 = unbraid.apply(network, split)
    evaluation = unbraid.evaluate(
        split,
        scan,
        output=unbraid.compare_outputs(network, network2, val, tolerance=0.0, skip_broken=True),
        ablation=unbraid.ablate(network2, val, skip_broken=True),
        semantics=unbraid.measure_semantics(split, scan, val, unbraid.Penultimate(network)),
    )
    return Run(network, val, train_scan, scan, found, split, evaluation)


@dataclass
class Element:
    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    children: list = field(default_factory=list)

    def walk(self):
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child.walk()

    def all(self, tag, kind=""):
        found = (e for e in self.walk() if e.tag == tag)
        return [e for e in found if not kind or kind in e.attributes.get("class", "").split()]

    def rows(self, tag="td"):
        """The texts of a table's cells."""
        return [[cell.text for cell in row.all(tag)] for row in self.all("tbody")[0].all("tr")]

    @property
    def text(self):
        parts = (child if isinstance(child, str) else child.text for child in self.children)
        return re.sub(r"\s+", " ", "".join(parts)).strip()


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open = [Element("root")]

    def handle_startendtag(self, tag, attrs):
        self.open[-1].children.append(Element(tag, {key: value or "" for key, value in attrs}))

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "img", "link", "input", "br"):  # these have no end
            self.open.append(self.open[-1].children[-1])

    def handle_endtag(self, tag):
        last = self.open.pop().tag
        assert last == tag, f"</{tag}> closes <{last}>"

    def handle_data(self, data):
        self.open[-1].children.append(data)


@cache
def read(text):
    reader = _Reader()
    reader.feed(text)
    reader.close()
    (root,) = reader.open
    return root


def sections(text):
    """The sections of channels."""
    articles = read(text).all("article")
    return {int(a.attributes["id"].removeprefix("channel-")): a for a in articles}


def notes(text):
    return " ".join(aside.text for aside in read(text).all("aside"))


def shots(row):
    """The pictures in a row, without what is laid over them."""
    return [image for image in row.all("img") if image not in row.all("img", "veil")]


def assert_harmless(text, kinds=("script", "style")):
    """Nothing runs but the page's own script, and nothing comes from anywhere else."""
    root = read(text)
    (policy,) = (e.attributes["content"] for e in root.all("meta") if "http-equiv" in e.attributes)
    assert "default-src 'none'" in policy
    assert {element.tag for kind in ("script", "style") for element in root.all(kind)} == {*kinds}
    for kind in kinds:
        (element,) = root.all(kind)
        assert element.attributes == {}
        digest = hashlib.sha256("".join(map(str, element.children)).encode()).digest()
        assert f"{kind}-src 'sha256-{base64.b64encode(digest).decode()}';" in policy
    assert not re.search(r"url\(|@import", root.all("style")[0].text)
    foreign = "link iframe object embed base form audio video use image foreignobject animate set"
    ids = [e.attributes["id"] for e in root.walk() if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    links = {f"#{one}" for one in ids}
    for element in root.walk():
        assert element.tag not in foreign.split()
        for key, value in element.attributes.items():
            assert not re.match("on|style$|srcset$|action$|background$|poster$", key), key
            if key == "src":
                picture = r"data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/=]+"
                assert re.fullmatch(picture, value), value
            if key.endswith("href"):
                assert value in links, value
            assert not re.search(r"https?:|//|url\(", value.split("base64,")[0]), value

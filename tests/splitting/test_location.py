"""Where a split lies: files, folders, and a stand-in for the Hugging Face Hub on this machine."""

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch

import unbraid
from unbraid.base.errors import LayerError, ModelError, RunError, UsageError
from unbraid.demo.network import LAYER, SPLIT, DemoNet, load_network
from unbraid.splitting.location import FILE, split_file
from unbraid.splitting.splits import Split

COMMIT, CONTENT = "c" * 40, (SPLIT / FILE).read_bytes()
ERRORS = {
    "nobody/nothing": (404, "RepoNotFound"),
    "some/locked": (403, "GatedRepo"),
    "some/other": (404, "EntryNotFound"),
    "some/broken": (500, ""),
}


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does: one repository with a split, and some that cannot be had."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.server.asked.append(self.path)
        self.wfile.write(self.answer())

    def answer(self):
        owner, name, _, revision, file = (*self.path.strip("/").split("/"), "", "", "")[:5]
        repo = f"{owner}/{name}"  # or something else that the library asks
        status, code = ERRORS.get(repo, (200, "") if file else (404, ""))
        if status == 200 and revision not in ("main", "v1", COMMIT):
            status, code = 404, "RevisionNotFound"
        content = CONTENT if status == 200 and (repo, file) == ("some/split", FILE) else b""
        self.send_response(status)
        about = {"X-Error-Code": code, "X-Repo-Commit": COMMIT, "ETag": '"e"'}
        for key, value in (about | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        return content

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs .[hub]")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("address", ["hf://some/split", "hf://some/split@v1"])
def test_a_split_on_the_hub_is_downloaded_once_and_loaded(address, hub):
    network, images = load_network(), torch.randn(3, 1, 28, 28)
    for _ in range(2):
        model2 = unbraid.load_split(network, address)
        assert torch.equal(model2(images), network(images))
    assert len([path for path in hub.asked if path.endswith(FILE)]) == 1
    assert split_file(address).read_bytes() == CONTENT


@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("hf://nobody/nothing", r"^There is no hf://nobody/nothing, or it is not yours"),
        ("hf://some/locked", r"not yours to read; check the name, or log in"),
        ("hf://some/split@v9", r"^hf://some/split has no revision v9; name one"),
        ("hf://some/other", rf"^hf://some/other holds no {FILE}, so no split"),
        ("hf://some/broken", r"^hf://some/broken cannot be reached \(.*500.*\); try again later"),
    ],
)
def test_what_the_hub_cannot_give_is_told_in_one_sentence(address, told, hub):
    with pytest.raises(RunError, match=told) as error:
        unbraid.load_split(load_network(), address)
    assert "\n" not in str(error.value)


def test_a_hub_that_is_away_is_told_and_the_cache_serves_all_the_same(hub, monkeypatch):
    first = split_file("hf://some/split")
    hub.shutdown()
    hub.server_close()
    assert split_file("hf://some/split") == first
    with pytest.raises(RunError, match=r"hf://some/unseen cannot be reached"):
        split_file("hf://some/unseen")


@pytest.mark.parametrize(
    "address", ["hf://", "hf://split", "hf://a/b/c", "hf://a/b@", "hf://../..", "hf://a/..@x y"]
)
def test_an_address_that_is_none_is_a_usage_error(address):
    with pytest.raises(UsageError, match="is no address; write hf://OWNER/NAME"):
        split_file(address)


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"take huggingface_hub; pip install 'unbraid\[hub\]'\.$"):
        split_file("hf://some/split")


def test_files_and_folders_are_taken_as_they_are(tmp_path):
    assert split_file(SPLIT) == split_file(str(SPLIT / FILE)) == SPLIT / FILE
    assert split_file(tmp_path / "none") == tmp_path / "none"
    with pytest.raises(RunError, match=rf"holds no {FILE}; name a folder"):
        split_file(tmp_path)
    with pytest.raises(RunError, match="cannot be read"):
        unbraid.load_split(load_network(), tmp_path / "none")


def test_the_demos_split_is_what_its_network_gets_split_to():
    network, split = load_network(), Split.load(SPLIT / FILE)
    assert split.layer.name == LAYER
    model2 = unbraid.load_split(network, SPLIT)
    images = torch.randn(4, 1, 28, 28)
    assert torch.equal(model2(images), network(images))
    with model2.gate(LAYER, split.channels[0].channel, 0, 0.0):
        assert not torch.equal(model2(images), network(images))


class Wider(DemoNet):
    """A network in which the layer has another shape."""

    def __init__(self):
        super().__init__()
        self.mix, self.classify = torch.nn.Conv2d(96, 25, 1), torch.nn.Linear(25, 10)


def test_a_split_that_does_not_fit_is_told_in_one_sentence(tmp_path):
    lacking = load_network()
    lacking.mixed = lacking.mix
    del lacking.mix
    trained = load_network()
    with torch.no_grad():
        trained.mix.weight[0, 0] += 1e-3
    for network, kind, told in (
        (lacking, LayerError, f"'{LAYER}'"),
        (trained, ModelError, "made for a network with other weights; load the weights"),
        (Wider().eval(), ModelError, "made for a network with other weights; load the weights"),
    ):
        with pytest.raises(kind, match=told) as error:
            unbraid.load_split(network, SPLIT)
        assert "\n" not in str(error.value)


def test_a_lying_split_of_another_shape_is_told(tmp_path):
    from dataclasses import replace

    from unbraid.networks.weights import hash_weights

    network = Wider().eval()
    lying = replace(Split.load(SPLIT / FILE), weights=hash_weights(network))
    lying.save(tmp_path / FILE)
    with pytest.raises(RunError, match="of another shape than the network's"):
        unbraid.load_split(network, tmp_path)

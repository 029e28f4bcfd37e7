"""Model specs, weights files, class folders and pictures: what people give and get wrong."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from unbraid.base.errors import DataError, ModelError, UsageError
from unbraid.images.open import images_for, open_images
from unbraid.images.pictures import read_picture
from unbraid.networks.models import import_torchvision, load_model
from unbraid.networks.weights import load_weights

OWN = """
import numpy as np
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return net, to_tensor, ["cat", "dog"]

def to_tensor(picture):
    return torch.tensor(np.asarray(picture.resize((8, 8)))).permute(2, 0, 1) / 255

def nothing():
    return 3
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (9, 7), (255, 0, 0)).save(tmp_path / "data" / name / "a.png")
    return tmp_path / "data"


class TestLoadModel:
    def test_a_function_of_a_file_gives_network_preprocessing_and_names(self, own: Path) -> None:
        loaded = load_model(f"{own}:build", device="cpu")
        assert loaded.class_names == ("cat", "dog")
        assert loaded.n_outputs() == 2
        assert not loaded.model.training

    @pytest.mark.parametrize("spec", ["torchvision:resnet18", "timm:resnet18"])
    def test_random_weights_need_no_download(self, spec: str) -> None:
        assert load_model(spec, "random", "cpu").n_outputs() == 1000

    @pytest.mark.parametrize(
        ("spec", "weights", "hint"),
        [
            ("torchvision:resnet5", None, "resnet50"),
            ("timm:resnet17", None, "resnet18"),
            ("torchvision:resnet50", "IMAGENET1K_V9", "IMAGENET1K_V1"),
            ("resnet50", None, "torchvision:NAME"),
            ("missing.py:build", None, "no file missing.py"),
            ("timm:resnet18", "some", "no weights file some"),
        ],
    )
    def test_an_unknown_name_is_told_with_what_there_is(
        self, spec: str, weights: str | None, hint: str
    ) -> None:
        with pytest.raises(UsageError, match=hint):
            load_model(spec, weights, "cpu")

    def test_a_function_that_is_missing_or_returns_no_network(self, own: Path) -> None:
        with pytest.raises(UsageError, match="Did you mean build"):
            load_model(f"{own}:biuld")
        with pytest.raises(UsageError, match="must return a network"):
            load_model(f"{own}:nothing")

    def test_a_device_that_is_not_there(self, own: Path) -> None:
        with pytest.raises(UsageError, match="Device 'nonsense'"):
            load_model(f"{own}:build", device="nonsense")

    def test_a_part_on_the_meta_device_stays_there(self, tmp_path: Path) -> None:
        file = tmp_path / "parts.py"
        file.write_text(
            "from torch import nn\n"
            "def build():\n"
            "    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(2))\n"
            "    network[0].unused = nn.Linear(3, 3, device='meta')\n"
            "    return network\n"
        )
        assert load_model(f"{file}:build", device="cpu").model[0].unused.weight.is_meta

    def test_no_network_connection_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise OSError("no route")

        monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
        with pytest.raises(ModelError, match="give --weights FILE"):
            load_model("torchvision:resnet18", "IMAGENET1K_V1", "cpu")

    def test_a_torchvision_built_for_another_torch_is_explained(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Broken:
            def find_spec(self, name: str, *_: object) -> None:
                if name == "torchvision":
                    raise RuntimeError("operator torchvision::nms does not exist")

        monkeypatch.delitem(sys.modules, "torchvision", raising=False)
        monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
        with pytest.raises(ModelError, match="install both together"):
            import_torchvision()


class TestWeights:
    @pytest.fixture
    def network(self) -> nn.Module:
        return nn.Linear(2, 3)

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_a_state_dict_is_loaded(
        self, network: nn.Module, tmp_path: Path, suffix: str, prefix: str
    ) -> None:
        state = {prefix + k: torch.full_like(v, 7.0) for k, v in network.state_dict().items()}
        path = tmp_path / f"w{suffix}"
        if suffix == ".pt":
            torch.save({"state_dict": state, "epoch": 3}, path)
        else:
            safetensors.torch.save_file(state, path)
        load_weights(network, path)
        assert (network.weight == 7).all()

    def test_code_in_a_weights_file_is_never_run(self, network: nn.Module, tmp_path: Path) -> None:
        marker = tmp_path / "ran"

        class Bomb:
            def __reduce__(self) -> tuple[object, tuple[object, ...]]:
                return Path.touch, (marker,)

        path = tmp_path / "evil.pt"
        torch.save({"weight": Bomb()}, path)
        with pytest.raises(ModelError, match="never loaded"):
            load_weights(network, path)
        (tmp_path / "raw.pt").write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(ModelError):
            load_weights(network, tmp_path / "raw.pt")
        assert not marker.exists()

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    def test_a_damaged_or_missing_file(
        self, network: nn.Module, tmp_path: Path, suffix: str
    ) -> None:
        path = tmp_path / f"w{suffix}"
        with pytest.raises(ModelError, match="cannot be read"):
            load_weights(network, path)
        path.write_bytes(b"\xff" * 100)
        with pytest.raises(ModelError, match=str(path)):
            load_weights(network, path)

    def test_weights_of_another_network(self, network: nn.Module, tmp_path: Path) -> None:
        torch.save(nn.Linear(5, 3).state_dict(), tmp_path / "w.pt")
        with pytest.raises(ModelError, match="do not fit"):
            load_weights(network, tmp_path / "w.pt")
        torch.save([1, 2], tmp_path / "w.pt")
        with pytest.raises(ModelError, match="no state dict"):
            load_weights(network, tmp_path / "w.pt")


class TestFolders:
    def test_labels_follow_the_sorted_folders(self, pictures: Path) -> None:
        images = open_images(pictures)
        assert images.targets == [0, 1]
        assert images.classes == ["cat", "dog"]

    def test_folders_are_matched_to_outputs_by_name(self, own: Path, pictures: Path) -> None:
        loaded = load_model(f"{own}:build", device="cpu")
        images, warning = images_for(loaded, str(pictures))
        assert images.targets == [0, 1]
        assert warning == ""

    def test_a_guess_is_told(self, pictures: Path) -> None:
        loaded = load_model("torchvision:resnet18", "random", "cpu")
        _, warning = images_for(loaded, str(pictures))
        assert "taken in order" in warning

    def test_no_folder_no_classes_no_images(self, pictures: Path) -> None:
        with pytest.raises(DataError, match="no folder"):
            open_images(pictures / "nowhere")
        (pictures / "empty").mkdir()
        with pytest.raises(DataError, match=r"empty holds no image"):
            open_images(pictures)


class TestPictures:
    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "RGB", "LA", "1", "CMYK", "I;16"])
    @pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif"])
    def test_every_mode_comes_out_as_rgb(self, tmp_path: Path, mode: str, kind: str) -> None:
        array = np.full((6, 8), 40000 if mode == "I;16" else 156, dtype=np.uint16)
        grey = Image.fromarray(array) if mode == "I;16" else Image.fromarray(array.astype(np.uint8))
        picture = grey if mode == "I;16" else grey.convert(mode)
        path = tmp_path / f"p.{kind}"
        writes = {"png": "1 L LA P RGB RGBA I;16", "jpg": "1 L RGB CMYK", "webp": "RGB RGBA"}
        if mode not in writes.get(kind, "1 L P RGB RGBA CMYK I;16").split():
            picture = Image.new("RGB", (8, 6), (156, 156, 156))
        picture.save(path)
        read = read_picture(path)
        assert read.mode == "RGB"
        assert read.size == (8, 6)
        if mode != "1":
            assert abs(np.asarray(read).mean() - 156) < 3

    def test_a_rotated_photograph_is_turned_upright(self, tmp_path: Path) -> None:
        picture = Image.new("RGB", (10, 4))
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees
        picture.save(tmp_path / "p.jpg", exif=exif)
        assert read_picture(tmp_path / "p.jpg").size == (4, 10)

    def test_a_broken_picture_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "p.png"
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(DataError, match=r"p\.png cannot be read"):
            read_picture(path)
        path.write_text("no picture")
        with pytest.raises(DataError, match=r"p\.png cannot be read"):
            read_picture(path)

    def test_an_enormous_picture_is_refused_before_it_is_unpacked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Image.new("L", (100, 100)).save(tmp_path / "p.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(DataError, match=r"p\.png cannot be read"):
            read_picture(tmp_path / "p.png")

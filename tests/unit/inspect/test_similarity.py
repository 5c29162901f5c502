"""compare_adapters(): the paper's phi on subspaces that are known, and entry by entry against dense decompositions."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from luthier.adapt.attaching import attach
from luthier.adapt.state import adapter_parameters
from luthier.core.config import LoraConfig
from luthier.core.errors import AdapterMismatchError
from luthier.formats.adapters import save_adapter
from luthier.formats.folder import AdapterFolder, read_adapter
from luthier.inspect import compare_adapters


def folder_of(folder: Path, lora_B: Tensor, lora_A: Tensor, names: tuple[str, ...] = ("layer",)) -> AdapterFolder:
    """Save an adapter whose pairs are these and return it as read."""
    out_features, in_features = len(lora_B), lora_A.shape[1]
    model = nn.ModuleDict({name: nn.Linear(in_features, out_features) for name in names})
    attach(model, LoraConfig(r=len(lora_A), lora_alpha=3, target_modules=list(names)))
    with torch.no_grad():
        for item in adapter_parameters(model):
            item.parameter.copy_(lora_A if item.role == "lora_A" else lora_B)
    return read_adapter(save_adapter(model, folder))


def test_known_subspaces(tmp_path: Path) -> None:
    out, into = torch.eye(6), torch.eye(8)
    # Strengths fall, so the singular directions are the axes in this order: outputs 0, 1, 2 and 0, 3; inputs 0, 1, 2 and 4, 1.
    first = folder_of(tmp_path / "a", out[:, [0, 1, 2]] * torch.tensor([9.0, 4, 2]), into[[0, 1, 2]])
    second = folder_of(tmp_path / "b", out[:, [0, 3]] * torch.tensor([7.0, 1]), into[[4, 1]])
    (layer,) = compare_adapters(first, second).layers
    assert layer.shape == (6, 8) and layer.ranks == (3, 2)
    assert [list(row) for row in layer.left] == [pytest.approx(row) for row in ([1, 1], [1, 0.5], [1, 0.5])]
    assert [list(row) for row in layer.right] == [pytest.approx(row, abs=1e-12) for row in ([0, 0], [0, 0.5], [0, 0.5])]
    assert layer.cosine == pytest.approx(0, abs=1e-12)
    assert layer.by_chance == (3 / 6, 3 / 8)


def test_an_adapter_is_like_itself_and_like_its_negative_but_for_the_sign(tmp_path: Path) -> None:
    B, A = torch.randn(20, 4), torch.randn(4, 30)
    first, second = folder_of(tmp_path / "a", B, A), folder_of(tmp_path / "b", -3 * B, A)
    for other, cosine in ((first, 1), (second, -1)):
        (layer,) = compare_adapters(first, other).layers
        for grid in (layer.left, layer.right):
            assert [grid[i][i] for i in range(4)] == pytest.approx([1] * 4)
        assert layer.cosine == pytest.approx(cosine)


def test_every_entry_is_the_dense_one(tmp_path: Path) -> None:
    pairs = [(torch.randn(12, r), torch.randn(r, 17)) for r in (3, 5)]
    folders = [folder_of(tmp_path / str(len(A)), B, A, ("one", "two")) for B, A in pairs]
    svds = [torch.linalg.svd(B.double() @ A.double()) for B, A in pairs]
    found = compare_adapters(*folders)
    assert [layer.path for layer in found.layers] == ["one", "two"]
    for layer in found.layers:
        for i in range(1, 4):
            for j in range(1, 6):
                left = svds[0].U[:, :i].T @ svds[1].U[:, :j]
                right = svds[0].Vh[:i] @ svds[1].Vh[:j].T
                assert layer.left[i - 1][j - 1] == pytest.approx(left.square().sum().item() / min(i, j), rel=1e-9)
                assert layer.right[i - 1][j - 1] == pytest.approx(right.square().sum().item() / min(i, j), rel=1e-9)


def test_an_update_of_zero_has_no_directions(tmp_path: Path) -> None:
    first = folder_of(tmp_path / "a", torch.zeros(5, 2), torch.randn(2, 7))
    (layer,) = compare_adapters(first, folder_of(tmp_path / "b", torch.randn(5, 2), torch.randn(2, 7))).layers
    assert (layer.ranks, layer.left, layer.right, layer.cosine) == ((0, 2), (), (), 0)


def test_layers_of_one_only_are_named_and_other_sizes_refused(tmp_path: Path) -> None:
    pair = torch.randn(5, 2), torch.randn(2, 7)
    first, second = folder_of(tmp_path / "a", *pair, ("one", "two")), folder_of(tmp_path / "b", *pair, ("two", "three"))
    found = compare_adapters(first, second)
    assert (found.only_first, found.only_second) == (("one",), ("three",))
    with pytest.raises(AdapterMismatchError, match="no adapted layer in common"):
        compare_adapters(first, folder_of(tmp_path / "c", *pair, ("four",)))
    with pytest.raises(AdapterMismatchError, match=r"two is \(5, 7\), and \(6, 7\)"):
        compare_adapters(first, folder_of(tmp_path / "d", torch.randn(6, 2), pair[1], ("two",)))

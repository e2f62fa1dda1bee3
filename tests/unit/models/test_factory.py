"""One factory for policies: base weights are looked up, and never made by it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spg import config
from spg.cli import base_weights as ensuring
from spg.config import ConfigError
from spg.core.errors import InputError
from spg.models import base_weights, hub
from spg.models.factory import base_name, build_policy
from tests.helpers import ROOT


def test_missing_base_weights_are_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPG_CACHE", str(tmp_path))
    cfg = config.compose("config", ["pretrain.steps=3"])
    with pytest.raises(ConfigError, match=rf"no base weights .*{base_name(cfg)}.*python -m spg\.pretrain"):
        build_policy(cfg)
    assert base_weights.look_up(cfg) is None


def test_base_weights_come_from_what_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config.compose("config", [])
    shipped = base_weights.existing(cfg)
    assert shipped == ensuring.ensure(cfg) == base_weights.ASSETS / base_weights.file_name(cfg)
    cached = tmp_path / shipped.name
    cached.write_bytes(shipped.read_bytes())
    monkeypatch.setenv("SPG_CACHE", str(tmp_path))
    assert base_weights.look_up(cfg) == shipped, "what ships comes first"
    monkeypatch.setattr(base_weights, "ASSETS", tmp_path / "none")
    assert base_weights.look_up(cfg) == cached
    one, other = build_policy(cfg), build_policy(cfg, lambda given: shipped)
    for name, tensor in one.network.state_dict().items():
        assert torch.equal(tensor, other.network.state_dict()[name])


def test_a_network_elsewhere_declares_how_its_configuration_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_networks.py").write_text(
        "import no_such_library\n\n\n"
        "class Narrow:\n"
        "    published_sizes = ('width', 'depth')\n"
        "    published_implied = {'depth': 'layers.number', 'width': 'head * heads'}\n"
        "    published_fixed = {'kind': ('narrow',), 'layers.shared': (False,)}\n\n\n"
        "class Narrower(Narrow):\n    pass\n"
    )
    fields = {"kind": "narrow", "head": 4, "heads": 2, "layers": {"number": 3}}
    for name in ("Narrow", "Narrower"):
        assert hub.sizes(f"own_networks.{name}", fields, "here") == {"width": 8, "depth": 3}
    with pytest.raises(InputError, match=r"another model than Narrow: layers\.shared=True \(not False\)"):
        hub.sizes("own_networks.Narrow", {**fields, "layers": {"number": 3, "shared": True}}, "here")
    with pytest.raises(InputError, match="it has no depth"):
        hub.sizes("own_networks.Narrow", {**fields, "layers": 3}, "here")


def test_sizes_are_settled_without_torch(tmp_path: Path) -> None:
    fields = {"d_model": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 29, "mlp_hidden_size": 48}
    fields |= {"rope_theta": 100.0, "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    code = (
        "import sys\nfrom spg import config\nfrom spg.models import hub\n"
        f"cfg = hub.settle(config.compose('config', ['model=llada_8b', 'model.path={tmp_path}']))\n"
        "assert cfg.model.network.config.embedding_size == 29\n"
        "assert not {'torch', 'lightning', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

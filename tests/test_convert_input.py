"""Checkpoints that cannot be converted are refused, by name, and nothing of theirs runs."""

import os
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from originals import (
    C,
    classifier,
    dppo,
    linear,
    lumos,
    same,
)

from diwa import cli
from diwa.convert import convert_checkpoint, export_checkpoint
from diwa.errors import CheckpointError


@pytest.fixture
def save(tmp_path):
    def write(content, name="vision.ckpt") -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write


# ---- bad input -----------------------------------------------------------------------------------


def change(name, value):
    def damage(w):
        w[name] = value(w[name]) if callable(value) else value

    return damage


CELL = "rssm_core.cell."
BAD_WORLD_MODELS = {
    "missing": (lambda w: w.pop(f"{CELL}prior_mlp_h.bias"), r"prior_mlp_h\.bias: missing"),
    "unexpected": (change("inv_dyna.0.weight", torch.zeros(2)), r"no place here:\s+inv_dyna\.0\.w"),
    "second_gru": (
        change(f"{CELL}gru.layers.1.weight_ih", torch.zeros(2, 2)),
        r"no place here:\s+rssm_core\.cell\.gru\.layers\.1\.weight_ih",
    ),
    "other_size": (
        change(f"{CELL}post_mlp_h.weight", lambda v: v[:, :-1]),
        r"post_mlp_h\.weight: file \(10, 11\), expected \(10, 12\)",
    ),
    "deeper_encoder": (
        change("encoder.encoder_static.8.weight", torch.zeros(2, 2, 4, 4)),
        r"no place here:\s+encoder\.encoder_static\.8\.weight",
    ),
    "nan": (change(f"{CELL}in_norm.bias", lambda v: v * torch.nan), r"in_norm\.bias: holds NaN"),
    "integers": (
        change(f"{CELL}in_norm.bias", lambda v: v.long()),
        r"in_norm\.bias: is torch.int64",
    ),
    "flat": (
        change(f"{CELL}prior_mlp.weight", torch.tensor(1.0)),
        r"prior_mlp\.weight has shape \(\)",
    ),
    "classes": (
        lambda w: [w.update({n: w[n][:-1]}) for n in (f"{CELL}prior_mlp.weight",)],
        r"11 latent numbers are no groups of 4",
    ),
    "no_cell": (
        lambda w: [w.pop(n) for n in list(w) if n.startswith("rssm")],
        r"has no rssm_core\.cell\.prior_mlp\.weight; it has encoder",
    ),
}


@pytest.mark.parametrize("kind", BAD_WORLD_MODELS)
def test_world_models_that_do_not_fit(kind, save, tmp_path):
    damage, message = BAD_WORLD_MODELS[kind]
    w = lumos()
    damage(w)
    file = save({"state_dict": w})
    with pytest.raises(CheckpointError, match=f"(?s){re.escape(str(file))}.*{message}"):
        convert_checkpoint(file, tmp_path / "out", "world-model", stoch_classes=C)
    assert not (tmp_path / "out").exists()


def test_unknown_tensors_can_be_kept_and_come_back(save, tmp_path):
    w = lumos() | {"inv_dyna.0.weight": torch.randn(3, 2)}
    made = convert_checkpoint(
        save({"state_dict": w}), tmp_path / "wm", "world-model", stoch_classes=C, skip_unknown=True
    )
    assert "inv_dyna.0.weight" in made.describe()
    export_checkpoint(tmp_path / "wm", tmp_path / "back.ckpt")
    same(torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"], w)


BAD_POLICIES = {
    "plain_mlp": (
        lambda w: [w.update({n.replace("layers", "moduleList"): w.pop(n)}) for n in list(w)],
        r"has no tensors named network|has no mlp_mean\.layers\.0\.weight",
    ),
    "layer_norm": (
        change("network.mlp_mean.layers.1.norm1.weight", torch.zeros(16)),
        r"another network than one residual block.*\s+network\.mlp_mean\.layers\.1\.norm1\.weight",
    ),
    "condition_net": (
        change("network.cond_mlp.moduleList.0.linear_1.weight", torch.zeros(16)),
        r"network\.cond_mlp\.moduleList",
    ),
    "chunk": (change("network.mlp_mean.layers.2.weight", lambda v: v[:-1]), "does not fit actions"),
    "width": (
        change("network.mlp_mean.layers.1.l2.weight", lambda v: v[:, :-1]),
        r"network\.mlp_mean\.layers\.1\.l2\.weight: file \(16, 15\), expected \(16, 16\)",
    ),
    "missing": (
        lambda w: w.pop("network.time_embedding.1.bias"),
        r"time_embedding\.1\.bias: missing",
    ),
    "ddim": (change("eta.eta_logit", torch.zeros(1)), r"no place here:\s+eta\.eta_logit"),
    "two_networks": (
        change("actor.mlp_mean.layers.0.bias", torch.zeros(16)),
        "one network but diff",
    ),
}


@pytest.mark.parametrize("kind", BAD_POLICIES)
def test_policies_that_do_not_fit(kind, save, tmp_path):
    damage, message = BAD_POLICIES[kind]
    w = dppo("network")
    damage(w)
    file = save({"model": w})
    with pytest.raises(CheckpointError, match=f"(?s){re.escape(str(file))}.*({message})"):
        convert_checkpoint(file, tmp_path / "out", "policy")
    assert not (tmp_path / "out").exists()


def test_classifiers_that_do_not_fit(save, tmp_path):
    cases = {
        "0 ways": {k: v for k, v in classifier().items() if "fc1" not in k},
        "2 ways": classifier() | linear("other", 256, 12),
        "hidden widths 12 and 13": classifier()
        | linear("head.fc1", 13, 256)
        | linear("head.fc2", 2, 13),
        r"fc2\.bias: missing": {k: v for k, v in classifier().items() if k != "head.fc2.bias"},
        "no place here": classifier() | {"scale": torch.ones(1)},
    }
    for i, (message, w) in enumerate(cases.items()):
        with pytest.raises(CheckpointError, match=f"(?s){message}"):
            convert_checkpoint(save(w, f"{i}.pt"), tmp_path / "out", "reward")
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_checkpoint(save, tmp_path):
    good = save({"state_dict": lumos()})
    (tmp_path / "cut.ckpt").write_bytes(good.read_bytes()[:-3000])
    (tmp_path / "text.ckpt").write_text("404 not found")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    for name in ("cut", "text", "empty"):
        file = tmp_path / f"{name}.ckpt"
        with pytest.raises(CheckpointError, match=rf"{name}\.ckpt is (truncated|refused)"):
            convert_checkpoint(file, tmp_path / "out", "world-model")
    with pytest.raises(CheckpointError, match="nowhere.ckpt does not exist"):
        convert_checkpoint(tmp_path / "nowhere.ckpt", tmp_path / "out", "world-model")
    with pytest.raises(CheckpointError, match=r"holds no weights .*\(found: epoch, optimizer\)"):
        convert_checkpoint(save({"epoch": 1, "optimizer": {}}), tmp_path / "out", "world-model")
    with pytest.raises(CheckpointError, match="holds no weights under ema"):
        convert_checkpoint(
            save({"model": dppo("network")}), tmp_path / "out", "policy", weights="ema"
        )


def test_a_folder_is_not_overwritten(save, tmp_path):
    file = save({"model": dppo("network")})
    convert_checkpoint(file, tmp_path / "p", "policy")
    with pytest.raises(CheckpointError, match="holds a model already"):
        convert_checkpoint(file, tmp_path / "p", "policy")


class Runs:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before-1.6"])
@pytest.mark.parametrize("where", ["top", "beside", "inside"])
def test_a_checkpoint_that_wants_to_run_code_is_refused_before_it_does(where, legacy, tmp_path):
    mark, file = tmp_path / "mark", tmp_path / "evil.ckpt"
    evil = Runs(os.system, f"touch {mark}")
    content = {
        "top": evil,
        "beside": {"state_dict": lumos(), "hyper_parameters": evil},
        "inside": {"state_dict": lumos() | {"x": evil}},
    }[where]
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"evil\.ckpt is (refused|truncated)"):
        convert_checkpoint(file, tmp_path / "out", "world-model", stoch_classes=C)
    assert [p.name for p in tmp_path.iterdir()] == ["evil.ckpt"]
    torch.load(file, weights_only=False)
    assert mark.exists()  # the danger is real


def test_the_configuration_that_lightning_keeps_is_skipped_without_importing_it(
    save, tmp_path, monkeypatch
):
    """`save_hyperparameters` of a Hydra configuration: OmegaConf objects beside the weights."""
    built = []
    module = types.ModuleType("omegaconf.dictconfig")

    class DictConfig:
        def __init__(self, content):
            self.content, self.parent = content, None

        def __setstate__(self, state):
            built.append(state)
            self.__dict__.update(state)

    DictConfig.__module__, DictConfig.__qualname__ = "omegaconf.dictconfig", "DictConfig"
    module.DictConfig = DictConfig
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, "omegaconf.dictconfig", module)
    config = DictConfig(
        {"rssm": DictConfig({"cell": {"deter_dim": 1024}}), "_target_": "os.system"}
    )
    w = lumos()
    file = save({"state_dict": w, "hyper_parameters": config})
    convert_checkpoint(file, tmp_path / "wm", "world-model", stoch_classes=C)
    assert not built  # the real class, though importable, was never made
    assert torch.load(file, weights_only=False)["hyper_parameters"].content and built


def test_command_line(save, tmp_path, capsys):
    file = save({"epoch": 1, "model": dppo("network"), "ema": dppo("network")}, "p.pt")
    out = tmp_path / "policy"
    assert cli.main(["convert", "checkpoint", str(file), str(out), "--kind", "policy"]) == 0
    assert "chunk 4 x 7, width 16, denoising steps 20" in capsys.readouterr().out
    assert cli.main(["convert", "to-checkpoint", str(out), str(tmp_path / "back.pt")]) == 0
    assert (tmp_path / "back.pt").exists()
    assert cli.main(["convert", "to-checkpoint", str(tmp_path), "x.pt"]) == 2
    assert "config.json does not exist" in capsys.readouterr().err
    file = save({"net_" + n: v for n, v in dppo("network").items()}, "renamed.pt")
    renamed = ["convert", "checkpoint", str(file), str(tmp_path / "r"), "--kind", "policy"]
    assert cli.main(renamed) == 2
    assert "no tensors named network." in capsys.readouterr().err
    assert cli.main([*renamed, "--rename", "net_network.=network."]) == 0

"""The arguments of the reference DiT: each bad one is refused by its name and value."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_models import CROSS, JOINT, inputs, make

from stattn import dit
from stattn.dit import DiT


@pytest.mark.parametrize(
    "message, change",
    [
        ("kind='parallel'", {"kind": "parallel"}),
        ("layers=0", {"layers": 0}),
        ("freq_dim=7", {"freq_dim": 7}),
        ("text_dim=-1", {"text_dim": -1}),
        ("vocab=10 needs text_dim=0", {"text_dim": 0}),
        ("text_dim=0", {"kind": "cross", "text_dim": 0, "vocab": 0}),
        (r"rope_split=\(2, 2, 2\)", {"rope_split": (2, 2, 2)}),
        ("layers=2.0", {"layers": 2.0}),
        ("heads=True", {"heads": True}),
        ("head_dim=7", {"head_dim": 7}),
        (r"patch=\(1, 2\)", {"patch": (1, 2)}),
        ("patch=-2", {"patch": (1, -2, 2)}),
        ("qk_norm='layer'", {"qk_norm": "layer"}),
        ("masked_input='yes'", {"masked_input": "yes"}),
        ("eps=-1.0", {"eps": -1.0}),
        ("rope_theta=0", {"rope_theta": 0}),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_field(message, change):
    dataclasses.replace(JOINT)
    with pytest.raises((ValueError, TypeError), match=message):
        dataclasses.replace(JOINT, **change)


@pytest.mark.parametrize(
    "message, call",
    [
        ("size=4", lambda model: model.kv_cache(1, 4, chunk=1, window=2)),
        ("size h=-4", lambda model: model.kv_cache(1, (-4, 4), chunk=1, window=2)),
        ("sinks=-1", lambda model: model.kv_cache(1, (4, 4), chunk=1, window=2, sinks=-1)),
        ("window=None", lambda model: model.kv_cache(1, (4, 4), chunk=1, window=None)),
        ("text_len=-1", lambda model: model.kv_cache(1, (4, 4), chunk=1, window=2, text_len=-1)),
        ("rebase='no'", lambda model: model.kv_cache(1, (4, 4), chunk=1, window=2, rebase="no")),
        ("batch=0", lambda model: model.flops((2, 4, 4), batch=0)),
        ("text of type NoneType", lambda model: model.encode_text(None)),
        ("dtype=torch.int64", lambda model: dit.load("tiny", dtype=torch.int64)),
        ("device='tpu'", lambda model: dit.load("tiny", device="tpu")),
    ],
)
def test_wrong_arguments_of_methods_and_of_load_are_named(message, call):
    with pytest.raises((ValueError, TypeError), match=message):
        call(make(JOINT))


def test_unknown_names_and_types_of_configs_are_refused():
    with pytest.raises(ValueError, match="'sora'.*tiny"):
        DiT("sora")
    with pytest.raises(TypeError, match="DiTConfig"):
        DiT({"kind": "joint"})


@pytest.mark.parametrize(
    "error, message, change",
    [
        (ValueError, r"x of shape \(2, 4, 6, 16, 20\)", {"x": torch.zeros(2, 4, 6, 16, 20)}),
        (ValueError, "17", {"x": torch.zeros(2, 3, 6, 17, 20)}),
        (ValueError, r"timestep of shape \(1,\)", {"timestep": torch.zeros(1)}),
        (ValueError, r"timestep of shape \(2, 4\)", {"timestep": torch.zeros(2, 4)}),
        (ValueError, r"text of shape \(1, 6\)", {"text": torch.zeros(1, 6, dtype=torch.int64)}),
        (ValueError, r"text of shape \(2, 7\)", {"text": torch.zeros(2, 7, dtype=torch.int64)}),
        (TypeError, "float32", {"text": torch.zeros(2, 6)}),
        (ValueError, "text_valid is given without text", {"text": None, "text_valid": torch.tensor([1, 1])}),
        (ValueError, "valid", {"text_valid": torch.tensor([1, 1, 1])}),
        (ValueError, "known and known_mask", {"known": torch.zeros(2, 3, 6, 16, 20)}),
        (ValueError, "known and known_mask", {"known_mask": torch.zeros(2, 1, 6, 16, 20)}),
        (
            ValueError,
            r"known of shape \(2, 3, 6, 16, 16\)",
            {"known": torch.zeros(2, 3, 6, 16, 16), "known_mask": torch.zeros(2, 1, 6, 16, 20)},
        ),
        (
            ValueError,
            r"known_mask of shape \(2, 3, 6, 16, 20\)",
            {"known": torch.zeros(2, 3, 6, 16, 20), "known_mask": torch.zeros(2, 3, 6, 16, 20)},
        ),
        (TypeError, "mask='spatial'", {"mask": "spatial"}),
        (TypeError, "x of type ndarray must be a tensor", {"x": np.zeros((2, 3, 6, 16, 20))}),
        (TypeError, "timestep of type float must be a tensor", {"timestep": 500.0}),
        (TypeError, "text of type str must be a tensor", {"text": "a red disc"}),
        (ValueError, r"text_valid of shape \(2,\) and torch.float32", {"text_valid": torch.ones(2)}),
        (ValueError, "dense_layers=-1", {"dense_layers": -1}),
        (TypeError, "dense_layers=1.5", {"dense_layers": 1.5}),
        (TypeError, "cache of type str must be a RollingKVCache", {"cache": "rolling"}),
        (TypeError, "tokens=1 must be True or False", {"tokens": 1}),
    ],
)
def test_inputs_that_do_not_fit_are_named(error, message, change):
    model = make(JOINT)
    x, timestep, text = inputs(JOINT)
    good = {"x": x, "timestep": timestep, "text": text}
    model(**good)
    with pytest.raises(error, match=message):
        model(**{**good, **change})


@pytest.mark.parametrize(
    "message, change",
    [
        (r"text of shape \(2, 6, 9\)", {"text": torch.zeros(2, 6, 9)}),
        (r"text of shape \(2, 6\)", {"text": torch.zeros(2, 6, dtype=torch.int64)}),
        ("masked_input", {"known": torch.zeros(2, 4, 3, 8, 10), "known_mask": torch.zeros(2, 1, 3, 8, 10)}),
        ("masked_input", {"known": torch.zeros(2, 4, 3, 8, 10)}),
        ("masked_input", {"known_mask": torch.zeros(2, 1, 3, 8, 10)}),
    ],
)
def test_inputs_of_another_kind_of_model_are_named(message, change):
    model = make(CROSS)
    x, timestep, text = inputs(CROSS)
    model(x, timestep, text)
    with pytest.raises(ValueError, match=message):
        model(**{"x": x, "timestep": timestep, "text": text, **change})


def test_a_model_without_text_runs_and_refuses_text():
    config = dataclasses.replace(JOINT, text_dim=0, text_len=0, vocab=0)
    model = make(config)
    x, timestep, text = inputs(JOINT)
    assert model(x, timestep).shape == x.shape
    with pytest.raises(ValueError, match="text_dim=0"):
        model(x, timestep, text)

"""Training: the loss is the one written down, a run leaves what it promises, and resuming changes nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stattn import dit, masks, train, trainer, world
from stattn.dit import DiT
from stattn.recipes import PRESETS
from stattn.trainer import Trainer

SMOKE = PRESETS["smoke"]
CPU = torch.device("cpu")


def _run(out: Path, **options: Any) -> dict[str, Any]:
    options = {"name": "smoke", "device": "cpu", "quiet": True, "log_every": 2, "clips": 0, **options}
    return train.train(SMOKE, out, **options)


def _awake(model: DiT) -> DiT:
    """Give a model that is the zero function weights that let every part matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.smoke
@pytest.mark.parametrize("key", ["full()", "window(2, 3, 3)", "frame_causal(1)", "spatial()"])
def test_materialized_attention_gives_what_the_operation_gives(key: str) -> None:
    plain = _awake(DiT(SMOKE.model)).eval()
    dense = DiT(SMOKE.model).eval()
    dense.load_state_dict(plain.state_dict())
    trainer.materialize_attention(dense)
    x = torch.randn(5, 3, 4, 32, 32)
    ids, valid = world.tokenize(["", "a red disc", "a blue square moves up, camera static", "a", "a green disc"])
    level = torch.tensor([0.0, 100.0, 500.0, 900.0, 1000.0])
    mask = masks.parse(key)
    with torch.no_grad():
        expected = plain(x, level, ids, valid, mask=mask)
        torch.testing.assert_close(dense(x, level, ids, valid, mask=mask), expected, atol=2e-5, rtol=1e-5)
        other = dense(x, level, ids, valid.roll(1), mask=mask)
    assert (other - expected).abs().max() > 1e-3


@pytest.mark.smoke
def test_the_loss_is_that_of_the_velocity_over_what_is_generated() -> None:
    clean, noise = torch.randn(2, 3, 2, 16, 16), torch.randn(2, 3, 2, 16, 16)
    level = torch.tensor([0.5, 0.01])
    generated = torch.zeros(2, 1, 2, 16, 16, dtype=torch.bool)
    generated[0, :, 1], generated[1, :, :, :8] = True, True
    seen: dict[str, Tensor] = {}

    def model(x: Tensor, timestep: Tensor, ids: Tensor, valid: Tensor, **keywords: Any) -> Tensor:
        seen.update(x=x, timestep=timestep, **keywords)
        return clean + 0.1

    nothing = torch.zeros(())
    loss = trainer.flow_loss(model, clean, noise, level, generated, nothing, nothing, nothing, 0.05)  # type: ignore[arg-type]
    counts = generated.flatten(1).sum(1)
    expected = (counts[0] * (0.1 / 0.5) ** 2 + counts[1] * (0.1 / 0.05) ** 2) / counts.sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(seen["timestep"], 1000 * level)
    torch.testing.assert_close(seen["x"][0], 0.5 * clean[0] + 0.5 * noise[0])
    # With d(x0)/dx = 0 the implied velocity is (x - x_hat) / s: its error is the loss, for s above the least level.
    velocity = (seen["x"][:1] - (clean[:1] + 0.1)) / 0.5
    torch.testing.assert_close(((velocity - (noise - clean)[:1]) ** 2).mean(), torch.tensor(0.04))
    assert torch.equal(seen["known_mask"], (~generated).float())
    assert (seen["known"][generated.expand_as(clean)] == 0).all()
    assert torch.equal(seen["known"][~generated.expand_as(clean)], clean[~generated.expand_as(clean)])


@pytest.mark.smoke
def test_a_batch_drops_captions_and_clauses_and_mixes_masks_and_tasks() -> None:
    recipe = dataclasses.replace(SMOKE, batch=512, height=16, width=16, masks=(("full()", 0.5), ("spatial()", 0.5)))
    made = Trainer(recipe, CPU)
    clean, noise, level, generated, ids, valid, bias = made.batch()
    assert 0.06 < (valid == 0).float().mean() < 0.15
    assert not torch.equal(noise, clean)
    assert level.log().sub((1 - level).log()).mean().item() == pytest.approx(recipe.level_mean, abs=0.15)
    whole = generated.flatten(1).all(1).float().mean()
    assert 0.4 < whole < 0.6
    scene = world.sample(512, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(scene.draw(), clean)
    full, _ = scene.tokens()
    named = valid > 0
    assert torch.equal(ids[named, :3], full[named, :3])
    assert 0.3 < (ids[named] == full[named]).all(1).float().mean() < 0.9
    # The bias hides unreal words and what the mask hides.
    chosen, seen_clips = set(), [clean]
    for made.steps in range(1, 9):
        clean, *_, valid, bias = made.batch()
        assert not any(torch.equal(clean, other) for other in seen_clips)
        seen_clips.append(clean)
        seen = bias[:, 0] == 0
        assert torch.equal(seen[:, 0, made.grid.video :].sum(1), valid)
        chosen.add(int(seen[0, 0, : made.grid.video].sum()))
    assert chosen == {made.grid.video, made.grid.video // 2}


def test_a_run_learns_and_leaves_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    options = ["--preset", "smoke", "--steps", "40", "--out", str(out), "--device", "cpu", "--clips", "4", "--quiet"]
    assert train.main(train._parse([*options, "--log-every", "4", "--sample-every", "0.5", "--seed", "3"])) == 0
    assert {"steps", "minutes", "full()", "window(2, 3, 3)"} == set(json.loads(capsys.readouterr().out))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(4, 41, 4))
    losses = [line["loss"] for line in log]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert (out / "samples" / "000040.png").stat().st_size > 1000
    record = json.loads((out / "smoke.json").read_text())
    assert record["steps"] == 40
    assert record["recipe"]["seed"] == 3
    assert record["losses"][0] == [4, losses[0]]
    assert {"torch", "python"} <= set(record["versions"])
    assert record["command"].startswith("python -m stattn.train --preset smoke --out")
    assert "--steps 40 --device cpu --seed 3 --log-every 4" in record["command"]
    scores = record["evaluation"]["masks"]["window(2, 3, 3)"]
    assert set(scores) == {"colour", "shape", "both", "direction", "flicker_ratio"}
    model = dit.load(out / "smoke.safetensors")
    assert model.config == SMOKE.model
    average = dit.load(out / "checkpoint.safetensors")
    for name, value in average.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.half().float()), name
    assert (out / "smoke.safetensors").stat().st_size < 2.2 * model.num_parameters + 20_000


def test_an_interrupted_run_resumes_as_if_nothing_had_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _run(tmp_path / "whole", steps=7)
    step, handler = train.Run.step, signal.getsignal(signal.SIGINT)

    def stop_after_three(run: train.Run, progress: float) -> None:
        step(run, progress)
        if run.trainer.steps == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "step", stop_after_three)
        with pytest.raises(KeyboardInterrupt, match="stopped at step 3"):
            _run(tmp_path / "parts", steps=7)
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "parts" / "smoke.safetensors").exists()
    # A line that a killed run wrote after its checkpoint is not kept.
    with open(tmp_path / "parts" / "log.jsonl", "a") as file:
        file.write('{"step": 4, "seconds": 1, "loss": 9}\n')
    _run(tmp_path / "parts", steps=7, resume=True)
    whole, parts = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts"))
    for part in ("model", "average"):
        for name, value in whole[part].items():
            assert torch.equal(parts[part][name], value), (part, name)
    logs = [
        [
            (line["step"], line["loss"])
            for line in map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
        ]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]
    assert [at for at, _ in logs[0]] == [2, 4, 6, 7]
    # The control: another seed ends elsewhere.
    other = Trainer(dataclasses.replace(SMOKE, seed=1), CPU)
    for at in range(7):
        other.step(at / 7)
    assert any(not torch.equal(value, whole["model"][name]) for name, value in other.model.state_dict().items())


def test_a_run_ends_with_its_minutes(tmp_path: Path) -> None:
    record = _run(tmp_path, minutes=0.03)
    assert 0.03 <= record["minutes"] < 0.1
    assert record["steps"] > 3


@pytest.mark.smoke
def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    recipe = dataclasses.replace(SMOKE, warmup=10, learning_rate=2.0)
    assert trainer.learning_rate(recipe, 0, 0.0) == pytest.approx(0.2)
    assert trainer.learning_rate(recipe, 9, 0.0) == pytest.approx(2.0)
    assert trainer.learning_rate(recipe, 99, 0.5) == pytest.approx(1.0)
    assert trainer.learning_rate(recipe, 99, 1.0) == pytest.approx(0.0)
    assert trainer.learning_rate(recipe, 99, 1.3) == pytest.approx(0.0)


@pytest.mark.smoke
def test_the_average_follows_the_model() -> None:
    made = Trainer(SMOKE, CPU)
    before = {name: value.clone() for name, value in made.average.state_dict().items()}
    made.step(0.0)
    weight = 1 - min(SMOKE.ema, 2 / 11)
    for name, value in made.average.state_dict().items():
        expected = torch.lerp(before[name], made.model.state_dict()[name], weight)
        torch.testing.assert_close(value, expected)


class _Oracle(nn.Module):
    """Answers every caption of one evaluation with given clips, whatever it is shown."""

    def __init__(self, clips: Tensor):
        super().__init__()
        self.clips, self.config = clips, SimpleNamespace(text_len=16)
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, **keywords: Any) -> Tensor:
        return self.clips.repeat(len(x) // len(self.clips), 1, 1, 1, 1)


def test_evaluation_scores_the_right_clips_fully_and_others_poorly() -> None:
    size = (6, 32, 32)
    real = world.render(36, *size, seed=train.EVALUATION_SEED).video
    options: dict[str, Any] = {"n": 36, "size": size, "steps": 2}
    scores = train.evaluate(_Oracle(real), **options)  # type: ignore[arg-type]
    assert scores == pytest.approx(
        {"colour": 1.0, "shape": 1.0, "both": 1.0, "direction": 1.0, "flicker_ratio": 1.0}, abs=0.03
    )
    wrong = train.evaluate(_Oracle(real.roll(1, 0)), **options)  # type: ignore[arg-type]
    assert wrong["both"] < 0.25
    assert wrong["flicker_ratio"] == pytest.approx(1.0, abs=0.01)
    shaken = train.evaluate(_Oracle(real + 0.1 * torch.randn_like(real)), **options)  # type: ignore[arg-type]
    assert shaken["flicker_ratio"] > 1.3


def test_what_cannot_be_trained_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="minutes=None and steps=None"):
        _run(tmp_path)
    with pytest.raises(ValueError, match="minutes=-1"):
        _run(tmp_path, minutes=-1)
    with pytest.raises(ValueError, match="steps=0"):
        _run(tmp_path, steps=0)
    with pytest.raises(ValueError, match=r"holds no checkpoint\.pt"):
        _run(tmp_path, steps=1, resume=True)
    _run(tmp_path, steps=1)
    with pytest.raises(ValueError, match="the checkpoint of another run"):
        _run(tmp_path, steps=1)
    other = dataclasses.replace(SMOKE, batch=5)
    with pytest.raises(ValueError, match="trained with another batch"):
        train.train(other, tmp_path, steps=2, device="cpu", resume=True, quiet=True)
    with pytest.raises(ValueError, match=r"model\.vocab=20"):
        dataclasses.replace(SMOKE, model=dataclasses.replace(SMOKE.model, vocab=20))
    with pytest.raises(ValueError, match=r"model\.masked_input=False"):
        dataclasses.replace(SMOKE, model=dataclasses.replace(SMOKE.model, masked_input=False))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(tmp_path, steps=2)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(
        Trainer, "step", lambda self, progress: setattr(self, "steps", self.steps + 1) or torch.tensor(math.nan)
    )
    with pytest.raises(FloatingPointError, match="the loss is nan at step 4"):
        _run(tmp_path, steps=9, resume=True)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("wrong", [False, True])
def test_a_compiled_run_with_other_gradients_is_stopped(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def compiled(loss: Any, **options: Any) -> Any:
        def call(*args: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return loss(*args) * (2 if wrong and calls > 2 else 1)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    one, other = Trainer(SMOKE, CPU, compile=True), Trainer(SMOKE, CPU)
    for _ in range(2):
        one.step(0.0)
        other.step(0.0)
    if wrong:
        with pytest.raises(RuntimeError, match="by 1 times their norm at step 2: train with --no-compile"):
            one.step(0.0)
        return
    assert torch.equal(one.step(0.0), other.step(0.0))
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_a_compiled_run_on_the_gpu_learns(tmp_path: Path) -> None:
    record = _run(tmp_path, steps=200, device="cuda", compile=True, log_every=20)
    losses = [loss for _, loss in record["losses"]]
    assert losses[-1] < 0.8 * losses[0]


def test_ready_weights_are_evaluated_without_training(tmp_path: Path) -> None:
    weights = str(tmp_path / "some.safetensors")
    dit.save(DiT(SMOKE.model), weights)
    line = ["--preset", "smoke", "--evaluate", weights, "--clips", "2", "--out", str(tmp_path)]
    assert train.main(train._parse([*line, "--device", "cpu"])) == 0
    record = json.loads((tmp_path / "evaluation.json").read_text())
    found = record["evaluation"]
    assert set(found["masks"]) == {key for key, _ in SMOKE.masks}
    assert min(found["real"][name] for name in ("colour", "shape", "direction")) == 1
    assert found["shuffled"]["flicker_ratio"] > 1.2
    assert not (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize("name", ["cubes", "small", "tiny"])
def test_every_preset_takes_a_step(name: str) -> None:
    recipe = dataclasses.replace(PRESETS[name], batch=2)
    trainer = Trainer(recipe, CPU)
    assert (trainer.step(0.0) > 0).item()
    grid = {"cubes": (4, 4, 4), "small": (4, 4, 4), "tiny": (8, 8, 8)}[name]
    assert recipe.grid == grid
    moved = [
        p for (_, p), q in zip(trainer.trained, Trainer(recipe, CPU).trained, strict=True) if not torch.equal(p, q[1])
    ]
    assert moved

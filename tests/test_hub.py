"""The layout for the Hub of kernels: a package that runs under any name, with operations in a namespace of its own."""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What the builder writes for a kernel without compiled parts.
OPS = """
import torch

ops = torch.ops.stattn_0123abcd


def add_op_namespace_prefix(name):
    return f"stattn_0123abcd::{name}"
"""

RUN = """
import importlib, inspect, pathlib, sys, types, torch

class Without:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "stattn":
            raise ImportError("a kernel of the Hub imports itself by relative names alone: " + name)

sys.meta_path.insert(0, Without)
path = pathlib.Path(sys.argv[1])
spec = importlib.util.spec_from_file_location("loaded_0123abcd", path / "__init__.py")
kernel = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
for each in sorted(path.rglob("*.py")):
    place = each.relative_to(path).with_suffix("").parts
    if place[0] != "kernels" and place[-1][:2] != "__":  # those of Triton are imported when they run
        importlib.import_module(".".join((spec.name, *place)))

q, k, v = torch.randn(3, 1, 60, 2, 16, dtype=torch.float64, requires_grad=True)
mask = kernel.masks.window(1, 3, 3)
out = kernel.attention(q, k, v, (3, 4, 5), mask)
scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) / 4
want = scores.masked_fill(~mask.allowed((3, 4, 5)), -torch.inf).softmax(-1) @ v.transpose(1, 2)
torch.testing.assert_close(out, want.transpose(1, 2))
out.sum().backward()
assert hasattr(torch.ops.stattn_0123abcd, "attention") and hasattr(torch.ops.stattn_0123abcd, "patchify3d")
kernel.modulate(torch.randn(1, 4, 8), torch.randn(1, 8), torch.randn(1, 8))

# As ``kernelize`` does: a layer of a model gets the forward of ours, and nothing else.
def kernelized(layer, name):
    ours = getattr(kernel.layers, name)
    layer.forward = types.MethodType(ours.forward, layer)
    return layer

layer = torch.nn.Module()
layer.mask = mask.key
attend = kernelized(layer, "SpaceTimeAttention")
assert torch.equal(attend(q, k, v, (3, 4, 5)), out)
torch.testing.assert_close(torch.compile(attend, backend="eager", fullgraph=True)(q, k, v, (3, 4, 5)), out)
x, y, scale = torch.randn(2, 6, 8), torch.randn(2, 6, 8), torch.randn(2, 8)
norm = kernelized(torch.nn.LayerNorm(8, eps=1e-3, elementwise_affine=False), "ModulatedLayerNorm")
want = torch.nn.functional.layer_norm(x, (8,), eps=1e-3) * (1 + scale[:, None]) + y
torch.testing.assert_close(norm(x, scale, y), want)
torch.testing.assert_close(kernelized(torch.nn.Module(), "GatedResidual")(x, y, scale), x + scale[:, None] * y)
convolution, video = torch.nn.Conv3d(3, 8, (1, 2, 2), stride=(1, 2, 2)), torch.randn(1, 3, 2, 4, 6)
want = convolution(video).flatten(2).transpose(1, 2)
torch.testing.assert_close(kernelized(convolution, "Patchify3D")(video), want)

# Its rules: no state, no constructor, no members but these two.
plain = {name for name, _ in inspect.getmembers(torch.nn.Module)}
named = vars(kernel.layers).values()
layers = [each for each in named if isinstance(each, type) and each.__module__ == kernel.layers.__name__]
assert len(layers) == 4
for each in layers:
    assert issubclass(each, torch.nn.Module) and each.__init__ is torch.nn.Module.__init__, each
    members = {name for name, _ in inspect.getmembers(each)} - plain
    assert members == {"can_torch_compile", "has_backward"}, (each, members)
"""


# The same by Hugging Face's own package: loaded from a folder, and put into a model.
KERNELIZE = """
import sys, torch
from pathlib import Path
from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_forward_from_hub, use_kernel_mapping

@use_kernel_forward_from_hub("SpaceTimeAttention")
class Attention(torch.nn.Module):
    mask = "window(1, 3, 3)"

    def forward(self, q, k, v, grid):
        raise NotImplementedError

layer = LocalLayerRepository(Path(sys.argv[1]), layer_name="SpaceTimeAttention")
with use_kernel_mapping({"SpaceTimeAttention": {"cpu": layer}}):
    model = kernelize(Attention(), mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu")
q, k, v = torch.randn(3, 1, 60, 2, 16)
out = model(q, k, v, (3, 4, 5))
kernel = sys.modules["stattn_0123abcd"]
assert torch.equal(out, kernel.attention(q, k, v, (3, 4, 5), kernel.masks.window(1, 3, 3)))
assert not torch.equal(out, kernel.attention(q, k, v, (3, 4, 5)))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("export", ROOT / "hub" / "export.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.export(tmp_path_factory.mktemp("hub"))
    (found / "_ops.py").write_text(OPS)
    return found


def test_the_package_runs_under_another_name_without_stattn(package, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(package)], cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""}
    )
    assert done.returncode == 0, done.stderr


def test_every_module_that_the_package_names_is_in_it(package):
    # Triton's are imported by their first launch only, which needs a GPU or its interpreter.
    named = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                modules = [folder] if node.module else [folder / each.name for each in node.names]
                named += [(path.name, each) for each in modules]
    assert any(each.name == "plan" for _, each in named)
    here = [each for each in named if each[1].is_dir() or each[1].with_suffix(".py").is_file()]
    assert [each for each in named if each not in here] == []


def test_kernelize_takes_its_layers(package, tmp_path):
    found = importlib.util.find_spec("kernels")
    if found is None or found.origin is None:  # the folder of this project is no package
        pytest.skip("Hugging Face's kernels is not installed")
    shutil.copytree(package, tmp_path / "build" / "torch-cpu")
    metadata = {"id": "stattn_0123abcd", "name": "stattn", "version": 1, "license": "Apache-2.0"}
    metadata |= {"python-depends": [], "backend": {"type": "cpu"}}
    (tmp_path / "build" / "torch-cpu" / "metadata.json").write_text(json.dumps(metadata))
    command = [sys.executable, "-c", KERNELIZE, str(tmp_path)]
    env = {"PATH": "", "PYTHONPATH": str(Path(found.origin).parents[1]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def test_its_own_tests_pass_and_its_benchmark_names_workloads_to_verify(package):
    folder = package.parent.parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder / "tests")]
    env = {"PATH": "", "PYTHONPATH": str(package.parent)}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout
    text = (folder / "benchmarks" / "benchmark.py").read_text()
    kinds = [set(re.findall(rf"def {kind}_(\w+)", text)) for kind in ("setup", "benchmark", "verify")]
    assert kinds[0] == kinds[1] == kinds[2] == {"full", "window", "frame_causal"}


def test_no_name_of_the_package_or_its_namespace_is_left_in_code(package):
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r'torch\.ops\.stattn\b|Library\("stattn"|"stattn::', text), path
        assert not re.search(r"^\s*(import stattn|from stattn)\b", text, re.MULTILINE), path


def test_the_builder_is_told_what_the_project_says(package):
    found = tomllib.loads((package.parent.parent / "build.toml").read_text())
    assert found["general"]["name"] == package.name == "stattn"
    assert "torch-noarch" in found
    card = (package.parent.parent / "CARD.md").read_text()
    layers = re.findall(r"^class (\w+)", (package / "layers.py").read_text(), re.MULTILINE)
    assert f"names = {tuple(layers)}".replace("'", '"') in card

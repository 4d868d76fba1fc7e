"""Promise: `python -m droppath_ext.info` tells what is installed and whether it works."""

import subprocess
import sys

import pytest
import torch
from conftest import HAS_CUDA

import droppath_ext
from droppath_ext import _C


def _python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False)


def _info(prelude):
    """Run the module in a fresh interpreter, after `prelude`."""
    run = "runpy.run_module('droppath_ext.info', run_name='__main__')"
    return _python("-c", f"import runpy, sys; sys.argv = ['info']\n{prelude}\n{run}")


@pytest.fixture(scope="module")
def report():
    return _python("-m", "droppath_ext.info")


def test_info_passes(report):
    assert report.returncode == 0, report.stdout + report.stderr
    assert "pass" in report.stdout.lower()
    assert "fail" not in report.stdout.lower()
    assert not report.stderr


def test_info_contents(report):
    text = report.stdout
    assert torch.__version__ in text
    assert droppath_ext.__version__ in text
    assert "CUDA" in text
    assert "cpu" in text.lower()
    if HAS_CUDA:
        assert _C.cuda_version in text
        assert _C.cuda_archs in text
    if torch.cuda.is_available():
        assert torch.cuda.get_device_name() in text


def test_info_fails_when_the_self_test_fails():
    """An op that returns wrong numbers must show in the exit status: break the reference that it is held against."""
    broken = "import droppath_ext.reference as r; r.apply_keep_mask = lambda x, keep, scale: x * 0 + 7"
    result = _info(broken)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "fail" in result.stdout.lower()

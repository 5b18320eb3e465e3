"""The environment that JAX is imported in: where compiled programs are kept, and when they are not."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiment.commands import train
from experiment.engines import caches_compilation, set_environment


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A user who has set nothing. What a test sets of the environment is taken back."""
    for name in ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"):
        monkeypatch.setenv(name, "")  # so that it is restored, whatever is set below
        monkeypatch.delenv(name)
    for name in ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "JAX_PLATFORMS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def cache_after() -> str | None:
    """Where programs are kept after `set_environment`, or None."""
    set_environment("jax", deterministic=False)
    return os.environ["JAX_COMPILATION_CACHE_DIR"] if caches_compilation() else None


def test_programs_are_kept_in_the_users_cache_folder_and_nothing_is_made_yet(home):
    assert cache_after() == str(home / ".cache" / "threeway-resnet" / "jax")
    assert not list(home.iterdir())


def test_the_cache_folder_moves(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    assert cache_after() == str(home / "xdg" / "threeway-resnet" / "jax")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(home / "own"))
    assert cache_after() == str(home / "own")


def test_the_cache_is_turned_off_by_jaxs_own_variable(home, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    assert cache_after() is None


@pytest.mark.parametrize("kind", ["a file", "a folder in a file", "a broken link", "nothing"])
def test_a_cache_folder_that_cannot_be_is_done_without(home, monkeypatch, kind):
    (home / "file").write_text("")
    (home / "link").symlink_to(home / "absent" / "folder")
    paths = {"a file": "file", "a folder in a file": "file/jax", "a broken link": "link"}
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(home / paths[kind]) if kind in paths else "")
    assert cache_after() is None


def test_a_cache_folder_that_cannot_be_written_is_done_without(home, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # chmod would not stop root
    assert cache_after() is None


def test_programs_that_are_damaged_in_the_cache_are_compiled_again(tmp_path):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compilation_cache.reset_cache()
    flags = ["--model", "cnn", "--train-subset", "0.1", "--steps", "2", "--no-report", "--run-dir"]
    try:
        assert train.main([*flags, str(tmp_path / "first")]) == 0
        entries = list((tmp_path / "cache").glob("*-cache"))
        assert entries
        for entry in entries:
            entry.write_bytes(entry.read_bytes()[:100])
        compilation_cache.reset_cache()
        with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
            assert train.main([*flags, str(tmp_path / "second")]) == 0
    finally:
        for name, value in zip(names, before, strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    first, second = (tmp_path / name / "weights.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()

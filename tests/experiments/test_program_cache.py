"""Programs that a run keeps on disk."""

import jax
import jax.numpy as jnp

from experiments import program_cache


def test_programs_are_kept_and_the_settings_come_back(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        with program_cache.kept(tmp_path / "programs"):
            jax.jit(lambda x: jnp.sin(x) * 3.25 + 17)(jnp.arange(5.0))
        assert any((tmp_path / "programs").iterdir())
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_folder_of_the_users_is_used(tmp_path):
    before, own = jax.config.jax_compilation_cache_dir, str(tmp_path / "own")
    jax.config.update("jax_compilation_cache_dir", own)
    try:
        with program_cache.kept(tmp_path / "programs"):
            assert jax.config.jax_compilation_cache_dir == own
        assert not (tmp_path / "programs").exists()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)

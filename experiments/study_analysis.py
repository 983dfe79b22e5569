"""What the study looks at besides the table: redundancy, forgetting, conflicts.

All but forgetting on the first seed's specialists alone. A `study` is
experiments.study_state.Study.
"""

import dataclasses
import functools
import json
from typing import Any

import jax
import numpy as np

from experiments.study_merges import QUIET, quietly
from experiments.study_training import batch_of, loss_fn
from multitask_jax import merging, training

DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def redundancy(study: Any, seed: Any) -> None:
    """How much of a specialist can be trimmed before its own accuracy falls."""
    merger = seed.merger
    for t, name in enumerate(study.names):

        def make(t: int = t, name: str = name) -> dict[str, Any]:
            known = study.store.records
            found = []
            for density in DENSITIES:
                if density == 1:  # the specialist itself
                    expert = known[("references", f"expert: {name}", seed.index)]
                    found.append(expert["test"][name])
                    continue
                tau = merger.whole(merger.trimmed(merger.models[t], density))
                # Nothing is chosen by it, so that test rows, which are more, will do.
                pool = seed.own_test[name]
                found.append(study.accuracies(merger.at(tau, {}), seed, pool)[name])
            base = known[("references", "base", seed.index)]
            return {"densities": DENSITIES, "test": found, "base": base["test"][name]}

        study.store.once("redundancy", name, seed.index, make)


def forgetting(study: Any, seed: Any) -> None:
    """A specialist's target and control tasks over alpha, by LiNeS and by WiSE-FT.

    LiNeS scales by alpha + (1 - alpha) l / (L - 1), WiSE-FT by alpha throughout. alpha
    is chosen on validation rows by the criterion of LiNeS, for both.
    """
    ways = {
        "LiNeS": lambda a: {"lines_alpha": a, "lines_beta": 1.0 - a},
        "WiSE-FT": lambda a: {"scale": a},
    }
    pool = seed.data.validation
    base = functools.cache(lambda: study.accuracies(seed.merger.base, seed, pool))
    known = study.store.records
    for t, name in enumerate(study.names):

        def make(t: int = t, name: str = name) -> dict[str, Any]:
            tau = seed.merger.whole(seed.merger.own(t))
            tuned = study.accuracies(seed.merger.at(tau, {}), seed, pool)
            others = [n for n in study.names if n != name]
            # The criterion divides by them; of none right half a row is made.
            least = {n: 0.5 / len(labels) for n, labels in pool.labels.items()}
            fine_tuned = max(tuned[name], least[name])
            zero_shot = [max(base()[n], least[n]) for n in others]

            def accuracies(
                way: str, alpha: float, rows: Any, at_0: Any, at_1: Any
            ) -> dict[str, float]:
                """On some rows; base and specialist were measured before."""
                if alpha == 1:  # either way
                    return at_1
                if alpha == 0 and way == "WiSE-FT":
                    return at_0
                model = seed.merger.at(tau, ways[way](alpha))
                return study.accuracies(model, seed, rows)

            on_test = [
                known[("references", row, seed.index)]["test"]
                for row in ("base", f"expert: {name}")
            ]
            out: dict[str, Any] = {"alphas": ALPHAS}
            for way in ways:
                found = [accuracies(way, a, pool, base(), tuned) for a in ALPHAS]
                alpha = merging.select_alpha(
                    ALPHAS,
                    [f[name] for f in found],
                    [[f[n] for n in others] for f in found],
                    fine_tuned=fine_tuned,
                    zero_shot=zero_shot,
                )
                out[way] = {
                    "validation": found,
                    "alpha": alpha,
                    "test": accuracies(way, alpha, seed.test, *on_test),
                }
            return out

        study.store.once("forgetting", name, seed.index, make)


def gradients(study: Any, seed: Any) -> None:
    """Cosines of the tasks' gradients at the base, on 64 training rows of each."""

    def make() -> dict[str, Any]:
        @jax.jit
        @jax.grad
        def gradient(params: Any, batch: Any) -> Any:
            key = jax.random.key(0)
            return loss_fn(params, batch, key, shape=study.evaluator.shape)[0]

        params = jax.device_put(study.base[0])
        found = []
        for name in study.names:
            encoded, rows = seed.data.encoded[name], seed.data.train[name]
            few = np.random.default_rng(0).permutation(len(rows.labels))[:64]
            found.append(
                gradient(params, batch_of(encoded, rows, few, seed.heads[name]))
            )
        agreement = training.gradients.agreement(found)
        return {
            "tasks": study.names,
            "cosines": np.asarray(agreement.cosines).round(4).tolist(),
            "conflict": float(agreement.conflict),
        }

    study.store.once("gradients", "at the base", seed.index, make)


def conflicts(study: Any, seed: Any) -> None:
    """Sign conflicts by depth, from the report of a TIES merge."""

    def make() -> dict[str, Any]:
        output = seed.folder / "merged"
        around = QUIET | {"output": str(output), "report": True}
        quietly(dataclasses.replace(seed.merger.config, method="ties", **around))
        report = json.loads((output / "merge_report.json").read_text())
        return {"depths": report["depths"]}

    study.store.once("conflicts", "ties", seed.index, make)

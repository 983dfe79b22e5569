"""What the study looks at besides the table, on models that only have scores."""

from types import SimpleNamespace

import numpy as np

from experiments import study_analysis
from experiments.study_store import Store


def test_forgetting_takes_a_specialist_that_is_never_right(tmp_path):
    """The criterion divides by its accuracy on few validation rows."""
    found = {"never": 0.0, "often": 0.5}
    store = Store(tmp_path)
    for row in ("base", "expert: never", "expert: often"):
        store.add("references", row, 0, {"test": found})
    study = SimpleNamespace(
        names=list(found), store=store, accuracies=lambda model, seed, pool: found
    )
    merger = SimpleNamespace(
        base={}, own=lambda t: {}, whole=lambda tau: tau, at=lambda tau, swept: {}
    )
    validation = SimpleNamespace(labels={n: np.zeros(4, int) for n in found})
    data = SimpleNamespace(validation=validation)
    seed = SimpleNamespace(index=0, merger=merger, data=data, test=None)
    study_analysis.forgetting(study, seed)
    for name in found:
        for way in ("LiNeS", "WiSE-FT"):
            # All are equal: the smallest, which moves least.
            assert store.records[("forgetting", name, 0)][way]["alpha"] == 0

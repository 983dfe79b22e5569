"""The PyTorch model that speed is compared with computes what ours does."""

import jax
import numpy as np
import pytest

from multitask_jax.masked import modalities as mods
from multitask_jax.masked.masks import dirichlet_masks
from multitask_jax.models import egom2p
from tests.masked.common import MODALITIES
from tests.masked.test_modalities import random_tokens

SHAPE = egom2p.Shape(16, 2, 2, 2)


def attention(kernels):
    """Names of PyTorch's Linear layers -> [out, in]."""
    return {
        name: np.reshape(k["kernel"], (-1, 16) if name == "output" else (16, -1)).T
        for name, k in kernels.items()
    }


def block(params, i, names):
    """One block's tensors by PyTorch's names."""
    at = jax.tree.map(lambda x: np.asarray(x[i]), params)
    out = {}
    for ours, theirs in names.items():
        if ours.startswith("norm"):
            out[f"{theirs}.weight"] = at[ours]["scale"]
        else:
            found = attention(at[ours])
            out |= {f"{theirs}.{k}.weight": x for k, x in found.items()}
    mlp = at["mlp"]
    out["mlp.gate_up.weight"] = mlp["gate_up"]["kernel"].reshape(16, -1).T
    out["mlp.down.weight"] = mlp["down"]["kernel"].T
    return out


ENCODER = {"norm_attention": "norm_own", "attention": "own", "norm_mlp": "norm_mlp"}
DECODER = {
    "norm_self": "norm_own",
    "self_attention": "own",
    "norm_query": "norm_query",
    "norm_context": "norm_context",
    "cross_attention": "cross",
    "norm_mlp": "norm_mlp",
}


def named(params):
    """Our parameters, or their gradients, by PyTorch's names."""
    out = {
        "token.weight": params["token_embedding"],
        "modality.weight": params["modality_embedding"],
        "mask_token": params["mask_token"],
        "context.weight": params["context"]["kernel"].T,
        **{f"{n}.weight": params[n]["scale"] for n in ("encoder_norm", "decoder_norm")},
    }
    for name, names in (("encoder", ENCODER), ("decoder", DECODER)):
        for i in range(2):
            found = block(params[name], i, names)
            out |= {f"{name}.{i}.{k}": x for k, x in found.items()}
    first = mods.first_ids(MODALITIES)
    for i, m in enumerate(MODALITIES):
        head = params["head"][:, first[i] : first[i] + m.vocabulary]
        out[f"heads.{i}.weight"] = head.T
    return out


@pytest.mark.filterwarnings("ignore:::torch")
def test_loss_and_gradients_are_those_of_pytorch():
    torch = pytest.importorskip("torch", reason="pip install multitask-jax[torch]")
    from experiments import egom2p_in_torch

    rng = np.random.default_rng(0)
    ids, present = mods.flatten(MODALITIES, random_tokens(rng, 3))
    keys = jax.random.split(jax.random.key(4), 3)  # asks for all modalities
    masks = jax.vmap(
        lambda k, p: dirichlet_masks(k, p, MODALITIES, inputs=20, targets=15)
    )(keys, present)
    params = egom2p.init(jax.random.key(1), MODALITIES, SHAPE)

    @jax.jit
    def ours(params):
        return egom2p.loss(params, ids, masks, modalities=MODALITIES, shape=SHAPE)[0]

    value, slopes = jax.value_and_grad(ours)(params)
    state = named(params) | {
        "position": mods.position_table(MODALITIES, 16),
        "of": mods.modality_of(MODALITIES).astype(np.int64),
    }
    model = egom2p_in_torch.EgoM2P(
        {
            **SHAPE._asdict(),
            "hidden": SHAPE.hidden,
            "vocabularies": [m.vocabulary for m in MODALITIES],
            "lengths": mods.lengths(MODALITIES).tolist(),
        }
    )
    model.load_state_dict({k: torch.tensor(np.array(x)) for k, x in state.items()})
    arrays = (ids, *masks.inputs, *masks.targets)
    batch = [torch.tensor(np.array(x)) for x in arrays]
    batch = [x.long() if x.dtype == torch.int32 else x for x in batch]
    loss = model(*batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(value), rel=1e-5)
    expected, found = named(slopes), dict(model.named_parameters())
    assert expected.keys() == found.keys()
    for name, slope in expected.items():
        assert np.abs(slope).max() > 1e-5, name
        np.testing.assert_allclose(
            found[name].grad, slope, rtol=1e-3, atol=1e-6, err_msg=name
        )

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multitask_jax import tree
from multitask_jax.tree import Depth

keys = st.text("abc.", min_size=1, max_size=3)
leaves = st.integers(0, 9)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=8,
)


@given(trees)
def test_unflatten_inverts_flatten(x):
    assert tree.unflatten(x, tree.flatten(x)) == x


def test_flatten_names_paths_in_order():
    x = {"b": [1, 2], "a": {"w": 3}}
    assert list(tree.flatten(x).items()) == [("a/w", 3), ("b/0", 1), ("b/1", 2)]
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        tree.flatten({"a/b": 1, "a": {"b": 2}})


def test_unflatten_tells_what_does_not_fit():
    with pytest.raises(ValueError, match=r"missing \['b'\], unexpected \['c'\]"):
        tree.unflatten({"a": 1, "b": 2}, {"a": 1, "c": 2})


def test_select():
    paths = ["embed/w", "block_0/mlp/w", "block_0/mlp/b"]
    assert tree.select(paths) == [True, True, True]
    assert tree.select(paths, include="mlp") == [False, True, True]
    assert tree.select(paths, include="mlp", exclude="b$") == [False, True, False]
    with pytest.raises(ValueError, match=r"include=.attn. matches none of 3 .*mlp"):
        tree.select(paths, include="attn")
    with pytest.raises(ValueError, match=r"exclude='\(' is not a regex"):
        tree.select(paths, exclude="(")


# Name -> (index, count) of the block, for each style of names.
STYLES = {
    "llama": {
        "model.embed_tokens.weight": None,
        "model.layers.0.self_attn.q_proj.weight": (0, 3),
        "model.layers.1.mlp.down_proj.weight": (1, 3),
        "model.layers.2.input_layernorm.weight": (2, 3),
        "model.norm.weight": None,
        "lm_head.weight": None,
    },
    "bert": {
        "embeddings.LayerNorm.bias": None,
        "encoder.layer.0.attention.output.LayerNorm.bias": (0, 2),
        "encoder.layer.1.attention.self.key.bias": (1, 2),
        "pooler.dense.weight": None,
    },
    "gpt2": {
        "transformer.wte.weight": None,
        "transformer.h.0.attn.c_attn.bias": (0, 12),
        **{f"transformer.h.{i}.mlp.c_fc.weight": (i, 12) for i in range(12)},
        "transformer.ln_f.weight": None,
    },
    "t5, a stack each": {
        "shared.weight": None,
        "encoder.block.0.layer.0.SelfAttention.k.weight": (0, 2),
        "encoder.block.1.layer.1.DenseReluDense.wi_0.weight": (1, 2),
        "encoder.final_layer_norm.weight": None,
        "decoder.block.0.layer.0.SelfAttention.k.weight": (0, 3),
        "decoder.block.1.layer.2.DenseReluDense.wo.weight": (1, 3),
        "decoder.block.2.layer.1.EncDecAttention.k.weight": (2, 3),
        "lm_head.weight": None,
    },
    "openclip, a stack each": {
        "visual.conv1.weight": None,
        "visual.transformer.resblocks.0.ln_1.bias": (0, 2),
        "visual.transformer.resblocks.1.mlp.c_fc.weight": (1, 2),
        "transformer.resblocks.0.attn.in_proj_weight": (0, 1),
        "text_projection": None,
    },
    "timm": {
        "patch_embed.proj.weight": None,
        "blocks.0.attn.qkv.weight": (0, 2),
        "blocks.1.mlp.fc1.weight": (1, 2),
        "norm.weight": None,
        "head.weight": None,
    },
    "timm swin": {
        "layers.0.blocks.0.attn.qkv.weight": (0, 3),
        "layers.0.blocks.1.attn.qkv.weight": (1, 3),
        "layers.1.downsample.norm.weight": None,
        "layers.1.blocks.0.attn.qkv.weight": (2, 3),
    },
    "convnext": {
        "stages.0.layers.0.dwconv.weight": (0, 3),
        "stages.1.layers.0.dwconv.weight": (1, 3),
        "stages.1.layers.1.dwconv.weight": (2, 3),
        "stages.1.downsampling_layer.0.weight": None,
    },
    "torchvision resnet": {
        "conv1.weight": None,
        "layer1.0.conv1.weight": (0, 3),
        "layer2.0.conv1.weight": (1, 3),
        "layer2.1.bn2.weight": (2, 3),
        "fc.weight": None,
    },
    "flax linen": {
        "params/Transformer/encoderblock_0/LayerNorm_0/scale": (0, 12),
        **{
            f"params/Transformer/encoderblock_{i}/MlpBlock_3/Dense_0/kernel": (i, 12)
            for i in range(12)
        },
        "params/Transformer/encoder_norm/scale": None,
        "params/head/kernel": None,
    },
    "flax hugging face": {
        "model/layers/0/self_attn/q_proj/kernel": (0, 2),
        "model/layers/1/self_attn/q_proj/kernel": (1, 2),
        "model/embed_tokens/embedding": None,
    },
    "numbers inside a block do not count": {
        "blk.0.mlp.3.w": (0, 4),
        "blk.1.mlp.0.w": (1, 4),
        "blk.2.mlp.1.w": (2, 4),
        "blk.3.mlp.0.w": (3, 4),
        "experts.3.w": None,
    },
    "mixture of experts": {
        "model.layers.0.block_sparse_moe.experts.7.w1.weight": (0, 2),
        "model.layers.1.block_sparse_moe.experts.0.w1.weight": (1, 2),
    },
    "a head of dense layers is no stack": {
        "encoder.layers.0.attn.weight": (0, 2),
        "encoder.layers.1.attn.weight": (1, 2),
        "box_head.layers.0.weight": None,
        "box_head.layers.1.weight": None,
    },
    "dense layers alone are blocks": {
        "layers_0/kernel": (0, 2),
        "layers_1/kernel": (1, 2),
    },
    "numbers with holes": {
        "layers.3.mlp.w": (0, 2),
        "layers.7.mlp.w": (1, 2),
    },
    "one block": {"layers.0.mlp.w": (0, 1), "embed.w": None},
}


@pytest.mark.parametrize("style", sorted(STYLES))
def test_block_depths(style):
    found = tree.block_depths(list(STYLES[style]))
    got = {p: d if d is None else d[1:] for p, d in found.items()}
    assert got == STYLES[style]


def test_block_pattern_overrides():
    paths = ["net.unit3.w", "net.unit5.w", "aux.unit0.w", "head.w"]
    assert tree.block_depths(paths, block_pattern=r"unit(\d+)\.") == {
        "net.unit3.w": Depth("net.unit", 0, 2),
        "net.unit5.w": Depth("net.unit", 1, 2),
        "aux.unit0.w": Depth("aux.unit", 0, 1),
        "head.w": None,
    }
    one = tree.block_depths(paths, block_pattern=r"(?P<stack>)unit(?P<index>\d+)")
    assert one["net.unit5.w"] == Depth("", 2, 3)
    template = tree.block_depths(
        ["a.layers.0.w", "a.layers.1.w", "sublayers.9.w"], block_pattern="layers.{i}."
    )
    assert template["a.layers.1.w"] == Depth("a.layers.", 1, 2)
    assert template["sublayers.9.w"] is None


def test_blocks_that_cannot_be_told_are_an_error_with_paths():
    with pytest.raises(ValueError, match=r"can't tell the blocks.*conv/w.*dense/w"):
        tree.block_depths(["conv/w", "dense/w"])
    with pytest.raises(ValueError, match="no group"):
        tree.block_depths(["layers.0.mlp.w"], block_pattern="layers")
    with pytest.raises(ValueError, match="expected digits"):
        tree.block_depths(["layers.x.mlp.w"], block_pattern=r"layers\.(\w)")


def test_lines_of_one_block_does_not_divide_by_zero():
    from multitask_jax import merging

    method = merging.with_lines(merging.task_arithmetic(), alpha=0.5, beta=1.0)
    base = {"layers_0": {"mlp": {"w": jnp.zeros(2)}}}
    out = merging.merge(method, base, [{"layers_0": {"mlp": {"w": jnp.ones(2)}}}])
    assert out["layers_0"]["mlp"]["w"].tolist() == [0.5, 0.5]

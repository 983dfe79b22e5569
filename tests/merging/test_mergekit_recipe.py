"""mergekit's YAML: what is understood, and how what is not is refused."""

import copy

import pytest

from multitask_jax.merging.mergekit import parameters, recipe

TIES = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [
        {"model": "a", "parameters": {"weight": 1, "density": [0.25, 0.75]}},
        {"model": "b"},
    ],
    "parameters": {"weight": [{"filter": "mlp", "value": 0.5}, {"value": 2}]},
    "dtype": "float32",
}
SLICES = {
    "merge_method": "passthrough",
    "slices": [
        {"sources": [{"model": "a", "layer_range": [0, 2]}]},
        {"sources": [{"model": "b", "layer_range": [1, 3]}]},
    ],
}


def changed(content, path, value):
    """A copy with the value at a path like ("models", 0, "model"); None removes it."""
    out = copy.deepcopy(content)
    at = out
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return out


def test_a_recipe():
    r = recipe.load(TIES)
    assert (r.method, r.base_model, r.dtype, r.out_dtype) == (
        "ties",
        "base",
        "float32",
        None,
    )
    assert r.whole
    (part,) = r.slices
    assert [s.model for s in part.sources] == ["a", "b"]
    assert part.sources[0].parameters["density"].entries == ((None, (0.25, 0.75)),)
    assert r.parameters["weight"].entries == (("mlp", (0.5,)), (None, (2.0,)))
    assert recipe.parse(r.text) == r


def test_slices():
    r = recipe.load(SLICES)
    assert not r.whole
    assert [s.sources[0].layers for s in r.slices] == [(0, 2), (1, 3)]


UNKNOWN = [
    (("merge_metod",), "ties", "merge_metod: unknown key; did you mean merge_method"),
    (("models", 0, "modle"), "a", r"models\[0\].modle: unknown key; did you mean mod"),
    (
        ("models", 1, "parameters"),
        {"wieght": 1},
        r"models\[1\].parameters.wieght: unknown key; did you mean weight",
    ),
    (
        ("models", 1, "parameters"),
        {"weight": [{"filtre": "mlp", "value": 1}]},
        r"models\[1\].parameters.weight\[0\].filtre: unknown key; did you mean filter",
    ),
    (("parameters", "lamda"), 1, "parameters.lamda: unknown key; did you mean lambda"),
    (("tokenizer",), {"sorce": "base"}, "tokenizer.sorce: unknown key; did you mean"),
    (("merge_method",), "tyes", "merge_method: got 'tyes'; did you mean ties"),
]


@pytest.mark.parametrize(("path", "value", "message"), UNKNOWN)
def test_unknown_keys_are_named(path, value, message):
    with pytest.raises(ValueError, match=message):
        recipe.load(changed(TIES, path, value))


WRONG = [
    (TIES, ("models",), [], "models: got list '\\[\\]', expected a list with entries"),
    (TIES, ("models", 0), "a", r"models\[0\]: got str 'a', expected a mapping"),
    (TIES, ("models", 0, "model"), 3, r"models\[0\].model: got int '3', expected text"),
    (TIES, ("parameters", "weight"), "heavy", "parameters.weight: got str 'heavy'"),
    (
        TIES,
        ("parameters", "weight"),
        True,
        "weight: got bool 'True', expected a number",
    ),
    (TIES, ("parameters", "weight"), [], "parameters.weight: got an empty gradient"),
    (TIES, ("parameters", "weight"), float("nan"), "weight: got float 'nan'"),
    (TIES, ("parameters", "weight"), [1, {"value": 1}], r"weight\[0\]: got int '1'"),
    (TIES, ("parameters", "weight"), [{"filter": "x"}], r"weight\[0\].value: got noth"),
    (TIES, ("parameters", "normalize"), 2, "normalize: got int '2', expected true or"),
    (TIES, ("parameters", "normalize"), [True, False], "normalize: got list"),
    (TIES, ("slices",), SLICES["slices"], "models, slices: got both"),
    (TIES, ("models",), None, "models, slices: got neither"),
    (TIES, ("modules",), {}, "modules: not supported"),
    (TIES, ("merge_method",), None, "merge_method: got nothing; expected one of l"),
    (TIES, ("parameters", "weight"), int("9" * 400), "weight: got int '999"),
    (TIES, ("base_model",), {"path": "a", "lora": "b"}, "base_model.lora: not supp"),
    (TIES, ("tokenizer",), {"tokens": {"<x>": {}}}, "tokenizer.tokens: not supported"),
    (SLICES, ("slices", 0, "residual_weight"), 0.5, r"slices\[0\].residual_weight"),
    (SLICES, ("slices", 0, "sources"), [], r"slices\[0\].sources: got list"),
    (
        SLICES,
        ("slices", 0, "sources", 0, "layer_range"),
        [2, 2],
        r"slices\[0\].sources\[0\].layer_range: got \[2, 2\], expected \[first, stop\)",
    ),
    (SLICES, ("slices", 1, "sources", 0, "layer_range"), None, "layer_range: got None"),
    (SLICES, ("slices", 1, "sources", 0, "layer_range"), [0, 1.5], r"got \[0, 1.5\]"),
]


@pytest.mark.parametrize(("content", "path", "value", "message"), WRONG)
def test_wrong_values_are_named(content, path, value, message):
    with pytest.raises(ValueError, match=message):
        recipe.load(changed(content, path, value))


def test_sources_of_a_slice_have_as_many_layers():
    source = {"model": "b", "layer_range": [0, 3]}
    content = copy.deepcopy(SLICES)
    content["slices"][0]["sources"].append(source)
    with pytest.raises(
        ValueError, match=r"slices\[0\].sources: layer_range of \[2, 3\]"
    ):
        recipe.load(content)


def test_keys_without_effect_are_told():
    content = changed(TIES, ("parameters", "int8_mask"), True)
    content = changed(content, ("chat_template",), "chatml")
    content = changed(content, ("name",), "mine")
    content = changed(content, ("parameters", "random_seed"), 0)
    content = changed(content, ("models", 0, "parameters", "gamma"), 0.1)
    content = changed(content, ("models", 0, "parameters", "lambda"), 0.1)
    notes = recipe.load(content).notes
    assert len(notes) == 6
    assert any("gamma: not a parameter of the method ties" in n for n in notes)
    assert any("lambda: not a parameter of one model in ties" in n for n in notes)


BAD = [
    ("", "the file: got nothing, expected a mapping"),
    ("- a\n- b\n", "the file: got list .*, expected a mapping"),
    ("just text", "the file: got str"),
    (
        "merge_method: ties\nmodels:\n\t- model: a\n",
        ":3: not valid YAML.*spaces, not t",
    ),
    ("merge_method: [ties\n", ":2: not valid YAML"),
    ("dtype: a\ndtype: b\n", ":2: the key 'dtype' occurs twice"),
    ("a: !!python/object:os.system {}\n", ":1: not valid YAML: could not determine"),
    ("&a [*a]\n", ":1: contains itself"),
    ("[" * 5000, "nested too deeply|not valid YAML"),
    ("a: 1\n---\nb: 2\n", "not valid YAML: but found another document"),
    ("\x07", "not valid YAML"),
    ("a: [1,\n 2024-13-45]", ":2: not a value of YAML: month must be in 1..12"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_bad_yaml(text, message, tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as e:
        recipe.load(path)
    assert str(path) in str(e.value)


def test_bombs_are_refused(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(ValueError, match=r"expands to more than 100,000 values"):
        recipe.parse("\n".join(lines))
    merges = ["a0: &a0 {k: 1}"]
    merges += [
        f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 9)
    ]
    with pytest.raises(ValueError, match=r"expands to more than 100,000 values"):
        recipe.parse("\n".join(merges))
    path = tmp_path / "huge.yml"
    path.write_text("# " + "x" * 1_000_001)
    with pytest.raises(ValueError, match=r"got 1,000,003 bytes, expected a recipe of"):
        recipe.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"not UTF-8"):
        recipe.load(path)
    with pytest.raises(ValueError, match=r"no such file"):
        recipe.load(tmp_path / "none.yml")


def test_switches_as_mergekit_reads_them():
    for value, want in ((1.0, True), ("true", True), (0, False), ("False", False)):
        r = recipe.load(changed(TIES, ("parameters", "normalize"), value))
        assert r.parameters["normalize"].entries == ((None, (want,)),)


def test_anchors_work():
    text = """
merge_method: linear
models:
- model: a
  parameters: &p {weight: 0.5}
- model: b
  parameters:
    <<: *p
"""
    sources = recipe.parse(text).slices[0].sources
    assert [s.parameters["weight"].entries for s in sources] == [((None, (0.5,)),)] * 2


def test_numbers_as_yaml_reads_them():
    r = recipe.parse(
        "merge_method: karcher\nmodels: [{model: a}]\nparameters: {tol: 1e-6}"
    )
    assert r.parameters["tol"].entries == ((None, (1e-6,)),)


# -- values ----------------------------------------------------------------------------


def setting(value):
    text = recipe.load(changed(TIES, ("parameters", "weight"), value))
    return text.parameters["weight"]


def test_gradients_by_hand():
    # [0, 1, 0.5] over 5 layers: positions 0, 1/4, 1/2, 3/4, 1.
    got = [
        parameters.evaluate(setting([0, 1, 0.5]), "w", parameters.layer_position(i, 5))
        for i in range(5)
    ]
    assert got == [0, 0.5, 1, 0.75, 0.5]
    assert parameters.evaluate(setting([3]), "w", 0.7) == 3
    assert parameters.evaluate(setting([1, 2]), "w", 1.0) == 2


def test_a_single_layer_is_at_the_end():
    assert parameters.layer_position(0, 1) == 1
    assert parameters.evaluate(setting([0, 1]), "w", 1.0) == 1


def test_filters_and_levels_by_hand():
    source = {"w": setting([{"filter": "attn", "value": [0, 1]}])}
    part = {
        "w": setting([{"filter": "mlp", "value": 3}, {"filter": "attn", "value": 4}])
    }
    top = {"w": setting([{"filter": "norm", "value": 5}, {"filter": "*", "value": 6}])}
    levels = (source, part, top)
    find = lambda name: parameters.lookup("w", levels, name, 0.25)  # noqa: E731
    assert find("layers.0.attn.q") == 0.25  # the source goes first
    assert find("layers.0.mlp.up") == 3  # no filter of the source: the slice
    assert find("layers.0.norm") == 5  # nor of the slice: the top
    assert find("embed") == 6
    assert parameters.lookup("w", (source, part), "embed", 0.25) is None
    # The first entry that matches wins, not the best one.
    first = setting([{"value": 1}, {"filter": "mlp", "value": 2}])
    assert parameters.evaluate(first, "mlp", 0.0) == 1


def test_a_filter_that_matches_nothing():
    s = setting([{"filter": "self_atn", "value": 1}, {"value": 0}])
    with pytest.raises(
        ValueError, match=r"parameters.weight: the filter 'self_atn' is in none of 2 n"
    ):
        parameters.check_filters([s], ["layers.0.self_attn.q", "embed"])
    parameters.check_filters([s], ["layers.0.self_atn.q", "embed"])

"""Every key of a config means what it means to transformers, or is refused by its name.

The keys are found, not listed: the fields of the family's config class, the names that
transformers' own source reads from a config, and other families' names for the same things. Each
is tried absent, null, at its default and at other values. What we take for a key that does nothing
must not change transformers' logits either.
"""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    cache_utils,
    configuration_utils,
    masking_utils,
    modeling_rope_utils,
    modeling_utils,
)
from transformers.initialization import no_init_weights
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from costmodel.families import family_named, family_names, spec_from_config
from costmodel.model.rotary_spec import ROTARY_KINDS
from costmodel.model.spec import ModelSpec
from executor.checkpoint.folder import Checkpoint
from executor.model.rotations import rotary_frequencies
from profiles.errors import InputError
from tests.executor.reference import ReferenceModel
from tests.executor.tiny_keys import ATTENTION, LLAMA3_ROPE
from tests.executor.tiny_models import save_tiny_model

# Longer than every window that is tried.
PROMPT = [(7 * i + 3) % 170 for i in range(24)]
ACTIVATIONS = ("silu", "relu", "gelu", "swish", "gelu_new", "tanh")
OTHER_VALUES: tuple[Any, ...] = (2, None, True, False, {})
ROPE_PLACES = ("rope_parameters", "rope_scaling")
Config = dict[str, Any]
# How many configs with changed keys must be followed, so that refusing all is no way to pass.
LEAST_ACCEPTED = 15
# Families that take fewer configs of rotations: Phi no scaling but one with lists, which these
# configs do not have, and Mellum none without a set for each kind of layer.
FEW_ROTATIONS = {"phi3": 15, "phimoe": 15, "mellum": 5}


class Folder:
    """A tiny checkpoint whose config is written anew for each question about it.

    ``refused`` are keys that mean nothing to us, and at which transformers failed to make a model.
    """

    refused: ClassVar[set[str]] = set()

    def __init__(self, path: Path, family: str) -> None:
        self.path, self.family = path, family
        model = save_tiny_model(path, family, num_layers=1)
        self.model_class, self.config_class = type(model), type(model.config)
        self.weights = model.state_dict()
        # Some families have keys of rotary positions for each kind of layer.
        self.has_rotations_by_kind = "full_attention" in (
            getattr(self.config_class(), "rope_parameters", None) or {}
        )
        self.base: Config = json.loads((path / "config.json").read_text())

    def ours(self, config: Config) -> ModelSpec | None:
        """What we read out of a config, or ``None`` where it or the prompt is refused."""
        try:
            spec = spec_from_config(config, name="tiny")
            return spec if spec.max_positions > 24 else None
        except InputError as error:
            assert "\n" not in str(error)
            return None

    def our_logits(self, config: Config) -> torch.Tensor | None:
        """``None`` where the config or the weights are refused."""
        self._write(config)
        try:
            return ReferenceModel(Checkpoint.open(self.path)).logits(PROMPT)
        except InputError:
            return None

    def logits(self, config: Config) -> torch.Tensor | None:
        """transformers' own; ``None`` where it refuses, or makes up weights that are not there.

        The config is read as ``from_pretrained`` reads it. The weights are those of memory: their
        files take most of its time.
        """
        self._write(config)
        try:
            with no_init_weights():
                model = AutoModelForCausalLM.from_config(
                    AutoConfig.from_pretrained(
                        self.path, attn_implementation=ATTENTION.get(self.family, "eager")
                    )
                )
            missing = set(model.load_state_dict(self.weights, strict=False).missing_keys)
            # Ties what the weights leave open, and takes it from what is missing.
            model.tie_weights(missing_keys=missing, recompute_mapping=False)
            with torch.inference_mode():
                out = model.eval()(torch.tensor([PROMPT]), return_dict=True).logits[0].float()
        except Exception:  # whatever it raises, it does not take this config
            return None
        return None if missing else out

    def takes(self, config: Config) -> bool:
        """Whether transformers' class takes a config."""
        try:
            self.config_class(**copy.deepcopy(config))
        except Exception:
            return False
        return True

    def _write(self, config: Config) -> None:
        (self.path / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module", params=family_names())
def folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Folder]:
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    # So small a model is slower with more.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Folder(tmp_path_factory.mktemp(request.param), request.param)
    torch.set_num_threads(threads)


def field_defaults(config_class: type) -> Config:
    """Every key that the class declares, with what it takes where the key is absent."""
    found = {}
    for field in fields(config_class):
        if field.default is not MISSING:
            found[field.name] = field.default
    return found


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """Names that a source file of transformers reads from a config."""
    text = path.read_text()
    patterns = (
        r"config\.([a-z_][a-z0-9_]*)\b(?!\()",
        r"""config, ["'](\w+)["']""",
        r"""(?:kwargs|config_dict)(?:\.\w+\(|\[)["'](\w+)["']""",
        r"""hasattr\(self, ["'](\w+)["']""",
    )
    return frozenset(name for pattern in patterns for name in re.findall(pattern, text))


def names_read(family: str) -> set[str]:
    """Names that transformers' source reads from a config, wherever it does."""
    folder = Path(transformers.__file__).parent / "models" / family.removesuffix("_text")
    modules = (
        configuration_utils,
        modeling_rope_utils,
        modeling_utils,
        masking_utils,
        cache_utils,
    )
    paths = [*folder.glob("*.py"), *(Path(str(module.__file__)) for module in modules)]
    found = {name for path in paths for name in names_in(path)}
    classes = (transformers.GPT2Config, transformers.BloomConfig, transformers.FalconConfig)
    for other in classes:
        found.update(other.attribute_map)
        found.update(other.attribute_map.values())
    return found - {"model_type"}


def other_values(default: Any) -> tuple[Any, ...]:
    """Values that are not the default, one of another type among them."""
    if isinstance(default, bool):
        return not default, 2
    if isinstance(default, int):
        return default * 2, max(1, default // 2), str(default)
    if isinstance(default, float):
        return default * 2, int(default) + 1, "0.5"
    return (*ACTIVATIONS, 2) if default in ACTIVATIONS else OTHER_VALUES


def variants(folder: Folder) -> Iterator[tuple[str, Config]]:
    """Yield each key with a config that says something else of it."""
    base, defaults = folder.base, field_defaults(folder.config_class)
    for key, default in defaults.items():
        yield key, {k: v for k, v in base.items() if k != key}
        for value in (None, default, *other_values(base.get(key, default))):
            yield key, base | {key: value}
    for key in sorted(names_read(folder.family) - set(defaults)):
        for value in OTHER_VALUES:
            yield key, base | {key: value}


def windowed(base: Config) -> Iterator[Config]:
    """Yield configs with keys that act together."""
    for kind in ("full_attention", "attention", "sliding_attention"):
        for more in ({}, {"sliding_window": 8}, {"sliding_window": 8, "use_sliding_window": True}):
            yield base | {"layer_types": [kind]} | more
    for first, window in itertools.product((0, 1, 2), (8, None)):
        windows = {"max_window_layers": first, "sliding_window": window}
        yield base | windows | {"use_sliding_window": True, "layer_types": None}


def test_defaults_are_those_of_transformers(folder: Folder) -> None:
    theirs = field_defaults(folder.config_class)
    ours = dict(family_named(folder.family).defaults)
    # Some keys are no fields of the class; the model reads them where they are there.
    assert set(ours) - set(theirs) <= names_read(folder.family)
    assert {key: theirs.get(key) for key in ours} == ours


def test_every_key_means_what_it_does_to_transformers(folder: Folder) -> None:
    expected, plain = folder.logits(folder.base), folder.ours(folder.base)
    assert expected is not None
    by_key: dict[str, list[tuple[Config, Any]]] = {}
    for key, config in variants(folder):
        by_key.setdefault(key, []).append((config, folder.ours(config)))
    # A key that we read must be refused wherever transformers refuses it.
    read = {key for key, found in by_key.items() if any(ours != plain for _, ours in found)}
    changed = [c for found in by_key.values() for c, ours in found if ours not in (None, plain)]
    verdicts = [(c, agrees(folder, c)) for c in (*changed, *windowed(folder.base))]
    accepted = [config for config, verdict in verdicts if verdict]
    assert len(accepted) >= LEAST_ACCEPTED
    wrong = [
        {k: v for k, v in config.items() if folder.base.get(k, "absent") != v}
        for config, verdict in verdicts
        if verdict is False
    ]
    idle = [[(k, c) for c, ours in found if ours == plain] for k, found in by_key.items()]
    for group in itertools.zip_longest(*idle):
        cases = [case for case in group if case and case[0] in read]
        cases += taken(folder, [c for c in group if c and c[0] not in read | folder.refused])
        wrong += [
            {key: config.get(key, "absent")}
            for key, config in culprits(folder, cases, expected, read)
        ]
    assert not wrong, wrong


def agrees(folder: Folder, config: Config) -> bool | None:
    """Whether we have transformers' logits; ``None`` where we refuse a config."""
    ours = None if folder.ours(config) is None else folder.our_logits(config)
    if ours is None:
        return None
    theirs = folder.logits(config)
    return theirs is not None and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def taken(folder: Folder, cases: Sequence[tuple[str, Config]]) -> list[tuple[str, Config]]:
    """Keep the cases that the class takes: all at once, where it takes them so.

    It has no need to take a case by itself. What it takes beside others is tried in any event.
    """
    if not cases or folder.takes(together(folder, cases)):
        return list(cases)
    if len(cases) == 1:
        return []
    half = len(cases) // 2
    return taken(folder, cases[:half]) + taken(folder, cases[half:])


def together(folder: Folder, cases: Sequence[tuple[str, Config]]) -> Config:
    """Return the config that says what each case says of its key."""
    config = dict(folder.base)
    for key, case in cases:
        config.pop(key, None)
        config |= {key: case[key]} if key in case else {}
    return config


def culprits(
    folder: Folder, cases: Sequence[tuple[str, Config]], expected: torch.Tensor, read: set[str]
) -> list[tuple[str, Config]]:
    """Find the keys that change transformers' logits, of many that are set at once."""
    found = folder.logits(together(folder, cases)) if cases else expected
    if found is not None and torch.allclose(found, expected, rtol=1e-5, atol=1e-5):
        return []
    if len(cases) > 1:
        half = len(cases) // 2
        parts = cases[:half], cases[half:]
        return [case for part in parts for case in culprits(folder, part, expected, read)]
    if found is None and cases[0][0] not in read:
        # What transformers refuses has no meaning that we could miss.
        folder.refused.add(cases[0][0])
        return []
    return list(cases)


def rope_configs(folder: Folder) -> Iterator[Config]:
    """Yield configs with each key of rotary positions at each of its places."""
    base = folder.base
    # The second one has bases of its own for each layer.
    plain = {k: v for k, v in base.items() if k not in ("rope_parameters", "layer_rope_theta")}
    kinds = ("default", *ROPE_INIT_FUNCTIONS)
    # Numbers that a family needs beside those of the rotation itself.
    own = {
        key: value
        for key, value in (base.get("rope_parameters") or {}).items()
        if key not in RopeParameters.__annotations__ and not isinstance(value, dict)
    }
    whole = {kind: own | LLAMA3_ROPE | {"rope_type": kind, "rope_theta": 5e4} for kind in kinds}
    for place, kind in itertools.product(ROPE_PLACES, kinds):
        found = whole[kind]
        yield plain | {place: found}
        yield plain | {
            place: {"type": kind, **{k: v for k, v in found.items() if k != "rope_type"}}
        }
        # One family for all: they share the code that reads these keys, here and there.
        is_whole = kind in ROTARY_KINDS and folder.family == "llama"
        for key in RopeParameters.__annotations__ if is_whole else ():
            less = {k: v for k, v in found.items() if k != key}
            yield plain | {place: less}
            for value in (None, 2.5, 64, "2"):
                yield plain | {place: found | {key: value}}
                # At the top of the config, where the key is elsewhere too and where it is not.
                yield plain | {place: found, key: value}
                yield plain | {place: less, key: value}
    for old, new in itertools.product(kinds, kinds):
        for theta in ({}, {"rope_theta": 3e4}):
            bare = {k: v for k, v in whole[old].items() if k != "rope_theta"}
            yield plain | {"rope_scaling": bare, "rope_parameters": whole[new]} | theta
    empties: tuple[Any, ...] = (None, {}, [], 0)
    for empty in empties:
        yield plain | {"rope_scaling": empty, "rope_parameters": whole["linear"]}
        yield plain | {"rope_scaling": whole["linear"], "rope_parameters": empty}
        yield plain | {"rope_parameters": empty, "rope_theta": 3e4}


def test_rotary_frequencies_are_those_of_transformers(folder: Folder) -> None:
    plain = folder.ours(folder.base)
    assert plain is not None
    if plain.layer(0).attention.rotary is None:
        pytest.skip("has no rotary positions")
    if folder.family in ("codegen", "gptj"):
        pytest.skip("has one fixed rotation, whatever these keys say")
    # Some families have Llama's model with a config of their own.
    module = importlib.import_module(folder.model_class.__module__)
    stem = folder.model_class.__name__.removesuffix("ForCausalLM")
    names = f"{stem}RotaryEmbedding", f"{stem}TextRotaryEmbedding"
    rotary_class = next(getattr(module, name) for name in names if hasattr(module, name))
    compared = 0
    for config in rope_configs(folder):
        config = by_layer_kind(folder, config)
        ours = folder.ours(config)
        if ours is None:
            continue
        attention = ours.layer(0).attention
        assert attention.rotary is not None
        made = folder.config_class(**copy.deepcopy(config))
        rotary = rotary_class(made)
        prefix = f"{made.layer_types[0]}_" if hasattr(rotary, "layer_types") else ""
        dim = attention.rotary.dim or attention.head_dim
        frequencies = rotary_frequencies(attention.rotary, dim, torch.device("cpu"))
        expected = getattr(rotary, f"{prefix}inv_freq")
        torch.testing.assert_close(frequencies, expected, msg=json.dumps(config))
        scaling = getattr(rotary, f"{prefix}attention_scaling")
        assert attention.rotary.attention_factor == pytest.approx(scaling)
        compared += 1
    assert compared > FEW_ROTATIONS.get(folder.family, 30)


def by_layer_kind(folder: Folder, config: Config) -> Config:
    """Name the keys of rotary positions for each kind of layer, where the family does so."""
    found = config.get("rope_parameters")
    if not found or not folder.has_rotations_by_kind:
        return config
    kinds = "full_attention", "sliding_attention"
    return config | {"rope_parameters": {kind: copy.deepcopy(found) for kind in kinds}}

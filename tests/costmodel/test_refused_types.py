"""Every model type of transformers either runs, or is refused by the mechanism that it needs."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from transformers.models.auto import modeling_auto

from costmodel.families import family_names, spec_from_config
from costmodel.families._refused import REFUSED
from costmodel.families._text_parts import TEXT_PARTS
from costmodel.model.loading import load_model_spec
from executor.checkpoint.folder import Checkpoint
from profiles.errors import InputError

# What people may take for a language model: decoders, encoders, and models with other inputs.
KINDS = sorted(
    {
        *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    }
)


def test_a_model_runs_or_is_refused_by_its_mechanism() -> None:
    refused = [kind for kind in KINDS if kind not in {*family_names(), *TEXT_PARTS}]
    assert [kind for kind in refused if kind not in REFUSED] == []
    assert not REFUSED.keys() & {*family_names(), *TEXT_PARTS}
    for kind in refused:
        mechanism, nearest = REFUSED[kind]
        told = f"{kind!r}, which needs {mechanism}; .*; try: a model of {nearest}, the nearest"
        with pytest.raises(InputError, match=re.escape(told).replace(r"\.\*", ".*")):
            spec_from_config({"model_type": kind}, name="tiny")


def test_encoders_and_encoder_decoders_are_refused_by_their_mechanism() -> None:
    for kind, mechanism in (("t5", "an encoder beside"), ("modernbert", "later tokens")):
        with pytest.raises(InputError, match=mechanism):
            spec_from_config({"model_type": kind}, name="tiny")


def test_the_nearest_family_runs() -> None:
    assert {nearest for _, nearest in REFUSED.values()} <= set(family_names())


def test_a_misspelt_type_names_those_that_are_close() -> None:
    with pytest.raises(InputError, match=r"got 'qwen_3'; allowed: .*; try: .*qwen3"):
        spec_from_config({"model_type": "qwen_3"}, name="tiny")


def test_a_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    # Python writes infinities into this family's configs.
    config = {"model_type": "mamba2", "time_step_limit": [0.0, math.inf]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (load_model_spec, lambda folder: Checkpoint.open(Path(folder))):
        with pytest.raises(InputError, match="'mamba2', which needs state-space layers") as caught:
            load(str(tmp_path))
        assert "\n" not in str(caught.value)

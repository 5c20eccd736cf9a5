"""What captioners are asked: templates by name, what they may hold, and which of it makes other captions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from urbanclip_ray.config import CaptionConfig
from urbanclip_ray.config.prompts import FIELDS, PromptFieldError, check_template, fill_template, packaged_prompts

MODEL = {"captioner": "transformers", "model": "m"}
COCA = {"captioner": "coca", "model": "w"}
ENDPOINT = {"captioner": "openai", "model": "m", "revision": "r", "endpoint": "https://host/v1"}
EVERYTHING = {"city": "Basel", "width_m": "610", "ground_resolution_m": "2.4"}


def test_the_templates_of_the_package_can_be_filled_for_a_tile_of_which_nothing_is_known_and_name_no_city():
    assert list(packaged_prompts()) == ["overview", "buildings", "roads", "vegetation_and_water", "human_activity"]
    for name, template in packaged_prompts().items():
        check_template(name, template)
        alone = fill_template(template, {})
        assert alone.isascii()
        assert not set("[]{}\n") & set(alone)
        assert "Basel" not in fill_template(template, EVERYTHING)
    told = fill_template(packaged_prompts()["overview"], EVERYTHING)
    assert "this satellite image, which is about 610 metres wide, in a few sentences" in told


@pytest.mark.parametrize(
    ("template", "known", "prompt"),
    [
        ("Describe {city}.", {"city": "Basel"}, "Describe Basel."),
        ("What[ in {city}][, {width_m} m wide]?", {"city": "Basel"}, "What in Basel?"),
        ("What[ in {city}, {width_m} m]?", {"city": "Basel"}, "What?"),
        ("{{city}} [[x]] {city}", {"city": "Basel"}, "{city} [x] Basel"),
        ("{city}", {"city": "{width_m} [[{0.__class__}]]"}, "{width_m} [[{0.__class__}]]"),  # data, not a template
        ("no field", {}, "no field"),
    ],
)
def test_a_template_is_filled_with_what_is_known(template, known, prompt):
    check_template("x", template)
    assert fill_template(template, known) == prompt


def test_a_field_outside_of_brackets_must_be_known():
    with pytest.raises(PromptFieldError, match=r"\{width_m\}, which is not known.*in \[brackets\]"):
        fill_template("{city} is {width_m} m wide", {"city": "Basel"})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{town}", r"\{town\} is no field; there are city, width_m"),
        ("{city.__class__}", "must be a plain name"),
        ("{city[0]}", "must be a plain name"),
        ("{city!r}", "must be a plain name"),
        ("{width_m:>9999999999}", "must be a plain name"),
        ("{}", "must be a plain name"),
        ("{0}", "must be a plain name"),
        ("{city", "write {{ and }} for braces"),
        ("city}", "write {{ and }} for braces"),
        ("[in {city}", r"write \[\[ and \]\] for brackets"),
        ("a ]", r"write \[\[ and \]\] for brackets"),
        ("[in {ci]ty}", "plain name"),
        ("  ", "is empty"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused_with_its_name(template, message):
    with pytest.raises(ValidationError, match=message) as caught:
        CaptionConfig(**MODEL, prompts=("mine",), templates={"mine": template})
    assert "'mine'" in str(caught.value)


@given(st.text("ab{}[]:!.0", max_size=12))
def test_a_template_that_is_accepted_can_be_filled(template):
    try:
        check_template("x", template)
    except ValueError:
        return  # refused: only what is accepted is asked about
    fill_template(template, dict.fromkeys(FIELDS, "v"))
    fill_template(template, {})  # no field can be made of these letters


def test_an_unknown_and_a_repeated_prompt_are_refused():
    with pytest.raises(ValidationError, match="no template 'forests': choose of overview, buildings"):
        CaptionConfig(**MODEL, prompts=("forests",))
    with pytest.raises(ValidationError, match="ask the same twice"):
        CaptionConfig(**MODEL, prompts=("roads", "overview", "roads"))


def test_prompts_stand_in_the_place_of_the_prompt_in_their_order():
    config = CaptionConfig(**MODEL, prompts=("roads", "mine"), templates={"mine": "Trees?"}, prompt="{not} [a] template")
    assert config.asked() == (packaged_prompts()["roads"], "Trees?")
    assert CaptionConfig(**MODEL, prompt="{not} [a] template").asked() == ("{not} [a] template",)


def test_what_is_asked_is_content_and_its_name_is_not():
    plain = CaptionConfig(**MODEL).content()
    assert not {"prompts", "templates"} & set(plain)  # as it was before there were any
    one = CaptionConfig(**MODEL, prompts=("a",), templates={"a": "Trees?"}).content()
    assert one == CaptionConfig(**MODEL, prompts=("b",), templates={"b": "Trees?"}, prompt="unused").content()
    assert one != CaptionConfig(**MODEL, prompts=("a",), templates={"a": "Roads?"}).content()
    assert one != plain


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"endpoint": ""}, "needs caption.endpoint"),
        ({"revision": ""}, "an endpoint does not tell its weights"),
        ({"model": ""}, "caption.model"),
        ({"endpoint": "https://me:secret@host/v1"}, "without keys, user names"),
        ({"endpoint": "https://host/v1?key=secret"}, "without keys, user names and queries"),
        ({"endpoint": "ftp://host/v1"}, "https://host/v1"),
        ({"endpoint": "file:///etc/passwd"}, "https://host/v1"),
        ({"api_key_variable": "sk-123"}, "the key or secret itself has no place here"),
        ({"decoding": {"num_beams": 2}}, "num_beams=1"),
    ],
)
def test_an_endpoint_is_described_in_full_and_without_secrets(keys, message):
    with pytest.raises(ValidationError, match=message):
        CaptionConfig(**ENDPOINT | keys)


def test_how_an_endpoint_is_asked_is_not_content():
    other = {"endpoint": "http://h:1/v1", "api_key_variable": "", "requests_per_minute": 9, "concurrent_requests": 1}
    assert CaptionConfig(**ENDPOINT).content() == CaptionConfig(**ENDPOINT | other | {"request_timeout_s": 1}).content()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": ""}, "needs caption.model: a run, a pretraining, or a folder"),
        ({"revision": "main"}, "are known by their content; leave it out"),
        ({"prompt": "What is there?"}, "is asked nothing.*leave out caption.prompts and caption.prompt"),
        ({"prompts": ("roads",)}, "is asked nothing"),
        ({"device_map": "auto"}, "leave out caption.device_map"),
        ({"decoding": {"num_beams": 2, "temperature": 1.0}}, "set caption.decoding.temperature=0, or num_beams=1"),
    ],
)
def test_keys_that_mean_nothing_to_a_coca_are_refused_with_what_to_do(keys, message):
    with pytest.raises(ValidationError, match=message):
        CaptionConfig(**COCA | keys)


def test_a_coca_is_asked_nothing_and_its_prompt_is_not_content():
    config = CaptionConfig(**COCA)
    assert config.asked() == ("",)
    assert config.content() == CaptionConfig(**COCA | {"model": "elsewhere", "prompt": ""}).content()
    assert config.content() != CaptionConfig(**COCA, decoding={"num_beams": 2}).content()
    assert config.has_weights
    assert not config.takes_prompt
    assert CaptionConfig(**MODEL).takes_prompt

"""Each rule rejects what it is for and nothing like it; what a rule file must be; hostile text costs no time."""

from __future__ import annotations

import pickle
import time

import pytest
from PIL import Image

from urbanclip_ray.captioners.base import Tile
from urbanclip_ray.captioners.land_cover import LandCoverCaptioner
from urbanclip_ray.captioners.refine import Standard, refine_sentences
from urbanclip_ray.captioners.rules import CHECKS, Rules, load_rules
from urbanclip_ray.captioners.sentence_checks import NOWHERE, Place
from urbanclip_ray.config import ConfigError, PixelsConfig, RefineConfig

RULES = Rules(load_rules(""), ("all",), "en")
BEIJING = Place("Beijing", 116.4, 39.9, m_per_px=3.1, side_m=790.0)
FINE = Place("zip98101", -122.3, 47.6, m_per_px=0.3, side_m=77.0)


@pytest.mark.parametrize(
    ("sentence", "reason"),
    [
        ("As an AI language model, I cannot see the image.", "boilerplate"),
        ("Sure! Here is a description of the image.", "boilerplate"),
        ("Here is a detailed description of the satellite image.", "boilerplate"),
        ("Describe the land use of this satellite image in a few sentences.", "boilerplate"),
        ("The aerial view provides a comprehensive overview of the city's layout.", "empty praise"),
        ("The overall scene captures the essence of a bustling urban environment.", "empty praise"),
        ("The presence of trees in the field adds a touch of nature to the scene.", "presence of something"),
        ("The sky is blue and there are buildings.", "sky or weather"),
        ("There are no buildings in the area.", "not there"),
        ("The building might be a school.", "guess"),
        ("It appears that the area is wealthy.", "guess"),
        ("There are several cars and trucks on the streets, indicating that it is busy.", "too small to be seen"),
        ("The scene also includes a few people walking around.", "too small to be seen"),
        ("A truck can also be seen on the highway.", "too small to be seen"),
        ("The city is bustling with activity.", "mood"),
        ("The houses were built in the 19th century.", "unseen claim"),
        ("Houses here are expensive and prices rise.", "unseen claim"),
        ("The main road is called Broadway and has shops.", "unseen claim"),
        ("Le fleuve traverse la ville et ses quartiers denses.", "other language"),
        ("图像显示了一个城市和一条河流", "other language"),
        ("A road with trees, a road with trees, a road with trees, a road with trees.", "repeated words"),
        ("houses houses houses houses houses", "repeated words"),
        ("A dense part of Shanghai with a river.", "another place"),
        ("The image has a resolution of 30 m.", "wrong scale"),
        ("A river of 50 km runs through the tile.", "wrong scale"),
    ],
)
def test_each_rule_has_its_reason(sentence, reason):
    assert RULES.reason(sentence, BEIJING) == reason


@pytest.mark.parametrize(
    "sentence",
    [
        "The image features a city street with houses.",
        "The image is a satellite view of a large city with a mix of residential and commercial buildings.",
        "The image shows a large airport with a runway and several airplanes parked on the tarmac.",
        "The field is surrounded by mountains, creating a picturesque landscape.",
        "The parking lot is filled with numerous cars.",
        "The river is surrounded by a lush green forest, adding to the serene atmosphere.",
        "The image is a bird's eye view of a city, featuring a large body of water, possibly a river.",
        "There are several boats on the water, adding to the lively atmosphere.",
        "The area appears to be a mix of agricultural and residential land.",
        "A dense forest.",
        "Green fields",
        "two baseball diamonds",
        "It is a port .",
        "A dense part of Beijing with a river.",
        "A road of 500 m crosses the tile.",
    ],
)
def test_what_says_something_of_the_tile_is_kept(sentence):
    assert RULES.reason(sentence, BEIJING) is None


def test_what_is_too_small_depends_on_the_tile_s_scale():
    cars, people = "There are several cars parked near the houses.", "There are several people near the houses."
    assert RULES.reason(cars, BEIJING) == RULES.reason(people, BEIJING) == "too small to be seen"
    assert RULES.reason(cars, FINE) is None
    assert RULES.reason(people, FINE) == "too small to be seen"
    assert RULES.reason(cars, NOWHERE) is None  # doubt speaks for the sentence
    assert RULES.reason("There are several boats near the shore.", Place(m_per_px=30.0)) is None  # no size is known of a boat


def test_a_place_is_judged_by_coordinates_and_else_by_the_region_s_name():
    sentence = "A dense part of Shanghai with a river."
    assert RULES.reason(sentence, Place("Shanghai")) is None
    assert RULES.reason(sentence, Place("beijing")) == "another place"
    assert RULES.reason(sentence, Place("tiles_7")) is None  # nothing says where that is
    assert RULES.reason(sentence, Place("tiles_7", 121.4, 31.2)) is None
    assert RULES.reason(sentence, Place("Shanghai", 116.4, 39.9)) == "another place"


def test_rules_are_switched_on_by_name():
    only = Rules(RULES.file, ("mood", "other language"), "en")
    assert only.reason("The city is bustling with activity.", BEIJING) == "mood"
    assert only.reason("As an AI language model, I cannot see the image.", BEIJING) is None
    with pytest.raises(ConfigError, match=r"refine\.rules has 'moods', but there are .*mood.* and all"):
        Rules(RULES.file, ("moods",), "en")


def test_another_language_can_be_asked_for():
    french = Rules(RULES.file, ("other language",), "fr")
    assert french.reason("Le fleuve traverse la ville et ses quartiers denses.") is None
    assert french.reason("There are many green trees and several buildings near the road.") == "other language"


def test_the_last_sentence_without_a_closing_mark_was_cut_off_where_others_have_one():
    standard = Standard(Rules(RULES.file, ("cut off",), "en"))
    whole, cut = "A wide river with a bridge.", "The houses along the"
    assert refine_sentences([whole, cut], RefineConfig(), standard) == ([whole], [(cut, "cut off")])
    assert refine_sentences([cut, whole], RefineConfig(), standard)[1] == []
    plain = ["many green trees", "two long roads"]  # somebody who writes no full stops
    assert refine_sentences(plain, RefineConfig(), standard) == (plain, [])


def test_rules_travel_to_workers_and_have_a_digest_of_their_content():
    again = pickle.loads(pickle.dumps(RULES))
    assert again.reason("The city is bustling with activity.", BEIJING) == "mood"
    assert again.content() == RULES.content()
    changed = RULES.file.model_copy(update={"tail": RULES.file.tail + "|, xyz"})
    assert Rules(changed, ("all",), "en").content() != RULES.content()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lead: [", "holds no rules"),
        ("- a\n- b", "is not a mapping"),
        ("lead: a\ntail: b", "rules: Field required"),
        ("lead: a\ntail: b\nrules: []\nother: 1", "other: Extra inputs"),
        ("lead: a\ntail: b\nrules: [{reason: x, patterns: ['(']}]", "holds no rules"),
        ("lead: a\ntail: '('\nrules: []", "holds no rules"),
        ("lead: a\ntail: b\nrules: [{reason: x, patterns: ['{nothing} here']}]", "is no list above it"),
        ("lead: a\ntail: b\nrules: [{reason: x, patterns: [a]}, {reason: x, patterns: [b]}]", "is taken"),
        ("lead: a\ntail: b\nrules: [{reason: cut off, patterns: [a]}]", "is taken"),
        ("lead: !!python/object/apply:os.system ['true']\ntail: b\nrules: []", "holds no rules"),
    ],
)
def test_a_file_that_holds_no_rules_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"mine\.yaml.*{message}|{message}"):
        load_rules(str(path))


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"refine\.rules_file=.*none\.yaml is not there"):
        load_rules(str(tmp_path / "none.yaml"))


def test_a_file_of_one_s_own_is_used(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "lead: 'well, '\ntail: ', so'\nlists: {colour: [red, blue]}\nrules: [{reason: bright, patterns: ['{colour}']}]"
    )
    rules = Rules(load_rules(str(path)), ("all",), "en")
    assert set(rules.names) == {*CHECKS, "bright"}
    assert rules.reason("A red roof in the middle of the tile.") == "bright"
    assert rules.reason("A roof in the middle of the tile, so it may be blue.") is None


def test_no_sentence_of_the_rule_based_captioner_breaks_a_rule():
    captioner = LandCoverCaptioner()
    for colour in [(30, 90, 30), (120, 200, 90), (200, 180, 120), (250, 250, 250), (120, 120, 120), (10, 20, 80)]:
        image = Image.new("RGB", (64, 64), colour)
        image.paste((90, 90, 95), (0, 0, 64, 20))
        for sentence in captioner.describe([_tile(image)])[0][0].split(". "):
            assert RULES.reason(sentence, BEIJING) is None, sentence


def _tile(image):
    import io

    stream = io.BytesIO()
    image.save(stream, "PNG")
    return Tile("r/a", stream.getvalue(), PixelsConfig())


@pytest.mark.parametrize(
    "text",
    [
        "a" * 100_000,
        "the city is " * 8_000,
        "There are " + "several " * 10_000 + "cars",
        "\x00" * 50_000,
        "\u202e" * 50_000,
        "<script>alert(1)</script>" * 4_000,
        ("The image " + "and the presence of a " * 85)[:1999],
        ("There are several numerous many " * 62)[:1999],
        (", indicating" * 200)[:1999],
    ],
)
def test_hostile_text_is_judged_in_no_time(text):
    start = time.process_time()
    RULES.reason(text, BEIJING)
    refine_sentences([text], RefineConfig(), Standard(RULES), BEIJING)
    assert time.process_time() - start < 5

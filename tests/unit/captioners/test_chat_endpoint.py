"""The captioner `openai` against a server that answers well, late, by halves, with nonsense, or not at all."""

from __future__ import annotations

import base64
import io
import json
import logging
import socket
import time

import numpy as np
import pytest
from hostile_endpoint import Answer, says, serve
from PIL import Image

from urbanclip_ray.captioners.back_ends import load_captioner, origin_of
from urbanclip_ray.captioners.base import Tile, UnusableCaptionerError
from urbanclip_ray.captioners.chat_endpoint import EndpointError, RequestRate
from urbanclip_ray.captioners.model_files import resolve_model
from urbanclip_ray.config import CaptionConfig, PixelsConfig
from urbanclip_ray.imagery import TileImageError

KEY = "sk-a-secret-that-nobody-may-see"
VARIABLE = "CAPTION_TEST_KEY"


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv(VARIABLE, KEY)


def tile(name: str, prompt: str = "describe this", **crop: int) -> Tile:
    pixels = np.random.default_rng(len(name)).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return Tile(name, stream.getvalue(), PixelsConfig(**crop), prompt)


TILES = [tile(name, f"what is {name}?") for name in ("a", "bb", "ccc", "dddd")]


def make_config(url: str, **keys) -> CaptionConfig:
    keys = {"request_retries": 0, "request_timeout_s": 20.0, "num_actors": 1, "api_key_variable": VARIABLE} | keys
    return CaptionConfig(captioner="openai", endpoint=url, model="m", revision="2026-11", **keys)


def make_captioner(url: str, **keys):
    config = make_config(url, **keys)
    return load_captioner(config, resolve_model(config))


def repeat(_: int, request) -> Answer:
    return says(f"You asked: {request.prompt}")


def test_every_tile_is_asked_its_prompt_with_its_own_pixels_and_the_answers_keep_their_order():
    with serve(repeat) as endpoint:
        described = make_captioner(endpoint.url).describe([*TILES, tile("e", "cut", crop_left_px=10)])
    assert described == [[f"You asked: what is {each.tile_id}?"] for each in TILES] + [["You asked: cut"]]
    by_prompt = {request.prompt: request for request in endpoint.requests}
    assert len(by_prompt) == 5
    request = by_prompt["what is a?"]
    assert request.body["model"] == "m"
    assert (request.body["max_completion_tokens"], request.body["temperature"]) == (128, 0)
    assert "seed" not in request.body
    assert request.headers["authorization"] == f"Bearer {KEY}"
    head, _, data = request.image_url.partition(",")
    assert head == "data:image/png;base64"
    sent = Image.open(io.BytesIO(base64.b64decode(data)))
    assert np.array_equal(np.asarray(sent), np.asarray(TILES[0].rgb()))
    cut = Image.open(io.BytesIO(base64.b64decode(by_prompt["cut"].image_url.partition(",")[2])))
    assert cut.size == (6, 12)


def test_samples_are_requests_of_their_own_with_a_seed_each():
    decoding = {"temperature": 0.7, "top_p": 0.9, "num_samples": 3, "seed": 5}
    with serve(lambda number, request: says(f"seed {request.body['seed']}")) as endpoint:
        assert make_captioner(endpoint.url, decoding=decoding).describe(TILES[:1]) == [["seed 5", "seed 6", "seed 7"]]
    assert {request.body["top_p"] for request in endpoint.requests} == {0.9}


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_is_refused_for_the_moment_is_asked_again_when_the_server_says(status):
    def answer(number, request):
        return Answer(status, b"{}", {"Retry-After": "1"}) if number == 0 else repeat(number, request)

    with serve(answer) as endpoint:
        assert make_captioner(endpoint.url, request_retries=2).describe(TILES[:1]) == [["You asked: what is a?"]]
    first, second = endpoint.requests
    assert second.at_s - first.at_s >= 1


def test_a_wait_of_an_hour_is_not_waited():
    with serve(lambda number, request: Answer(429, b"{}", {"Retry-After": "3600"})) as endpoint:
        (error,) = make_captioner(endpoint.url, request_retries=3).describe(TILES[:1])
    assert isinstance(error, EndpointError)
    assert len(endpoint.requests) == 1


NONSENSE = {
    "half JSON": Answer(body=says("A road.").body[:60]),
    "not JSON": Answer(body=b"<html>502 Bad Gateway</html>", headers={"Content-Type": "text/html"}),
    "called JSON": Answer(body=b"\xff\xfe\x00 no"),
    "another JSON": Answer(body=b'{"error": "busy"}'),
    "a list": Answer(body=b"[1, 2]"),
    "null": Answer(body=b"null"),
    "no choices": Answer(body=b'{"choices": []}'),
    "no text": says(None, finish_reason="content_filter"),
    "an empty text": says("  "),
    "a number": says(7),
    "a list for a text": says([{"text": "x"}]),
    "nested without end": Answer(body=b"[" * 100_000),
    "breaks off": Answer(body=says("A road.").body, breaks_off=True),
    "bad request": Answer(400, b'{"error": {"message": "image too large"}}'),
    "elsewhere": Answer(302, b"", {"Location": "http://127.0.0.1:9/v1"}),
    "too long": says("word " * 20_000),
}


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_nonsense_is_the_error_of_its_tile_and_the_others_are_described(nonsense):
    def answer(number, request):
        return NONSENSE[nonsense] if request.prompt == "what is bb?" else repeat(number, request)

    with serve(answer) as endpoint:
        first, error, *last = make_captioner(endpoint.url).describe(TILES)
    assert [first, *last] == [[f"You asked: what is {each.tile_id}?"] for each in (TILES[0], *TILES[2:])]
    assert isinstance(error, Exception)
    assert not isinstance(error, UnusableCaptionerError)
    assert len(str(error)) < 400
    assert "\n" not in str(error)


def test_a_server_that_is_too_slow_is_an_error_of_the_tile():
    with serve(lambda number, request: repeat(number, request)._replace(wait_s=8.0 if number else 0.0)) as endpoint:
        captioner = make_captioner(endpoint.url, request_timeout_s=4.0, concurrent_requests=1)
        first, second = captioner.describe(TILES[:2])
    assert first == ["You asked: what is a?"]
    assert str(second).startswith("the endpoint failed: APITimeoutError")


def test_a_tile_that_cannot_be_decoded_is_not_sent():
    with serve(repeat) as endpoint:
        error, text = make_captioner(endpoint.url).describe([TILES[0]._replace(image=TILES[0].image[:50]), TILES[1]])
    assert isinstance(error, TileImageError)
    assert text == ["You asked: what is bb?"]
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize(
    ("status", "key"), [(401, "caption.api_key_variable"), (403, "caption.api_key_variable"), (404, "caption.model")]
)
def test_an_endpoint_that_refuses_the_key_or_the_model_is_asked_no_more(status, key):
    with serve(lambda number, request: Answer(status, json.dumps({"error": {"message": f"no {KEY}"}}).encode())) as endpoint:
        captioner = make_captioner(endpoint.url, concurrent_requests=1)
        errors = captioner.describe(TILES)
        assert len(endpoint.requests) == 1
        assert captioner.describe(TILES[:1]) == errors[:1]
        assert len(endpoint.requests) == 1
    assert {type(error) for error in errors} == {UnusableCaptionerError}
    assert f"correct {key}" in str(errors[0])
    assert KEY not in str(errors[0])


def test_an_endpoint_that_fails_all_tiles_of_its_first_batch_is_unusable_and_a_single_tile_does_not_tell():
    with serve(lambda number, request: Answer(500, b"{}")) as endpoint:
        captioner = make_captioner(endpoint.url)
        assert isinstance(captioner.describe(TILES[:1])[0], EndpointError)
        error = captioner.describe(TILES)[0]
    assert isinstance(error, UnusableCaptionerError)
    assert f"caption.endpoint={endpoint.url}, asked for caption.model=m, answers nothing" in str(error)


def test_where_nothing_listens_the_endpoint_is_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        error = make_captioner(url).describe(TILES)[0]
    assert isinstance(error, UnusableCaptionerError)
    assert f"caption.endpoint={url}" in str(error)
    assert "refused" in str(error)


def test_an_endpoint_that_has_answered_once_stays_usable():
    with serve(lambda number, request: repeat(number, request) if number == 0 else Answer(500, b"{}")) as endpoint:
        captioner = make_captioner(endpoint.url, concurrent_requests=1)
        assert captioner.describe(TILES[:1]) == [["You asked: what is a?"]]
        assert {type(error) for error in captioner.describe(TILES)} == {EndpointError}


def test_the_key_is_in_no_error_and_in_no_log(caplog):
    caplog.set_level(logging.DEBUG)
    echo = json.dumps({"error": {"message": "x" * 280 + f"Incorrect key {KEY}" + KEY}}).encode()
    with serve(lambda number, request: Answer(400, echo) if number else repeat(number, request)) as endpoint:
        captioner = make_captioner(endpoint.url, concurrent_requests=1)
        errors = captioner.describe(TILES)[1:]
    assert all(isinstance(error, EndpointError) for error in errors)
    assert all(KEY[:6] not in str(error) for error in errors)
    assert KEY not in caplog.text
    assert KEY not in repr(make_config(endpoint.url))


def test_without_a_key_none_is_sent_and_a_missing_one_is_named(monkeypatch):
    with serve(repeat) as endpoint:
        make_captioner(endpoint.url, api_key_variable="").describe(TILES[:1])
    assert "authorization" not in endpoint.requests[0].headers
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(UnusableCaptionerError, match=rf"caption\.api_key_variable={VARIABLE} is not set on the node"):
        make_captioner(endpoint.url)
    monkeypatch.setenv(VARIABLE, "sk-1\nX-Header: 1")
    with pytest.raises(UnusableCaptionerError, match="holds something else than a key") as caught:
        make_captioner(endpoint.url)
    assert "sk-1" not in str(caught.value)


def test_requests_keep_to_the_rate_with_those_that_are_repeated():
    def answer(number, request):
        return Answer(500, b"{}", {"Retry-After": "0.01"}) if number == 1 else repeat(number, request)

    with serve(answer) as endpoint:
        # two actors share 600 a minute: this one sends one every 0.2 s
        captioner = make_captioner(endpoint.url, requests_per_minute=600, num_actors=2, request_retries=2)
        start_s = time.monotonic()
        assert all(isinstance(texts, list) for texts in captioner.describe(TILES))
    assert len(endpoint.requests) == 5
    assert max(request.at_s for request in endpoint.requests) - start_s >= 4 * 0.2


def test_a_rate_lets_the_first_through_at_once():
    rate = RequestRate(1)
    rate.wait()  # a second one would wait for a minute


def test_what_decides_the_text_is_in_the_origin_and_where_it_is_asked_is_not():
    def origin(prompt="p", url="http://h/v1", **keys):
        config = make_config(url, **keys)
        return origin_of(config, resolve_model(config), prompt)

    base = origin()
    assert (base.model, base.revision, base.prompt) == ("m", "2026-11", "p")
    for same in ({"url": "https://elsewhere/v1"}, {"requests_per_minute": 9}, {"dtype": "float32"}, {"decoding": {"seed": 3}}):
        assert origin(**same) == base
    for other in ({"prompt": "q"}, {"decoding": {"max_new_tokens": 9}}, {"decoding": {"temperature": 1}}):
        assert origin(**other) != base
    assert KEY not in repr(base)

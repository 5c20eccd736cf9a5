"""The captioner `openai`: a model behind an OpenAI-compatible chat endpoint, on this machine or somebody else's.

Every tile is sent as a PNG of its own pixels, margins cut off and metadata left behind, inside the message. The client is
OpenAI's: it tries again after 408, 409, 429, 5xx and lost connections, at intervals that double up to 8 s with jitter, or when
the server's `Retry-After` says so, up to two minutes. What it gives up on is the tile's error.

The key of the endpoint comes from an environment variable of the node and goes nowhere else: not into a config, and it is
struck out of what the server says.
"""

from __future__ import annotations

import base64
import io
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from urbanclip_ray.captioners.base import Origin, Tile, UnusableCaptionerError
from urbanclip_ray.captioners.model_files import ModelReference
from urbanclip_ray.captioners.texts import UNWANTED
from urbanclip_ray.config import CaptionConfig, DecodingConfig
from urbanclip_ray.errors import one_line
from urbanclip_ray.imagery import TileImageError

MAX_ERROR_CHARACTERS = 300


class EndpointError(RuntimeError):
    """The endpoint gave no caption of one tile."""

    def __init__(self, detail: str) -> None:
        super().__init__(f"the endpoint failed: {detail}")


def origin_of(config: CaptionConfig, reference: ModelReference, prompt: str) -> Origin:
    """What decides the texts as far as one can tell: the weights are what `caption.revision` says that they are."""
    return Origin(reference.name, reference.revision, prompt, drawn_decoding(config.decoding) | {"back_end": "openai"})


def drawn_decoding(decoding: DecodingConfig) -> dict[str, float | int | str]:
    """The keys of decoding that matter without beams; where nothing is drawn, only the length does."""
    names = ("max_new_tokens", "temperature", "top_p", "seed") if decoding.temperature > 0 else ("max_new_tokens",)
    return {name: getattr(decoding, name) for name in names}


class ChatEndpointCaptioner:
    """A client of the endpoint; raises UnusableCaptionerError without the library or the key.

    An endpoint that refuses the key or does not know the model, and one that has answered nothing when the first batch of
    several tiles is through, is unusable: it is not asked again.
    """

    def __init__(self, config: CaptionConfig, reference: ModelReference) -> None:
        self._config = config
        self._model = reference.name
        self._key = read_api_key(config.api_key_variable)
        self._client = _connect(config, self._key)
        self._has_answered = False
        self._unusable: UnusableCaptionerError | None = None

    def describe(self, tiles: Sequence[Tile]) -> list[list[str] | Exception]:
        with ThreadPoolExecutor(self._config.concurrent_requests) as pool:
            described = list(pool.map(self._describe, tiles))
        errors = [texts for texts in described if isinstance(texts, EndpointError)]
        if not self._has_answered and len(errors) > 1 and len(errors) == len(described):
            self._unusable = self._refusal(f"answers nothing ({errors[0]})", "caption.endpoint")
        return [self._unusable] * len(tiles) if self._unusable else described

    def _describe(self, tile: Tile) -> list[str] | Exception:
        try:
            url = data_url(tile.rgb())
        except TileImageError as error:
            return error
        try:
            return [self._ask(url, tile.prompt, sample) for sample in range(self._config.decoding.num_samples)]
        except (EndpointError, UnusableCaptionerError) as error:
            return error

    def _ask(self, image_url: str, prompt: str, sample: int) -> str:
        import openai

        if self._unusable:
            raise self._unusable
        content = [{"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": prompt}]
        try:
            answer = self._client.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": content if prompt else content[:1]}],
                extra_headers=None if self._key else {"Authorization": openai.Omit()},
                **_options(self._config.decoding, sample),
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            self._unusable = self._refusal(f"refuses the key ({self._explain(error)})", "caption.api_key_variable")
            raise self._unusable from None
        except openai.NotFoundError as error:
            self._unusable = self._refusal(f"has no such model ({self._explain(error)})", "caption.model")
            raise self._unusable from None
        except Exception as error:  # foreign answers: the client's own errors, and whatever a parser stumbles over
            raise EndpointError(self._explain(error)) from None
        text = _text_of(answer)
        self._has_answered = True
        return text

    def _explain(self, error: Exception) -> str:
        """An error in one line, its cause with it, without the key: a server may repeat what it was sent."""
        cause = f" ({one_line(error.__cause__, 1000)})" if error.__cause__ else ""
        text = one_line(error, 1_000_000) + cause  # struck out before it is cut: half a key is one as well
        return UNWANTED.sub("", text.replace(self._key, "***") if self._key else text)[:MAX_ERROR_CHARACTERS]

    def _refusal(self, what: str, key: str) -> UnusableCaptionerError:
        place = f"caption.endpoint={self._config.endpoint}, asked for caption.model={self._model},"
        return UnusableCaptionerError(
            f"{place} {what}: correct {key}, or see that the endpoint is up; what is described is kept"
        )


def read_api_key(variable: str) -> str:
    """The key in this node's environment; empty where the endpoint wants none. Raises UnusableCaptionerError."""
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        state = "holds something else than a key" if key else "is not set"
        raise UnusableCaptionerError(
            f"caption.api_key_variable={variable} {state} on the node {os.uname().nodename}: set it in the environment of "
            "every node before Ray starts there, or set caption.api_key_variable= for an endpoint that wants no key"
        )
    return key


class RequestRate:
    """Lets one request through every so many seconds, in every thread of this process, repeated ones as well."""

    def __init__(self, requests_per_minute: float) -> None:
        self._interval_s = 60 / requests_per_minute
        self._lock = threading.Lock()
        self._next_s = time.monotonic()

    def wait(self, _request: object = None) -> None:
        with self._lock:
            now_s = time.monotonic()
            at_s = max(now_s, self._next_s)
            self._next_s = at_s + self._interval_s
        time.sleep(at_s - now_s)


def data_url(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _connect(config: CaptionConfig, key: str) -> Any:
    try:
        import openai
    except ImportError:
        raise UnusableCaptionerError(
            f"caption.captioner=openai needs the package openai on the node {os.uname().nodename}: "
            "pip install 'urbanclip_ray[openai]'"
        ) from None
    share = config.requests_per_minute / config.num_actors
    hooks = {"request": [RequestRate(share).wait]} if share else {}
    return openai.OpenAI(
        base_url=config.endpoint,
        api_key=key or "none",
        timeout=config.request_timeout_s,
        max_retries=config.request_retries,
        # A redirect would take the images, if not the key, to where the config does not say.
        http_client=openai.DefaultHttpxClient(event_hooks=hooks, follow_redirects=False),
    )


def _options(decoding: DecodingConfig, sample: int) -> dict[str, Any]:
    options: dict[str, Any] = {"max_completion_tokens": decoding.max_new_tokens, "temperature": decoding.temperature}
    if decoding.temperature > 0:
        options |= {"top_p": decoding.top_p, "seed": decoding.seed + sample}  # not `n`: few servers know it
    return options


def _text_of(answer: Any) -> str:
    """The text of an answer that may be anything; raises EndpointError where there is none."""
    try:
        choice = answer.choices[0]
        text, reason = choice.message.content, choice.finish_reason
    except (AttributeError, IndexError, TypeError):
        raise EndpointError("an answer without a choice that has a message") from None
    if not isinstance(text, str) or not text.strip():
        raise EndpointError(f"an empty answer (finish_reason={str(reason)[:40]!r})")
    return text

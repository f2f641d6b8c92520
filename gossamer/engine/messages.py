"""The wire format between the engine's process and whoever talks to it: typed msgspec, one message a frame.

A frame is decoded into one of the types below or dropped; nothing in it can name code to run. Both sides bound a
frame's size before they look inside.
"""

import logging
from typing import Generic, TypeVar

import msgspec

from gossamer.config import EngineConfig
from gossamer.core import EngineStats, SamplingParams, TokenOutput
from gossamer.engine.info import EngineInfo

MAX_FRAME_BYTES = 64 << 20
"""Ten times the longest prompt of a million tokens; a larger frame cannot be ours."""

DEFAULT_FACTORY = "gossamer.engine.build:build_engine"

logger = logging.getLogger(__name__)

T = TypeVar("T")


class StartConfig(msgspec.Struct, frozen=True, kw_only=True):
    """First line of the engine process's standard input, as JSON. `factory`: `module:function` like `build_engine`."""

    engine: EngineConfig
    requests_address: str
    outputs_address: str
    factory: str = DEFAULT_FACTORY
    log_level: str = "info"


class AddRequest(msgspec.Struct, frozen=True, tag="add"):
    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    cache_salt: str | None = None
    arrival_time: float | None = None


class AbortRequests(msgspec.Struct, frozen=True, tag="abort"):
    request_ids: list[str]


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    pass


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    stage: str
    fraction: float


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    info: EngineInfo


class Outputs(msgspec.Struct, frozen=True, tag="outputs"):
    """What one step produced. Sent without outputs too, so that statistics stay fresh and silence means trouble."""

    outputs: list[TokenOutput]
    stats: EngineStats


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """A request that the engine did not take. `status` is HTTP's: 400 its own fault, 503 overload, 500 ours."""

    request_id: str
    message: str
    status: int
    param: str | None = None
    code: str | None = None
    retry_after: int = 1


class Fatal(msgspec.Struct, frozen=True, tag="fatal"):
    """The engine's last words: why it cannot start, or go on."""

    message: str


ToEngine = AddRequest | AbortRequests | Shutdown
FromEngine = Progress | Ready | Outputs | Refused | Fatal


class FrameDecoder(Generic[T]):
    """Decodes frames of one direction; a frame that is not one of ours is logged and dropped."""

    def __init__(self, message_type: object) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(message_type)
        self.num_dropped = 0

    def decode(self, frames: list[bytes]) -> T | None:
        """The message, or None if the frames are garbage. A message is exactly one frame."""
        try:
            if len(frames) != 1 or len(frames[0]) > MAX_FRAME_BYTES:
                sizes = [len(frame) for frame in frames[:8]]
                raise msgspec.DecodeError(f"{len(frames)} frames of sizes {sizes}...")
            return self._decoder.decode(frames[0])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError) as exc:
            self.num_dropped += 1
            logger.warning("dropped a frame that is not a message: %s", exc)
            return None


encode = msgspec.msgpack.Encoder().encode

"""POST /tokenize and /detokenize, in vLLM's shapes."""

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from gossamer.server.openai_protocol import DetokenizeRequest, TokenizeRequest, decode_body, decoder_of
from gossamer.server.serving import Serving, json_response

_tokenize_decoder = decoder_of(TokenizeRequest)
_detokenize_decoder = decoder_of(DetokenizeRequest)


async def tokenize(serving: Serving, body: bytes, http: Request) -> Response:
    request = decode_body(body, _tokenize_decoder)
    serving.check_model(request.model)
    request.check()
    if request.messages is not None:
        tokens = await serving.encode_chat(request)
    else:
        tokens = await serving.encode(request.prompt or "", request)
    tokenizer, limits = serving.llm.tokenizer, serving.llm.info.limits
    strings = [tokenizer.id_to_token(token) or "" for token in tokens] if request.return_token_strs else None
    answer = {"count": len(tokens), "max_model_len": limits.max_model_len, "tokens": tokens, "token_strs": strings}
    return json_response(answer)


async def detokenize(serving: Serving, body: bytes, http: Request) -> Response:
    request = decode_body(body, _detokenize_decoder)
    serving.check_model(request.model)
    if request.tokens:
        serving.llm.info.limits.check_prompt(request.tokens, "tokens")
    text = await asyncio.to_thread(serving.llm.tokenizer.decode, request.tokens, skip_special_tokens=False)
    return json_response({"prompt": text})

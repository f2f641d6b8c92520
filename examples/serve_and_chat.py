"""A server and the OpenAI client (pip install openai) talking to it: python examples/serve_and_chat.py MODEL"""

import asyncio
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

from openai import AsyncOpenAI

QUESTIONS = ["What is the capital of France?", "What is the capital of Japan?", "What is water made of?"]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=1).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    sys.exit(server.returncode)


async def ask(client: AsyncOpenAI, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    stream = await client.chat.completions.create(
        model="default", messages=messages, temperature=0, max_tokens=48, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
    return f"{question}\n  {''.join(pieces)}"


async def ask_all(url: str) -> None:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        for answer in await asyncio.gather(*(ask(client, question) for question in QUESTIONS)):
            print(answer)


if __name__ == "__main__":
    port = free_port()
    server = subprocess.Popen([sys.executable, "-m", "gossamer", "serve", *sys.argv[1:], "--port", str(port)])
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", server)
        asyncio.run(ask_all(f"http://127.0.0.1:{port}"))
    finally:
        server.terminate()
        server.wait()

"""An OpenAI-compatible server whose every delay is known, to measure a load tester with."""

import asyncio
import json
import threading
import time


def words_of(content):
    return content if isinstance(content, str) else " ".join(part["text"] for part in content)


class MockServer:
    """Runs in its own thread. `behave(number, body)` gives what to do with the n-th generation, as a dict:

    first, gap: seconds to the first token and between chunks; tokens; per_chunk: tokens in a chunk; usage: "chunk", "end" or
    "none"; status: an HTTP error instead; fail_after: chunks after which an error frame comes; break_after: chunks after which
    the connection is cut. `serial`: one request at a time. stall = (begin, end) in seconds since start(): nothing moves then.
    """

    def __init__(self, behave=lambda number, body: {}, serial=False, stall=None, api_key=None, tls=None):
        self.behave, self.stall, self.api_key, self.tls = behave, stall, api_key, tls  # tls: an ssl.SSLContext
        self.requests = []  # (time, body) of every generation
        self.phases = {}  # name: {"sum": seconds, "count": n}, shown at /metrics
        self.connections = set()
        self.serial = serial
        self.began = time.monotonic()
        self.loop = asyncio.new_event_loop()
        self.ready = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self.thread.start()
        self.ready.wait(10)
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        if not self.thread.is_alive():
            return
        self.loop.call_soon_threadsafe(self._close)
        self.thread.join(10)

    def start_clock(self):
        """The stall, and the numbers of requests, count from here."""
        self.began = time.monotonic()
        self.requests.clear()

    @property
    def url(self):
        return f"https://localhost:{self.port}" if self.tls else f"http://127.0.0.1:{self.port}"

    def _run(self):
        asyncio.set_event_loop(self.loop)
        self.turn = asyncio.Lock()
        self.server = self.loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=8192, ssl=self.tls))
        self.port = self.server.sockets[0].getsockname()[1]
        self.ready.set()
        self.loop.run_forever()

    def _close(self):
        self.server.close()
        for writer in self.connections:
            writer.transport.abort()
        self.loop.stop()

    async def _sleep(self, seconds):
        """Sleeps, and through the stall if that comes in between."""
        await asyncio.sleep(seconds)
        if self.stall:
            now = time.monotonic() - self.began
            if self.stall[0] <= now < self.stall[1]:
                await asyncio.sleep(self.stall[1] - now)

    async def _serve(self, reader, writer):
        self.connections.add(writer)
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.connections.discard(writer)
            writer.close()

    async def _one(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, path, _ = head.split(" ", 2)
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in head.split("\r\n")[1:] if line)}
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        if self.api_key and headers.get("authorization") != f"Bearer {self.api_key}":
            return self._answer(writer, 401, {"error": {"message": "wrong API key", "type": "auth", "code": None, "param": None}})
        if method == "GET" and path == "/metrics":
            return self._answer(writer, 200, None, "".join(f'millrace_request_phase_seconds_{kind}{{phase="{phase}",model="mock"}} {value}\n'
                                                             for phase, sums in self.phases.items() for kind, value in sums.items()))
        if method == "GET":
            return self._answer(writer, 200, {"object": "list", "data": [{"id": "mock", "object": "model"}]})
        body = json.loads(raw)
        self.requests.append((time.monotonic() - self.began, body))
        plan = {"first": 0.0, "gap": 0.0, "tokens": body.get("max_tokens", 16), "per_chunk": 1, "usage": "chunk",
                **self.behave(len(self.requests) - 1, body)}
        if not self.serial:
            return await self._generate(writer, body, plan)
        async with self.turn:
            return await self._generate(writer, body, plan)

    def _answer(self, writer, status, body, text=None):
        data = (json.dumps(body) if text is None else text).encode()
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-type: {'application/json' if text is None else 'text/plain'}\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
        return True

    async def _generate(self, writer, body, plan):
        if "status" in plan:
            return self._answer(writer, plan["status"], {"error": {"message": "as scripted", "type": "x", "code": None, "param": None}})
        text = body["prompt"] if "prompt" in body else " ".join(words_of(m["content"]) for m in body["messages"])
        prompt_tokens = len(text.split()) + 5  # a template of five
        usage = lambda n: {"prompt_tokens": prompt_tokens, "completion_tokens": n, "total_tokens": prompt_tokens + n}
        await self._sleep(plan["first"])
        if not body.get("stream"):
            return self._answer(writer, 200, {"choices": [{"index": 0, "finish_reason": "length", "text": "w " * plan["tokens"],
                                                           "message": {"role": "assistant", "content": "w"}}],
                                              "usage": usage(plan["tokens"])})
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")

        def send(event):
            data = b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n"
            writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

        send({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        sent = chunks = 0
        while sent < plan["tokens"]:
            if chunks:
                await self._sleep(plan["gap"])
            if plan.get("break_after") == chunks:
                writer.transport.abort()
                return False
            if plan.get("fail_after") == chunks:
                send({"error": {"message": "scripted failure", "type": "server_error", "code": None, "param": None}})
                return False
            count = min(plan["per_chunk"], plan["tokens"] - sent)
            sent, chunks = sent + count, chunks + 1
            event = {"choices": [{"index": 0, "delta": {"content": "w " * count}, "text": "w " * count, "finish_reason": None}]}
            if plan["usage"] == "chunk":
                event["usage"] = usage(sent)
            send(event)
            await writer.drain()
        send({"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": "length"}]})
        if plan["usage"] != "none":
            send({"choices": [], "usage": usage(sent)})
        send(b"[DONE]")
        writer.write(b"0\r\n\r\n")
        return True

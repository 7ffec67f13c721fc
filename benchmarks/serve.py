"""The server under load: 64 clients on loopback for a minute, beside one request at a time.

    python benchmarks/serve.py                    # some minutes; both models
    python benchmarks/serve.py --models tiny --seconds 10

Two models of random weights: `tiny`, that of the tests, whose time is what surrounds a call of the model, and `small`,
of 7.9 M weights, whose time on a CPU is arithmetic, of which a batch saves none.

Server and clients are processes of their own, on the same cores. A client asks `/v1/embeddings` for one text of 5 to 40
words and has its next ready when the answer is there; every answer is compared with `encode` of the same text, alone.
Memory is the server's resident set, read each second; it grows by what the last fifth has more than the second fifth,
for caches of the first are filled then. Writes `benchmarks/results/serve.json`.
"""

from __future__ import annotations

from basics import RESULTS, keep, kept, machine, parser

# isort: split
import json
import multiprocessing as mp
import os
import statistics
import tempfile
import threading
import time
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np

from small_models import small_qwen2_vl
from tiny import tiny_backbone

CLIENTS = 64
TEXTS = 256
WORDS = ("red", "blue", "small", "bus", "boat", "house", "tree", "dog", "by", "on", "under", "the", "a", "one", "new")


def texts(count: int) -> list[str]:
    """Distinct texts."""
    rng = np.random.default_rng(0)
    return [f"{number} " + " ".join(rng.choice(WORDS, rng.integers(5, 40))) for number in range(count)]


def serve_model(folder: Path, address: Any, limits: dict[str, Any]) -> None:
    """The server's process: tells its address, and ends with the process that began it."""
    from unime_st import load_encoder
    from unime_st.data import encode_corpus, load_corpus
    from unime_st.search import CorpusSearch
    from unime_st.serve import Limits, create_app
    from unime_st.serve.server import listen, serve

    model = load_encoder(folder / "encoder", device="cpu")
    if not (folder / "corpus").is_dir():
        encode_corpus(model, enumerate_texts(64), folder / "corpus", with_ids=True)
    app = create_app(model, CorpusSearch(load_corpus(folder / "corpus")), limits=Limits(**limits))
    with listen("127.0.0.1", 0) as listening:
        address.put(listening.getsockname()[1])
        serve(app, listening, Limits(**limits))


def enumerate_texts(count: int) -> list[tuple[str, str]]:
    """Texts with ids."""
    return [(str(number), text) for number, text in enumerate(texts(count))]


def ask(port: int, said: list[str], until: float, first: int, done: list[Any], failed: list[str]) -> None:
    """One client: asks until the time is over, and keeps how long each answer took."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    place = first
    while time.monotonic() < until:
        body = json.dumps({"input": said[place % len(said)]})
        started = time.monotonic()
        try:
            connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
        except OSError as error:
            failed.append(repr(error))
            connection.close()
            continue
        if answer.status == 200:
            done.append((time.monotonic() - started, place % len(said), json.loads(content)["data"][0]["embedding"]))
        else:
            failed.append(f"{answer.status} {content[:200]!r}")
        place += CLIENTS
    connection.close()


def resident_mb(process: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def load(folder: Path, alone: np.ndarray, clients: int, seconds: float, **limits: Any) -> dict[str, Any]:
    """Serve, ask with so many clients at once, and measure."""
    context = mp.get_context("spawn")
    address = context.Queue()
    server = context.Process(target=serve_model, args=(folder, address, limits))
    server.start()
    try:
        port = address.get(timeout=300)
        said = texts(TEXTS)
        ask(port, said, time.monotonic() + 3, 0, [], [])  # warm
        done: list[Any] = []
        failed: list[str] = []
        until = time.monotonic() + seconds
        threads = [
            threading.Thread(target=ask, args=(port, said, until, first, done, failed)) for first in range(clients)
        ]
        for thread in threads:
            thread.start()
        memory = []
        while time.monotonic() < until:
            memory.append(resident_mb(server.pid or 0))
            time.sleep(1)
        for thread in threads:
            thread.join()
    finally:
        server.terminate()
        server.join()
    took = sorted(1000 * seconds for seconds, _, _ in done)
    fifth = max(len(memory) // 5, 1)
    return {
        "clients": clients,
        "seconds": seconds,
        "answers": len(done),
        "errors": len(failed),
        "first_errors": failed[:3],
        "answers_a_second": round(len(done) / seconds, 1),
        "p50_ms": round(statistics.median(took), 1),
        "p99_ms": round(took[int(0.99 * len(took))], 1),
        "memory_mb": {"start": round(memory[0], 1), "peak": round(max(memory), 1), "end": round(memory[-1], 1)},
        "memory_growth_mb": round(statistics.mean(memory[-fifth:]) - statistics.mean(memory[fifth : 2 * fifth]), 1),
        "furthest_from_encode": max(
            float(np.abs(np.asarray(vector) - alone[place]).max()) for _, place, vector in done
        ),
    }


def measure(backbone: Path, folder: Path, seconds: float) -> dict[str, Any]:
    """One model: a client alone, and many."""
    from unime_st import build_encoder, export_encoder

    model = build_encoder(backbone, device="cpu")
    export_encoder(model, folder / "encoder")
    alone = np.concatenate([model.encode([text]) for text in texts(TEXTS)])
    one = load(folder, alone, 1, seconds / 3)
    no_wait = load(folder, alone, 1, seconds / 3, max_wait=0.0)
    many = load(folder, alone, CLIENTS, seconds)
    best = max(one["answers_a_second"], no_wait["answers_a_second"])
    return {
        "load_average": round(os.getloadavg()[0], 1),
        "one_at_a_time": one,
        "one_at_a_time_without_wait": no_wait,
        "many": many,
        "times_the_throughput_of_one_at_a_time": round(many["answers_a_second"] / best, 2),
    }


def main() -> None:
    """Measure, and write; models that are not measured keep their numbers."""
    arguments = parser(__doc__, output=RESULTS / "serve.json")
    arguments.add_argument("--seconds", type=float, default=60)
    arguments.add_argument("--models", nargs="+", choices=["tiny", "small"], default=["tiny", "small"])
    given = arguments.parse_args()
    found = kept(given.output) | {"command": "python benchmarks/serve.py", "machine": machine()}
    for name in given.models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            make = small_qwen2_vl if name == "small" else partial(tiny_backbone, "qwen2_vl")
            found[name] = measure(make(folder / "backbone"), folder, given.seconds)
        keep(given.output, found)


if __name__ == "__main__":
    main()

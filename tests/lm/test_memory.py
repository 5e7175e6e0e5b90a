"""The memory of a rank: the model of it, what is found on this machine, and prompts that do not fit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import families
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn import init
from ringattn.errors import ArgumentError

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

from ringattn import lm
from ringattn.lm import host_memory
from ringattn.lm.host_memory import MEMORY, memory_of_rank, parse_bytes
from ringattn.lm.memory import MOST, PROCESS, CacheLayer, Footprint
from ringattn.lm.server.api.fields import RequestError
from ringattn.lm.server.api.requests import Request, Served, read_request
from ringattn.lm.server.engine import Engine
from ringattn.lm.server.stop_words import StopWords
from ringattn.lm.sharding.sharded_cache import held_bytes

FOOTPRINTS = st.builds(
    Footprint,
    weights=st.integers(0, 1 << 36),
    layers=st.lists(
        st.builds(CacheLayer, st.integers(1, 1 << 14), st.one_of(st.none(), st.integers(1, 4096))), max_size=4
    ).map(tuple),
    states=st.integers(0, 1 << 20),
    activations=st.integers(0, 1 << 16),
)
SHARES = st.floats(0.01, 1.0)
CHUNKS = st.sampled_from([1, 512, 8192])


@given(FOOTPRINTS, st.integers(0, 1 << 40), SHARES, CHUNKS)
def test_the_longest_context_is_the_longest(one: Footprint, available: int, share: float, chunk: int) -> None:
    longest = one.longest(available, share, chunk)
    assert longest == 0 or one.needed(longest, share, chunk) <= available
    assert longest == MOST or one.needed(longest + 1, share, chunk) > available


@given(FOOTPRINTS, st.integers(0, 1 << 20), st.integers(0, 1 << 20), SHARES, CHUNKS)
def test_more_tokens_never_need_less(one: Footprint, tokens: int, more: int, share: float, chunk: int) -> None:
    assert one.needed(tokens, share, chunk) <= one.needed(tokens + more, share, chunk)


@given(FOOTPRINTS, st.integers(0, 1 << 40), st.integers(0, 1 << 40), SHARES, CHUNKS)
def test_more_memory_never_fits_less(one: Footprint, available: int, more: int, share: float, chunk: int) -> None:
    assert one.longest(available, share, chunk) <= one.longest(available + more, share, chunk)


@pytest.mark.parametrize("family", ["llama", "mistral, windows", "qwen3_next", "deepseek_v3"])
def test_the_cache_needs_no_more_than_promised(family: str) -> None:
    model = lm.shard(families.build(family), init("solo"))
    cache = model.make_cache()
    for _ in lm.stream_generate(model, families.words(), [1] * 700, max_tokens=2, prompt_cache=cache, chunk=64):
        pass
    one = model.footprint
    allocated = sum(leaf.nbytes for leaf in lm.sharding.forward_pass.flat(cache))
    assert held_bytes(cache) <= allocated <= one.cache(701, 1.0, 64)
    if family == "llama":
        assert one.cache(701, 1.0, 64) < 1.5 * allocated


@pytest.mark.parametrize(
    "text, size", [("1048577", (1 << 20) + 1), ("2048K", 2 << 20), ("1.5G", 3 << 29), ("512M", 1 << 29)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes("x", text) == size


@pytest.mark.parametrize("text", ["", "-1G", "1T", "many", "1 G"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(ArgumentError, match="^x: .*expected bytes, or a number with K, M or G, such as 96G$"):
        parse_bytes("x", text)


@pytest.mark.parametrize("text", ["0", "64", "1023K"])
def test_a_size_that_has_lost_its_unit(text: str) -> None:
    with pytest.raises(ArgumentError, match=f"^x: '{text}', expected at least 1M, such as 96G$"):
        parse_bytes("x", text)


def test_the_memory_of_this_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    with init("solo") as ring:
        whole = memory_of_rank(ring)
        assert 0 < whole <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        ring.hosts = ring.hosts * 3  # as if three ranks shared the host
        assert memory_of_rank(ring) == whole // 3
        monkeypatch.setenv(MEMORY, "3G")
        assert memory_of_rank(ring) == 3 << 30


@pytest.mark.parametrize(
    "lines, file, found",
    [
        ("0::/a/b\n", "a/memory.max", 1 << 20),
        ("0::/a/b\n", "a/b/memory.max", 1 << 20),
        ("4:memory:/a\n0::/\n", "memory/a/memory.limit_in_bytes", 1 << 20),
        ("0::/a/b\n", "c/memory.max", host_memory.UNLIMITED),
    ],
)
def test_limits_of_cgroups(lines: str, file: str, found: int, tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text(lines)
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(f"{1 << 20}\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert min(host_memory.cgroup_limits(tmp_path / "cgroup", tmp_path)) == found


def limited(model, tokens: int, chunk: int) -> str:
    """The memory with which `tokens` of context fit, and not one more."""
    return str(model.footprint.needed(tokens, 1.0, chunk))


def test_a_prompt_that_does_not_fit_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lm.shard(families.build("llama"), init("solo"))
    monkeypatch.setenv(MEMORY, limited(model, 2000, 64))
    longest = model.footprint.longest(int(os.environ[MEMORY]), 1.0, 64)
    cache = model.make_cache()

    def read(tokens: int, answer: int) -> None:
        list(lm.stream_generate(model, families.words(), [1] * tokens, max_tokens=answer, prompt_cache=cache, chunk=64))

    read(1500, 1)
    held = cache[0].size()
    left = longest - held
    for tokens, answer, asked in (
        (left + 1, -1, ""),
        (left - 19, 20, " and an answer of 20 (max_tokens)"),
        (left, 1, " and an answer of 1 (max_tokens)"),
    ):
        with pytest.raises(
            ArgumentError,
            match=rf"^prompt: {held + tokens:,} tokens of context{re.escape(asked)} need \S+ GiB on rank 0 \(\S+\), "
            rf"which has \S+ GiB; {longest:,} tokens fit[^\n]*$",
        ):
            read(tokens, answer)
        assert cache[0].size() == held  # nothing was read
    read(left - 20, 20)


def test_weights_that_leave_no_room_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lm.shard(families.build("llama"), init("solo"))
    monkeypatch.setenv(MEMORY, "1M")
    with pytest.raises(ArgumentError, match="; 0 tokens fit. The weights leave no room: divide them"):
        list(lm.stream_generate(model, families.words(), [1], max_tokens=1))
    with pytest.raises(ArgumentError, match="; 0 tokens fit. The weights leave no room: divide them"):
        Engine(model, families.words(), 3, 64)


def test_the_server_refuses_and_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lm.shard(families.build("llama"), init("solo"))
    monkeypatch.setenv(MEMORY, limited(model, 2000, 64))
    engine = Engine(model, families.words(), 3, 64)
    assert 2000 <= engine.longest < 2300
    for tokens, body in ((engine.longest, {}), (1500, {"max_tokens": 900})):
        with pytest.raises(RequestError, match=rf"GiB on rank 0 .*{engine.longest:,} tokens fit") as refused:
            engine.submit(request(body), [1] * tokens)
        assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")
    for start in (1, 2):
        engine._generate(None, {}, [start] * 800, 1, StopWords([]))
    assert len(engine._pool) == 2
    engine._generate(None, {}, [3] * (engine.longest - 1000), 1, StopWords([]))
    assert len(engine._pool) == 2  # of three contexts the oldest had to go before the third was read


def test_a_default_length_of_answers_becomes_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lm.shard(families.build("llama"), init("solo"))
    monkeypatch.setenv(MEMORY, limited(model, 2000, 64))
    engine = Engine(model, families.words(), 3, 64)
    for tokens, body, answer in ((1400, {}, 512), (engine.longest - 9, {}, 9), (1500, {"max_tokens": 7}, 7)):
        assert engine.submit(request(body), [1] * tokens).request.max_tokens == answer


def request(body: dict) -> Request:
    """A request to a server whose answers have 512 tokens by default."""
    return read_request("text", {"prompt": "x", **body}, Served(("tiny",), 64, {"max_tokens": 512}))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_a_process_takes_no_more_than_is_reserved() -> None:
    code = "import ringattn.lm, mlx_lm, transformers; print(open('/proc/self/status').read())"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    (kib,) = re.findall(r"VmRSS:\s*(\d+)", shown)
    assert int(kib) << 10 < PROCESS


@pytest.mark.ranks
def test_generate_says_so_in_one_line(tmp_path: Path) -> None:
    folder = families.save(tmp_path)
    line = [sys.executable, "-m", "ringattn.cli", "generate", "-n", "2", "--env", f"{MEMORY}={PROCESS + (1 << 20)}"]
    line += ["--model", str(folder), "--prefill-step-size", "16", "-p", "w1 " * 5000, "--ignore-chat-template"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and done.stdout == ""
    errors = [one for one in done.stderr.splitlines() if one.startswith("Error: ")]
    assert len(errors) == 1, done.stderr
    need = r"5,\d{3} tokens of context and an answer of \d+ \(max_tokens\) need .*; [\d,]+ tokens fit"
    assert re.match(rf"Error: (rank \d: )?prompt: {need}", errors[0]), errors
